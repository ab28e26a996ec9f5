"""Mixed precision, SOLVER.AMP."""

import functools
import hashlib
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from devices import GPU
from variants import (
    BOTH,
    LABELENC,
    PLAIN,
    REPRESENTATIVE,
    VARIANTS,
    build_variant,
    gradients_of,
    losses_of,
    make_batch,
    share_proposals,
)

import train_net
from crosskd.alignment import align_features
from crosskd.losses import box_loss, distribution_loss, feature_loss, quality_focal_loss
from labelenc import feature_distance
from plaindet.engine import PlainTrainer, finite

pytestmark = pytest.mark.cuda

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
# Half of the distance between two numbers is 2^-11 and 2^-8 of their size; the losses are means.
TOLERANCE = {FLOAT16: 0.01, BFLOAT16: 0.02}


def check_losses(variant, precisions, device, make_cfg):
    """Every loss is float32's, and no gradient overflows: the losses' arithmetic is in float32."""
    model, batch = build_variant(variant, make_cfg), make_batch()
    if isinstance(device, GPU):
        device.move(model)
    recorded, replayed = share_proposals(model)
    expected = losses_of(model, batch)
    proposals = list(recorded)
    for precision, digits in precisions.items():
        replayed[:] = proposals
        with torch.autocast(model.device.type, precision):
            found = losses_of(model, batch)
        assert found.keys() == expected.keys()
        for name, loss in found.items():
            value = expected[name].item()
            assert loss.dtype == torch.float32, name
            assert loss.item() == pytest.approx(value, rel=digits, abs=0.1 * digits), name
        for name, gradient in gradients_of(model, found).items():
            assert torch.isfinite(gradient).all(), name


def is_long(variant):
    # The phases of LabelEnc differ in what they leave out.
    return variant not in REPRESENTATIVE or variant.method in (PLAIN, LABELENC[0], LABELENC[3])


@pytest.mark.parametrize(
    "variant",
    [pytest.param(x, id=str(x), marks=[pytest.mark.long] if is_long(x) else []) for x in VARIANTS],
)
def test_losses_are_float32s(variant, device, make_tiny_cfg):
    on_gpu = isinstance(device, GPU)
    precisions = TOLERANCE if on_gpu else {BFLOAT16: TOLERANCE[BFLOAT16]}
    check_losses(variant, precisions, device, make_tiny_cfg)


@pytest.mark.long
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(x, id=str(x))
        for x in REPRESENTATIVE
        if x.method in (BOTH, "step 1", "CrossKD bridged")
    ],
)
def test_float16_on_the_cpu(variant, device, make_tiny_cfg):
    """Which takes seconds for an iteration."""
    if isinstance(device, GPU):
        pytest.skip("test_losses_are_float32s has it")
    check_losses(variant, {FLOAT16: TOLERANCE[FLOAT16]}, device, make_tiny_cfg)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: feature_distance([x], [y]),
        lambda x, y: align_features(x, y).sum(),
        lambda x, y: feature_loss(x, y),
        lambda x, y: quality_focal_loss(x, y).sum(),
        lambda x, y: distribution_loss(x, y).sum(),
        lambda x, y: box_loss(
            x.flatten(2)[..., :4].abs(), y.flatten(2)[..., :4].abs(), "giou"
        ).sum(),
        lambda x, y: box_loss(x.flatten(2)[..., :4], y.flatten(2)[..., :4], "l1").sum(),
    ],
)
@pytest.mark.parametrize("size", [3e4, 4.0])
def test_losses_of_float16(loss, size, device):
    """The squares, sums and areas of large numbers are beyond float16, whose largest is 65504, and
    it has three digits."""
    where = device.device if isinstance(device, GPU) else "cpu"
    generator = torch.Generator().manual_seed(0)
    x, y = size * (torch.rand(2, 2, 8, 8, 8, generator=generator) - 0.5)
    x, y = (value.to(where, FLOAT16).requires_grad_() for value in (x, y))
    expected = loss(x.detach().double().float(), y.detach().double().float())
    with torch.autocast(torch.device(where).type, FLOAT16):
        found = loss(x, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    found.backward()
    assert torch.isfinite(x.grad).all()


@pytest.fixture
def make_trainer(device, monkeypatch, make_method_cfg):
    """Returns a function that makes a trainer in float16, with norms of constant statistics. On the
    CPU, Detectron2's AMPTrainer is made to believe in a GPU, and computes in bfloat16."""
    options = ["SOLVER.AMP.ENABLED", "True"]
    if isinstance(device, GPU):
        options += ["MODEL.DEVICE", "cuda"]
    else:
        autocast = functools.partial(torch.autocast, "cpu")
        monkeypatch.setattr("torch.cuda.amp.autocast", lambda dtype: autocast(dtype=BFLOAT16))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("plaindet.engine.trainer.check_device", lambda cfg: None)

    def make(method, detector, *overrides):
        norms = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "GN")
        cfg = make_method_cfg(method, detector, *options, *norms, *overrides)
        trainer = PlainTrainer(cfg)
        trainer.test = lambda *_: {}
        if trainer._trainer.grad_scaler.is_enabled():  # so low that no step is skipped by itself
            trainer._trainer.grad_scaler = torch.cuda.amp.GradScaler(init_scale=64)
        trainer.states = states = []  # before each iteration
        before_step = trainer.before_step

        def record():
            states.append(fingerprints(trainer))
            before_step()

        trainer.before_step = record
        return trainer

    return make


def fingerprints(trainer):
    """Of the weights, of which copies for each iteration would take gigabytes."""
    parameters = trainer.model.named_parameters()
    return {k: hashlib.sha256(v.detach().cpu().numpy()).digest() for k, v in parameters}


def changed(before, after):
    return {name for name, value in before.items() if value != after[name]}


def poison_gradients(trainer, iterations):
    """Makes a gradient of finite losses infinite."""
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda x: x * float("inf") if trainer.iter in iterations else x)


def poison_losses(trainer, iterations):
    """Gives the model an infinite pixel."""

    def before_forward(_, inputs):
        if trainer.iter in iterations:
            inputs[0][0]["image"] = inputs[0][0]["image"].float()
            inputs[0][0]["image"][0, 10, 10] = float("inf")

    trainer.model.register_forward_pre_hook(before_forward)


def test_the_scaler_skips_a_step(make_trainer):
    """Gradients that overflow do not end the run."""
    trainer = make_trainer("baseline", "retinanet")
    poison_gradients(trainer, {1})
    trainer.train()
    first, second, third, fourth = trainer.states
    assert changed(first, second)
    assert not changed(second, third)
    assert changed(third, fourth)
    assert trainer._trainer.grad_scaler.get_scale() == 32


def test_the_adapter_rests_under_the_scaler(make_trainer):
    """While L3 is off, its gradients of zero, which the scaler unscales, do not reach the
    optimizer; also in an iteration that the scaler skips."""
    trainer = make_trainer("labelenc_step1", "fcos")
    adapter = list(trainer.task.training_only["LabelEnc"].feature_adapter.parameters())
    poison_gradients(trainer, {0})
    trainer.train()
    first, second, third, fourth = trainer.states
    prefix = "training_only.LabelEnc.feature_adapter"
    assert not changed(first, second)
    assert changed(second, third)
    assert not [name for name in changed(first, third) if name.startswith(prefix)]
    assert [name for name in changed(third, fourth) if name.startswith(prefix)]
    assert all(p in trainer.optimizer.state for p in adapter)


def test_an_iteration_with_an_infinite_loss_is_left_out(make_trainer, caplog):
    trainer = make_trainer("baseline", "retinanet")
    poison_losses(trainer, {1})
    with caplog.at_level(logging.WARNING, "plaindet"):
        trainer.train()
    first, second, third, fourth = trainer.states
    assert changed(first, second)
    assert not changed(second, third)
    assert changed(third, fourth)
    (message,) = [x.getMessage() for x in caplog.records if "left out" in x.getMessage()]
    assert "Iteration 1 is left out, since a loss is infinite or NaN in float16 in this" in message
    assert message.count(".png") == 2
    assert not list(Path(trainer.cfg.OUTPUT_DIR).glob("nonfinite*"))


def test_not_more_than_a_few_in_a_row(make_trainer):
    trainer = make_trainer("baseline", "retinanet", "SOLVER.MAX_ITER", "20")
    poison_losses(trainer, {0, 1, *range(3, 20)})
    with pytest.raises(FloatingPointError, match="is infinite or NaN in iteration 8: .*loss"):
        trainer.train()
    assert trainer.iter == 3 + finite.MAX_LEFT_OUT
    assert not changed(trainer.states[3], fingerprints(trainer))
    assert (Path(trainer.cfg.OUTPUT_DIR) / "nonfinite_0000008_process0.pth").exists()


def test_statistics_that_took_it_in_end_the_run(make_trainer):
    """Those of batch norms, which the forward pass changes."""
    trainer = make_trainer("baseline", "retinanet", "MODEL.RESNETS.NORM", "BN")
    poison_losses(trainer, {1})
    with pytest.raises(FloatingPointError, match="A loss is infinite or NaN in iteration 1"):
        trainer.train()


def test_bfloat16_has_no_scaler(make_trainer):
    """So a loss that is not finite ends the run at once, as in float32."""
    trainer = make_trainer("baseline", "retinanet", "SOLVER.AMP.PRECISION", "bfloat16")
    assert trainer._trainer.precision is BFLOAT16
    poison_losses(trainer, {1})
    with pytest.raises(FloatingPointError, match="A loss is infinite or NaN in iteration 1"):
        trainer.train()


def test_a_loss_of_another_process(make_trainer, monkeypatch, caplog):
    """All processes leave the same iterations out."""
    trainer = make_trainer("baseline", "retinanet")
    asked = set()

    def flag(up):
        first = trainer.iter not in asked
        asked.add(trainer.iter)
        return SimpleNamespace(is_up=lambda: up or (first and trainer.iter == 1))

    monkeypatch.setattr(finite, "Flag", flag)
    with caplog.at_level(logging.WARNING, "plaindet"):
        trainer.train()
    assert not changed(*trainer.states[1:3])
    assert changed(*trainer.states[2:4])
    assert any("float16 in another process" in message for message in caplog.messages)


def test_a_scale_that_has_collapsed_ends_the_run(make_trainer):
    """Otherwise a run whose gradients are never finite would do nothing to its end."""
    trainer = make_trainer("baseline", "retinanet", "SOLVER.MAX_ITER", "8")
    trainer._trainer.grad_scaler = torch.cuda.amp.GradScaler(init_scale=3 * finite.MIN_SCALE)
    poison_gradients(trainer, range(8))
    with pytest.raises(FloatingPointError, match="has diverged in iteration 2: gradients are"):
        trainer.train()


def test_amp_needs_a_gpu(make_cfg):
    cfg = make_cfg("quick/retinanet_R_18_baseline.yaml", "SOLVER.AMP.ENABLED", "True")
    with pytest.raises(ValueError, match="SOLVER.AMP.ENABLED needs a GPU, but MODEL.DEVICE is cpu"):
        train_net.PlainTrainer(cfg)


def test_unknown_precision(make_cfg):
    cfg = make_cfg("quick/retinanet_R_18_baseline.yaml", "SOLVER.AMP.PRECISION", "float8")
    with pytest.raises(ValueError, match="SOLVER.AMP.PRECISION is 'float8', expected 'float16' or"):
        train_net.PlainTrainer(cfg)
