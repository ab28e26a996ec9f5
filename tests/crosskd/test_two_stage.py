"""CrossKD's training of Faster R-CNN and Mask R-CNN."""

from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from iteration import (
    check_needs_teacher,
    check_training_run,
    losses_of,
    method_of,
    with_gradient,
)
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from plaindet import read_config
from plaindet.engine import Teacher
from plaindet.engine.adapters import RegionPredictions

detectors = pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
KD = {"loss_kd_cls", "loss_kd_box"}
POSITION = "MODEL.CROSSKD.POSITION"
NUM_CONV = "MODEL.ROI_BOX_HEAD.NUM_CONV"
# Without detectron2.model_zoo, which needs pkg_resources.
MODEL_ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
LAYERS = ["conv1", "fc1", "fc2"]  # of a box head with one convolution


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_gradient_of_distillation(make_trainer, position):
    """It reaches the backbone, the FPN and the box head up to the position, and nothing else."""
    trainer = make_trainer("mask_rcnn", POSITION, position, NUM_CONV, 1, teacher=[NUM_CONV, 1])
    model, losses = trainer.plain_model, losses_of(trainer)
    assert KD < losses.keys()
    for name in KD:
        reached = {name.rpartition(".")[0] for name in with_gradient(model, [losses[name]])}
        backbone = {name for name in reached if name.startswith("backbone")}
        assert {"backbone.bottom_up.stem.conv1", "backbone.fpn_output2"} < backbone
        before = {f"roi_heads.box_head.{layer}" for layer in LAYERS[:position]}
        assert {name for name in reached - backbone if "norm" not in name} == before
    detection = with_gradient(model, [v for k, v in losses.items() if k not in KD])
    for part in ("roi_heads.box_head.fc2", "roi_heads.box_predictor.cls_score"):
        assert f"{part}.weight" in detection


def test_mimicking(make_trainer):
    """The student's own predictions imitate, so all of its box head learns from the teacher."""
    trainer = make_trainer("faster_rcnn", "MODEL.CROSSKD.STRATEGY", "mimicking")
    losses = losses_of(trainer)
    reached = with_gradient(trainer.plain_model, [losses[name] for name in KD])
    assert {f"roi_heads.box_predictor.{x}.weight" for x in ("cls_score", "bbox_pred")} < reached
    assert not any(name.startswith("proposal_generator") for name in reached)


@detectors
@pytest.mark.parametrize("position", [0, 1])
def test_teacher_that_is_the_student(make_trainer, detector, position):
    """Re-scaling to their own statistics changes nothing; the cross-head predictions are then the
    teacher's own."""
    norms = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "")
    options = ("MODEL.RESNETS.DEPTH", 34, POSITION, position)
    trainer = make_trainer(detector, *norms, *options, teacher=norms)
    teacher = method_of(trainer.task).teacher.model
    trainer.plain_model.load_state_dict(teacher.state_dict())
    losses = losses_of(trainer)
    assert losses["loss_kd_cls"].item() == pytest.approx(0, abs=1e-6)
    assert losses["loss_kd_box"].item() == pytest.approx(0, abs=1e-4)


@detectors
def test_detection_losses_are_the_plain_detector_s(make_trainer, make_cfg, detector):
    """To the bit, and with the same random numbers."""
    trainer = make_trainer(detector)
    plain = build_model(make_cfg(f"quick/{detector}_R_18_baseline.yaml")).train()
    plain.load_state_dict(trainer.plain_model.state_dict(), strict=True)
    batch = next(iter(trainer.data_loader))
    found = []
    for model in (trainer.model, plain):
        torch.manual_seed(3)
        with EventStorage() as storage:
            losses = model(batch)
        found.append((losses, storage.latest(), torch.get_rng_state()))
    (losses, logged, state), (expected, expected_logged, expected_state) = found
    assert losses.keys() - expected.keys() == KD
    assert ("loss_mask" in losses) == (detector == "mask_rcnn")
    assert all(torch.equal(losses[name], loss) for name, loss in expected.items())
    assert logged == expected_logged
    assert torch.equal(state, expected_state)


def test_mixed_precision(make_trainer):
    """The losses are computed in float32."""
    trainer = make_trainer("faster_rcnn")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(trainer)
    for name in KD:
        assert losses[name].dtype == torch.float32
        assert 0 < losses[name] < float("inf")


@pytest.mark.parametrize("world_size", [1, 4])
def test_normalizer(make_cfg, world_size, monkeypatch):
    """The number of regions, averaged over processes."""
    model = build_model(make_cfg("quick/faster_rcnn_R_18_crosskd.yaml"))
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: world_size)
    # The other processes have no regions.
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    regions = [Boxes(torch.rand(8, 4))]
    predictions = [RegionPredictions(torch.randn(8, 4), torch.randn(8, 12)) for _ in range(2)]
    losses = method_of(model).distillation_losses(regions, *predictions)
    target = predictions[1].logits.softmax(1)
    divergence = F.kl_div(predictions[0].logits.log_softmax(1), target, reduction="sum")
    torch.testing.assert_close(losses["loss_kd_cls"], 0.5 * divergence / 8 * world_size)


def test_pictures_of_proposals(make_trainer):
    """As the plain detector's, every VIS_PERIOD iterations."""
    trainer = make_trainer("faster_rcnn", "VIS_PERIOD", 2)
    batch = next(iter(trainer.data_loader))
    with EventStorage(start_iter=2) as storage:
        trainer.model(batch)
        assert len(storage._vis_data) == 1


def run_by_hand(roi_heads, features, regions, start, stop):
    """The box head with one convolution from the pooled features, layer by layer."""
    head, x = roi_heads.box_head, features
    if start == 0:
        levels = [features[name] for name in ("p2", "p3", "p4", "p5")]
        x = roi_heads.box_pooler(levels, regions)
    if start < 1 <= stop:
        x = F.conv2d(x, head.conv1.weight, head.conv1.bias, padding=1).relu()
    if start < 2 <= stop:
        x = head.fc1(x.reshape(len(x), -1)).relu()
    if start < 3 <= stop:
        x = head.fc2(x).relu()
    return x


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_cross_head_predictions(make_trainer, position, monkeypatch):
    """Student features of the regions, each channel with the statistics of the teacher's, through
    the rest of the teacher's box head; and the teacher's own predictions of the same regions."""
    options = (POSITION, position, NUM_CONV, 1, "MODEL.RESNETS.NORM", "FrozenBN")
    trainer = make_trainer("faster_rcnn", *options, teacher=[NUM_CONV, 1])
    model, batch = trainer.plain_model, next(iter(trainer.data_loader))
    if position > 0:
        # The ReLU leaves all channels alive. The deviation of one that is positive in a single
        # region is near the epsilon, which the alignment's fused kernel puts in another place.
        torch.nn.init.constant_(getattr(model.roi_heads.box_head, LAYERS[position - 1]).bias, 2.0)
    seen = []
    method = method_of(trainer.task)
    original = method.distillation_losses
    monkeypatch.setattr(
        method, "distillation_losses", lambda *args: seen.extend(args) or original(*args)
    )
    with EventStorage():
        trainer.model(batch)
    regions, predictions, target, _ = seen

    held = []
    with torch.no_grad():
        for detector in (model, method.teacher.model):
            features = detector.backbone(detector.preprocess_image(batch).tensor)
            held.append(run_by_hand(detector.roi_heads, features, regions, 0, position))
        aligned = torch.empty_like(held[1])
        for c in range(aligned.shape[1]):
            mine, other = held[0][:, c], held[1][:, c]
            aligned[:, c] = (mine - mine.mean()) / (mine.std() + 1e-6) * other.std() + other.mean()
        if position > 0:
            aligned = aligned.relu()
        teacher = method.teacher.model.roi_heads
        for x, actual in ((aligned, predictions), (held[1], target)):
            if position == 0:
                x = F.conv2d(
                    x, teacher.box_head.conv1.weight, teacher.box_head.conv1.bias, padding=1
                ).relu()
            x = run_by_hand(teacher, x, regions, max(position, 1), 3)
            logits, deltas = teacher.box_predictor.cls_score(x), teacher.box_predictor.bbox_pred(x)
            torch.testing.assert_close(actual.logits, logits, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(actual.deltas, deltas, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls_loss", ["kl", "qfl"])
@pytest.mark.parametrize("box_loss", ["l1", "giou"])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_distillation_losses(make_cfg, cls_loss, box_loss, class_agnostic):
    """Region by region from the definition."""
    cfg = make_cfg("quick/faster_rcnn_R_18_crosskd.yaml")
    cfg.MODEL.CROSSKD.CLS_LOSS, cfg.MODEL.CROSSKD.BOX_LOSS = cls_loss, box_loss
    cfg.MODEL.CROSSKD.CLS_TEMPERATURE, cfg.MODEL.CROSSKD.BOX_WEIGHT = 2.0, 3.0
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = class_agnostic
    model = build_model(cfg)
    corners = torch.rand(5, 2) * 50
    boxes = Boxes(torch.cat([corners, corners + 10 + torch.rand(5, 2) * 40], dim=1))
    regions = [boxes[:2], boxes[2:]]
    prediction, target = (
        RegionPredictions(torch.randn(5, 4) * 2, torch.randn(5, 4 if class_agnostic else 12))
        for _ in range(2)
    )
    prediction.logits.requires_grad_()
    losses = method_of(model).distillation_losses(regions, prediction, target)

    expected = dict.fromkeys(KD, 0)
    transform = model.roi_heads.box_predictor.box2box_transform
    for i in range(5):
        p, q = prediction.logits[i], target.logits[i]
        if cls_loss == "kl":
            p, q = (p / 2).softmax(0), (q / 2).softmax(0)
            expected["loss_kd_cls"] += 0.5 * 2**2 * (q * (q.log() - p.log())).sum() / 5
        else:
            p, q = p.softmax(0)[:3], q.softmax(0)[:3]
            entropy = -(q * p.log() + (1 - q) * (1 - p).log())
            expected["loss_kd_cls"] += 0.5 * ((p - q).abs() * entropy).sum() / 5
        scores = target.logits[i].softmax(0)[:3]
        k = 0 if class_agnostic else scores.argmax().item()
        deltas = [x.deltas[i : i + 1, 4 * k : 4 * k + 4] for x in (prediction, target)]
        if box_loss == "l1":
            distance = (deltas[0] - deltas[1]).abs().sum()
        else:
            decoded = [transform.apply_deltas(x, boxes.tensor[i : i + 1]) for x in deltas]
            distance = generalized_box_iou_loss(*decoded, reduction="sum")
        expected["loss_kd_box"] += 3 * scores.max() * distance / 5
    for name in KD:
        torch.testing.assert_close(losses[name], expected[name])
    losses["loss_kd_cls"].backward()
    assert prediction.logits.grad.isfinite().all()


CASCADE = (
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
    *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
)
NORMS = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "")


def test_cascade(make_trainer, monkeypatch):
    """The regions of each stage go through the same stage of the teacher, and teach what is in
    front of them in their own stage."""
    trainer = make_trainer("faster_rcnn", *CASCADE, *NORMS, POSITION, 1, teacher=[*CASCADE, *NORMS])
    model, batch = trainer.plain_model, next(iter(trainer.data_loader))
    method, seen = method_of(trainer.task), []
    original = method.distillation_losses
    monkeypatch.setattr(
        method, "distillation_losses", lambda *args: seen.append(args) or original(*args)
    )
    with EventStorage():
        losses = trainer.model(batch)
    expected = {f"{name}_stage{i}" for name in KD for i in range(3)}
    assert {name for name in losses if "kd" in name} == expected
    for stage in range(3):
        reached = with_gradient(model, [losses[f"{name}_stage{stage}"] for name in KD])
        heads = {x.rpartition(".")[0] for x in reached if x.startswith("roi_heads")}
        assert heads == {f"roi_heads.box_head.{stage}.fc1"}
        assert "backbone.fpn_output2.weight" in reached
    assert not torch.equal(seen[0][0][0].tensor[:4], seen[1][0][0].tensor[:4])

    teacher = method.teacher.model
    with torch.no_grad():
        features = teacher.backbone(teacher.preprocess_image(batch).tensor)
        roi_heads = teacher.roi_heads
        for regions, _, target, stage in seen:
            x = roi_heads.box_pooler([features[f"p{i}"] for i in range(2, 6)], regions)
            logits, deltas = roi_heads.box_predictor[stage](roi_heads.box_head[stage](x))
            torch.testing.assert_close(target.logits, logits)
            torch.testing.assert_close(target.deltas, deltas)


@pytest.mark.parametrize("position", [0, 1])
def test_cascade_with_a_teacher_that_is_the_student(make_trainer, position):
    options = (*CASCADE, *NORMS, "MODEL.RESNETS.DEPTH", 34, POSITION, position)
    trainer = make_trainer("faster_rcnn", *options, teacher=[*CASCADE, *NORMS])
    model, method = trainer.plain_model, method_of(trainer.task)
    model.load_state_dict(method.teacher.model.state_dict())
    losses = losses_of(trainer)
    for stage in range(3):
        assert losses[f"loss_kd_cls_stage{stage}"].item() == pytest.approx(0, abs=1e-6)
        assert losses[f"loss_kd_box_stage{stage}"].item() == pytest.approx(0, abs=1e-4)


def test_cascade_teaches_the_backbone_as_one_stage(make_trainer):
    """As the detection losses of a cascade, whose gradients it scales in front of the box heads."""
    trainer = make_trainer("faster_rcnn", *CASCADE, teacher=CASCADE)
    with EventStorage():
        seen = trainer.task.adapter.observe(next(iter(trainer.data_loader)))
    boxes, held, _ = seen.head[0]
    (scaled,) = torch.autograd.grad(held.sum(), seen.features["p2"], retain_graph=True)
    levels = [seen.features[f"p{i}"] for i in range(2, 6)]
    pooled = trainer.plain_model.roi_heads.box_pooler(levels, boxes)
    (whole,) = torch.autograd.grad(pooled.sum(), seen.features["p2"])
    assert whole.any()
    torch.testing.assert_close(3 * scaled, whole, rtol=1e-4, atol=1e-3)


def test_cascades_of_another_width(make_trainer):
    """Each stage has a projection of its own."""
    width = ["MODEL.ROI_BOX_HEAD.FC_DIM", 320]
    trainer = make_trainer("faster_rcnn", *CASCADE, POSITION, 1, teacher=[*CASCADE, *width])
    state = method_of(trainer.task).state_dict()
    assert {key: x.shape for key, x in state.items()} == {
        f"projection_stage{i}.weight": (320, 256) for i in range(3)
    }
    losses = losses_of(trainer)
    kd = [loss for name, loss in losses.items() if "kd" in name]
    assert len(with_gradient(method_of(trainer.task), kd)) == 3


@detectors
def test_training_run(make_trainer, detector):
    """The teacher does not change and is in no checkpoint; the result is the plain detector."""

    def detect_all(model):
        model.roi_heads.box_predictor.test_score_thresh = 0.0

    found = check_training_run(make_trainer(detector), GeneralizedRCNN, detect_all)
    assert ("pred_masks" in found) == (detector == "mask_rcnn")


@pytest.mark.parametrize(
    ("position", "teacher", "shape"),
    [
        (0, ["MODEL.FPN.OUT_CHANNELS", 96], (96, 64, 1, 1)),
        (1, ["MODEL.ROI_BOX_HEAD.FC_DIM", 320], (320, 256)),
    ],
)
def test_box_heads_of_another_width(make_trainer, position, teacher, shape):
    """A learned projection takes the features to the other head, for training only."""
    trainer = make_trainer("faster_rcnn", POSITION, position, teacher=teacher)
    method = method_of(trainer.task)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    assert {key: value.shape for key, value in before.items()} == {"projection.weight": shape}
    trainer.train()
    after = method.state_dict()
    assert not torch.equal(after["projection.weight"], before["projection.weight"])
    assert not any("projection" in key for key in trainer.task.state_dict())

    resumed = make_trainer("faster_rcnn", POSITION, position, teacher=teacher)
    resumed.resume_or_load(resume=True)
    state = method_of(resumed.task).state_dict()
    assert torch.equal(state["projection.weight"], after["projection.weight"])


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "meta-architecture is ProposalNetwork"),
        (
            [
                *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
                *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
            ],
            "ROI heads is CascadeROIHeads, the student's is StandardROIHeads",
        ),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 5], "number of classes is 5, the student's is 3"),
        (["MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4"]], r"strides of the pooled .* \[8, 16\]"),
        (["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 14], r"resolution of the .* is \(14, 14\)"),
        (["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True], "box deltas is 4, .* is 12"),
        (
            ["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0)],
            "weights of the box deltas",
        ),
        (["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True], "USE_SIGMOID_CE is True"),
        (["MODEL.ROI_BOX_HEAD.NUM_FC", 1], "POSITION is 2, but .* has only 1 layers"),
        (
            [NUM_CONV, 2, "MODEL.ROI_BOX_HEAD.NUM_FC", 1],
            r"size of features at position 2 is \(7, 7\), the student's is \(\)",
        ),
        (["DATASETS.TRAIN", ("shapes_train",)], "trained on shapes_train with disc"),
    ],
)
def test_teacher_that_does_not_fit(make_trainer, teacher, message):
    with pytest.raises(ValueError, match=message):
        make_trainer("faster_rcnn", POSITION, 2, teacher=teacher)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CROSSKD.STRATEGY", "b", "is 'b', expected one of .*'a', 'mimicking'"),
        ("CROSSKD.POSITION", 3, "is 3, expected one of .*0, 1, 2"),
        ("CROSSKD.CLS_LOSS", "bce", "is 'bce', expected one of .*'kl', 'qfl'"),
        ("CROSSKD.BOX_LOSS", "kl", "is 'kl', expected one of .*'l1', 'giou', 'iou'"),
        ("CROSSKD.CLS_REGION", "positive", "is 'positive', expected one of .*'all'"),
        ("CROSSKD.CENTERNESS_WEIGHT", 1.0, "is 1.0, expected one of .*0"),
        ("CROSSKD.FEATURE_WEIGHT", 1.0, "is 1.0, expected one of .*0"),
        ("CROSSKD.BOX_TEMPERATURE", 2.0, "is 2.0, expected one of .*1"),
        ("CROSSKD.QUERIES", "student", "is 'student', expected one of .*'teacher'"),
        ("ROI_HEADS.NAME", "Res5ROIHeads", "is 'Res5ROIHeads', expected one of .*Standard"),
        ("ROI_BOX_HEAD.USE_SIGMOID_CE", True, "is True, expected one of .*False"),
        ("ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True, "is True, expected one of .*False"),
        ("PROPOSAL_GENERATOR.NAME", "PrecomputedProposals", r"is 'Precomputed.*\['RPN'\]"),
    ],
)
def test_options(make_cfg, key, value, message):
    cfg = make_cfg("quick/faster_rcnn_R_18_crosskd.yaml", f"MODEL.{key}", value)
    if value == "Res5ROIHeads":
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p5"]
    with pytest.raises(ValueError, match=f"MODEL.{key} {message}"):
        build_model(cfg)


def test_teacher_of_the_model_zoo(read_cfg):
    """Detectron2's own baseline fits the student's config."""
    cfg = read_cfg("CrossKD/faster_rcnn_R_18_FPN_from_R_50.yaml")
    teacher = read_config(MODEL_ZOO / "COCO-Detection" / "faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = teacher.MODEL.DEVICE = "cpu"
    student = build_model(cfg)
    student.set_teacher(Teacher(build_model(teacher), teacher.INPUT.FORMAT))
    assert not [*student.training_only.parameters()]


def test_without_teacher(make_cfg):
    check_needs_teacher(build_model(make_cfg("quick/faster_rcnn_R_18_crosskd.yaml")))
