"""Mixed precision."""

import pytest
import torch
from detectron2.utils.events import EventStorage

import train_net
from plaindet.engine import PlainTrainer
from plaindet.seeding import seed_everything


@pytest.mark.parametrize(
    ("method", "detector"),
    [
        *(("labelenc_step1", d) for d in ("retinanet", "fcos", "gfl", "atss", "faster_rcnn")),
        *(("labelenc_step2", d) for d in ("retinanet", "mask_rcnn")),
        *(("crosskd", d) for d in ("retinanet", "fcos", "gfl", "atss")),
        *(("crosskd", d) for d in ("faster_rcnn", "deformable_detr")),
        ("labelenc_crosskd", "gfl"),
    ],
)
def test_bfloat16_losses_are_float32s(make_method_cfg, method, detector):
    """Within bfloat16's precision, for every loss: its own arithmetic is in float32."""
    cfg = make_method_cfg(method, detector)
    # Batch statistics of a 1 x 1 feature of two images turn small differences into large ones.
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM = "FrozenBN", "GN"
    trainer_class = train_net.trainer_class(cfg)
    model = trainer_class.build_model(cfg).train()
    batch = next(iter(trainer_class.build_train_loader(cfg)))
    losses = []
    if hasattr(model, "proposal_generator"):
        # Losses of other regions differ by more than the precision.
        regions, original = [], model.proposal_generator.forward

        def same_regions(*args):
            found, rpn_losses = original(*args)
            regions.append(regions.pop(0) if losses else found)
            return regions[-1], rpn_losses

        model.proposal_generator.forward = same_regions
    for enabled in (False, True):
        seed_everything(0)
        if hasattr(model, "loss_normalizer"):
            del model.loss_normalizer
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), EventStorage():
            losses.append(model(batch))
    expected, found = losses
    assert expected.keys() == found.keys()
    for name, loss in found.items():
        assert loss.dtype == torch.float32, name
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.05, abs=5e-3), name
    sum(found.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_amp_needs_a_gpu(make_cfg):
    cfg = make_cfg("quick/retinanet_R_18_baseline.yaml", "SOLVER.AMP.ENABLED", "True")
    with pytest.raises(ValueError, match="SOLVER.AMP.ENABLED needs a GPU, but MODEL.DEVICE is cpu"):
        PlainTrainer(cfg)
