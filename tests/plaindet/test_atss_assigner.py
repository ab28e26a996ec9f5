"""ATSS assignment against the numbers of mmdet's and a brute force in plain Python."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes

from plaindet.modeling.atss_assigner import assign_atss, centers_within

NUMBERS = np.load(Path(__file__).parent.parent / "data" / "plaindet" / "atss_targets.npz")
STRIDES = [8, 16, 32, 64, 128]


def make_anchors(height, width):
    generator = DefaultAnchorGenerator(
        sizes=[[8 * stride] for stride in STRIDES], aspect_ratios=[1], strides=STRIDES, offset=0
    )
    return generator([torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in STRIDES])


def make_boxes(count, size):
    corners = torch.rand(count, 2) * torch.tensor(size[::-1]) * 0.8
    return Boxes(torch.cat([corners, corners + 2 + torch.rand(count, 2) ** 2 * 150], dim=1))


def brute_force(anchors, gt_boxes, usable, num_candidates=9):
    """Algorithm 1 of the paper, box by box."""
    levels, first = [], 0
    for level in anchors:
        levels.append([i for i in range(first, first + len(level)) if usable[i]])
        first += len(level)
    anchors = Boxes.cat(anchors).tensor.double().tolist()
    centers = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in anchors]
    matches, best_ious = [-1] * len(anchors), [0.0] * len(anchors)
    for box_index, box in enumerate(gt_boxes.tensor.double().tolist()):
        x1, y1, x2, y2 = box
        center = ((x1 + x2) / 2, (y1 + y2) / 2)
        ious = {}
        for level in levels:
            for i in sorted(level, key=lambda i: math.dist(centers[i], center))[:num_candidates]:
                ious[i] = iou(anchors[i], box)
        threshold = statistics.mean(ious.values()) + statistics.stdev(ious.values())
        for i, value in ious.items():
            x, y = centers[i]
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0.01
            if value >= threshold and inside and value > best_ious[i]:
                matches[i], best_ious[i] = box_index, value
    return matches


def iou(box, other):
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    intersection = max(width, 0) * max(height, 0)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (box, other)]
    return intersection / (sum(areas) - intersection)


@pytest.mark.parametrize("case", ["A_mixed", "B_empty", "C_overlap", "D_large_frame"])
def test_mmdets_numbers(case):
    anchors = make_anchors(*NUMBERS["image_hw"].tolist())
    gt_boxes = Boxes(torch.from_numpy(NUMBERS[f"{case}_boxes"]))
    usable = torch.ones(sum(map(len, anchors)), dtype=torch.bool)
    matches = assign_atss(anchors, gt_boxes, usable)
    np.testing.assert_array_equal(matches.numpy(), NUMBERS[f"{case}_matches"])


@pytest.mark.parametrize("num_candidates", [3, 9])
@pytest.mark.parametrize("size", [(256, 320), (96, 64)])  # the second has levels of 1 to 6 anchors
def test_brute_force(size, num_candidates):
    anchors = make_anchors(*size)
    usable = torch.ones(sum(map(len, anchors)), dtype=torch.bool)
    positives = 0
    for count in (1, 5, 12):
        gt_boxes = make_boxes(count, size)
        matches = assign_atss(anchors, gt_boxes, usable, num_candidates)
        assert matches.tolist() == brute_force(anchors, gt_boxes, usable, num_candidates)
        positives += (matches >= 0).sum()
    assert positives > 10


def test_unusable_anchors_do_not_exist():
    """Neither as positives nor as candidates, so that other anchors take their place."""
    anchors = make_anchors(256, 320)
    usable = centers_within(Boxes.cat(anchors), (120, 170), 32)
    gt_boxes = make_boxes(8, (120, 170))
    matches = assign_atss(anchors, gt_boxes, usable)
    assert matches.tolist() == brute_force(anchors, gt_boxes, usable)
    assert (matches >= 0).any()
    assert (matches[~usable] == -1).all()


def test_no_boxes():
    anchors = make_anchors(64, 96)
    usable = torch.ones(sum(map(len, anchors)), dtype=torch.bool)
    matches = assign_atss(anchors, Boxes(torch.zeros(0, 4)), usable)
    assert (matches == -1).all()
    assert matches.shape == usable.shape
    assert matches.dtype == torch.int64


@pytest.mark.parametrize("box", [[50.0, 50, 50, 90], [40.1, 40.1, 41, 41]])
def test_boxes_without_an_anchor_inside(box):
    anchors = make_anchors(128, 128)
    usable = torch.ones(sum(map(len, anchors)), dtype=torch.bool)
    assert (assign_atss(anchors, Boxes(torch.tensor([box])), usable) == -1).all()


def test_one_anchor_in_all():
    """No standard deviation of one IoU: the anchor is positive."""
    anchors = [Boxes(torch.tensor([[0.0, 0, 8, 8]]))]
    gt_boxes = Boxes(torch.tensor([[1.0, 1, 9, 9]]))
    assert assign_atss(anchors, gt_boxes, torch.ones(1, dtype=torch.bool)).tolist() == [0]


def test_own_padding_of_an_image():
    """As many positions of each level as the image, rounded up to 32, has strides begun."""
    anchors = make_anchors(160, 224)
    usable = centers_within(Boxes.cat(anchors), (128, 170), 32)  # 128 x 192
    for stride, level in zip(STRIDES, usable.split([len(level) for level in anchors])):
        height, width = -(-160 // stride), -(-224 // stride)
        expected = torch.zeros(height, width, dtype=torch.bool)
        expected[: -(-128 // stride), : -(-192 // stride)] = True
        assert torch.equal(level.view(height, width), expected)
