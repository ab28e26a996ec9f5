"""The builder of Detectron2's Swin Transformer."""

import pytest
import torch
from detectron2.modeling import build_backbone
from torchvision.models import swin_t


@pytest.fixture
def cfg(read_cfg):
    cfg = read_cfg("PlainDet/retinanet_Swin_T_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.0
    return cfg


def test_swin_t(cfg):
    """The default is Swin-T: it has the parameters of torchvision's, whose last norm is that of the
    last output, and two more norms."""
    backbone = build_backbone(cfg)
    ours = sum(p.numel() for p in backbone.bottom_up.parameters())
    theirs = swin_t()
    expected = sum(p.numel() for p in theirs.parameters()) - sum(
        p.numel() for p in theirs.head.parameters()
    )
    assert ours == expected + 2 * (192 + 384)
    assert all(p.requires_grad for p in backbone.parameters())
    with torch.no_grad():
        levels = backbone(torch.rand(1, 3, 64, 96))
    assert {name: tuple(x.shape[-2:]) for name, x in levels.items()} == {
        "p3": (8, 12),
        "p4": (4, 6),
        "p5": (2, 3),
        "p6": (1, 2),
        "p7": (1, 1),
    }


@pytest.mark.parametrize(("freeze_at", "frozen"), [(1, {"patch_embed"}), (2, {"patch_embed", "0"})])
def test_freeze_at(cfg, freeze_at, frozen):
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    names = [n for n, p in build_backbone(cfg).bottom_up.named_parameters() if not p.requires_grad]
    assert {n.split(".")[1] if n.startswith("layers") else n.split(".")[0] for n in names} == frozen


def test_stochastic_depth_without_timm(cfg, monkeypatch):
    monkeypatch.setattr("plaindet.modeling.swin.find_spec", lambda name: None)
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    with pytest.raises(ModuleNotFoundError, match="DROP_PATH_RATE is 0.2, .* needs timm"):
        build_backbone(cfg)
