"""Both methods in one training, against each of them alone."""

import logging

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage
from iteration import check_needs_teacher, check_training_run

from labelenc import LabelEncTrainer
from plaindet.engine import PlainTrainer, Teacher, plain_cfg, training_methods
from plaindet.modeling import GFL

NAMES = {
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
    "gfl": "GFL",
    "atss": "ATSS",
    "faster_rcnn": "GeneralizedRCNN",
    "mask_rcnn": "GeneralizedRCNN",
}


@pytest.mark.parametrize("detector", NAMES)
def test_losses_are_those_of_both(make_cfg, detector):
    """The detector's, CrossKD's and LabelEnc's, as each method alone computes them."""
    cfg = make_cfg(f"quick/{detector}_R_18_labelenc_step2.yaml")
    cfg.MODEL.CROSSKD = make_cfg(f"quick/{detector}_R_18_crosskd.yaml").MODEL.CROSSKD
    teacher = Teacher(build_model(make_cfg(f"quick/{detector}_R_34_teacher.yaml")))
    mapper = LabelEncTrainer.build_train_mapper(cfg)
    batch = next(iter(LabelEncTrainer.build_train_loader(cfg, mapper)))

    models, losses = {}, {}
    for method in ("LabelEncCrossKD", "LabelEnc", "CrossKD"):
        cfg.MODEL.META_ARCHITECTURE = method + NAMES[detector]
        model = models[method] = build_model(cfg).train()
        if method != "LabelEnc":
            model.set_teacher(teacher)
        both = models["LabelEncCrossKD"]
        model.load_state_dict(both.state_dict())
        for name, module in model.training_only.items():
            module.load_state_dict(both.training_only[name].state_dict())
        torch.manual_seed(0)  # of sampled proposals
        with EventStorage():
            losses[method] = model(batch)

    found = losses["LabelEncCrossKD"]
    assert found.keys() == losses["LabelEnc"].keys() | losses["CrossKD"].keys()
    assert {"loss_kd_cls", "loss_kd_box", "loss_distance"} < found.keys()
    for method in ("LabelEnc", "CrossKD"):
        for name, expected in losses[method].items():
            torch.testing.assert_close(found[name], expected, msg=f"{name} of {method}")
    # So are the gradients, with LabelEnc's auxiliary loss next to all of CrossKD's.
    sum(found.values()).backward()
    losses["LabelEnc"]["loss_distance"].backward()
    sum(losses["CrossKD"].values()).backward()
    alone = [dict(models[method].named_parameters()) for method in ("LabelEnc", "CrossKD")]
    for name, parameter in both.named_parameters():
        if parameter.requires_grad:
            gradients = (x[name].grad for x in alone if name in x and x[name].grad is not None)
            expected = sum(gradients)
            scale = expected.abs().max().item()
            torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-5 * (1 + scale))


def test_training_run(make_method_cfg):
    """It starts from the step-1 file, leaves LabelEnc out after the cut-off, and ends in the plain
    detector; the teacher and the label encoder do not change."""
    cfg = make_method_cfg("labelenc_crosskd", "gfl")
    trainer = PlainTrainer(cfg)
    trainer.resume_or_load(resume=False)
    model, labelenc = trainer.plain_model, trainer.task.training_only["LabelEnc"]
    step1 = torch.load(cfg.MODEL.LABELENC.STEP1_FILE, weights_only=True)
    inherited = {key: model.state_dict()[key].clone() for key in step1["head"]}
    assert all(torch.equal(value, step1["head"][key]) for key, value in inherited.items())

    distances = []
    auxiliary_loss = labelenc.auxiliary_loss
    labelenc.auxiliary_loss = lambda *args: distances.append(auxiliary_loss(*args)) or distances[-1]
    check_training_run(trainer, GFL, prepare)
    # The first is of the check for unused parameters.
    assert [x.item() > 0 for x in distances[1:]] == [True, True, False, False]
    encoder = labelenc.label_encoder.state_dict()
    assert all(torch.equal(value, step1["label_encoder"][key]) for key, value in encoder.items())
    assert not all(torch.equal(value, model.state_dict()[k]) for k, value in inherited.items())


def prepare(model):
    """All detections of random weights."""
    model.test_score_thresh = 0.0


def test_resuming(make_cfg, make_method_cfg):
    """The feature adapter and the projection of the teacher's features come from the checkpoint."""
    cfg = make_method_cfg("labelenc_crosskd", "gfl")
    wide = ["MODEL.FPN.OUT_CHANNELS", 96]
    teacher = build_model(make_cfg("quick/gfl_R_34_teacher.yaml", *wide))
    torch.save({"model": teacher.state_dict()}, cfg.MODEL.CROSSKD.TEACHER.WEIGHTS)
    cfg.MODEL.CROSSKD.TEACHER.OPTS += wide
    first = PlainTrainer(cfg)
    first.resume_or_load(resume=False)
    first.train()
    cfg.SOLVER.MAX_ITER = 5
    trainer = PlainTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    expected = first.task.training_only.state_dict()
    found = trainer.task.training_only.state_dict()
    parts = {".".join(key.split(".")[:2]) for key in found}
    assert parts > {"LabelEnc.feature_adapter", "CrossKD.cls_projection"}
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    trainer.train()


def test_step1_is_labelenc_s_own(make_method_cfg):
    cfg = make_method_cfg("labelenc_crosskd", "gfl", "MODEL.LABELENC.STEP", "1")
    with pytest.raises(ValueError, match="STEP is 1, but together with CrossKD .* trains step 2"):
        build_model(cfg)


@pytest.mark.parametrize("name", sorted({*NAMES.values()}))
def test_short_names(read_cfg, caplog, name):
    """They say what they are short for."""
    cfg = read_cfg("quick/gfl_R_18_labelenc_crosskd.yaml")
    for short, methods in (
        ("LabelEncCrossKD", ["LabelEnc", "CrossKD"]),
        ("LabelEnc", ["LabelEnc"]),
        ("CrossKD", ["CrossKD"]),
    ):
        cfg.MODEL.META_ARCHITECTURE = short + name
        assert training_methods(cfg) == methods
        caplog.set_level(logging.INFO, "plaindet.engine.build")
        assert plain_cfg(cfg).MODEL.META_ARCHITECTURE == name
        assert f"{short}{name} is short for {name} with MODEL.TRAINING_METHODS" in caplog.text
        plain = META_ARCH_REGISTRY.get(short + name).plain_class()
        assert plain is META_ARCH_REGISTRY.get(name)


def test_without_teacher(make_method_cfg):
    check_needs_teacher(build_model(make_method_cfg("labelenc_crosskd", "gfl")))
