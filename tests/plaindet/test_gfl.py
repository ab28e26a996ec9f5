"""The losses and the decoding of GFL in closed form; see test_anchor_center.py for the rest."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec

from plaindet.modeling import GFLHead
from plaindet.modeling.gfl import (
    DistributionTransform,
    distribution_focal_loss,
    quality_focal_loss,
)


def test_decodes_the_mean_of_each_distribution():
    """Two bins of equal weight: the distance is between them, in strides; left side first."""
    transform = DistributionTransform(reg_max=4, anchor_scale=8)
    logits = torch.full((4, 5), -100.0)
    for side, bins in enumerate(([0, 1], [2], [3, 4], [0, 4])):
        logits[side, bins] = 0
    anchors = torch.tensor([[-32.0, -24, 32, 40], [68, 68, 132, 132]])  # stride 8
    boxes = transform.apply_deltas(logits.flatten().expand(2, -1), anchors)
    expected = torch.tensor([[-4.0, -8, 28, 24], [96, 84, 128, 116]])
    torch.testing.assert_close(boxes, expected)
    distances = torch.tensor([[0.5, 2, 3.5, 2]]).expand(2, 4)
    torch.testing.assert_close(transform.get_deltas(anchors, boxes), distances)


def test_equal_bins_decode_to_the_middle():
    transform = DistributionTransform()
    anchor = torch.tensor([[-64.0, -64, 64, 64]])  # stride 16
    box = transform.apply_deltas(torch.zeros(1, 4 * 17), anchor)
    torch.testing.assert_close(box, torch.tensor([[-128.0, -128, 128, 128]]))


def test_distribution_focal_loss():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    targets = torch.tensor([1.25, 2.0, 7.0, -1.0])
    loss = distribution_focal_loss(probabilities.log().expand(4, 4), targets)
    expected = [
        -(0.75 * math.log(0.2) + 0.25 * math.log(0.3)),
        -math.log(0.3),
        -(0.1 * math.log(0.3) + 0.9 * math.log(0.4)),  # taken as 2.9
        -math.log(0.1),
    ]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_distribution_focal_loss_is_least_at_its_target():
    logits = torch.tensor([-30.0, math.log(0.3), math.log(0.7), -30.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(distribution_focal_loss(logits, torch.tensor(1.7)), logits)
    torch.testing.assert_close(gradient, torch.zeros(4), atol=1e-6, rtol=0)


def test_quality_focal_loss():
    """Nothing for a score equal to the quality; the focal loss without alpha for 0 and 1."""
    targets = torch.tensor([0.3, 0.0, 1.0, 0.5])
    logits = torch.tensor([0.3, 0.2, 0.6, 0.9]).logit()
    entropy = -(0.5 * math.log(0.9) + 0.5 * math.log(0.1))
    expected = [0, -math.log(0.8) * 0.2**2, -math.log(0.6) * 0.4**2, entropy * 0.4**2]
    loss = quality_focal_loss(logits, targets, beta=2.0)
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


def test_head_starts_as_in_the_paper():
    shape = [ShapeSpec(channels=32, stride=8)]
    head = GFLHead(input_shape=shape, conv_dims=[32], num_classes=3, norm="GN", reg_max=7)
    assert head.bbox_pred.out_channels == 4 * 8
    assert head.bbox_pred.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not head.bbox_pred.bias.any()
    assert head.cls_score.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)
