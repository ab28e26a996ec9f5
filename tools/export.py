#!/usr/bin/env python
"""Writes a trained detector as ONNX or TorchScript, and checks the file before it is there.

    python tools/export.py --config-file output/run/plain_config.yaml
        [--weights output/run/model_final.pth] [--images FILE ... | N] --output detector.onnx
        [KEY VALUE ...]

The output's name ends in .onnx, or in .pt for TorchScript. The file takes one image (3, H, W) in
0..255, float32, of the size to which the config resizes it and in the channel order INPUT.FORMAT.
It returns boxes (XYXY in pixels of that image), scores, classes, and of a Mask R-CNN the masks
inside the boxes.

A process without Detectron2 runs the file on the images, each in several sizes, and its detections
are compared with the detector's: boxes within 0.01 pixels, scores within 0.0001, the same classes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from plaindet.export import OUTPUTS, detect, export_onnx, export_torchscript
from plaindet.files import write_atomically

from detectors import add_image_arguments, choose_dataset, choose_images, load_model, read_cfg

# What the order of floating point operations may change, in pixels and probabilities.
TOLERANCES = {"boxes": 0.01, "scores": 1e-4, "classes": 0.0, "masks": 1e-3}
# Of the sizes of an image that are checked, relative to the config's; the last one is turned.
SCALES = (1.0, 0.77, 1.19, 1.0)

# Run the file on the images of an .npz file, in a process that has nothing else.
RUNNERS = {
    ".onnx": """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
run = lambda image: session.run(None, {"image": image})
""",
    ".pt": """
import sys, numpy as np, torch, torchvision
model = torch.jit.load(sys.argv[1], map_location="cpu")
torch.set_grad_enabled(False)
run = lambda image: [x.numpy() for x in model(torch.from_numpy(image))]
""",
}
LOOP = """
outputs = {}
for name, image in np.load(sys.argv[2]).items():
    for i, x in enumerate(run(image)):
        outputs[f"{name}/{i}"] = x
np.savez(sys.argv[3], **outputs)
assert "detectron2" not in sys.modules
"""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config-file", required=True, help="the plain_config.yaml of a run")
    parser.add_argument("--weights", help="default: model_final.pth beside the config")
    parser.add_argument("--output", required=True, type=Path, help="NAME.onnx or NAME.pt")
    add_image_arguments(parser)
    args = parser.parse_args()
    if args.output.suffix not in RUNNERS:
        parser.error(f"--output is {args.output}, expected a name that ends in .onnx or .pt")
    return args


def check_images(cfg: CfgNode, files: list[str]) -> list[torch.Tensor]:
    """The images as the detector gets them, (3, H, W) float32, each in several sizes."""
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    images = []
    for file in files:
        image = read_image(file, cfg.INPUT.FORMAT)
        image = resize.get_transform(image).apply_image(image).astype("float32")
        image = torch.from_numpy(image.transpose(2, 0, 1).copy())
        for i, scale in enumerate(SCALES):
            size = [round(side * scale) for side in image.shape[1:]]
            resized = F.interpolate(image[None], size, mode="bilinear")[0]
            is_last = i == len(SCALES) - 1
            images.append(resized.transpose(1, 2).contiguous() if is_last else resized)
    return images


def run_file(path: Path, images: list[torch.Tensor]) -> list[tuple[np.ndarray, ...]]:
    """What a file detects, in a fresh process.

    Raises:
        RuntimeError: it does not run, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        np.savez(inputs, **{str(i): image.numpy() for i, image in enumerate(images)})
        code = RUNNERS[path.suffix] + LOOP
        command = [sys.executable, "-W", "ignore", "-c", code, path, inputs, outputs]
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-2000:])
        found = np.load(outputs)
        count = len(found.files) // len(images)
        return [tuple(found[f"{i}/{k}"] for k in range(count)) for i in range(len(images))]


def differences(
    expected: tuple[np.ndarray, ...], found: tuple[np.ndarray, ...]
) -> dict[str, float]:
    """The largest difference of each output in an image, whatever the order of detections with
    nearly equal scores; infinite for another number of detections."""
    names = OUTPUTS[: len(expected)]
    if len(found) != len(names) or any(x.shape != y.shape for x, y in zip(expected, found)):
        return dict.fromkeys(names, float("inf"))
    if not len(expected[0]):
        return dict.fromkeys(names, 0.0)
    expected, found = ([x.astype("float64") for x in group] for group in (expected, found))
    cost = sum(
        np.abs(x[:, None] - y[None]).reshape(len(x), len(x), -1).sum(-1) / (TOLERANCES[name] or 0.1)
        for name, x, y in zip(names[:3], expected, found)
    )
    _, order = linear_sum_assignment(cost)
    return {name: float(np.abs(x - y[order]).max()) for name, x, y in zip(names, expected, found)}


def verify(
    path: Path, images: list[torch.Tensor], expected: list[tuple[np.ndarray, ...]]
) -> dict[str, float]:
    """The largest differences over all images.

    Raises:
        ValueError: the file does not detect what the detector does.
    """
    try:
        found = run_file(path, images)
    except RuntimeError as error:
        raise ValueError(f"the file does not run on these images:\n{error}") from error
    worst = {}
    for image, x, y in zip(images, expected, found):
        here = differences(x, y)
        bad = {name: value for name, value in here.items() if value > TOLERANCES[name]}
        if bad:
            height, width = image.shape[1:]
            raise ValueError(
                f"in an image of {width} x {height} pixels the file's {len(y[0])} detections are "
                f"not the detector's {len(x[0])}: "
                + ", ".join(f"{name} differ by {value:g}" for name, value in bad.items())
            )
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in here.items()}
    return worst


def main():
    args = parse_args()
    if args.output.suffix == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise SystemExit(
                f"ONNX needs the optional extra [export] of this project: {error}"
            ) from None
    cfg = read_cfg(args.config_file, args.opts)
    cfg.MODEL.DEVICE = "cpu"
    weights = args.weights or os.path.join(os.path.dirname(args.config_file), "model_final.pth")
    model, _ = load_model(cfg, weights)
    try:
        chosen = choose_images(args, cfg)
    except KeyError:  # a config with Detectron2's keys alone does not say where it is
        raise SystemExit(
            f"The data set {choose_dataset(args, cfg)} is not registered. Expected images to check "
            "with, by --images FILE ... --output ..., or the data set, by DATASETS.COCO_FORMAT at "
            "the end of the command"
        ) from None
    images = check_images(cfg, [d["file_name"] for d in chosen])
    with torch.no_grad():
        expected = [tuple(x.numpy() for x in detect(model, image)) for image in images]
    numbers = [len(boxes) for boxes, *_ in expected]
    if not any(numbers):
        raise SystemExit(
            f"The detector finds nothing in these {len(images)} images, which checks nothing: "
            "expected --images in which it does, or a lower score threshold"
        )
    example = images[int(np.argmax(numbers))]
    if args.output.suffix == ".onnx":
        content = export_onnx(model, example)
    else:
        content = export_torchscript(model, example).save_to_buffer()
    # Complete and checked, or not there.
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"detector{args.output.suffix}"
        path.write_bytes(content)
        try:
            worst = verify(path, images, expected)
        except ValueError as error:
            raise SystemExit(f"{args.output} is not written: {error}") from None
    write_atomically(str(args.output), lambda file: file.write(content))
    print(
        f"{args.output}: {sum(numbers)} detections in {len(images)} images of "
        f"{len({tuple(image.shape) for image in images})} sizes agree; largest differences: "
        + ", ".join(f"{name} {value:.1g}" for name, value in worst.items())
    )


if __name__ == "__main__":
    main()
