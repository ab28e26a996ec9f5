"""What GFL and ATSS share: the numbers of mmdet's heads, ignored positions, batches without
objects, inference, options."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from plaindet.engine import check_num_classes

DATA = Path(__file__).parent.parent / "data" / "plaindet"
# The predictions of each detector.
KINDS = {"GFL": ["cls", "reg"], "ATSS": ["cls", "reg", "ctr"]}
LOSSES = {
    "GFL": {"loss_cls", "loss_box_reg", "loss_dfl"},
    "ATSS": {"loss_cls", "loss_box_reg", "loss_centerness"},
}
both_detectors = pytest.mark.parametrize("name", KINDS)


@pytest.fixture
def make_detector(read_cfg):
    def make(name, *overrides):
        cfg = read_cfg(f"quick/{name.lower()}_R_18_baseline.yaml")
        cfg.merge_from_list([f"MODEL.{name}.ANCHOR_SCALE", 8.0, *overrides])
        return build_model(cfg).train()

    return make


def load_numbers(name):
    """The stored numbers, and the head's predictions (N, R, K) with gradients."""
    numbers = dict(np.load(DATA / f"{name.lower()}_head.npz"))
    if name == "GFL":  # only where it matters
        image, position = numbers["reg_index"]
        dense = np.zeros((*numbers["cls"].shape[:2], 68), dtype=np.float32)
        dense[image, position] = numbers["reg"]
        numbers["reg"] = dense
    predictions = [torch.from_numpy(numbers[kind]).requires_grad_() for kind in KINDS[name]]
    return numbers, predictions


def as_head_outputs(numbers, predictions):
    """For each (N, R, K) prediction a list of (N, K, Hi, Wi), one for each level."""
    sizes = numbers["feat_sizes"].tolist()
    counts = [height * width for height, width in sizes]
    return [
        [x.transpose(1, 2).unflatten(2, size) for x, size in zip(p.split(counts, dim=1), sizes)]
        for p in predictions
    ]


def make_features(numbers):
    return [torch.zeros(2, 1, *size) for size in numbers["feat_sizes"].tolist()]


def make_instances(numbers, case):
    return [
        Instances(
            tuple(numbers["image_sizes"][i].tolist()),
            gt_boxes=Boxes(torch.from_numpy(numbers[f"{case}/gt{i}_boxes"])),
            gt_classes=torch.from_numpy(numbers[f"{case}/gt{i}_labels"]),
        )
        for i in (0, 1)
    ]


def make_batch(*num_boxes, size=(128, 160)):
    batch = []
    for count in num_boxes:
        corners = torch.rand(count, 2) * torch.tensor([100.0, 70.0])
        instances = Instances(size)
        instances.gt_boxes = Boxes(torch.cat([corners, corners + 8 + torch.rand(count, 2) * 50], 1))
        instances.gt_classes = torch.randint(0, 8, (count,))
        batch.append({"image": torch.rand(3, *size) * 255, "instances": instances})
    return batch


@both_detectors
@pytest.mark.parametrize("case", ["both", "second_empty", "both_empty"])
def test_trains_as_mmdet(make_detector, name, case):
    """Targets, normaliser, losses and gradients. One image is smaller than the batch."""
    model = make_detector(name)
    numbers, predictions = load_numbers(name)
    features, instances = make_features(numbers), make_instances(numbers, case)

    labels, boxes = map(
        torch.stack, model.label_anchors(model.anchor_generator(features), instances)
    )
    expected = numbers[f"{case}/labels"]  # -1 for ignored ones
    np.testing.assert_array_equal(labels.numpy(), expected)
    positive = (expected >= 0) & (expected < 8)
    np.testing.assert_array_equal(boxes[positive].numpy(), numbers[f"{case}/target_boxes"])
    assert model.num_positives(labels).item() == numbers[f"{case}/num_positives"]

    outputs = as_head_outputs(numbers, predictions)
    losses = model.forward_training(None, features, outputs, instances)
    assert losses.keys() == LOSSES[name]
    for key, loss in losses.items():
        assert loss.item() == pytest.approx(float(numbers[f"{case}/{key}"]), rel=1e-5), key
    sum(losses.values()).backward()
    counts = [height * width for height, width in numbers["feat_sizes"].tolist()]
    for kind, prediction in zip(KINDS[name], predictions):
        norms = [level.norm().item() for level in prediction.grad.split(counts, dim=1)]
        np.testing.assert_allclose(
            norms, numbers[f"{case}/gradient_norms_{kind}"], rtol=1e-4, atol=1e-9, err_msg=kind
        )


@both_detectors
def test_detects_as_mmdet(make_detector, name):
    model = make_detector(name).eval()
    numbers, predictions = load_numbers(name)
    images = SimpleNamespace(image_sizes=[tuple(size) for size in numbers["image_sizes"].tolist()])
    with torch.no_grad():
        outputs = as_head_outputs(numbers, predictions)
        results = model.forward_inference(images, make_features(numbers), outputs)
    for i, result in enumerate(results):
        expected = {key: numbers[f"predicted{i}_{key}"] for key in ("boxes", "scores", "labels")}
        np.testing.assert_allclose(result.pred_boxes.tensor, expected["boxes"], atol=1e-3)
        np.testing.assert_allclose(result.scores, expected["scores"], rtol=1e-5)
        np.testing.assert_array_equal(result.pred_classes, expected["labels"])


@both_detectors
def test_positions_outside_an_images_own_padding_do_not_matter(make_detector, name):
    model = make_detector(name)
    numbers, predictions = load_numbers(name)
    features, instances = make_features(numbers), make_instances(numbers, "both")
    outside = torch.from_numpy(numbers["both/labels"]) == -1
    assert not outside[0].any()
    assert outside[1].any()
    totals = []
    for value in (0.0, 5.0):
        changed = [p.detach().masked_fill(outside[..., None], value) for p in predictions]
        losses = model.forward_training(
            None, features, as_head_outputs(numbers, changed), instances
        )
        totals.append(sum(losses.values()))
    assert totals[0] == totals[1]


@both_detectors
def test_losses_are_float32(make_detector, name):
    """With predictions in half precision, as under AMP."""
    model = make_detector(name)
    numbers, predictions = load_numbers(name)
    features, instances = make_features(numbers), make_instances(numbers, "both")
    outputs = as_head_outputs(numbers, [p.bfloat16() for p in predictions])
    losses = model.forward_training(None, features, outputs, instances)
    for key, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(float(numbers[f"both/{key}"]), rel=0.02), key


@both_detectors
@pytest.mark.parametrize("num_boxes", [(0, 0), (3, 0)])
def test_images_without_objects(make_detector, name, num_boxes):
    model = make_detector(name)
    with EventStorage():
        losses = model(make_batch(*num_boxes))
    sum(losses.values()).backward()
    assert losses.pop("loss_cls") > 0
    assert all((loss > 0) == any(num_boxes) for loss in losses.values())
    # Every parameter takes part, which DDP needs.
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@both_detectors
def test_inference_limits(make_detector, name):
    """The number of candidates of each level and of detections, and the score threshold; boxes are
    on the image."""
    model = make_detector(name, f"MODEL.{name}.TOPK_CANDIDATES_TEST", 3).eval()
    with torch.no_grad():
        model.head.cls_score.bias.fill_(1.0)
        image = {"image": torch.rand(3, 100, 90) * 255}
        result = model([image])[0]["instances"]
        assert 0 < len(result) <= 3 * 5
        assert result.pred_boxes.nonempty().all()
        assert result.pred_boxes.tensor.min() >= 0
        assert (result.pred_boxes.tensor.amax(dim=0) <= torch.tensor([90, 100, 90, 100])).all()
        model.test_topk_candidates, model.max_detections_per_image = 1000, 4
        assert len(model([image])[0]["instances"]) == 4
        model.head.cls_score.bias.fill_(-9.0)
        assert len(model([image])[0]["instances"]) == 0


@both_detectors
def test_head_in_parts(make_detector, name):
    """`predict` on the outputs of the subnets gives what the head gives; each level has a factor,
    and only the boxes have."""
    head = make_detector(name).head
    features = [torch.rand(1, 64, size, size) for size in (8, 4, 2, 1, 1)]
    outputs = head(features)
    assert head.scales.shape == (5,)
    for level, feature in enumerate(features):
        parts = head.predict(head.cls_subnet(feature), head.bbox_subnet(feature), level)
        assert len(parts) == len(outputs)
        assert all(torch.equal(part, out[level]) for part, out in zip(parts, outputs))
    with torch.no_grad():
        head.scales[1] = 3
    changed = head(features)
    torch.testing.assert_close(changed[1][1], 3 * outputs[1][1])
    for kind, level in ((0, 1), (1, 0), (-1 if name == "ATSS" else 0, 1)):
        assert torch.equal(changed[kind][level], outputs[kind][level])


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("GFL", "ANCHOR_SCALE", 0.0, "a positive number"),
        ("ATSS", "ASSIGNER_CANDIDATES", 0, "1 or more"),
        ("GFL", "REG_MAX", 0, "1 or more"),
        ("GFL", "QUALITY_FOCAL_BETA", -1.0, "0 or more"),
        ("ATSS", "BBOX_REG_WEIGHTS", (10.0, 5.0), "4 numbers"),
    ],
)
def test_bad_options(make_detector, name, key, value, expected):
    with pytest.raises(ValueError, match=rf"{key} is .*, expected {expected}"):
        make_detector(name, f"MODEL.{name}.{key}", value)


@both_detectors
def test_number_of_classes_is_checked(make_cfg, name):
    cfg = make_cfg(f"quick/{name.lower()}_R_18_baseline.yaml", f"MODEL.{name}.NUM_CLASSES", 4)
    with pytest.raises(ValueError, match=f"MODEL.{name}.NUM_CLASSES is 4"):
        check_num_classes(build_model(cfg), cfg.DATASETS.TRAIN)
