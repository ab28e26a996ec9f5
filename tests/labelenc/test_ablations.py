"""The variants that the paper's tables compare: Tables 2, 3, 5 and 6."""

import logging
import os

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.analysis import find_unused_parameters
from detectron2.utils.events import EventStorage

from labelenc import (
    LabelEncTrainer,
    feature_distance,
    inherit_step1_file,
    inherit_teacher,
    save_step1_file,
)
from labelenc.step1_file import labelenc_of
from plaindet.engine import Teacher

STEP1 = "quick/retinanet_R_18_labelenc_step1.yaml"
STEP2 = "quick/retinanet_R_18_labelenc_step2.yaml"
BASELINE = "quick/retinanet_R_18_baseline.yaml"
SHORT = ("SOLVER.MAX_ITER", "2", "MODEL.LABELENC.WARMUP_ITERS", "0")
SHORT += ("MODEL.LABELENC.CUTOFF_ITERS", "0")


def clone(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def changed(module, before):
    return {
        key for key, value in module.state_dict().items() if not torch.equal(value, before[key])
    }


def losses_of(trainer):
    with EventStorage():
        return trainer.model(next(iter(trainer.data_loader)))


@pytest.fixture
def step1_file(make_cfg, tmp_path):
    """The step-1 file of a network of other weights than step 2 will have."""
    torch.manual_seed(3)
    path = tmp_path / "label_encoder.pth"
    save_step1_file(build_model(make_cfg(STEP1)), str(path))
    torch.manual_seed(4)
    return path


def test_reconstruction_loss_only(make_cfg):
    """Table 2: the label encoder and the head learn from L1, and nothing is done with images."""
    cfg = make_cfg(STEP1, *SHORT, "MODEL.LABELENC.LAMBDA1", "0.0", "MODEL.LABELENC.LAMBDA2", "0.0")
    cfg.TEST.EVAL_PERIOD = 0
    trainer = LabelEncTrainer(cfg)
    model, labelenc = trainer.plain_model, labelenc_of(trainer.task)
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    with EventStorage():
        unused = find_unused_parameters(trainer.model, next(iter(trainer.data_loader)))
    assert not {n for n, p in trainer.task.named_parameters() if p.requires_grad} & set(unused)
    assert set(losses_of(trainer)) == {"loss_reconstruction_cls", "loss_reconstruction_box_reg"}
    parts = (model.backbone, labelenc.feature_adapter, labelenc.label_encoder, model.head)
    before = [clone(part) for part in parts]
    trainer._trainer.iter = 0
    with EventStorage():
        trainer._trainer.run_step()
    moved = [bool(changed(part, state)) for part, state in zip(parts, before)]
    assert moved == [False, False, True, True]
    assert calls == []


def test_without_distance_in_step_1(make_cfg):
    """LAMBDA2 0: as the warm-up, to the end."""
    trainer = LabelEncTrainer(make_cfg(STEP1, *SHORT, "MODEL.LABELENC.LAMBDA2", "0.0"))
    labelenc = labelenc_of(trainer.task)
    before = clone(labelenc.feature_adapter)
    trainer.train()
    assert not changed(labelenc.feature_adapter, before)
    assert not labelenc.distance_enabled


@pytest.mark.parametrize("supervision", [True, False])
@pytest.mark.parametrize("initialization", [True, False])
def test_supervision_and_initialization(make_cfg, step1_file, supervision, initialization):
    """Table 5: each on and off."""
    trainer = LabelEncTrainer(
        make_cfg(
            STEP2,
            *SHORT,
            *("MODEL.LABELENC.STEP1_FILE", str(step1_file)),
            *("MODEL.LABELENC.LAMBDA", str(float(supervision))),
            *("MODEL.LABELENC.INHERIT", str(initialization)),
        )
    )
    model, saved = trainer.plain_model, torch.load(step1_file, weights_only=True)
    encoder = labelenc_of(trainer.task).label_encoder
    before = clone(model)
    trainer.resume_or_load(resume=False)
    assert all(torch.equal(v, saved["label_encoder"][k]) for k, v in clone(encoder).items())
    moved = changed(model, before)
    assert ("head.cls_score.weight" in moved) == initialization
    assert ("backbone.fpn_output3.weight" in moved) == initialization
    assert not [key for key in moved if "bottom_up" in key]

    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == (2 if supervision else 0)
    batch = next(iter(trainer.data_loader))
    assert ("label_map" in batch[0]) == supervision


@pytest.mark.parametrize(
    ("student", "kept"),
    [
        ("retinanet_R_101", set()),
        ("retinanet_R_101_DCN", set()),
        (
            "retinanet_MobileNetV2",
            {"fpn_lateral3", "fpn_lateral4", "fpn_lateral5", "top_block.p6"},
        ),
    ],
)
def test_encoder_of_another_backbone(make_cfg, tmp_path, caplog, student, kept):
    """Table 3: the file of a step 1 with ResNet-50 serves other backbones. Where the widths differ,
    what reads the backbone keeps its initialisation."""
    path = str(tmp_path / "label_encoder.pth")
    step1 = build_model(make_cfg("LabelEnc/retinanet_R_50_FPN_step1.yaml"))
    save_step1_file(step1, path)
    model = build_model(make_cfg(f"LabelEnc/{student}_FPN_step2.yaml"))
    before = clone(model)
    caplog.set_level(logging.INFO, "labelenc.step1_file")
    inherit_step1_file(model, path)
    os.remove(path)
    encoder = step1.label_encoder.state_dict()
    for key, value in model.state_dict().items():
        layer = key.removeprefix("backbone.").rpartition(".")[0]
        if "bottom_up" in key or layer in kept:
            assert torch.equal(value, before[key]), key
        elif key.startswith("backbone."):
            assert torch.equal(value, encoder[key.removeprefix("backbone.")]), key
        else:
            assert torch.equal(value, step1.state_dict()[key]), key
    assert caplog.text.count("backbone.") == len(kept)


@pytest.fixture
def teacher_file(make_cfg, tmp_path):
    """The checkpoint of a plain RetinaNet, in eval mode."""
    torch.manual_seed(5)
    teacher = build_model(make_cfg(BASELINE))
    with torch.no_grad():
        for name, buffer in teacher.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    path = tmp_path / "teacher.pth"
    torch.save({"model": teacher.state_dict()}, path)
    torch.manual_seed(6)
    return path


def teacher_options(teacher_file, *overrides):
    opts = ["MODEL.RETINANET.NUM_CLASSES", 3, "DATASETS.TRAIN", ("tiny_train",), *overrides]
    return (
        *SHORT,
        *("MODEL.LABELENC.TEACHER.CONFIG_FILE", f"configs/{BASELINE}"),
        *("MODEL.LABELENC.TEACHER.WEIGHTS", str(teacher_file)),
        *("MODEL.LABELENC.TEACHER.OPTS", str(opts)),
    )


def test_vanilla_kd(make_cfg, teacher_file):
    """Table 6: a teacher's features in place of h(y), its head inherited, no label map."""
    trainer = LabelEncTrainer(make_cfg(STEP2, *teacher_options(teacher_file)))
    trainer.resume_or_load(resume=False)
    model, labelenc = trainer.plain_model, labelenc_of(trainer.task)
    teacher = labelenc.feature_teacher.model
    saved = torch.load(teacher_file, weights_only=True)["model"]
    assert not changed(teacher, saved)
    for key, value in model.state_dict().items():
        if "bottom_up" not in key:
            assert torch.equal(value, saved[key]), key

    batch = next(iter(trainer.data_loader))
    assert "label_map" not in batch[0]
    with EventStorage(), torch.no_grad():
        images = model.preprocess_image(batch).tensor
        features, expected = model.backbone(images), teacher.backbone(images)
        adapted = [labelenc.feature_adapter(feature) for feature in features.values()]
        distance = feature_distance(adapted, list(expected.values()))
        assert trainer.model(batch)["loss_distance"].item() == pytest.approx(
            distance.item(), rel=1e-5
        )

    model.vis_period = 1
    with EventStorage() as storage, torch.no_grad():
        trainer.model(batch)
        assert [name for name, *_ in storage._vis_data] == ["features_p4: image | teacher"]
    model.vis_period = 0

    # The teacher is in nothing that is trained, saved or distributed, and does not change.
    adapter = {
        f"training_only.LabelEnc.feature_adapter.{i}.{k}"
        for i in (0, 2, 4)
        for k in ("weight", "bias")
    }
    names = {name.removeprefix("detector.") for name, _ in trainer.task.named_parameters()}
    assert names - model.state_dict().keys() == adapter
    trainer.train()
    assert not changed(teacher, saved)
    assert not teacher.training
    assert changed(model.backbone, {k.removeprefix("backbone."): v for k, v in saved.items()})

    # What it trained is evaluated without the teacher's files.
    teacher_file.unlink()
    evaluated = build_model(make_cfg(STEP2, *teacher_options(teacher_file))).eval()
    file = os.path.join(trainer.cfg.OUTPUT_DIR, "model_final.pth")
    DetectionCheckpointer(evaluated).load(file)
    assert not changed(evaluated, model.state_dict())


def test_teacher_has_its_own_image_format(make_cfg):
    """A student of RGB images and a teacher of BGR images see the same picture."""
    model = build_model(make_cfg(BASELINE))
    image = torch.rand(3, 64, 64) * 255
    teacher = Teacher(model, "BGR")
    cpu = torch.device("cpu")
    expected = teacher.features([{"image": image}], "BGR", cpu)
    flipped = teacher.features([{"image": image.flip(0)}], "RGB", cpu)
    assert all(torch.equal(value, flipped[level]) for level, value in expected.items())
    assert not any(value.requires_grad for value in expected.values())


def test_teacher_of_another_colour_space(make_cfg, teacher_file):
    for teacher, student in (("HSV", "BGR"), ("BGR", "YUV-BT.601")):
        options = teacher_options(teacher_file, "INPUT.FORMAT", teacher)
        with pytest.raises(
            ValueError, match=f"images in {teacher}, the student's are in {student}"
        ):
            LabelEncTrainer(make_cfg(STEP2, *options, "INPUT.FORMAT", student))
    options = teacher_options(teacher_file, "INPUT.FORMAT", "HSV")
    LabelEncTrainer(make_cfg(STEP2, *options, "INPUT.FORMAT", "HSV"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.FPN.OUT_CHANNELS", 32], "teacher.pth does not fit this RetinaNet: it has "),
        (["MODEL.RETINANET.NUM_CONVS", 3], "teacher.pth does not fit this RetinaNet: it lacks "),
    ],
)
def test_teacher_that_does_not_fit_its_file(make_cfg, teacher_file, overrides, message):
    with pytest.raises(ValueError, match=message):
        LabelEncTrainer(make_cfg(STEP2, *teacher_options(teacher_file, *overrides)))


def test_head_of_another_detector_as_the_teacher(make_cfg):
    """ATSS and FCOS have heads of the same shapes, which mean different things."""
    student = build_model(make_cfg("quick/fcos_R_18_labelenc_step2.yaml"))
    student.set_feature_teacher(Teacher(build_model(make_cfg("quick/atss_R_18_baseline.yaml"))))
    with pytest.raises(ValueError, match="is of the class ATSS, expected FCOS, whose head"):
        inherit_teacher(student, "teacher.yaml")


def test_teacher_that_does_not_fit_the_student(make_cfg, teacher_file):
    options = teacher_options(teacher_file)
    narrow = make_cfg(STEP2, *options, "MODEL.FPN.OUT_CHANNELS", "32")
    with pytest.raises(ValueError, match="teacher's features are .*channels=64.*detector's .*=32"):
        LabelEncTrainer(narrow)
    deep = make_cfg(STEP2, *options, "MODEL.RETINANET.NUM_CONVS", "3")
    with pytest.raises(ValueError, match=f"{BASELINE} has another head: only in the config "):
        LabelEncTrainer(deep).resume_or_load(resume=False)
    without_norm = make_cfg(STEP2, *options, "MODEL.FPN.NORM", "")
    with pytest.raises(ValueError, match=f"{BASELINE} has another FPN: only in the config "):
        LabelEncTrainer(without_norm).resume_or_load(resume=False)
    other_boxes = make_cfg(STEP2, *options, "MODEL.RETINANET.BBOX_REG_WEIGHTS", "(5, 5, 5, 5)")
    with pytest.raises(ValueError, match=r"does not fit: box_weights is \[1.0, .* and \[5, 5, "):
        LabelEncTrainer(other_boxes).resume_or_load(resume=False)
    with pytest.raises(ValueError, match="STEP is 1, which trains the label encoder. A teacher"):
        build_model(make_cfg(STEP1, *options))
    without = make_cfg(STEP2, *options[:-4], "MODEL.LABELENC.TEACHER.WEIGHTS", "")
    with pytest.raises(ValueError, match="MODEL.LABELENC.TEACHER.WEIGHTS is empty"):
        LabelEncTrainer(without)
