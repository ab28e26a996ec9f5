"""An iteration of every detector with every method: losses and gradients as on the CPU, and no wait
of the host for the device that Detectron2 does not have."""

from collections import Counter
from typing import NamedTuple

import pytest
from devices import GPU, to_cpu
from variants import (
    BOTH,
    CROSSKD,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    PLAIN,
    REPRESENTATIVE,
    TWO_STAGE,
    VARIANTS,
    Variant,
    assert_gradients_close,
    assert_losses_close,
    build_variant,
    gradients_of,
    losses_of,
    make_batch,
    share_proposals,
)

pytestmark = pytest.mark.cuda

# Where the host waits in this project's own code, and why.
OWN = {"plaindet.modeling.anchor_center: positives": "the box losses are those of the positives"}
# Where Detectron2's code waits more often than in the plain detector.
EMPTY_PROPOSALS = (
    "detectron2.modeling.proposal_generator.proposal_utils: find_top_rpn_proposals",
    "detectron2.structures.boxes: __getitem__",
)
POOLING = (
    "detectron2.layers.wrappers: nonzero_tuple",
    "detectron2.modeling.poolers: _convert_boxes_to_pooler_format",
)


def exceptions(variant: Variant) -> dict[str, str]:
    """The places where a variant may wait more often than the plain detector, with the reason."""
    found = {}
    if variant.detector in TWO_STAGE:
        found.update(dict.fromkeys(EMPTY_PROPOSALS, "drops empty proposals"))
        if variant.method in (*CROSSKD, BOTH):
            found.update(dict.fromkeys(POOLING, "the regions' features of the teacher"))
    return found


class Iteration(NamedTuple):
    variant: Variant
    losses: tuple[dict, dict]  # on the CPU, on the device
    gradients: tuple[dict, dict]
    waits: Counter


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(x, id=str(x), marks=[] if x in REPRESENTATIVE else [pytest.mark.long])
        for x in VARIANTS
    ],
)
def iteration(request, device, make_tiny_cfg, plain_waits):
    """The same iteration on the CPU and on the device."""
    result = run_on_both(request.param, device, make_tiny_cfg)
    if request.param.method == PLAIN:
        plain_waits[request.param.detector] = result.waits
    return result


@pytest.fixture(scope="module")
def plain_waits():
    """Where the host waits in an iteration of each plain detector so far."""
    return {}


def run_on_both(variant, device, make_cfg):
    model, batch = build_variant(variant, make_cfg), make_batch()
    recorded, replayed = share_proposals(model)
    losses = losses_of(model, batch)
    gradients = gradients_of(model, losses)
    model.zero_grad()
    device.move(model)
    with device.in_use() as waits:
        replayed += [[x.to(device.device) for x in proposals] for proposals in recorded]
        waits.clear()
        found = losses_of(model, batch)
        found_gradients = gradients_of(model, found)
    losses, found = ({k: to_cpu(v) for k, v in x.items()} for x in (losses, found))
    found_gradients = {name: to_cpu(x) for name, x in found_gradients.items()}
    return Iteration(variant, (losses, found), (gradients, found_gradients), waits)


def test_losses_and_gradients_are_those_of_the_cpu(iteration, device):
    """In float32. The double computes on the CPU, with other strides here and there."""
    tolerances = (LOSS_TOLERANCE, GRADIENT_TOLERANCE) if isinstance(device, GPU) else (1e-6, 1e-4)
    expected, found = iteration.losses
    assert_losses_close(found, expected, tolerances[0])
    expected, found = iteration.gradients
    assert_gradients_close(found, expected, tolerances[1])


def test_the_host_waits_no_more_than_for_the_plain_detector(
    iteration, plain_waits, device, make_tiny_cfg
):
    """But for `exceptions`. Step 1 has the detector's losses twice."""
    variant, waits = iteration.variant, iteration.waits
    times = 2 if variant.method.startswith("step 1") else 1
    if variant.detector not in plain_waits:
        result = run_on_both(Variant(variant.detector, PLAIN), device, make_tiny_cfg)
        plain_waits[variant.detector] = result.waits
    plain = plain_waits[variant.detector]
    more = {
        place: f"{count} times, {times * plain[place]} expected"
        for place, count in waits.items()
        if count > times * plain[place] and place not in exceptions(variant)
    }
    assert not more
    packages = ("plaindet", "labelenc", "crosskd")
    own = {place for place in waits if place.split(".")[0] in packages}
    assert own <= OWN.keys()
