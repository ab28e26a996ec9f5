"""A detector that is traced on one image computes on others what the detector itself does."""

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model

SIZES = [(64, 96), (96, 64), (120, 160), (160, 128)]
DETECTORS = ("retinanet", "fcos", "fcos_imprv", "gfl", "atss")
TOPK = 30


def images():
    """3 of each size, of little and of much contrast, so that the scores differ."""
    generator = torch.Generator().manual_seed(0)
    for height, width in SIZES:
        for contrast in (2, 40, 100):
            noise = torch.randn(3, height // 8, width // 8, generator=generator)
            noise = torch.nn.functional.interpolate(noise[None], size=(height, width))[0]
            yield (128 + contrast * noise).clamp(0, 255)


def detect(model, inputs):
    return model(inputs)[0]["instances"]


def trained_a_little(model):
    """Random predictors whose scores vary with the image."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.head.named_parameters():
        if name.startswith("cls_score") and name.endswith("weight"):
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("detector", "backbone"),
    [*((detector, "R_18") for detector in DETECTORS), ("retinanet", "lite0")],
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_traced_detector(make_cfg, detector, backbone):
    """With score thresholds that leave few, many and more candidates than are kept of a level."""
    node = f"MODEL.{detector.removesuffix('_imprv').upper()}"
    cfg = make_cfg(
        f"quick/{detector}_{backbone}_baseline.yaml",
        *(f"{node}.TOPK_CANDIDATES_TEST", str(TOPK), f"{node}.SCORE_THRESH_TEST", "0.0"),
    )
    model = trained_a_little(build_model(cfg))
    all_scores = torch.cat([detect(model, [{"image": image}]).scores for image in images()])
    threshold = float(all_scores.quantile(0.5))
    model.test_score_thresh = threshold
    expected = [detect(model, [{"image": image}]) for image in images()]
    numbers = [len(instances) for instances in expected]
    assert min(numbers) < max(numbers)
    first = next(images())
    adapter = TracingAdapter(model, first, lambda model, image: detect(model, [{"image": image}]))
    traced = torch.jit.trace(adapter, (first,), check_trace=False)
    for image, instances in zip(images(), expected):
        found = adapter.outputs_schema(traced(image))
        assert torch.equal(found.pred_classes, instances.pred_classes)
        assert torch.allclose(found.scores, instances.scores, rtol=1e-5, atol=1e-6)
        assert torch.allclose(found.pred_boxes.tensor, instances.pred_boxes.tensor, atol=1e-3)
