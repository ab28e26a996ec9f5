"""The configs of the LabelEnc paper for COCO: their numbers, and a training iteration of each."""

from pathlib import Path

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage

import train_net
from labelenc import LabelEnc
from plaindet.engine import PlainTrainer, Teacher, plain_cfg
from plaindet.modeling import DeformableBottleneckBlock

FOLDER = Path(train_net.__file__).parent / "configs"

R50 = "ImageNetPretrained/MSRA/R-50.pkl"
R101 = "ImageNetPretrained/MSRA/R-101.pkl"
SWIN = "swin_tiny_patch4_window7_224.pth?matching_heuristics=True"
R18 = "models/resnet18-f37072fd.pth"
MOBILENET = "models/mobilenet_v2-7ebf99e0.pth"
# Learning rates.
DENSE, TWO_STAGE = 0.01, 0.02
# config: (learning rate, weights of the backbone)
PLAIN = {
    "retinanet_R_50_FPN_1x": (DENSE, R50),
    "retinanet_R_101_FPN_1x": (DENSE, R101),
    "retinanet_R_101_DCN_FPN_1x": (DENSE, R101),
    "retinanet_MobileNetV2_FPN_1x": (DENSE, MOBILENET),
    "retinanet_Swin_T_FPN_1x": (DENSE, SWIN),
    "fcos_R_50_FPN_1x": (DENSE, R50),
    "fcos_imprv_R_50_FPN_1x": (DENSE, R50),
    "fcos_imprv_R_50_DCN_FPN_1x": (DENSE, R50),
    "fcos_imprv_R_101_FPN_1x": (DENSE, R101),
    "fcos_imprv_R_101_DCN_FPN_1x": (DENSE, R101),
    "gfl_R_50_FPN_1x": (DENSE, R50),
    "gfl_R_101_FPN_2x_ms": (DENSE, R101),
    "atss_R_50_FPN_1x": (DENSE, R50),
    "atss_R_101_FPN_1x": (DENSE, R101),
    "atss_R_101_FPN_2x_ms": (DENSE, R101),
    "faster_rcnn_R_18_FPN_1x": (TWO_STAGE, R18),
    "faster_rcnn_R_50_FPN_1x": (TWO_STAGE, R50),
    "faster_rcnn_R_101_FPN_1x": (TWO_STAGE, R101),
    "faster_rcnn_R_101_DCN_FPN_1x": (TWO_STAGE, R101),
    "mask_rcnn_R_50_FPN_1x": (TWO_STAGE, R50),
    "mask_rcnn_R_101_FPN_1x": (TWO_STAGE, R101),
}
# config: lambda_1 and lambda_2
STEP1 = {
    "retinanet_R_50_FPN_step1": (1, 1),
    "retinanet_R_50_FPN_step1_reconstruction_only": (0, 0),
    "retinanet_R_101_FPN_step1": (1, 1),
    "fcos_R_50_FPN_step1": (1, 1),
    "fcos_imprv_R_50_FPN_step1": (1, 1),
    "fcos_imprv_R_50_DCN_FPN_step1": (1, 1),
    "faster_rcnn_R_50_FPN_step1": (1, 1),
    "mask_rcnn_R_50_FPN_step1": (1, 1),
}
# config: the step 1 that it starts from
STEP2 = {
    "retinanet_R_50_FPN_step2": "retinanet_R_50_FPN_step1",
    "retinanet_R_101_FPN_step2": "retinanet_R_50_FPN_step1",
    "retinanet_R_101_DCN_FPN_step2": "retinanet_R_50_FPN_step1",
    "retinanet_MobileNetV2_FPN_step2": "retinanet_R_50_FPN_step1",
    "fcos_R_50_FPN_step2": "fcos_R_50_FPN_step1",
    "fcos_imprv_R_50_FPN_step2": "fcos_imprv_R_50_FPN_step1",
    "fcos_imprv_R_101_FPN_step2": "fcos_imprv_R_50_FPN_step1",
    "fcos_imprv_R_101_DCN_FPN_step2": "fcos_imprv_R_50_DCN_FPN_step1",
    "faster_rcnn_R_50_FPN_step2": "faster_rcnn_R_50_FPN_step1",
    "faster_rcnn_R_101_FPN_step2": "faster_rcnn_R_50_FPN_step1",
    "faster_rcnn_R_101_DCN_FPN_step2": "faster_rcnn_R_50_FPN_step1",
    "mask_rcnn_R_50_FPN_step2": "mask_rcnn_R_50_FPN_step1",
    "mask_rcnn_R_101_FPN_step2": "mask_rcnn_R_50_FPN_step1",
}
# config: the teacher
VANILLA_KD = {
    "retinanet_MobileNetV2_FPN_vanilla_kd_from_R_50": "retinanet_R_50_FPN_1x",
    "retinanet_R_50_FPN_vanilla_kd_from_R_50": "retinanet_R_50_FPN_1x",
    "retinanet_R_50_FPN_vanilla_kd_from_R_101": "retinanet_R_101_FPN_1x",
}
# These have mmdet's solver, the others that of the LabelEnc paper.
MMDET = {name for name in PLAIN if name.startswith(("gfl", "atss", "faster_rcnn_R_18"))}
LABELENC = {**STEP1, **STEP2, **VANILLA_KD}
COCO = [f"PlainDet/{name}.yaml" for name in PLAIN] + [f"LabelEnc/{name}.yaml" for name in LABELENC]


def test_every_config_is_in_the_tables():
    found = {str(path.relative_to(FOLDER)) for path in FOLDER.glob("[LP]*/*.yaml")}
    shared = {path for path in found if Path(path).name[0].isupper()}  # Base-..., Step1, ...
    # Those of Deformable DETR are in plaindet/test_deformable_detr.py, those of ViTDet and what is
    # in no paper in test_families.py.
    others = {path for path in found if "deformable_detr" in path or "_ViT_" in path}
    assert found - shared - others == set(COCO)


@pytest.mark.parametrize("config", COCO)
def test_settings_of_the_paper(read_cfg, config):
    """Sec. 4.1, and what the paper's code adds to it."""
    cfg, name = read_cfg(config), Path(config).stem
    plain = name if name in PLAIN else name.partition("_FPN")[0] + "_FPN_1x"
    base_lr, weights = PLAIN[plain]
    solver, labelenc = cfg.SOLVER, cfg.MODEL.LABELENC
    is_mmdet = name in MMDET
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.GAMMA) == (16, base_lr, 0.1)
    assert solver.WARMUP_ITERS == 500
    assert solver.WARMUP_FACTOR == pytest.approx(0.001 if is_mmdet else 1 / 3, rel=1e-3)
    assert solver.WARMUP_METHOD == ("constant" if "fcos" in name else "linear")
    biases = (solver.BIAS_LR_FACTOR, solver.WEIGHT_DECAY_BIAS)
    assert biases == ((1, 1e-4) if is_mmdet else (2, 0))
    assert solver.WEIGHT_DECAY_NORM == (1e-4 if "fcos" in name or is_mmdet else 0)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.9, 1e-4)
    multi_scale = name.endswith("_2x_ms")
    assert cfg.INPUT.MIN_SIZE_TRAIN == ((480, 800) if multi_scale else (800,))
    assert not multi_scale or cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    assert cfg.INPUT.MIN_SIZE_TEST == 800
    assert cfg.INPUT.MAX_SIZE_TRAIN == cfg.INPUT.MAX_SIZE_TEST == 1333
    test = () if "reconstruction_only" in name else ("coco_2017_val",)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("coco_2017_train",), test)
    assert (cfg.MODEL.WEIGHTS or cfg.MODEL.TIMM.CHECKPOINT_PATH).endswith(weights)
    assert cfg.INPUT.FORMAT == ("RGB" if weights in (MOBILENET, R18, SWIN) else "BGR")
    assert cfg.MODEL.MASK_ON == ("mask_rcnn" in name)

    if name in STEP1:
        assert (labelenc.STEP, labelenc.WARMUP_ITERS) == (1, 30000)
        assert (solver.STEPS, solver.MAX_ITER) == ((90000, 110000), 120000)
        assert (labelenc.LAMBDA1, labelenc.LAMBDA2) == STEP1[name]
    elif multi_scale:
        assert (solver.STEPS, solver.MAX_ITER) == ((120000, 160000), 180000)
    else:
        assert (solver.STEPS, solver.MAX_ITER) == ((60000, 80000), 90000)
    if name in STEP2 or name in VANILLA_KD:
        assert (labelenc.STEP, labelenc.CUTOFF_ITERS, labelenc.LAMBDA) == (2, 10000, 1)
    if name in LABELENC:
        assert labelenc.LABEL_MAP == ("masks" if "mask_rcnn" in name else "boxes")
    if name in STEP2:
        source = read_cfg(f"LabelEnc/{STEP2[name]}.yaml")
        assert labelenc.STEP1_FILE == f"{source.OUTPUT_DIR}/label_encoder.pth"
    if name in VANILLA_KD:
        teacher = f"PlainDet/{VANILLA_KD[name]}.yaml"
        assert Path(labelenc.TEACHER.CONFIG_FILE).samefile(FOLDER / teacher)
        assert labelenc.TEACHER.WEIGHTS == f"{read_cfg(teacher).OUTPUT_DIR}/model_final.pth"


def test_output_folders_differ(read_cfg):
    folders = [read_cfg(config).OUTPUT_DIR for config in COCO]
    assert len(set(folders)) == len(folders)


def deformable_layers(model):
    """Deformable blocks of the backbone, and deformable layers of the head."""
    blocks = sum(isinstance(m, DeformableBottleneckBlock) for m in model.backbone.modules())
    head = getattr(model, "head", torch.nn.Identity())
    return blocks, sum(name.endswith(".offset") for name, _ in head.named_modules())


@pytest.mark.parametrize(
    "config",
    [pytest.param(x, marks=pytest.mark.long if "R_101_FPN" in x else ()) for x in COCO],
)
def test_one_iteration_of_each_phase(make_cfg, config):
    """At a small size and without pretrained weights; ResNet-101 only differs in its depth."""
    # Detectron2's Swin Transformer drops paths only where timm is installed.
    cfg, name = make_cfg(config, "MODEL.SWIN.DROP_PATH_RATE", "0.0"), Path(config).stem
    mapper = PlainTrainer.build_train_mapper(cfg)
    batch = next(iter(build_detection_train_loader(cfg, mapper=mapper)))
    model = build_model(cfg).train()
    if name in LABELENC:
        assert type(model.methods[0]) is LabelEnc
    detector = model.detector if name in LABELENC else model
    plain = META_ARCH_REGISTRY.get(plain_cfg(cfg).MODEL.META_ARCHITECTURE)
    assert type(detector) is plain
    num_blocks = {"R_50_DCN": 13, "R_101_DCN": 30}
    assert deformable_layers(model) == (
        next((count for key, count in num_blocks.items() if key in name), 0),
        2 if "fcos" in name and "DCN" in name else 0,
    )
    if name in VANILLA_KD:
        model.set_feature_teacher(
            Teacher(build_model(make_cfg(f"PlainDet/{VANILLA_KD[name]}.yaml")))
        )

    for distance_enabled in (False, True) if name in LABELENC else (None,):
        if name in LABELENC:
            model.training_only["LabelEnc"].distance_enabled = distance_enabled
        with EventStorage():
            losses = model(batch)
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        reconstruction = [key for key in losses if key.startswith("loss_reconstruction")]
        assert bool(reconstruction) == (name in STEP1)
        if name.endswith("reconstruction_only"):
            assert len(reconstruction) == len(losses)
        elif name in LABELENC:
            assert (losses["loss_distance"] > 0) == distance_enabled
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
