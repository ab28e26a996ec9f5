"""The cross-head step against the official implementation's numbers."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.meta_arch import fcos
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn
from torch.nn import functional as F

from crosskd import align_features
from plaindet.engine.adapters import DenseAdapter, TowerFeatures
from plaindet.modeling import FCOSHead, GFLHead

NUMBERS = np.load(Path(__file__).parent.parent / "data" / "crosskd" / "cross_head.npz")


def make_head(num_convs=4, channels=64):
    shapes = [ShapeSpec(channels=channels, stride=stride) for stride in (32, 64, 128)]
    return GFLHead(
        input_shape=shapes, conv_dims=[channels] * num_convs, num_classes=8, norm="GN"
    ).eval()


def make_adapter(head, channels):
    """With the part of a detector that matters here."""
    return DenseAdapter(
        SimpleNamespace(
            head=head,
            head_in_features=["p5", "p6", "p7"],
            backbone=SimpleNamespace(output_shape=lambda: {"p5": ShapeSpec(channels=channels)}),
            prediction_dims=[8, 4 * 17],
            _transpose_dense_predictions=partial(DenseDetector._transpose_dense_predictions, None),
        )
    )


@torch.no_grad()
def test_classification_of_an_official_teacher():
    """Student features held after the third convolution, through the teacher's fourth and its
    predictor: three levels of a GFL."""
    head = make_head()
    teacher = {k[8:]: torch.from_numpy(NUMBERS[k]) for k in NUMBERS if k.startswith("teacher/")}
    head.cls_subnet[9].weight.copy_(teacher["conv.weight"])
    head.cls_subnet[9].bias.zero_()
    head.cls_subnet[10].weight.copy_(teacher["gn.weight"])
    head.cls_subnet[10].bias.copy_(teacher["gn.bias"])
    head.cls_score.weight.copy_(teacher["gfl_cls.weight"])
    head.cls_score.bias.copy_(teacher["gfl_cls.bias"])

    held, reference, expected = (
        [torch.from_numpy(NUMBERS[f"{name}_l{level}"]) for level in (2, 3, 4)]
        for name in ("stu/cls_hold", "tea/cls_hold", "reused/cls")
    )
    aligned = [F.relu(align_features(*pair)) for pair in zip(held, reference)]
    adapter = make_adapter(head, 64)
    adapter.position = 3
    logits = adapter.predictions_from(TowerFeatures(aligned, aligned)).logits
    wanted = torch.cat([x.flatten(2).transpose(1, 2) for x in expected], dim=1)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_parts_make_the_whole():
    """Any position splits the head into two parts that give what its forward gives."""
    head = make_head(channels=32)
    adapter = make_adapter(head, 32)
    features = [torch.randn(2, 32, size, size) for size in (8, 4, 2)]
    expected = adapter.flatten(head(features))
    assert adapter.num_positions == 4
    for position in range(5):
        adapter.position = position
        assert adapter.width == 32
        run = adapter.run_head(dict(zip(("p5", "p6", "p7"), features)))
        held = run.held
        assert position == 0 or all((x >= 0).all() for x in (*held.cls, *held.box))
        for actual in (adapter.flatten(run.predictions), adapter.predictions_from(held)):
            assert torch.equal(actual.logits, expected.logits)
            assert torch.equal(actual.regression, expected.regression)


@torch.no_grad()
def test_fcos_of_detectron2():
    """Its centerness goes through the tower of the boxes."""
    shapes = [ShapeSpec(channels=32, stride=stride) for stride in (32, 64, 128)]
    head = fcos.FCOSHead(input_shape=shapes, num_classes=8, conv_dims=[32] * 4, norm="GN").eval()
    adapter = make_adapter(head, 32)
    adapter.detector.prediction_dims = [8, 4, 1]
    features = [torch.randn(2, 32, size, size) for size in (8, 4, 2)]
    expected = adapter.flatten(head(features))
    adapter.position = 3
    found = adapter.predictions_from(adapter.run_head(dict(zip(("p5", "p6", "p7"), features))).held)
    assert expected.centerness_logits is not None
    for name in ("logits", "regression", "centerness_logits"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, nn.LeakyReLU])
def test_heads_of_other_activations(activation):
    """A position is behind an activation of any kind, and rectified behind a ReLU alone."""
    head = make_head(num_convs=2, channels=32)
    assert make_adapter(head, 32).num_positions == 2
    for tower in (head.cls_subnet, head.bbox_subnet):
        tower[2] = tower[5] = activation()
    adapter = make_adapter(head, 32)
    assert adapter.num_positions == 2
    features = dict(zip(("p5", "p6", "p7"), [torch.randn(2, 32, size, size) for size in (8, 4, 2)]))
    adapter.position = 1
    run = adapter.run_head(features)
    assert torch.equal(run.held.cls[0], head.cls_subnet[:3](features["p5"]))
    actual, expected = adapter.predictions_from(run.held), adapter.flatten(run.predictions)
    assert torch.equal(actual.logits, expected.logits)
    assert not adapter.is_rectified


def test_convolutions_with_their_activation():
    """Detectron2's, which have norm and activation in them."""
    head = make_head(num_convs=2, channels=32)
    for name in ("cls_subnet", "bbox_subnet"):
        blocks = [Conv2d(32, 48, 3, padding=1, activation=F.relu), Conv2d(48, 32, 3, padding=1)]
        setattr(head, name, nn.Sequential(*blocks, nn.SiLU(inplace=True)))
    adapter = make_adapter(head, 32)
    assert adapter.num_positions == 2
    features = dict(zip(("p5", "p6", "p7"), [torch.randn(2, 32, size, size) for size in (8, 4, 2)]))
    for position, width, is_rectified in ((1, 48, True), (2, 32, False)):
        adapter.position = position
        assert (adapter.width, adapter.is_rectified) == (width, is_rectified)
        run = adapter.run_head(features)
        actual, expected = adapter.predictions_from(run.held), adapter.flatten(run.predictions)
        assert torch.equal(actual.logits, expected.logits)


def test_width_behind_a_deformable_convolution():
    """And not that of its offsets."""
    shapes = [ShapeSpec(channels=32, stride=8)]
    head = FCOSHead(
        input_shape=shapes, conv_dims=[32] * 2, num_classes=8, deformable_last_conv=True
    )
    adapter = make_adapter(head, 32)
    adapter.position = 2
    assert adapter.width == 32
