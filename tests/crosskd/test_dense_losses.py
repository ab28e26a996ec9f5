"""The terms of CrossKD's losses of dense detectors, from their definitions."""

import itertools

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from iteration import losses_of, method_of
from torchvision.ops import box_iou, generalized_box_iou_loss

from plaindet.engine import adapter_of
from plaindet.engine.adapters import Assignment, Predictions

STRIDES = [8, 16, 32, 64, 128]


def test_padding_cells_do_not_count(make_cfg):
    """Cells that only the padding of a batch has get no weight, ignored anchors neither."""
    model = build_model(make_cfg("quick/retinanet_R_18_baseline.yaml"))
    images = ImageList(torch.zeros(2, 3, 96, 128), [(96, 128), (40, 70)])
    features = [torch.zeros(2, 1, -(-96 // s), -(-128 // s)) for s in (8, 16, 32, 64, 128)]
    anchors = model.anchor_generator(features)
    labels = torch.full((2, sum(map(len, anchors))), 3)
    labels[0, :4], labels[1, 7] = torch.tensor([-1, 2, -1, 0]), 1
    assignment = adapter_of(model).assignment(anchors, list(labels), [], images)
    p3, p4, *_ = assignment.valid.split([len(level) for level in anchors], dim=1)
    # 40 x 70 is padded to 64 x 96: 8 x 12 cells of P3, 4 x 6 of P4.
    expected = torch.zeros(12, 16, 9)
    expected[:8, :12] = 1
    assert torch.equal(p3[1], expected.flatten())
    assert p4[1].sum() == 4 * 6 * 9
    assert p3[0, :4].tolist() == [0, 1, 0, 1]
    assert p3[0, 4:].all()
    assert assignment.positive.sum(dim=1).tolist() == [2, 1]
    assert assignment.normalizer == 3


def test_rounded_centres_of_anchors_do_not_decide_what_is_padding(read_cfg):
    """COCO's anchors that are not square have centres such as 127.99999 at x = 128."""
    cfg = read_cfg("CrossKD/retinanet_R_18_FPN_from_R_50.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).detector
    images = ImageList(torch.zeros(1, 3, 512, 512), [(128, 192)])
    anchors = model.anchor_generator([torch.zeros(1, 1, 512 // s, 512 // s) for s in STRIDES])
    labels = torch.full((1, sum(map(len, anchors))), 80)
    valid = adapter_of(model).assignment(anchors, list(labels), [], images).valid
    levels = valid.split([len(level) for level in anchors], dim=1)
    cells = [level.view(512 // s, 512 // s, 9) for level, s in zip(levels, STRIDES)]
    for level, stride in zip(cells, STRIDES):
        assert level[: -(-128 // stride), : -(-192 // stride)].all()
        assert level.sum() == 9 * -(-128 // stride) * -(-192 // stride)


@pytest.mark.parametrize(
    ("detector", "box_loss", "cls_loss"),
    [
        ("atss", "giou", "qfl"),
        ("atss", "iou", "bce"),
        ("atss", "l1", "qfl"),
        ("gfl", "kl", "qfl"),
        ("gfl", "giou", "bce"),
    ],
)
@pytest.mark.parametrize("region", ["all", "positive", "negative"])
def test_distillation_losses(make_cfg, detector, box_loss, cls_loss, region):
    """Anchor by anchor from the definition, of two images with three anchors."""
    cfg = make_cfg(
        f"quick/{detector}_R_18_crosskd.yaml",
        *("MODEL.CROSSKD.CLS_LOSS", cls_loss, "MODEL.CROSSKD.CLS_GAMMA", "2.0"),
        *("MODEL.CROSSKD.CLS_REGION", region, "MODEL.CROSSKD.CLS_WEIGHT", "0.5"),
        *("MODEL.CROSSKD.BOX_LOSS", box_loss, "MODEL.CROSSKD.BOX_WEIGHT", "3.0"),
        *("MODEL.CROSSKD.BOX_TEMPERATURE", "2.0"),
        *("MODEL.CROSSKD.CENTERNESS_WEIGHT", "0.25" if detector == "atss" else "0.0"),
    )
    task = build_model(cfg)
    anchors = torch.tensor([[0.0, 0, 40, 40], [20, 10, 60, 50], [30, 30, 70, 70]])
    prediction, target = (
        Predictions(
            task.adapter,
            torch.randn(2, 3, 3) * 2,
            torch.randn(2, 3, 4 if detector == "atss" else 4 * 17),
            torch.randn(2, 3, 1) if detector == "atss" else None,
        )
        for _ in range(2)
    )
    positive = torch.tensor([[True, False, False], [False, True, False]])
    valid = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assignment = Assignment(positive, valid, torch.tensor(4.0))
    losses = method_of(task).distillation_losses([Boxes(anchors)], prediction, target, assignment)

    expected, confidences = dict.fromkeys(losses, 0.0), 0.0
    for i, a in itertools.product(range(2), range(3)):
        if not valid[i, a]:
            continue
        p, q = (x.logits[i, a].sigmoid() for x in (prediction, target))
        entropy = -(q * p.log() + (1 - q) * (1 - p).log())
        loss = ((p - q).abs() ** 2 * entropy if cls_loss == "qfl" else entropy).sum()
        if region == "all" or (region == "positive") == positive[i, a]:
            expected["loss_kd_cls"] += 0.5 * loss / 4
        sides = [x.regression[i, a] for x in (prediction, target)]
        if box_loss == "kl":
            p, q = ((x.view(4, 17) / 2).softmax(1) for x in sides)
            distance = 2**2 * (q * (q / p).log()).sum(1).mean()
        else:
            transform = task.detector.box2box_transform
            boxes = [transform.apply_deltas(x[None], anchors[a][None]) for x in sides]
            distance = {
                "giou": lambda x, y: generalized_box_iou_loss(x, y).sum(),
                "iou": lambda x, y: -box_iou(x, y).log().sum(),
                "l1": lambda x, y: (x - y).abs().sum(),
            }[box_loss](*boxes)
        confidence = target.logits[i, a].sigmoid().max()
        confidences += confidence
        expected["loss_kd_box"] += 3 * confidence * distance / (1 if box_loss == "kl" else 4)
        if detector == "atss" and positive[i, a]:
            p, q = (x.centerness_logits[i, a].sigmoid().sum() for x in (prediction, target))
            entropy = -(q * p.log() + (1 - q) * (1 - p).log())
            expected["loss_kd_centerness"] += 0.25 * entropy / 4
    if box_loss == "kl":
        expected["loss_kd_box"] /= confidences
    assert ("loss_kd_centerness" in losses) == (detector == "atss")
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], msg=name)


def test_feature_loss(make_trainer):
    """PKD's: half the squared difference of standardised channels, in the mean of each level."""
    trainer = make_trainer("retinanet", "MODEL.CROSSKD.FEATURE_WEIGHT", "3.0")
    model, batch = trainer.plain_model, next(iter(trainer.data_loader))
    teacher = method_of(trainer.task).teacher.model
    with EventStorage(), torch.no_grad():
        loss, expected = trainer.model(batch)["loss_kd_feature"], 0.0
        images = model.preprocess_image(batch).tensor
        both = (model.backbone(images), teacher.backbone(images))
        for student, target in zip(*(features.values() for features in both)):
            difference = 0.0
            for feature, sign in ((student, 1), (target, -1)):
                channels = feature.transpose(0, 1).flatten(1)
                deviation = channels.std(dim=1, keepdim=True) + 1e-6
                difference += sign * (channels - channels.mean(dim=1, keepdim=True)) / deviation
            expected += 3 * difference.square().mean() / 2
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_normalizer_of_fcos(make_cfg):
    """The sum over the positives of the centerness (Eq. 3 of the FCOS paper)."""
    model = build_model(make_cfg("quick/fcos_R_18_baseline.yaml"))
    instances = Instances((128, 128), gt_classes=torch.tensor([0, 2]))
    instances.gt_boxes = Boxes([[10.0, 12, 50, 70], [60, 20, 120, 100]])
    anchors = model.anchor_generator([torch.zeros(1, 1, 128 // s, 128 // s) for s in STRIDES])
    labels, boxes = model.label_anchors(anchors, [instances])
    images = ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)])
    assignment = adapter_of(model).assignment(anchors, labels, boxes, images)
    expected = 0.0
    for anchor, label, box in zip(Boxes.cat(anchors).get_centers(), labels[0], boxes[0]):
        if label < 3:
            (x, y), (x0, y0, x1, y1) = anchor.tolist(), box.tolist()
            left, top, right, bottom = x - x0, y - y0, x1 - x, y1 - y
            horizontal = min(left, right) / max(left, right)
            expected += (horizontal * min(top, bottom) / max(top, bottom)) ** 0.5
    assert expected > 1
    assert assignment.normalizer.item() == pytest.approx(expected, rel=1e-5)
    assert assignment.positive.sum() == sum(label < 3 for label in labels[0])


@pytest.mark.parametrize("box_loss", ["giou", "iou", "l1"])
def test_box_losses_of_decoded_distributions(make_trainer, box_loss):
    """GFL's boxes can also be distilled as boxes."""
    trainer = make_trainer("gfl", "MODEL.CROSSKD.BOX_LOSS", box_loss)
    losses = losses_of(trainer)
    assert 0 < losses["loss_kd_box"] < float("inf")
