"""CrossKD's training of dense detectors."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.events import EventStorage
from iteration import (
    check_needs_teacher,
    check_training_run,
    losses_of,
    method_of,
    with_gradient,
)

from plaindet.modeling import ATSS, FCOS, GFL

PLAIN_CLASSES = {"retinanet": RetinaNet, "fcos": FCOS, "gfl": GFL, "atss": ATSS}
detectors = pytest.mark.parametrize("detector", PLAIN_CLASSES)
KD = {"loss_kd_cls", "loss_kd_box"}


@detectors
def test_gradient_of_distillation(make_trainer, detector):
    """It reaches the backbone and the subnets up to the position, and nothing behind it."""
    trainer = make_trainer(detector, "MODEL.CROSSKD.FEATURE_WEIGHT", "1.0")
    model, losses = trainer.plain_model, losses_of(trainer)
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
    method = method_of(trainer.task)
    targets, distillation_losses = [], method.distillation_losses
    method.distillation_losses = lambda anchors, imitating, target, assignment: (
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
    names = with_gradient(trainer.plain_model, [losses["loss_kd_cls"]])
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
    trainer = make_trainer("retinanet", "MODEL.CROSSKD.STRATEGY", strategy)
    method = method_of(trainer.task)
    calls, original = [], method.cross_head_predictions
    method.cross_head_predictions = lambda *args: calls.append(args) or original(*args)
    losses_of(trainer)
    ((held, reference, adapter),) = calls
    is_student = strategy in ("a", "c")
    assert held.cls[0].requires_grad == held.box[0].requires_grad == is_student
    assert reference.cls[0].requires_grad == reference.box[0].requires_grad == (not is_student)
    assert adapter.detector is (method.teacher.model if is_student else trainer.plain_model)


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
    teacher = method_of(trainer.task).teacher.model
    trainer.plain_model.load_state_dict(teacher.state_dict())
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
    plain.load_state_dict(trainer.plain_model.state_dict(), strict=True)
    batch = next(iter(trainer.data_loader))
    with EventStorage():
        losses, expected = trainer.model(batch), plain(batch)
    assert losses.keys() - expected.keys() - {"loss_kd_centerness"} == KD
    assert ("loss_kd_centerness" in losses) == (detector == "atss")
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)


def by_hand(student, teacher, batch, position):
    """The cross-head predictions with plain loops, from the definition."""
    images = student.preprocess_image(batch).tensor
    cross_head = {"cls": [], "box": []}
    for level in student.head_in_features:
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
    method, batch = method_of(trainer.task), next(iter(trainer.data_loader))[:1]
    seen = []
    original = method.cross_head_predictions
    monkeypatch.setattr(
        method, "cross_head_predictions", lambda *args: seen.append(original(*args)) or seen[-1]
    )
    with EventStorage():
        trainer.model(batch)
        with torch.no_grad():
            expected = by_hand(trainer.plain_model, method.teacher.model, batch, position)
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
    task = trainer.task
    for state, module in (("model", task.detector), ("training_only", task.training_only)):
        assert checkpoint[state].keys() == module.state_dict().keys()
        assert all(torch.equal(v, checkpoint[state][k]) for k, v in module.state_dict().items())
    trainer.train()
    assert trainer.iter == 3


@pytest.mark.parametrize("strategy", ["a", "b", "c", "d"])
def test_heads_of_another_width(make_trainer, strategy):
    """A learned projection takes the features to the other head, for training only."""
    trainer = make_trainer(
        "retinanet",
        "MODEL.CROSSKD.STRATEGY",
        strategy,
        teacher=("MODEL.FPN.OUT_CHANNELS", 96),
    )
    method = method_of(trainer.task)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    assert before.keys() == {"cls_projection.weight", "box_projection.weight"}
    trainer.train()
    after = method.state_dict()
    assert not any(torch.equal(value, after[key]) for key, value in before.items())
    assert not any("projection" in key for key in trainer.task.state_dict())


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
        (
            ["INPUT.FORMAT", "YUV-BT.601"],
            "trained on images in YUV-BT.601, the student's are in BGR, .*INPUT.FORMAT YUV-BT.601",
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
        r"CONFIG_FILE: .*config.yaml is not .* plain detector .*CROSSKD.* plain_config.yaml beside"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer("retinanet", "MODEL.CROSSKD.TEACHER.CONFIG_FILE", str(path))


def test_weights_of_a_part_of_the_teacher(make_trainer):
    options = str(["MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CONVS", 3])
    message = (
        r"TEACHER: cannot build the teacher of .*R_34_teacher.yaml .*retinanet_teacher.pth does "
        r"not .* lacks head\..* is the plain_config.yaml beside its checkpoint"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer("retinanet", "MODEL.CROSSKD.TEACHER.OPTS", options)


def test_weights_of_more_than_the_teacher(make_trainer):
    """All of the config's parameters are there, but the file is of a deeper head."""
    options = str(["MODEL.RETINANET.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CONVS", 1])
    message = r"retinanet_teacher.pth does not .* more layers, head.cls_subnet.3.weight"
    with pytest.raises(ValueError, match=message):
        make_trainer("retinanet", "MODEL.CROSSKD.TEACHER.OPTS", options)


def test_teacher_of_an_unknown_data_set(make_trainer, caplog):
    """A teacher from elsewhere: its classes are counted, but their names are not known."""
    make_trainer("retinanet", teacher=["DATASETS.TRAIN", ("elsewhere_train",)])
    assert "trained on elsewhere_train, which is not registered here" in caplog.text


@pytest.mark.parametrize(
    ("detector", "key", "value", "expected"),
    [
        ("retinanet", "STRATEGY", "e", "'a', 'b', 'c', 'd', 'mimicking'"),
        ("retinanet", "POSITION", 3, "0, 1, 2"),
        ("retinanet", "CLS_LOSS", "focal", "'qfl', 'bce'"),
        ("retinanet", "CLS_GAMMA", 0.5, "0 or at least 1"),
        ("faster_rcnn", "CLS_GAMMA", -1.0, "0 or at least 1"),
        ("retinanet", "CLS_REGION", "none", "'all', 'positive', 'negative'"),
        ("gfl", "BOX_LOSS", "l2", "'giou', 'iou', 'l1', 'kl'"),
        # Their boxes are no distributions: the loss would be 0.
        ("retinanet", "BOX_LOSS", "kl", r"'giou', 'iou', 'l1'\]"),
        ("atss", "BOX_LOSS", "kl", r"'giou', 'iou', 'l1'\]"),
        ("fcos", "BOX_LOSS", "kl", r"'giou', 'iou', 'l1'\]"),
        ("retinanet", "CENTERNESS_WEIGHT", 1.0, r"\[0\]"),
        ("gfl", "CENTERNESS_WEIGHT", 1.0, r"\[0\]"),
        ("gfl", "CLS_TEMPERATURE", 2.0, r"\[1\]"),
        ("gfl", "QUERIES", "student", r"\['teacher'\]"),
    ],
)
def test_options(make_cfg, detector, key, value, expected):
    cfg = make_cfg(f"quick/{detector}_R_18_crosskd.yaml")
    cfg.MODEL.CROSSKD[key] = value
    with pytest.raises(ValueError, match=rf"MODEL.CROSSKD.{key} is .*, expected .*{expected}"):
        build_model(cfg)


def test_without_teacher(make_cfg):
    check_needs_teacher(build_model(make_cfg("quick/retinanet_R_18_crosskd.yaml")))
