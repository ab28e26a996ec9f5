"""Inference of a trained detector is the plain detector's, on the device too."""

import pytest
import torch
from detectron2.modeling import build_model
from devices import to_cpu
from variants import BOTH, METHODS, NORMS, Variant, build_variant, make_batch

pytestmark = pytest.mark.cuda

DETECTORS = [
    pytest.param(
        x, marks=[] if x in ("gfl", "mask_rcnn", "deformable_detr") else [pytest.mark.long]
    )
    for x in METHODS
]


def prepare(model):
    """Different scores, as of a trained detector, and all detections."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and any(x in name for x in ("cls_score", "class_embed")):
            parameter.data.normal_(0, 0.05, generator=generator)
    if hasattr(model, "roi_heads"):
        model.roi_heads.box_predictor.test_score_thresh = 0.0
    model.test_score_thresh = model.test_class_score_thresh = 0.0
    return model.eval()


def detect(model, batch):
    with torch.no_grad():
        results = [x["instances"] for x in model(batch)]
    return [{k: getattr(v, "tensor", v) for k, v in x.get_fields().items()} for x in results]


@pytest.mark.parametrize("detector", DETECTORS)
def test_detections(detector, device, make_tiny_cfg):
    """Bit for bit those of the plain detector on the same device. Those of the CPU up to rounding,
    by which of two overlapping boxes with nearly the same score the other one may survive."""
    method = BOTH if BOTH in METHODS[detector] else "CrossKD"
    model = prepare(build_variant(Variant(detector, method), make_tiny_cfg))
    plain = build_model(make_tiny_cfg(f"quick/{detector}_R_18_baseline.yaml", *NORMS))
    assert type(plain) is type(model.detector)
    plain.load_state_dict(model.state_dict(), strict=True)
    prepare(plain)
    batch = [{"image": x["image"]} for x in make_batch()]
    expected = detect(plain, batch)
    for each in (model, plain):
        device.move(each)
    with device.in_use():
        found, found_by_plain = ([dict(x) for x in detect(m, batch)] for m in (model, plain))
    for image, by_plain, on_cpu in zip(found, found_by_plain, expected):
        image, by_plain = ({k: to_cpu(v) for k, v in x.items()} for x in (image, by_plain))
        assert image.keys() == by_plain.keys() == on_cpu.keys()
        assert all(torch.equal(image[key], by_plain[key]) for key in image)
        assert len(on_cpu["scores"]) > 20
        same = torch.cdist(image["pred_boxes"], on_cpu["pred_boxes"]) < 0.1
        same &= image["pred_classes"][:, None] == on_cpu["pred_classes"]
        same &= (image["scores"][:, None] - on_cpu["scores"]).abs() < 1e-4
        assert min(same.any(dim=i).float().mean() for i in (0, 1)) >= 0.95
