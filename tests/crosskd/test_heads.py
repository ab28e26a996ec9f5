"""The cross-head step against the official implementation's numbers."""

from pathlib import Path

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from crosskd import align_features
from crosskd.heads import SubnetFeatures, num_positions, predict, run_subnets, width_at
from plaindet.modeling import GFLHead

NUMBERS = np.load(Path(__file__).parent.parent / "data" / "crosskd" / "cross_head.npz")


def make_head(num_convs=4, channels=64):
    shapes = [ShapeSpec(channels=channels, stride=stride) for stride in (32, 64, 128)]
    return GFLHead(
        input_shape=shapes, conv_dims=[channels] * num_convs, num_classes=8, norm="GN"
    ).eval()


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
    outputs = run_subnets(head, SubnetFeatures(aligned, aligned), start=3)
    logits, _ = predict(head, outputs)
    for actual, wanted in zip(logits, expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_parts_make_the_whole():
    """Any position splits the head into two parts that give what its forward gives."""
    head = make_head(channels=32)
    features = [torch.randn(2, 32, size, size) for size in (8, 4, 2)]
    expected = head(features)
    assert num_positions(head) == 4
    for position in range(5):
        assert width_at(head, position) == 32
        held = run_subnets(head, SubnetFeatures(features, features), stop=position)
        assert position == 0 or all((x >= 0).all() for x in (*held.cls, *held.box))
        actual = predict(head, run_subnets(head, held, start=position))
        for levels, wanted in zip(actual, expected):
            assert all(torch.equal(*pair) for pair in zip(levels, wanted))
