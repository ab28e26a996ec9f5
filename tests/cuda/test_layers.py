"""Layers and memory formats with kernels of their own on GPUs."""

import copy
import os
import shutil

import pytest
import torch
from devices import GPU, to_cpu
from variants import (
    BOTH,
    METHODS,
    Variant,
    assert_gradients_close,
    assert_losses_close,
    build_variant,
    gradients_of,
    losses_of,
    make_batch,
    share_proposals,
)

from plaindet.modeling.deformable import DeformableBottleneckBlock, DeformableConvWithOffset

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(
    "make_layer",
    [
        lambda: DeformableConvWithOffset(16, 8),
        lambda: DeformableBottleneckBlock(16, 32, bottleneck_channels=8, norm="FrozenBN"),
        lambda: DeformableBottleneckBlock(
            16, 32, bottleneck_channels=8, norm="BN", stride=2, deform_modulated=True
        ),
    ],
    ids=["with offset", "v1", "v2"],
)
def test_deformable_convolutions(make_layer, device):
    """Outputs and gradients are the CPU's."""
    layer = make_layer()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "offset" in name:
                parameter.normal_(0, 0.1)
    on_device = device.move(copy.deepcopy(layer))
    x = torch.randn(2, 16, 12, 10)
    expected = layer(x)
    expected.square().mean().backward()
    with device.in_use():
        found = on_device(x.to(device.device))
        found.square().mean().backward()
    torch.testing.assert_close(to_cpu(found), expected.detach(), rtol=1e-4, atol=1e-4)
    for (name, parameter), other in zip(layer.named_parameters(), on_device.parameters()):
        torch.testing.assert_close(
            to_cpu(other.grad), parameter.grad, rtol=1e-3, atol=1e-5, msg=name
        )


@pytest.mark.parametrize(
    "detector",
    [pytest.param(x, marks=[] if x == "gfl" else [pytest.mark.long]) for x in METHODS],
)
def test_channels_last(detector, device, make_tiny_cfg):
    """A model in this format has the same losses and gradients, with both methods."""
    method = BOTH if BOTH in METHODS[detector] else "CrossKD"
    model, batch = build_variant(Variant(detector, method), make_tiny_cfg), make_batch()
    if isinstance(device, GPU):
        device.move(model)
    recorded, replayed = share_proposals(model)
    expected = losses_of(model, batch)
    expected_gradients = gradients_of(model, expected)
    replayed += recorded
    for each in (model, model.teacher.model):
        each.to(memory_format=torch.channels_last)
    found = losses_of(model, batch)
    assert_losses_close(found, expected)
    assert_gradients_close(gradients_of(model, found), expected_gradients)


@pytest.mark.long
def test_compiled_backbone(device, make_tiny_cfg):
    """`model.backbone.compile()` keeps the names of the weights, and changes no loss. On the CPU
    only its tracing is checked, since the compiler takes long."""
    backend = "eager"
    model = build_variant(Variant("retinanet", BOTH), make_tiny_cfg)
    if isinstance(device, GPU):
        backend = "inductor"
        pytest.importorskip("triton", reason="torch.compile needs triton")
        if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
            pytest.skip("torch.compile needs a C compiler")
        device.move(model)
    keys = model.state_dict().keys()
    expected = losses_of(model, make_batch())
    expected_gradients = gradients_of(model, expected)
    model.backbone.compile(backend=backend)
    found = losses_of(model, make_batch())
    assert model.state_dict().keys() == keys
    assert_losses_close(found, expected)
    assert_gradients_close(gradients_of(model, found), expected_gradients)
