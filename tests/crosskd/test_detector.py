"""CrossKD's training of dense detectors."""

import itertools

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from iteration import check_needs_teacher, check_training_run, losses_of, with_gradient
from torchvision.ops import box_iou, generalized_box_iou_loss

from crosskd.detector import Assignment, Predictions
from plaindet.modeling import ATSS, FCOS, GFL

PLAIN_CLASSES = {"retinanet": RetinaNet, "fcos": FCOS, "gfl": GFL, "atss": ATSS}
detectors = pytest.mark.parametrize("detector", PLAIN_CLASSES)
KD = {"loss_kd_cls", "loss_kd_box"}
STRIDES = [8, 16, 32, 64, 128]


@detectors
def test_gradient_of_distillation(make_trainer, detector):
    """It reaches the backbone and the subnets up to the position, and nothing behind it."""
    trainer = make_trainer(detector, "MODEL.CROSSKD.FEATURE_WEIGHT", "1.0")
    model, losses = trainer.model, losses_of(trainer)
    assert KD | {"loss_kd_feature"} < losses.keys()
    distilled = with_gradient(model, [losses[name] for name in KD])
    before = {f"head.{subnet}.{i}" for subnet in ("cls_subnet", "bbox_subnet") for i in (0, 1)}
    reached = {name.rpartition(".")[0] for name in distilled}
    assert {name for name in reached if name.startswith("head")} == before
    assert "backbone.bottom_up.stem.conv1" in reached
    features = with_gradient(model, [losses["loss_kd_feature"]])
    assert not any(name.startswith("head") for name in features)
    assert "backbone.fpn_output3.weight" in features
    detection = with_gradient(model, [v for k, v in losses.items() if not k.startswith("loss_kd")])
    assert "head.cls_score.weight" in detection
    assert "head.bbox_subnet.3.weight" in detection


@pytest.mark.parametrize(
    ("strategy", "reached"),
    [
        ("a", {"backbone", "before"}),
        ("b", {"backbone", "before", "after"}),
        ("c", {"backbone", "before", "after"}),
        ("d", {"after"}),
        ("mimicking", {"backbone", "before", "after"}),
    ],
)
def test_gradient_of_each_strategy(make_trainer, strategy, reached):
    """Fig. 1 of the supplement. In (d) the teacher's features go through the student's layers, so
    the backbone gets nothing but through the statistics that they are given."""
    trainer = make_trainer("retinanet", "MODEL.CROSSKD.STRATEGY", strategy)
    targets, distillation_losses = [], trainer.model.distillation_losses
    trainer.model.distillation_losses = lambda anchors, imitating, target, assignment: (
        targets.append(target) or distillation_losses(anchors, imitating, target, assignment)
    )
    losses = losses_of(trainer)
    # In (b) and (c) both of the predictions learn.
    (target,) = targets
    assert target.logits.requires_grad == (strategy in ("b", "c"))
    if strategy in ("b", "c"):
        for name, prediction in (("cls", target.logits), ("box", target.regression)):
            loss = losses[f"loss_kd_{name}"]
            (gradient,) = torch.autograd.grad(loss, prediction, retain_graph=True)
            assert gradient.abs().sum() > 0
    names = with_gradient(trainer.model, [losses["loss_kd_cls"]])
    found = set()
    for name in names:
        layer = name.split(".")
        is_after = layer[1] == "cls_score" or (layer[1] == "cls_subnet" and int(layer[2]) > 2)
        found.add("backbone" if layer[0] == "backbone" else "after" if is_after else "before")
    assert found >= reached
    if strategy == "a":
        assert "after" not in found


@pytest.mark.parametrize("strategy", ["a", "b", "c", "d"])
def test_features_and_head_of_each_strategy(make_trainer, strategy):
    """Fig. 1 of the supplement: (a) and (c) take the student's features through the teacher's head,
    (b) and (d) the teacher's through the student's."""
    model = (trainer := make_trainer("retinanet", "MODEL.CROSSKD.STRATEGY", strategy)).model
    calls, original = [], model.cross_head_predictions
    model.cross_head_predictions = lambda *args: calls.append(args) or original(*args)
    losses_of(trainer)
    ((held, reference, detector),) = calls
    is_student = strategy in ("a", "c")
    assert held.cls[0].requires_grad == held.box[0].requires_grad == is_student
    assert reference.cls[0].requires_grad == reference.box[0].requires_grad == (not is_student)
    assert detector is (model.teacher.model if is_student else model)


@detectors
def test_teacher_that_is_the_student(make_trainer, detector):
    """Held features are not negative, so re-scaling to their own statistics changes nothing; the
    cross-head predictions are then the teacher's own, and the losses those of equal inputs: 0."""
    trainer = make_trainer(
        detector,
        *("MODEL.RESNETS.DEPTH", "34", "MODEL.RESNETS.NORM", "FrozenBN"),
        *("MODEL.FPN.NORM", ""),
        teacher=("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""),
    )
    model = trainer.model
    model.load_state_dict(model.teacher.model.state_dict())
    losses = losses_of(trainer)
    assert losses["loss_kd_cls"].item() == pytest.approx(0, abs=1e-6)
    assert losses["loss_kd_box"].item() == pytest.approx(0, abs=1e-4)


@detectors
def test_batch_without_objects(make_trainer, detector):
    """Where nothing is positive the teacher still teaches, about as strongly as elsewhere."""
    trainer = make_trainer(detector)
    batch, losses = next(iter(trainer.data_loader)), []
    with EventStorage():
        losses.append(trainer.model(batch))
        for image in batch:
            image["instances"] = image["instances"][:0]
        losses.append(trainer.model(batch))
    for name in KD:
        assert 0 < losses[1][name] < 100 * losses[0][name]


@detectors
def test_detection_losses_are_the_plain_detector_s(make_trainer, make_cfg, detector):
    trainer = make_trainer(detector)
    plain = build_model(make_cfg(f"quick/{detector}_R_18_baseline.yaml")).train()
    plain.load_state_dict(trainer.model.state_dict(), strict=True)
    batch = next(iter(trainer.data_loader))
    with EventStorage():
        losses, expected = trainer.model(batch), plain(batch)
    assert losses.keys() - expected.keys() - {"loss_kd_centerness"} == KD
    assert ("loss_kd_centerness" in losses) == (detector == "atss")
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)


def by_hand(model, batch, position):
    """The cross-head predictions with plain loops, from the definition."""
    images = model.preprocess_image(batch).tensor
    student, teacher = model, model.teacher.model
    cross_head = {"cls": [], "box": []}
    for level in model.head_in_features:
        for kind, subnet in (("cls", "cls_subnet"), ("box", "bbox_subnet")):
            held = []
            for detector in (student, teacher):
                x = detector.backbone(images)[level]
                layers = list(getattr(detector.head, subnet))
                for layer in layers[: 3 * position]:
                    x = layer(x)
                held.append(x)
            x = torch.empty_like(held[0])
            for c in range(x.shape[1]):
                mine, other = held[0][:, c], held[1][:, c]
                deviations = [0 if t.numel() == 1 else t.std() for t in (mine, other)]
                x[:, c] = (mine - mine.mean()) / (deviations[0] + 1e-6) * deviations[
                    1
                ] + other.mean()
            x = x.relu() if position > 0 else x
            for layer in list(getattr(teacher.head, subnet))[3 * position :]:
                x = layer(x)
            predictor = teacher.head.cls_score if kind == "cls" else teacher.head.bbox_pred
            cross_head[kind].append(predictor(x))
    return cross_head


@pytest.mark.parametrize("position", [0, 1, 2])
def test_cross_head_predictions(make_trainer, position, monkeypatch):
    """At every position, levels of one cell included."""
    trainer = make_trainer("retinanet", "MODEL.CROSSKD.POSITION", str(position))
    model, batch = trainer.model, next(iter(trainer.data_loader))[:1]
    seen = []
    original = model.cross_head_predictions
    monkeypatch.setattr(
        model, "cross_head_predictions", lambda *args: seen.append(original(*args)) or seen[-1]
    )
    with EventStorage():
        model(batch)
        with torch.no_grad():
            expected = by_hand(model, batch, position)
    for prediction, kind, size in ((seen[0].logits, "cls", 3), (seen[0].regression, "box", 4)):
        flat = [
            x.unflatten(1, (-1, size)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in expected[kind]
        ]
        torch.testing.assert_close(prediction, torch.cat(flat, 1), rtol=1e-4, atol=1e-4)


@detectors
def test_training_run(make_trainer, detector):
    """The teacher does not change and is in no checkpoint; the result is the plain detector."""

    def detect_all(model):
        model.test_score_thresh = model.test_class_score_thresh = 0.0

    check_training_run(make_trainer(detector), PLAIN_CLASSES[detector], detect_all)


def test_resuming(make_trainer):
    """The teacher comes from its own files again, and the projection from the checkpoint."""
    wide = ("MODEL.FPN.OUT_CHANNELS", 96)
    make_trainer("retinanet", teacher=wide).train()
    trainer = make_trainer("retinanet", "SOLVER.MAX_ITER", "3", teacher=wide)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    checkpoint = torch.load(trainer.checkpointer.get_checkpoint_file(), weights_only=False)
    for state, module in (("model", trainer.model), ("training_only", trainer.model.training_only)):
        assert checkpoint[state].keys() == module.state_dict().keys()
        assert all(torch.equal(v, checkpoint[state][k]) for k, v in module.state_dict().items())
    trainer.train()
    assert trainer.iter == 3


@pytest.mark.parametrize("strategy", ["a", "d"])
def test_heads_of_another_width(make_trainer, strategy):
    """A learned projection takes the features to the other head, for training only."""
    trainer = make_trainer(
        "retinanet",
        "MODEL.CROSSKD.STRATEGY",
        strategy,
        teacher=("MODEL.FPN.OUT_CHANNELS", 96),
    )
    before = {k: v.clone() for k, v in trainer.model.training_only.state_dict().items()}
    assert before.keys() == {"cls_projection.weight", "box_projection.weight"}
    trainer.train()
    after = trainer.model.training_only.state_dict()
    assert not any(torch.equal(value, after[key]) for key, value in before.items())
    assert not any("projection" in key for key in trainer.model.state_dict())


def test_width_that_cannot_be_bridged(make_trainer):
    with pytest.raises(ValueError, match=r"widths \[64, 96\] .* strategy 'b' a projection"):
        make_trainer(
            "retinanet",
            *("MODEL.CROSSKD.STRATEGY", "b"),
            teacher=("MODEL.FPN.OUT_CHANNELS", 96),
        )


def test_padding_cells_do_not_count(make_cfg):
    """Cells that only the padding of a batch has get no weight, ignored anchors neither."""
    model = build_model(make_cfg("quick/retinanet_R_18_crosskd.yaml"))
    images = ImageList(torch.zeros(2, 3, 96, 128), [(96, 128), (40, 70)])
    features = [torch.zeros(2, 1, -(-96 // s), -(-128 // s)) for s in (8, 16, 32, 64, 128)]
    anchors = model.anchor_generator(features)
    labels = torch.full((2, sum(map(len, anchors))), 3)
    labels[0, :4], labels[1, 7] = torch.tensor([-1, 2, -1, 0]), 1
    assignment = model.assignment(anchors, list(labels), [], images)
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


ANCHORS = "MODEL.ANCHOR_GENERATOR.SIZES"


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (["MODEL.RETINANET.NUM_CLASSES", 5], "number of classes is 5, the student's is 3"),
        ([ANCHORS, [[16], [32], [64], [128], [256]]], "teacher's anchors"),
        (["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5], "anchor offset is 0.5, the student's is 0.0"),
        (
            ["MODEL.RETINANET.IN_FEATURES", ["p3", "p4"], ANCHORS, [[16]]],
            r"strides of the levels is \[8, 16\]",
        ),
        (
            ["MODEL.META_ARCHITECTURE", "FCOS", "MODEL.FCOS.NUM_CLASSES", 3],
            "meta-architecture is FCOS, the student's .* RetinaNet",
        ),
        (
            ["DATASETS.TRAIN", ("shapes_train",)],
            r"trained on shapes_train with disc, .* but tiny_train has red, green, blue\.",
        ),
    ],
)
def test_teacher_that_does_not_fit(make_trainer, teacher, message):
    with pytest.raises(ValueError, match=message):
        make_trainer("retinanet", teacher=teacher)


def test_feature_loss_needs_equal_channels(make_trainer):
    with pytest.raises(ValueError, match=r"channels .*FEATURE_WEIGHT, is \[96, .* is \[64, "):
        make_trainer(
            "retinanet",
            *("MODEL.CROSSKD.FEATURE_WEIGHT", "1.0"),
            teacher=("MODEL.FPN.OUT_CHANNELS", 96),
        )


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        (("CONFIG_FILE", "none.yaml"), FileNotFoundError, "CONFIG_FILE: none.yaml does not exist"),
        (("CONFIG_FILE", ""), ValueError, "MODEL.CROSSKD.TEACHER.CONFIG_FILE is empty"),
        (("WEIGHTS", "none.pth"), FileNotFoundError, "TEACHER.WEIGHTS: none.pth does not exist"),
    ],
)
def test_missing_files_of_a_teacher(make_trainer, option, error, message):
    with pytest.raises(error, match=message):
        make_trainer("retinanet", f"MODEL.CROSSKD.TEACHER.{option[0]}", option[1])


def test_config_of_a_run_is_not_its_plain_config(make_trainer, make_cfg, tmp_path):
    """config.yaml, which a run writes beside plain_config.yaml, has the keys of the methods."""
    path = tmp_path / "config.yaml"
    path.write_text(make_cfg("quick/retinanet_R_34_teacher.yaml").dump())
    message = (
        r"CONFIG_FILE: .*config.yaml is not .* plain detector .*CROSSKD.* plain_config.yaml in"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer("retinanet", "MODEL.CROSSKD.TEACHER.CONFIG_FILE", str(path))


def test_weights_of_a_part_of_the_teacher(make_trainer):
    options = str(["MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CONVS", 3])
    with pytest.raises(ValueError, match=r"retinanet_teacher.pth does not .* lacks head\."):
        make_trainer("retinanet", "MODEL.CROSSKD.TEACHER.OPTS", options)


def test_teacher_of_an_unknown_data_set(make_trainer, caplog):
    """A teacher from elsewhere: its classes are counted, but their names are not known."""
    make_trainer("retinanet", teacher=["DATASETS.TRAIN", ("elsewhere_train",)])
    assert "trained on elsewhere_train, which is not registered here" in caplog.text


def test_rounded_centres_of_anchors_do_not_decide_what_is_padding(read_cfg):
    """COCO's anchors that are not square have centres such as 127.99999 at x = 128."""
    cfg = read_cfg("CrossKD/retinanet_R_18_FPN_from_R_50.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    images = ImageList(torch.zeros(1, 3, 512, 512), [(128, 192)])
    anchors = model.anchor_generator([torch.zeros(1, 1, 512 // s, 512 // s) for s in STRIDES])
    labels = torch.full((1, sum(map(len, anchors))), 80)
    valid = model.assignment(anchors, list(labels), [], images).valid
    levels = valid.split([len(level) for level in anchors], dim=1)
    cells = [level.view(512 // s, 512 // s, 9) for level, s in zip(levels, STRIDES)]
    for level, stride in zip(cells, STRIDES):
        assert level[: -(-128 // stride), : -(-192 // stride)].all()
        assert level.sum() == 9 * -(-128 // stride) * -(-192 // stride)


@pytest.mark.parametrize(
    ("detector", "key", "value", "expected"),
    [
        ("retinanet", "STRATEGY", "e", "'a', 'b', 'c', 'd', 'mimicking'"),
        ("retinanet", "POSITION", 3, "0, 1, 2"),
        ("retinanet", "CLS_LOSS", "focal", "'qfl', 'bce'"),
        ("retinanet", "CLS_REGION", "none", "'all', 'positive', 'negative'"),
        ("gfl", "BOX_LOSS", "l2", "'giou', 'iou', 'l1', 'kl'"),
        # Their boxes are no distributions: the loss would be 0.
        ("retinanet", "BOX_LOSS", "kl", r"'giou', 'iou', 'l1'\]"),
        ("atss", "BOX_LOSS", "kl", r"'giou', 'iou', 'l1'\]"),
        ("fcos", "BOX_LOSS", "kl", r"'giou', 'iou', 'l1'\]"),
        ("retinanet", "CENTERNESS_WEIGHT", 1.0, r"\[0\]"),
        ("gfl", "CENTERNESS_WEIGHT", 1.0, r"\[0\]"),
    ],
)
def test_options(make_cfg, detector, key, value, expected):
    cfg = make_cfg(f"quick/{detector}_R_18_crosskd.yaml")
    cfg.MODEL.CROSSKD[key] = value
    with pytest.raises(ValueError, match=rf"MODEL.CROSSKD.{key} is .*, expected .*{expected}"):
        build_model(cfg)


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
    model = build_model(cfg)
    anchors = torch.tensor([[0.0, 0, 40, 40], [20, 10, 60, 50], [30, 30, 70, 70]])
    prediction, target = (
        Predictions(
            model,
            torch.randn(2, 3, 3) * 2,
            torch.randn(2, 3, 4 if detector == "atss" else 4 * 17),
            torch.randn(2, 3, 1) if detector == "atss" else None,
        )
        for _ in range(2)
    )
    positive = torch.tensor([[True, False, False], [False, True, False]])
    valid = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assignment = Assignment(positive, valid, torch.tensor(4.0))
    losses = model.distillation_losses([Boxes(anchors)], prediction, target, assignment)

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
            boxes = [model.box2box_transform.apply_deltas(x[None], anchors[a][None]) for x in sides]
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
    model, batch = trainer.model, next(iter(trainer.data_loader))
    with EventStorage(), torch.no_grad():
        loss, expected = model(batch)["loss_kd_feature"], 0.0
        images = model.preprocess_image(batch).tensor
        for student, teacher in zip(
            model.backbone(images).values(), model.teacher.model.backbone(images).values()
        ):
            difference = 0.0
            for feature, sign in ((student, 1), (teacher, -1)):
                channels = feature.transpose(0, 1).flatten(1)
                deviation = channels.std(dim=1, keepdim=True) + 1e-6
                difference += sign * (channels - channels.mean(dim=1, keepdim=True)) / deviation
            expected += 3 * difference.square().mean() / 2
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_normalizer_of_fcos(make_cfg):
    """The sum over the positives of the centerness (Eq. 3 of the FCOS paper)."""
    model = build_model(make_cfg("quick/fcos_R_18_crosskd.yaml"))
    instances = Instances((128, 128), gt_classes=torch.tensor([0, 2]))
    instances.gt_boxes = Boxes([[10.0, 12, 50, 70], [60, 20, 120, 100]])
    anchors = model.anchor_generator([torch.zeros(1, 1, 128 // s, 128 // s) for s in STRIDES])
    labels, boxes = model.label_anchors(anchors, [instances])
    images = ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)])
    assignment = model.assignment(anchors, labels, boxes, images)
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


def test_without_teacher(make_cfg):
    check_needs_teacher(build_model(make_cfg("quick/retinanet_R_18_crosskd.yaml")))
