"""FCOS against Detectron2's own, the original implementation's numbers and closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torchvision.ops import generalized_box_iou_loss

from plaindet.modeling import FCOSHead
from plaindet.modeling.fcos import centerness_target
from plaindet.modeling.losses import iou_loss

DATA = Path(__file__).parent.parent / "data" / "plaindet"
STRIDES = [8, 16, 32, 64, 128]

# The config of Detectron2's variant.
DETECTRON2 = [
    *("MODEL.FCOS.NORM", "", "MODEL.FCOS.LEVEL_SCALES", "False"),
    *("MODEL.FCOS.LOSS_NORMALIZER", "moving_average"),
    *("MODEL.FCOS.CENTERNESS_WEIGHTED_BOX_LOSS", "False", "MODEL.FCOS.IOU_SMOOTHING", "0.0"),
    *("MODEL.FCOS.CLASS_SCORE_THRESH_TEST", "0.0", "MODEL.FCOS.SCORE_THRESH_TEST", "0.2"),
]


@pytest.fixture
def make_fcos(read_cfg):
    def make(*overrides, config="quick/fcos_imprv_R_18_baseline.yaml"):
        cfg = read_cfg(config)
        cfg.MODEL.FCOS.NUM_CLASSES = 5
        cfg.merge_from_list(list(overrides))
        return build_model(cfg).train()

    return make


def make_batch(num_images=2, size=(128, 160), boxes=6):
    batch = []
    for _ in range(num_images):
        corners = torch.rand(boxes, 2) * torch.tensor([100.0, 70.0])
        sides = 3 + torch.rand(boxes, 2) ** 2 * 90
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
        instances.gt_classes = torch.randint(0, 5, (boxes,))
        batch.append({"image": torch.rand(3, *size) * 255, "instances": instances})
    return batch


def detectron2_twin(model):
    """Detectron2's FCOS with the same weights, loaded strictly."""
    head = detectron2_fcos.FCOSHead(
        input_shape=[ShapeSpec(channels=64, stride=stride) for stride in STRIDES],
        conv_dims=[64, 64],
        num_classes=5,
    )
    twin = detectron2_fcos.FCOS(
        backbone=model.backbone,
        head=head,
        num_classes=5,
        pixel_mean=model.pixel_mean.flatten().tolist(),
        pixel_std=model.pixel_std.flatten().tolist(),
    )
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


def test_detectron2_variant_trains_the_same(make_fcos):
    model = make_fcos(*DETECTRON2)
    twin = detectron2_twin(model).train()
    for _ in range(2):  # the second time with a moved average
        batch = make_batch()
        with EventStorage():
            losses, expected = model(batch), twin(batch)
        assert losses.keys() == expected.keys()
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5), name
    for detector, terms in ((model, losses), (twin, expected)):
        detector.head.zero_grad()
        sum(terms.values()).backward(retain_graph=True)
    for (name, parameter), other in zip(model.head.named_parameters(), twin.head.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_detectron2_variant_detects_the_same(make_fcos):
    model = make_fcos(*DETECTRON2).eval()
    with torch.no_grad():
        model.head.cls_score.bias.fill_(0.5)
        model.head.bbox_pred.bias.fill_(2.0)
        model.head.cls_score.weight.mul_(20)
    twin = detectron2_twin(model).eval()
    batch = [{"image": x["image"]} for x in make_batch()]
    with torch.no_grad():
        for ours, expected in zip(model(batch), twin(batch)):
            ours, expected = ours["instances"], expected["instances"]
            assert len(ours) > 10
            assert torch.equal(ours.pred_boxes.tensor, expected.pred_boxes.tensor)
            assert torch.equal(ours.scores, expected.scores)
            assert torch.equal(ours.pred_classes, expected.pred_classes)


@pytest.mark.parametrize("kind", ["fcos", "fcos_imprv"])
def test_targets_of_the_original(make_fcos, kind):
    """Labels, distances and centerness of boxes of all sizes, equal to the original's."""
    numbers = np.load(DATA / "fcos_targets.npz")
    model = make_fcos(config=f"quick/{kind}_R_18_baseline.yaml")
    height, width = numbers["hw"].tolist()
    features = [torch.zeros(2, 1, height // stride, width // stride) for stride in STRIDES]
    anchors = model.anchor_generator(features)
    instances = [
        Instances(
            (height, width),
            gt_boxes=Boxes(torch.from_numpy(numbers[f"boxes{i}"])),
            gt_classes=torch.from_numpy(numbers[f"labels{i}_0"]),
        )
        for i in (1, 2)
    ]
    labels, boxes = model.label_anchors(anchors, instances)
    distances = model._target_distances(anchors, boxes, torch.stack(labels) != 5)

    counts = [len(level) for level in anchors]
    levels = zip(torch.stack(labels).split(counts, 1), distances.split(counts, 1))
    for level, (labels, distances) in enumerate(levels):
        expected = numbers[f"{kind}_labels{level}"]  # 1-based, 0 is background
        labels = torch.where(labels == 5, 0, labels + 1).flatten()
        np.testing.assert_array_equal(labels.numpy(), expected)
        positive = expected > 0
        distances = distances.reshape(-1, 4)[positive]
        np.testing.assert_allclose(distances, numbers[f"{kind}_reg{level}"][positive], rtol=1e-6)
        centerness = centerness_target(distances)
        np.testing.assert_allclose(centerness, numbers[f"{kind}_ctr{level}"], rtol=1e-5)


def test_range_includes_its_limits_and_the_smaller_box_wins(make_fcos):
    """A position whose farthest side is 64 px away belongs to P3 and P4, as in the original; areas
    that differ by one pixel are told apart."""
    model = make_fcos("MODEL.FCOS.CENTER_SAMPLING_RADIUS", "0.0")
    anchors = model.anchor_generator([torch.zeros(1, 1, 256 // s, 256 // s) for s in STRIDES])
    boxes = torch.tensor([[4.0, 4.0, 84.0, 85.0], [4.0, 4.0, 84.0, 84.0]])  # centre not decisive
    instances = Instances((256, 256), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0, 1]))
    labels, _ = model.label_anchors(anchors, [instances])
    p3, p4 = labels[0].split([len(level) for level in anchors])[:2]
    # x = 20 on P3 (2.5 strides): 64 px to the right side at 84.
    assert p3.view(32, 32)[5, 2] == 1
    # On P4, x = 24 has 60 px and y = 72 has 68 px.
    assert p4.view(16, 16)[4, 1] == 1
    assert p4.view(16, 16)[1, 1] == 5


KINDS = ("cls", "reg", "ctr")


@pytest.fixture
def mmdet(make_fcos):
    """mmdet's FCOS, the first version, with the numbers of its head and their predictions."""
    numbers = np.load(DATA / "fcos_head.npz")
    model = make_fcos(
        *("MODEL.FCOS.IOU_SMOOTHING", 0.0, "MODEL.FCOS.NMS_THRESH_TEST", 0.5),
        *("MODEL.FCOS.NUM_CLASSES", 8),
        config="quick/fcos_R_18_baseline.yaml",
    )
    predictions = [torch.from_numpy(numbers[kind]).requires_grad_() for kind in KINDS]
    return model, numbers, predictions


def split_levels(numbers, predictions):
    """The feature maps' stand-ins, and each (N, R, K) prediction as the head gives it."""
    sizes = numbers["feat_sizes"].tolist()
    counts = [height * width for height, width in sizes]
    outputs = [
        [x.transpose(1, 2).unflatten(2, size) for x, size in zip(p.split(counts, dim=1), sizes)]
        for p in predictions
    ]
    return [torch.zeros(2, 1, *size) for size in sizes], outputs, counts


@pytest.mark.parametrize("case", ["both", "second_empty", "both_empty"])
def test_trains_as_mmdet(mmdet, case):
    """Targets, losses and gradients."""
    model, numbers, predictions = mmdet
    features, outputs, counts = split_levels(numbers, predictions)
    instances = [
        Instances(
            tuple(numbers["image_sizes"][i].tolist()),
            gt_boxes=Boxes(torch.from_numpy(numbers[f"{case}/gt{i}_boxes"])),
            gt_classes=torch.from_numpy(numbers[f"{case}/gt{i}_labels"]),
        )
        for i in (0, 1)
    ]
    labels, _ = model.label_anchors(model.anchor_generator(features), instances)
    np.testing.assert_array_equal(torch.stack(labels), numbers[f"{case}/labels"])
    with EventStorage():
        losses = model.forward_training(None, features, outputs, instances)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(float(numbers[f"{case}/{name}"]), rel=1e-5), name
    sum(losses.values()).backward()
    for kind, prediction in zip(KINDS, predictions):
        norms = [level.norm().item() for level in prediction.grad.split(counts, dim=1)]
        expected = numbers[f"{case}/gradient_norms_{kind}"]
        np.testing.assert_allclose(norms, expected, rtol=1e-4, atol=1e-9, err_msg=kind)


def test_detects_as_mmdet(mmdet, monkeypatch):
    """Up to the two things that differ: mmdet's score is without the square root, which changes no
    order, and it clips boxes to the image before NMS, as the model is made to do here."""
    model, numbers, predictions = mmdet
    features, outputs, _ = split_levels(numbers, predictions)
    images = ImageList(torch.zeros(2, 3, 160, 224), numbers["image_sizes"].tolist())
    decode = model._decode_multi_level_predictions

    def decode_and_clip(*args):
        candidates = decode(*args)
        candidates.pred_boxes.clip(candidates.image_size)
        return candidates[candidates.pred_boxes.nonempty()]

    monkeypatch.setattr(model, "_decode_multi_level_predictions", decode_and_clip)
    with torch.no_grad():
        results = model.eval().forward_inference(images, features, outputs)
    for i, result in enumerate(results):
        expected = {key: numbers[f"predicted{i}_{key}"] for key in ("boxes", "scores", "labels")}
        np.testing.assert_array_equal(result.pred_classes, expected["labels"])
        np.testing.assert_allclose(result.scores**2, expected["scores"], rtol=1e-5)
        np.testing.assert_allclose(result.pred_boxes.tensor, expected["boxes"], atol=1e-3)


# Turns distances from a position to the sides of a box into the box around the origin.
SIDES = torch.tensor([-1.0, -1.0, 1.0, 1.0])


@pytest.mark.parametrize("loss_type", ["iou", "giou"])
@pytest.mark.parametrize("weighted", [False, True])
def test_iou_loss_of_the_original(loss_type, weighted):
    numbers = np.load(DATA / "iou_losses.npz")
    predictions, targets = (torch.from_numpy(numbers[f"iou_{k}"]) for k in ("pred", "target"))
    loss = iou_loss(predictions * SIDES, targets * SIDES, loss_type, smoothing=1.0)
    if weighted:
        loss = loss * torch.from_numpy(numbers["iou_weight"])
    expected = float(numbers["iou_" + ("w_" if weighted else "") + loss_type])
    assert loss.sum().item() == pytest.approx(expected, rel=1e-5)


def test_iou_loss_of_boxes():
    """Without smoothing: torchvision's GIoU loss of the boxes; -log IoU by hand."""
    boxes, targets = torch.rand(2, 50, 4) * 10 * SIDES
    expected = generalized_box_iou_loss(boxes, targets)
    torch.testing.assert_close(iou_loss(boxes, targets, "giou"), expected)
    half = iou_loss(torch.tensor([0.0, -1, 1, 1]), torch.tensor([-1.0, -1, 1, 1]), "iou")
    assert half.item() == pytest.approx(np.log(2))


def test_degenerate_predictions_are_finite():
    distances = torch.zeros(3, 4, requires_grad=True)
    targets = torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0], [1e-3, 1, 1, 1]])
    for loss_type in ("iou", "giou"):
        loss = iou_loss(distances * SIDES, targets * SIDES, loss_type).sum()
        (gradient,) = torch.autograd.grad(loss, distances)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["fcos", "fcos_imprv"])
def test_no_objects(make_fcos, kind):
    model = make_fcos(config=f"quick/{kind}_R_18_baseline.yaml")
    with EventStorage():
        losses = model(make_batch(boxes=0))
    sum(losses.values()).backward()
    assert losses["loss_fcos_loc"] == 0
    assert losses["loss_fcos_ctr"] == 0
    assert losses["loss_fcos_cls"] > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_class_threshold(make_fcos):
    """A candidate below the class threshold is dropped, whatever its centerness."""
    model = make_fcos("MODEL.FCOS.CLASS_SCORE_THRESH_TEST", "0.3").eval()
    with torch.no_grad():
        model.head.bbox_pred.bias.fill_(2.0)
        model.head.ctrness.bias.fill_(9.0)
        model.head.cls_score.weight.zero_()
        model.head.cls_score.bias.copy_(torch.tensor([0.29, 0.31, 0.5, 0.1, 0.9]).logit())
        result = model([{"image": torch.rand(3, 64, 64) * 255}])[0]["instances"]
    assert set(result.pred_classes.tolist()) <= {1, 2, 4}
    assert result.scores.max().item() == pytest.approx(0.9**0.5, rel=1e-3)


def test_head_options():
    shape = [ShapeSpec(channels=8, stride=stride) for stride in (8, 16)]
    features = [torch.rand(1, 8, 4, 4), torch.rand(1, 8, 2, 2)]

    def head(**options):
        torch.manual_seed(0)
        head = FCOSHead(input_shape=shape, conv_dims=[8, 8], num_classes=3, norm="", **options)
        for parameter in head.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
        return head

    # Centerness from the other subnet, the rest unchanged.
    plain, other = head(), head(centerness_on_box_subnet=False)
    assert plain(features)[2][0].ne(other(features)[2][0]).any()
    assert plain(features)[0][0].equal(other(features)[0][0])
    subnet = plain.bbox_subnet(features[0])
    torch.testing.assert_close(plain(features)[2][0], plain.ctrness(subnet))
    torch.testing.assert_close(other(features)[2][0], other.ctrness(other.cls_subnet(features[0])))
    # The factor of each level, with ReLU or exp.
    for level, feature in enumerate(features):
        regression = plain.bbox_pred(plain.bbox_subnet(feature)) * plain.scales[level]
        torch.testing.assert_close(plain(features)[1][level], regression.relu())
    exponential = head(normalize_distances=False)
    torch.testing.assert_close(exponential(features)[1][1], regression.exp())
    assert head(level_scales=False).scales is None
    # The last convolution of both subnets samples where its offsets say.
    deformable = head(deformable_last_conv=True)
    keys = deformable.state_dict().keys()
    assert {"cls_subnet.2.offset.weight", "bbox_subnet.2.weight"} <= keys
    assert "cls_subnet.0.offset.weight" not in keys


@pytest.mark.parametrize("kind", [pytest.param("fcos", marks=pytest.mark.long), "fcos_imprv"])
def test_learns_to_detect_one_box(make_fcos, kind):
    """A few steps on one image, until its decoded box is right: units and offsets fit together."""
    model = make_fcos(config=f"quick/{kind}_R_18_baseline.yaml")
    box = torch.tensor([[18.0, 10.0, 42.0, 50.0]])
    instances = Instances((64, 64), gt_boxes=Boxes(box), gt_classes=torch.tensor([3]))
    image = torch.rand(3, 64, 64) * 60
    image[:, 10:50, 18:42] += 150
    batch = [{"image": image, "instances": instances}] * 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=50)
    with EventStorage():
        for _ in range(50):
            optimizer.zero_grad()
            sum(model(batch).values()).backward()
            optimizer.step()
            scheduler.step()
        predictions = model.head(
            list(model.backbone(model.preprocess_image(batch).tensor).values())
        )
        anchors = model.anchor_generator(predictions[0])
        predictions = model._transpose_dense_predictions(predictions, [5, 4, 1])
    logits, distances, centerness = (torch.cat(levels, 1)[0] for levels in predictions)
    best = (logits[:, 3].sigmoid() * centerness[:, 0].sigmoid()).argmax()
    decoded = model.box2box_transform.apply_deltas(
        distances[best][None], Boxes.cat(anchors).tensor[best][None]
    )
    # Short trainings differ in the last bits of their numbers, and then by some pixels.
    assert pairwise_iou(Boxes(decoded), Boxes(box)) > 0.75


def test_unknown_options(make_fcos):
    with pytest.raises(ValueError, match="BOX_REG_LOSS_TYPE is 'l1', expected 'iou' or 'giou'"):
        make_fcos("MODEL.FCOS.BOX_REG_LOSS_TYPE", "l1")
    with pytest.raises(ValueError, match="LOSS_NORMALIZER is 'sum', expected 'batch'"):
        make_fcos("MODEL.FCOS.LOSS_NORMALIZER", "sum")
