"""The configs of CrossKD for COCO: their numbers, and a training iteration of each."""

import inspect
import os
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

import train_net
from crosskd import CrossKD, CrossKDTrainer, DenseCrossKD, TwoStageCrossKD
from plaindet.engine import Teacher

FOLDER = Path(train_net.__file__).parent / "configs" / "CrossKD"

ONE, TWO = ((58640, 80630), 87960), ((117280, 161260), 175920)
# config: schedule of 12 or 24 epochs, teacher
SCHEDULE = {
    "gfl_R_50_FPN_from_R_101": (ONE, "gfl_R_101"),
    "gfl_R_18_FPN_from_R_50": (ONE, "gfl_R_50"),
    "gfl_R_18_FPN_from_R_101": (ONE, "gfl_R_101"),
    "gfl_R_34_FPN_from_R_101": (ONE, "gfl_R_101"),
    "retinanet_R_50_FPN_from_R_101": (TWO, "retinanet_R_101"),
    "retinanet_R_18_FPN_from_R_50": (ONE, "retinanet_R_50"),
    "retinanet_R_50_FPN_from_Swin_T": (ONE, "retinanet_Swin_T"),
    "atss_R_50_FPN_from_R_101": (ONE, "atss_R_101"),
    "fcos_R_50_FPN_from_R_101": (TWO, "fcos_R_101"),
    "faster_rcnn_R_18_FPN_from_R_50": (ONE, "faster_rcnn_R_50_FPN_1x"),
    "mask_rcnn_R_18_FPN_from_R_50": (ONE, "mask_rcnn_R_50_FPN_1x"),
}
# detector: position; kind and weight of the box loss; weights of classes and centerness
LOSSES = {
    "gfl": (3, "kl", 4, 1, 0),
    "retinanet": (3, "giou", 1, 1, 0),
    "atss": (3, "giou", 1, 1, 1),
    "fcos": (2, "iou", 0.75, 0.4, 0),
    "faster": (0, "l1", 1, 0.5, 0),
    "mask": (0, "l1", 1, 0.5, 0),
}


# Variants: what they change of the config of this name without their ending.
FEATURE_WEIGHT = {"gfl": 6.0, "retinanet": 2.0, "atss": 1.0, "fcos": 2.0}
VARIANTS = {
    f"{name}_pkd": {"FEATURE_WEIGHT": FEATURE_WEIGHT[detector]}
    for name in SCHEDULE
    if (detector := name.partition("_")[0]) in FEATURE_WEIGHT
}
TABLES = {  # 1 and 4 of the supplement
    "bce": {"CLS_LOSS": "bce"},
    "bce_positive": {"CLS_LOSS": "bce", "CLS_REGION": "positive"},
    "bce_negative": {"CLS_LOSS": "bce", "CLS_REGION": "negative"},
    "strategy_b": {"STRATEGY": "b"},
    "strategy_c": {"STRATEGY": "c"},
    "strategy_d": {"STRATEGY": "d"},
    "mimicking": {"STRATEGY": "mimicking"},
}
VARIANTS.update({f"gfl_R_18_FPN_from_R_50_{ending}": keys for ending, keys in TABLES.items()})


def options_of(method, crosskd):
    """What the method gets, with its own defaults."""
    defaults = {key: x.default for key, x in inspect.signature(method).parameters.items()}
    return {**defaults, **method.settings(crosskd)}


@pytest.mark.parametrize("method", CrossKD.__subclasses__())
def test_defaults(read_cfg, method):
    """Those of the config are the constructor's, or none."""
    crosskd = read_cfg("quick/retinanet_R_18_baseline.yaml").MODEL.CROSSKD
    for key, parameter in inspect.signature(method).parameters.items():
        if key != "teacher" and crosskd[key.upper()] is not None:
            assert crosskd[key.upper()] == parameter.default, key


def test_every_config_is_in_the_table():
    found = {path.stem for path in FOLDER.glob("*.yaml")}
    # Of test_deformable_detr.py and test_families.py.
    found = {name for name in found if "deformable_detr" not in name and "_ViT_" not in name}
    assert {name for name in found if not name[0].isupper()} == {*SCHEDULE, *VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(read_cfg, name):
    original = next(x for x in SCHEDULE if name.startswith(x + "_"))
    cfg, expected = read_cfg(f"CrossKD/{name}.yaml"), read_cfg(f"CrossKD/{original}.yaml")
    assert cfg.OUTPUT_DIR == f"{expected.OUTPUT_DIR}{name[len(original) :]}"
    expected.OUTPUT_DIR = cfg.OUTPUT_DIR
    for key, value in VARIANTS[name].items():
        assert expected.MODEL.CROSSKD[key] != value
        expected.MODEL.CROSSKD[key] = value
    assert cfg == expected
    if not name.endswith("_pkd"):
        cfg.MODEL.DEVICE = "cpu"
        build_model(cfg)


@pytest.mark.parametrize("name", SCHEDULE)
def test_settings_of_the_official_code(read_cfg, name):
    cfg, detector = read_cfg(f"CrossKD/{name}.yaml"), name.partition("_")[0]
    solver, crosskd = cfg.SOLVER, cfg.MODEL.CROSSKD
    method = TwoStageCrossKD if detector in ("faster", "mask") else DenseCrossKD
    options = options_of(method, crosskd)
    (steps, max_iter), teacher = SCHEDULE[name]
    assert (solver.STEPS, solver.MAX_ITER, solver.IMS_PER_BATCH) == (steps, max_iter, 16)
    is_rcnn = detector in ("faster", "mask")
    base_lr = 0.02 if is_rcnn else 0.01
    assert (solver.BASE_LR, solver.WARMUP_ITERS, solver.WEIGHT_DECAY) == (base_lr, 500, 1e-4)
    assert LOSSES[detector] == (
        options["position"],
        options["box_loss"],
        options["box_weight"],
        options["cls_weight"],
        options.get("centerness_weight", 0),
    )
    cls_loss = "kl" if is_rcnn else "qfl"
    assert [options[x] for x in ("strategy", "cls_loss", "cls_gamma")] == ["a", cls_loss, 1]
    assert options.get("cls_temperature", 1) == 1
    if is_rcnn:  # which is trained here
        expected = FOLDER.parent / "PlainDet" / f"{teacher}.yaml"
        assert os.path.samefile(crosskd.TEACHER.CONFIG_FILE, expected)
        assert crosskd.TEACHER.WEIGHTS == f"output/{teacher}/model_final.pth"
        assert read_cfg(f"PlainDet/{teacher}.yaml").OUTPUT_DIR == f"output/{teacher}"
    else:
        assert crosskd.TEACHER.CONFIG_FILE == f"output/teachers/{teacher}.yaml"
        assert crosskd.TEACHER.WEIGHTS == f"output/teachers/{teacher}.pth"
    assert cfg.MODEL.MASK_ON == (detector == "mask")
    if detector == "fcos":
        assert (solver.WARMUP_METHOD, round(solver.WARMUP_FACTOR, 3)) == ("constant", 0.333)
        assert (solver.BIAS_LR_FACTOR, solver.WEIGHT_DECAY_BIAS) == (2, 0)
        clip = solver.CLIP_GRADIENTS
        assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 35)
        assert (cfg.INPUT.FORMAT, cfg.MODEL.FPN.TOP_BLOCK) == ("BGR", "LastLevelP6P7")
        assert cfg.MODEL.PIXEL_MEAN == [102.9801, 115.9465, 122.7717]
        assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 800)
    else:
        assert (solver.WARMUP_METHOD, solver.WARMUP_FACTOR) == ("linear", 0.001)
        assert (solver.BIAS_LR_FACTOR, solver.WEIGHT_DECAY_BIAS) == (1, 1e-4)
        assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("RGB", False)
        assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
        assert cfg.INPUT.MIN_SIZE_TRAIN == (800,)
    if is_rcnn:
        box_head, box_loss = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.RPN.BBOX_REG_LOSS_TYPE
        assert (box_head.POOLER_TYPE, box_head.POOLER_SAMPLING_RATIO) == ("ROIAlignV2", 0)
        assert box_head.BBOX_REG_LOSS_TYPE == box_loss == "smooth_l1"
        assert box_head.SMOOTH_L1_BETA == cfg.MODEL.RPN.SMOOTH_L1_BETA == 0  # L1
    else:
        assert cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE == "p5"
        nms_threshold = cfg.MODEL[detector.upper()].NMS_THRESH_TEST
        assert nms_threshold == (0.5 if detector in ("retinanet", "fcos") else 0.6)
        assert cfg.MODEL.FPN.TOP_BLOCK.endswith("WithoutReLU") == (detector != "fcos")


@pytest.mark.parametrize("name", SCHEDULE)
def test_one_iteration(make_cfg, name):
    """At a small size, without pretrained weights, with a teacher like the student."""
    cfg = make_cfg(f"CrossKD/{name}.yaml")
    student = build_model(cfg).train()
    cfg.MODEL.META_ARCHITECTURE = type(student.detector).__name__
    student.set_teacher(Teacher(build_model(cfg), cfg.INPUT.FORMAT))
    batch = next(iter(CrossKDTrainer.build_train_loader(cfg)))
    with EventStorage():
        losses = student(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_kd_cls"] > 0
    assert losses["loss_kd_box"] > 0
