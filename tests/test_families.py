"""Families of detectors with every method: an iteration each, what its losses teach, and what is
left of it."""

import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, MViT, build_model
from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem
from detectron2.utils.events import EventStorage

from plaindet.config import merge_config
from plaindet.engine import PlainTrainer


@BACKBONE_REGISTRY.register()
def build_tests_regnet(cfg, input_shape):
    return RegNet(
        stem_class=SimpleStem, stem_width=8, block_class=ResBottleneckBlock, depth=5,
        w_a=28, w_0=16, w_m=2, group_width=8, out_features=["s1", "s2", "s3", "s4"],
    )  # fmt: skip


@BACKBONE_REGISTRY.register()
def build_tests_mvit(cfg, input_shape):
    return MViT(img_size=64, embed_dim=16, depth=4, last_block_indexes=(0, 1, 2, 3))


def fpn_over(name, features):
    return [
        *("MODEL.BACKBONE.NAME", "build_fpn_backbone", "MODEL.FPN.BOTTOM_UP", name),
        *("MODEL.FPN.IN_FEATURES", features),
    ]


# The quick configs, and what is changed of them.
FAMILIES = {
    "cascade_rcnn": (
        "faster_rcnn_R_18",
        [
            *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads"),
            *("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        ],
    ),
    "regnet": ("faster_rcnn_R_18", fpn_over("build_tests_regnet", ["s1", "s2", "s3", "s4"])),
    "mvit": (
        "faster_rcnn_R_18",
        fpn_over("build_tests_mvit", ["scale2", "scale3", "scale4", "scale5"]),
    ),
    "vitdet": (
        "mask_rcnn_ViT_tiny",
        ["MODEL.VIT.IMAGE_SIZE", 96, "MODEL.VIT.EMBED_DIM", 48, "MODEL.VIT.DEPTH", 2],
    ),
    "deformable_detr": (
        "deformable_detr_R_18",
        [
            *("MODEL.DEFORMABLE_DETR.HIDDEN_DIM", 32, "MODEL.DEFORMABLE_DETR.NUM_HEADS", 4),
            *("MODEL.DEFORMABLE_DETR.NUM_ENCODER_LAYERS", 1),
            *("MODEL.DEFORMABLE_DETR.NUM_DECODER_LAYERS", 2),
        ],
    ),
}  # fmt: skip
RUNS = ("labelenc_step1", "labelenc_step2", "crosskd")


def kind_of_loss(name):
    if "_kd_" in name:
        return "KD"
    return "L3" if name == "loss_distance" else "L1" if "reconstruction" in name else "L2"


def part_of(trainer, parameter):
    """Of the detector: what makes the features, or its head; otherwise the module for training."""
    if parameter.startswith("training_only."):
        return parameter.split(".")[2]
    name = parameter.removeprefix("detector.")
    if name.startswith(tuple(f"{x}." for x in trainer.task.adapter.feature_parts)):
        return "features"
    is_encoder = name.startswith(("transformer.model.encoder.", "transformer.model.level_embed"))
    return "transformer encoder" if is_encoder else "head"


def taught(trainer):
    """The parts that the losses of each kind reach."""
    with EventStorage():
        losses = trainer.model(next(iter(trainer.data_loader)))
    reached = {}
    for kind in {kind_of_loss(name) for name in losses}:
        trainer.model.zero_grad()
        parts = [loss for name, loss in losses.items() if kind_of_loss(name) == kind]
        sum(parts).backward(retain_graph=True)
        reached[kind] = {
            part_of(trainer, name)
            for name, parameter in trainer.model.named_parameters()
            if parameter.grad is not None and parameter.grad.any()
        }
    return reached


@pytest.mark.parametrize("family", FAMILIES)
def test_family_with_every_method(make_cfg, tmp_path, family):
    if family in ("mvit", "vitdet"):
        pytest.importorskip("timm")
    if family == "deformable_detr":
        pytest.importorskip("transformers")
    detector, changes = FAMILIES[family]
    head = {"head", "transformer encoder"} if family == "deformable_detr" else {"head"}
    expected = {
        "L1": {"label_encoder"} | head,
        "L2": {"features"} | head,
        "L3": {"features", "feature_adapter"},
        # Up to where features change the head: the encoder's output, or the pooled features.
        "KD": {"features"} | head - {"head"},
    }
    kinds = {"labelenc_step1": "L1 L2 L3", "labelenc_step2": "L2 L3", "crosskd": "L2 KD"}
    for run in RUNS:
        cfg = make_cfg(
            f"quick/{detector}_{run}.yaml",
            *("DATASETS.TEST", "()", "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", str(tmp_path / run)),
            *("MODEL.LABELENC.WARMUP_ITERS", 0, "MODEL.LABELENC.CUTOFF_ITERS", 0),
            *("MODEL.LABELENC.STEP1_FILE", str(tmp_path / "labelenc_step1" / "label_encoder.pth")),
            *("MODEL.CROSSKD.TEACHER.CONFIG_FILE", str(tmp_path / "labelenc_step2")),
            *("MODEL.CROSSKD.TEACHER.WEIGHTS", "", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
            *changes,
        )
        trainer = PlainTrainer(cfg)
        trainer.resume_or_load(resume=False)
        assert taught(trainer) == {kind: expected[kind] for kind in kinds[run].split()}
        trainer.train()
        plain = build_model(merge_config(tmp_path / run / "plain_config.yaml"))
        checkpoint = torch.load(tmp_path / run / "model_final.pth", weights_only=False)
        plain.load_state_dict(checkpoint["model"], strict=True)
        assert type(plain) is type(trainer.plain_model)


@pytest.mark.parametrize(
    ("plain", "name", "node"),
    [
        ("mask_rcnn_ViT_B_100ep", "mask_rcnn_ViT_B", "VIT"),
        ("deformable_detr_R_50_50ep", "deformable_detr_R_50", "DEFORMABLE_DETR"),
    ],
)
def test_labelenc_for_coco(read_cfg, plain, name, node):
    """As for the paper's detectors: a third more iterations for the warm-up of step 1, a ninth of
    step 2 behind the cut-off, and else the plain config."""
    plain = read_cfg(f"PlainDet/{plain}.yaml")
    step1, step2 = (read_cfg(f"LabelEnc/{name}_step{step}.yaml") for step in (1, 2))
    warmup, total = step1.MODEL.LABELENC.WARMUP_ITERS, plain.SOLVER.MAX_ITER
    assert warmup == pytest.approx(total / 3, rel=1e-3)
    assert step1.SOLVER.STEPS == tuple(x + warmup for x in plain.SOLVER.STEPS)
    assert step1.SOLVER.MAX_ITER == total + warmup
    assert step2.MODEL.LABELENC.CUTOFF_ITERS == pytest.approx(total / 9, abs=1)
    assert step2.MODEL.LABELENC.STEP1_FILE == f"{step1.OUTPUT_DIR}/label_encoder.pth"
    assert step2.SOLVER == plain.SOLVER
    for step, cfg in ((1, step1), (2, step2)):
        assert [*cfg.MODEL.TRAINING_METHODS] == ["LabelEnc"]
        assert cfg.MODEL.LABELENC.STEP == step
        assert cfg.MODEL.LABELENC.LABEL_MAP == ("masks" if plain.MODEL.MASK_ON else "boxes")
        assert (cfg.MODEL[node], cfg.INPUT) == (plain.MODEL[node], plain.INPUT)


def test_crosskd_of_vitdet_for_coco(read_cfg):
    cfg = read_cfg("CrossKD/mask_rcnn_ViT_B_from_ViT_L.yaml")
    plain, teacher = (read_cfg(f"PlainDet/mask_rcnn_ViT_{x}_100ep.yaml") for x in "BL")
    crosskd, paper = cfg.MODEL.CROSSKD, read_cfg("CrossKD/mask_rcnn_R_18_FPN_from_R_50.yaml")
    assert (cfg.SOLVER, cfg.MODEL.VIT) == (plain.SOLVER, plain.MODEL.VIT)
    assert crosskd.TEACHER.CONFIG_FILE.endswith("PlainDet/mask_rcnn_ViT_L_100ep.yaml")
    assert crosskd.TEACHER.WEIGHTS == f"{teacher.OUTPUT_DIR}/model_final.pth"
    crosskd.TEACHER = paper.MODEL.CROSSKD.TEACHER
    assert crosskd == paper.MODEL.CROSSKD
