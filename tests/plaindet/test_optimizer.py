import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from plaindet import add_plaindet_config
from plaindet.engine import build_optimizer


@pytest.fixture
def make_optimizer():
    """Returns a function that makes the optimizer of a small model, and the model."""

    def make(*overrides):
        cfg = get_cfg()
        add_plaindet_config(cfg)
        cfg.merge_from_list(["SOLVER.BASE_LR", "0.1", *overrides])
        model = nn.ModuleDict({"backbone": nn.Linear(2, 3), "norm": nn.LayerNorm(3)})
        model["head"] = nn.Linear(3, 1)
        return build_optimizer(cfg, model), model

    return make


def test_sgd_is_the_default(make_optimizer):
    optimizer, _ = make_optimizer("SOLVER.MOMENTUM", "0.8")
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.8


def test_rates_and_decay_of_adamw(make_optimizer):
    optimizer, model = make_optimizer(
        *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.WEIGHT_DECAY", "0.02"),
        *("SOLVER.WEIGHT_DECAY_NORM", "0.0", "SOLVER.WEIGHT_DECAY_BIAS", "0.01"),
        *("SOLVER.LR_FACTORS", "[['backbone', 0.5], ['weight', 0.25]]"),
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    found = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = {
        "backbone.weight": (0.05, 0.02),
        "backbone.bias": (0.05, 0.01),
        "norm.weight": (0.025, 0.0),
        "head.weight": (0.025, 0.02),
        "head.bias": (0.1, 0.01),
    }
    for name, values in expected.items():
        assert found[model.get_parameter(name)] == pytest.approx(values)


@pytest.mark.parametrize("optimizer_name", ["SGD", "AdamW"])
@pytest.mark.parametrize("scale", [10.0, 0.001])
def test_full_model_clipping(make_optimizer, optimizer_name, scale):
    """All gradients together get the norm, and keep their direction; small ones stay."""
    optimizer, model = make_optimizer(
        *("SOLVER.OPTIMIZER", optimizer_name, "SOLVER.CLIP_GRADIENTS.ENABLED", "True"),
        *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
        *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.1"),
    )
    gradients = [scale * torch.randn_like(p) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients):
        parameter.grad = gradient.clone()
    optimizer.step()
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient * min(1, 0.1 / norm), rtol=1e-4, atol=0)


def test_clipping_of_detectron2_with_adamw(make_optimizer):
    """Its CLIP_TYPE "norm" is of each parameter."""
    optimizer, model = make_optimizer(
        *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"),
        *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.1"),
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    norms = [parameter.grad.norm().item() for parameter in model.parameters()]
    assert norms == pytest.approx([0.1] * len(norms), rel=1e-4)


def test_unknown_options(make_optimizer):
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER is 'Lamb', expected 'SGD' or 'AdamW'"):
        make_optimizer("SOLVER.OPTIMIZER", "Lamb")
    with pytest.raises(ValueError, match="SOLVER.LR_FACTORS needs SOLVER.OPTIMIZER AdamW"):
        make_optimizer("SOLVER.LR_FACTORS", "[['backbone', 0.1]]")
