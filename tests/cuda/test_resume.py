"""An interrupted and resumed run on a GPU; tests/plaindet/test_resume.py has those on the CPU."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from resumed_runs import assert_equal, final_checkpoint, in_folder, start
from variants import skip_without_libraries

from plaindet.engine import ExactResume

pytestmark = pytest.mark.cuda

# The operator whose gradient PyTorch has no deterministic version of on GPUs.
INEXACT = {"deformable_detr": "grid_sampler"}


@pytest.fixture
def _deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(
    ("method", "detector"),
    [
        ("baseline", "retinanet"),
        ("labelenc_step1", "fcos"),
        ("labelenc_step2", "atss"),
        ("labelenc_crosskd", "gfl"),
        ("baseline", "mask_rcnn"),
        ("crosskd", "deformable_detr"),
    ],
)
def test_resumed_equals_uninterrupted(method, detector, gpu, make_method_cfg):
    """Bit for bit, with deterministic algorithms. Where there are none, PyTorch names the operator,
    and the weights differ by rounding."""
    skip_without_libraries(detector)
    options = ("SOLVER.CHECKPOINT_PERIOD", "2", "SEED", "5", "MODEL.DEVICE", str(gpu.device))
    cfg = make_method_cfg(method, detector, *options)
    whole, resumed = in_folder(cfg, "whole"), in_folder(cfg, "resumed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(whole)
        start(resumed, interrupt_at=2)
        assert start(resumed, resume=True).start_iter == 2
    messages = {str(x.message) for x in caught if "deterministic" in str(x.message)}
    inexact = {message.split(" ")[0] for message in messages}
    expected, found = final_checkpoint(whole), final_checkpoint(resumed)
    assert all(INEXACT.get(detector, "none") in operator for operator in inexact)
    if not inexact:
        assert_equal(found, expected)
        return
    for name, weights in expected["model"].items():
        difference = (found["model"][name] - weights).float().norm()
        assert difference <= 0.01 * weights.float().norm() + 1e-3, name


@pytest.mark.parametrize("deterministic", [True, False])
def test_torchscript(deterministic):
    """It optimises on GPUs, which changes last bits, but not where runs are to be repeatable."""
    hook = ExactResume(torch.nn.Linear(2, 2, device="meta"), checkpoint_period=1)
    hook.trainer = SimpleNamespace(data_loader=[], start_iter=0, cfg=SimpleNamespace(SEED=0))
    before = torch._C._get_graph_executor_optimize()
    torch.use_deterministic_algorithms(deterministic)
    try:
        hook.before_train()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch._C._get_graph_executor_optimize() == (not deterministic)
    hook.after_train()
    assert torch._C._get_graph_executor_optimize() == before
