"""Detectron2's RetinaNet, and what CrossKD makes of its assignment, against the numbers of mmdet's,
with what is known to differ accounted for.

The numbers are too big for the repository: `make golden GOLDEN=<folder>` runs this file, the folder
having `10_retina_head.npz`.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from plaindet.engine import adapter_of

pytestmark = pytest.mark.golden
LEVELS = range(5)
NUM_CLASSES = 8
LOSSES = {"loss_cls": "loss_cls", "loss_box_reg": "loss_bbox"}


@pytest.fixture(scope="module")
def numbers():
    return np.load(Path(os.environ.get("GOLDEN", "")) / "10_retina_head.npz")


@pytest.fixture(scope="module")
def model(read_cfg):
    cfg = read_cfg("CrossKD/retinanet_R_18_FPN_from_R_50.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RETINANET.NUM_CLASSES = NUM_CLASSES
    return build_model(cfg).detector.train()


def by_ratio_to_by_size(x):
    """(N, H * W * 9, ...) with the sizes within the ratios, as mmdet counts them, to Detectron2's
    order."""
    anchors = x.unflatten(1, (-1, 3, 3)).transpose(2, 3)
    return anchors.flatten(1, 3)


def of_levels(numbers, name):
    return [torch.from_numpy(numbers[f"{name}_l{level}"]) for level in LEVELS]


def targets(numbers, name):
    """(N, R, ...) in Detectron2's order."""
    return torch.cat([by_ratio_to_by_size(x) for x in of_levels(numbers, name)], dim=1)


def make_anchors(model, numbers):
    features = [torch.zeros(2, 1, *size) for size in numbers["feat_sizes"].tolist()]
    return model.anchor_generator(features)


def make_instances(numbers, case):
    return [
        Instances(
            tuple(numbers[f"img{i}_img_shape"].tolist()),
            gt_boxes=Boxes(torch.from_numpy(numbers[f"{case}/gt{i}_boxes"])),
            gt_classes=torch.from_numpy(numbers[f"{case}/gt{i}_labels"]),
        )
        for i in (0, 1)
    ]


def test_anchors(model, numbers):
    for level, anchors in enumerate(make_anchors(model, numbers)):
        expected = by_ratio_to_by_size(torch.from_numpy(numbers[f"priors_l{level}"])[None])[0]
        torch.testing.assert_close(anchors.tensor, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["both", "second_empty", "both_empty"])
def test_losses_of_mmdets_targets(model, numbers, case):
    """Equal, up to the normaliser: mmdet's is the batch's, Detectron2's a moving average."""
    anchors = make_anchors(model, numbers)
    all_anchors = Boxes.cat(anchors).tensor
    outputs = [of_levels(numbers, name) for name in ("cls", "reg")]
    outputs = [[x.requires_grad_() for x in levels] for levels in outputs]
    predictions = [
        [by_ratio_to_by_size(x.permute(0, 2, 3, 1).reshape(2, -1, dim)) for x in levels]
        for levels, dim in zip(outputs, (NUM_CLASSES, 4))
    ]
    labels, deltas = targets(numbers, f"{case}/labels"), targets(numbers, f"{case}/bbox_targets")
    weights = targets(numbers, f"{case}/label_weights")
    labels = torch.where(weights > 0, labels, -1)
    boxes = [model.box2box_transform.apply_deltas(x, all_anchors) for x in deltas]
    with EventStorage():
        model.loss_normalizer = 100
        losses = model.losses(anchors, predictions[0], list(labels), predictions[1], boxes)
    scale = model.loss_normalizer / float(numbers[f"{case}/avg_factor"])
    for ours, theirs in LOSSES.items():
        expected = float(numbers[f"{case}/{theirs}"])
        assert losses[ours].item() * scale == pytest.approx(expected, rel=1e-5, abs=1e-7)
    (sum(losses.values()) * scale).backward()
    for levels, name in zip(outputs, ("cls", "reg")):
        for x, expected in zip(levels, of_levels(numbers, f"{case}/grad_{name}")):
            torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("case", ["both", "second_empty", "both_empty"])
def test_assignment(model, numbers, case):
    """The labels differ where an object has no anchor of an IoU of 0.5: mmdet gives its best
    anchors to it, Detectron2 to the object they overlap most. What CrossKD leaves out, padding and
    ignored anchors, is what mmdet leaves out."""
    anchors, instances = make_anchors(model, numbers), make_instances(numbers, case)
    gt_labels, gt_boxes = model.label_anchors(anchors, instances)
    sizes = [x.image_size for x in instances]
    images = ImageList(torch.zeros(2, 3, *numbers["batch_hw"].tolist()), sizes)
    assignment = adapter_of(model).assignment(anchors, gt_labels, gt_boxes, images)
    labels, valid = targets(numbers, f"{case}/labels"), targets(numbers, f"{case}/label_weights")
    for i, image in enumerate(instances):
        low_quality = torch.zeros(len(labels[i]), dtype=torch.bool)
        if len(image):
            iou = pairwise_iou(image.gt_boxes, Boxes.cat(anchors))
            low_quality = ((iou == iou.amax(dim=1, keepdim=True)) & (iou < 0.5)).any(dim=0)
        counted = (valid[i] > 0) & ~low_quality
        assert torch.equal(gt_labels[i][counted], labels[i][counted])
        assert torch.equal((assignment.valid[i] > 0) | low_quality, (valid[i] > 0) | low_quality)
        assert counted.any()
