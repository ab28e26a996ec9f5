"""A detector that is exported with one image detects in others what it detects itself."""

import pytest
import torch
from detectron2.modeling import build_model

from plaindet.export import OUTPUTS, detect, export_onnx, export_torchscript

onnxruntime = pytest.importorskip("onnxruntime")

SIZES = [(96, 128), (128, 96), (120, 160), (160, 136)]
DENSE = ("retinanet", "fcos", "fcos_imprv", "gfl", "atss")
# The predictors of classes.
CLASSIFIERS = ("cls_score", "box_predictor.cls", "class_embed", "objectness_logits")


def images():
    """3 of each size, of little and of much contrast, so that the scores differ."""
    generator = torch.Generator().manual_seed(0)
    for height, width in SIZES:
        for contrast in (2, 40, 100):
            noise = torch.randn(3, height // 8, width // 8, generator=generator)
            noise = torch.nn.functional.interpolate(noise[None], size=(height, width))[0]
            yield (128 + contrast * noise).clamp(0, 255)


def trained_a_little(model):
    """Random predictors whose scores vary with the image."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(key in name for key in CLASSIFIERS) and name.endswith("weight"):
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


def set_threshold(model, threshold):
    if hasattr(model, "roi_heads"):
        model.roi_heads.box_predictor.test_score_thresh = threshold
    elif hasattr(model, "test_score_thresh"):
        model.test_score_thresh = threshold


def assert_same_detections(expected, found):
    assert len(expected) == len(found)
    for name, x, y in zip(OUTPUTS, expected, found):
        assert x.shape == y.shape, name
        atol = {"boxes": 0.01, "scores": 1e-4, "classes": 0, "masks": 1e-3}[name]
        assert torch.allclose(x.double(), y.double(), rtol=0, atol=atol), name


@pytest.mark.parametrize(
    ("detector", "backbone"),
    [
        ("retinanet", "lite0"),
        *((detector, "R_18") for detector in DENSE[1:]),
        ("faster_rcnn", "R_18"),
        ("mask_rcnn", "R_18"),
        ("deformable_detr", "R_18"),
    ],
)
@torch.no_grad()
def test_exported_detector(make_cfg, detector, backbone):
    """With score thresholds that leave few, many and more candidates than are kept."""
    overrides = ["TEST.DETECTIONS_PER_IMAGE", "30"]
    if detector in DENSE:
        node = f"MODEL.{detector.removesuffix('_imprv').upper()}"
        overrides = [f"{node}.TOPK_CANDIDATES_TEST", "30", f"{node}.SCORE_THRESH_TEST", "0.0"]
    elif detector != "deformable_detr":
        overrides += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    cfg = make_cfg(f"quick/{detector}_{backbone}_baseline.yaml", *overrides)
    model = trained_a_little(build_model(cfg))
    scores = torch.cat([detect(model, image)[1] for image in images()])
    set_threshold(model, float(scores.quantile(0.5)))
    expected = [detect(model, image) for image in images()]
    numbers = [len(boxes) for boxes, *_ in expected]
    assert detector == "deformable_detr" or min(numbers) < max(numbers)
    assert (len(expected[0]) == 4) == (detector == "mask_rcnn")

    example = list(images())[0]
    traced = export_torchscript(model, example)
    session = onnxruntime.InferenceSession(export_onnx(model, example))
    assert [x.name for x in session.get_outputs()] == list(OUTPUTS[: len(expected[0])])
    assert not model.training
    for image, detections in zip(images(), expected):
        with torch.jit.optimized_execution(False):  # which takes longer for each new size
            assert_same_detections(detections, traced(image))
        found = session.run(None, {"image": image.numpy()})
        assert_same_detections(detections, [torch.from_numpy(x) for x in found])


def test_keypoints(make_cfg):
    """Which would be missing from the file."""
    cfg = make_cfg("quick/faster_rcnn_R_18_baseline.yaml", "MODEL.KEYPOINT_ON", "True")
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (8,)
    with pytest.raises(ValueError, match="keypoints, which are not exported.*KEYPOINT_ON False"):
        export_onnx(build_model(cfg), torch.zeros(3, 64, 64))
