"""A trained detector as a file that needs neither Detectron2 nor this project: TorchScript, ONNX.

What is exported takes one image, as the detector's config resizes it and in its channel order, of
any size that the detector itself takes, and returns its detections in pixels of that image.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN
from torch import nn

OUTPUTS = ("boxes", "scores", "classes", "masks")
OPSET = 18


def detect(model: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The detections of a plain detector in one image, the best first.

    Args:
        model: in eval mode.
        image: (3, H, W), values in 0..255, float32.

    Returns:
        boxes (N, 4) in XYXY absolute pixels, scores (N,), classes (N,) int64, and of a Mask R-CNN
        masks (N, M, M), the probabilities inside the boxes, as
        `detectron2.layers.paste_masks_in_image` takes them

    Raises:
        ValueError: the detector has keypoints, which are not exported.
    """
    inputs = [{"image": image}]
    if isinstance(model, GeneralizedRCNN):
        # Pasting the masks into the image is left to whoever uses the file.
        instances = model.inference(inputs, do_postprocess=False)[0]
    else:
        instances = model(inputs)[0]["instances"]
    if instances.has("pred_keypoints"):
        raise ValueError(
            f"This {type(model).__name__} detects keypoints, which are not exported: with "
            "MODEL.KEYPOINT_ON False it is exported without them"
        )
    outputs = [instances.pred_boxes.tensor, instances.scores, instances.pred_classes]
    if instances.has("pred_masks"):
        outputs.append(instances.pred_masks[:, 0])
    return tuple(outputs)


def export_torchscript(model: nn.Module, image: torch.Tensor) -> torch.jit.ScriptModule:
    """The detector as TorchScript, by tracing :func:`detect`. To load it elsewhere takes PyTorch
    and `import torchvision`, whose operators it calls.

    Args:
        model: a plain detector.
        image: an example, (3, H, W) in 0..255 on the detector's device, in which it detects
            something.
    """
    adapter = _adapter(model, image)
    with torch.no_grad(), _without_warnings():
        return torch.jit.trace(adapter, (image,), check_trace=False)


def export_onnx(model: nn.Module, image: torch.Tensor) -> bytes:
    """The detector as ONNX with standard operators, "image" as its input with dynamic height and
    width, and the outputs of :func:`detect` by their names.

    Args:
        model, image: as in :func:`export_torchscript`.
    """
    adapter = _adapter(model, image)
    with torch.no_grad(), _without_warnings():
        outputs = OUTPUTS[: len(adapter(image))]
        file = io.BytesIO()
        # dynamo=True does not take data-dependent shapes: the number of boxes.
        torch.onnx.export(
            adapter,
            (image,),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(outputs),
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "detections"} for name in outputs},
            },
        )
    return file.getvalue()


def _adapter(model: nn.Module, image: torch.Tensor) -> TracingAdapter:
    # In eval mode itself, too: the exporter restores the mode of what it exports.
    return TracingAdapter(model.eval(), image, detect).eval()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Of Python values that become constants, which the verification of `tools/export.py` would
    find, and of deprecated calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
