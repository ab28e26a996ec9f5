"""ViTDet from a yaml config against Detectron2's LazyConfig of it."""

from functools import partial

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.modeling import build_model, get_vit_lr_decay_rate
from detectron2.solver import get_default_optimizer_params

from plaindet.engine import TrainingTask, build_optimizer

pytest.importorskip("timm")

CONFIG = "PlainDet/mask_rcnn_ViT_B_100ep.yaml"
SIZES = {"EMBED_DIM": 48, "DEPTH": 3, "NUM_HEADS": 3, "IMAGE_SIZE": 128, "GLOBAL_BLOCKS": [2]}
SMALL = [x for key, value in SIZES.items() for x in (f"MODEL.VIT.{key}", value)]


def test_equals_detectron2s(make_cfg):
    """The weights of its model zoo load, and give its detections."""
    cfg = make_cfg(CONFIG, *SMALL, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    model = build_model(cfg).eval()
    lazy = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    lazy.backbone.net.update(embed_dim=48, depth=3, num_heads=3, img_size=128)
    lazy.backbone.net.window_block_indexes = [0, 1]
    lazy.backbone.square_pad = 128
    lazy.roi_heads.num_classes = 3
    lazy.roi_heads.box_head.fc_dims = [32]
    lazy.roi_heads.box_predictor.input_shape.channels = 32
    lazy.roi_heads.box_predictor.test_score_thresh = 0.0
    theirs = instantiate(lazy).eval()
    for parameter in theirs.parameters():  # with the position embedding, which starts at 0
        torch.nn.init.normal_(parameter, std=0.1)
    model.load_state_dict(theirs.state_dict(), strict=True)
    batch = [{"image": torch.rand(3, 96, 128) * 255}]
    with torch.no_grad():
        found, expected = (x(batch)[0]["instances"].get_fields() for x in (model, theirs))
    assert len(expected["scores"]) > 0
    for name, value in expected.items():
        torch.testing.assert_close(
            *(getattr(x, "tensor", x) for x in (found[name], value)), rtol=1e-5, atol=1e-5
        )


def test_settings_of_detectron2s(read_cfg):
    """The numbers of its mask_rcnn_vitdet_b_100ep.py, which is in no package."""
    cfg, large = read_cfg(CONFIG), read_cfg("PlainDet/mask_rcnn_ViT_L_100ep.yaml")
    solver, lazy = cfg.SOLVER, model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    net, vit = lazy.backbone.net, cfg.MODEL.VIT
    assert (vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS) == (net.embed_dim, net.depth, net.num_heads)
    assert (vit.WINDOW_SIZE, vit.DROP_PATH_RATE) == (net.window_size, net.drop_path_rate)
    assert vit.IMAGE_SIZE == net.img_size == lazy.backbone.square_pad
    assert sorted([*vit.GLOBAL_BLOCKS, *net.window_block_indexes]) == list(range(12))
    assert [*cfg.MODEL.PIXEL_MEAN] == pytest.approx([*lazy.pixel_mean])
    assert [*cfg.MODEL.PIXEL_STD] == pytest.approx([*lazy.pixel_std])
    assert cfg.INPUT.FORMAT == lazy.input_format
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY) == ("AdamW", 1e-4, 0.1)
    assert (solver.STEPS, solver.MAX_ITER) == ((163889, 177546), 184375)
    assert (solver.IMS_PER_BATCH, solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (64, 250, 0.001)
    assert (solver.VIT_LR_DECAY_RATE, large.SOLVER.VIT_LR_DECAY_RATE) == (0.7, 0.8)


def test_rates_and_decay(make_cfg):
    """Detectron2's own for each parameter of the detector, although it is within a task."""
    cfg = make_cfg(CONFIG, *SMALL)
    detector = build_model(cfg)
    expected = get_default_optimizer_params(
        detector,
        base_lr=1e-4,
        weight_decay=0.1,
        weight_decay_norm=0.0,
        lr_factor_func=partial(get_vit_lr_decay_rate, lr_decay_rate=0.7, num_layers=3),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    expected = {p: (g["lr"], g["weight_decay"]) for g in expected for p in g["params"]}
    optimizer = build_optimizer(cfg, TrainingTask(detector))
    found = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in detector.named_parameters():
        assert found[parameter] == pytest.approx(expected[parameter]), name
    assert len({lr for lr, _ in expected.values()}) == 5
