"""The step-1 file, `label_encoder.pth`: what step 2 takes over from step 1 (Sec. 3.3).

It holds plain tensors and a small description, and nothing of the image branch's backbone::

    {
        "version": 3,
        "description": {"detector": "RetinaNet", "num_classes": 80, "fpn": {"p3": [256, 8], ...},
                        "fuse_type": "sum", "extra_levels": "LastLevelP6P7 on res5",
                        "label_map": "boxes", "settings": {"box_weights": [1.0, ...], ...}},
        "label_encoder": psi, the state dict of the encoder and its FPN,
        "head": theta_d, the plain detector's state dict without its backbone (and without
                Deformable DETR's input projections),
        "thing_classes": ["person", ...], if the names of the classes are known,
    }
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import nn

from plaindet.engine import TrainingTask, adapter_of
from plaindet.files import write_atomically
from plaindet.loading import load_tensors
from plaindet.messages import some_of
from plaindet.modeling import check_class_names
from plaindet.modeling.class_names import ENTRY as CLASSES

if TYPE_CHECKING:
    from .method import LabelEnc

FILE_NAME = "label_encoder.pth"
VERSION = 3

logger = logging.getLogger(__name__)


def labelenc_of(task: TrainingTask | LabelEnc) -> LabelEnc:
    """The method of a task that trains with LabelEnc."""
    return task.training_only["LabelEnc"] if isinstance(task, TrainingTask) else task


def describe(labelenc: LabelEnc) -> dict:
    """What a step-1 file has to agree on with the detector that uses it: the class of the detector,
    the number of classes, the FPN's levels as {name: [channels, stride]} and how they are made,
    what label maps are drawn from, and the head's settings."""
    encoder = labelenc.label_encoder
    shapes, top_block = encoder.output_shape(), encoder.top_block
    extra_levels = top_block and f"{type(top_block).__name__} on {top_block.in_feature}"
    return {
        "detector": type(labelenc.adapter.detector).__name__,
        "num_classes": encoder.bottom_up.num_classes,
        "fpn": {name: [shape.channels, shape.stride] for name, shape in shapes.items()},
        "fuse_type": encoder._fuse_type,
        "extra_levels": extra_levels,
        "label_map": labelenc.label_map,
        "settings": labelenc.adapter.head_settings,
    }


def save_step1_file(
    task: TrainingTask | LabelEnc, path: str, class_names: Sequence[str] | None = None
) -> None:
    """Writes the step-1 file of a task in training to `path`; a file there is replaced at once,
    so that it is whole whenever the run is killed.

    Raises:
        FloatingPointError: a weight is infinite or NaN; nothing is written.
    """
    labelenc = labelenc_of(task)
    encoder = labelenc.label_encoder.state_dict()
    head = labelenc.adapter.head_state
    bad = [name for name, x in {**encoder, **head}.items() if not torch.isfinite(x).all()]
    if bad:
        raise FloatingPointError(
            f"No step-1 file is written, since weights are infinite or NaN: {some_of(bad)}"
        )
    write_step1_file(path, describe(labelenc), encoder, head, class_names)


def write_step1_file(
    path: str,
    description: dict,
    label_encoder: dict[str, torch.Tensor],
    head: dict[str, torch.Tensor],
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes a step-1 file from its parts, which the top of this module describes. A file that is
    at `path` already is replaced at once."""
    data = {
        "version": VERSION,
        "description": description,
        "label_encoder": label_encoder,
        "head": head,
    }
    if class_names is not None:
        data[CLASSES] = list(class_names)
    write_atomically(path, lambda f: torch.save(data, f))


def inherit_step1_file(
    task: TrainingTask | LabelEnc, path: str, with_detector: bool = True, dataset: str = ""
) -> None:
    """Initialises step 2: the label encoder and the head from the step-1 file, and the detector's
    FPN from the *encoder's* FPN, as the official implementation does. A pyramid of another kind
    keeps its initialisation.

    Layers of the FPN whose shape differs (laterals on a backbone of other widths, say) keep their
    initialisation; a line of the log names them.

    Args:
        task: without wrapper.
        path: of the step-1 file.
        with_detector: also the head and the FPN, and not the label encoder alone.
        dataset: that step 2 trains on, whose classes are compared with step 1's by their names.

    Raises:
        ValueError: the file is no step-1 file, or one of another detector, FPN, label map or head,
            or of other classes.
    """
    labelenc, data = labelenc_of(task), _load(path)
    if dataset:
        classes = MetadataCatalog.get(dataset).get("thing_classes")
        check_class_names(f"The step-1 file {path}", data.get(CLASSES), dataset, classes)
    expected = describe(labelenc)
    if not with_detector:
        del expected["settings"]
    _check_description(data["description"], expected, f"The step-1 file {path}")
    encoder, adapter = labelenc.label_encoder, labelenc.adapter
    _check_tensors("label encoder", encoder.state_dict(), data["label_encoder"], path)
    if with_detector:
        _check_tensors("head", adapter.head_state, data["head"], path)
    encoder.load_state_dict(data["label_encoder"])
    if with_detector:
        fpn = _fpn(encoder)
        if fpn.keys() != _fpn(adapter.detector.backbone).keys():
            fpn = {}
        _load_matching_layers(adapter.detector, fpn, data["head"], path)


def inherit_teacher(task: TrainingTask | LabelEnc, path: str) -> None:
    """Initialises step 2 of "vanilla KD": the head and the FPN from the teacher's, in the same way.

    Args:
        task: without wrapper, with a teacher.
        path: of the teacher's config, for messages.

    Raises:
        ValueError: the teacher's head or FPN is another one.
    """
    labelenc = labelenc_of(task)
    teacher, detector = labelenc.feature_teacher.model, labelenc.adapter.detector
    if not isinstance(teacher, type(detector)):
        raise ValueError(
            f"The teacher {path} is of the class {type(teacher).__name__}, expected "
            f"{type(detector).__name__}, whose head can be inherited. Set "
            "MODEL.LABELENC.INHERIT False to use its features alone"
        )
    adapters = [adapter_of(teacher), labelenc.adapter]
    _check_description(*(x.head_settings for x in adapters), f"The teacher {path}")
    head, fpn = adapters[0].head_state, _fpn(teacher.backbone)
    _check_keys("FPN", _fpn(detector.backbone), fpn, path)
    _check_tensors("head", labelenc.adapter.head_state, head, path)
    _load_matching_layers(detector, fpn, head, path)


def _fpn(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of an FPN as the backbone of a detector, without what is below it; empty for a
    backbone that does not tell them apart."""
    if not hasattr(backbone, "bottom_up"):
        return {}
    state = backbone.state_dict()
    return {f"backbone.{k}": v for k, v in state.items() if not k.startswith("bottom_up.")}


def _load(path: str) -> dict:
    if not path:
        raise ValueError(
            "MODEL.LABELENC.STEP1_FILE is empty: step 2 needs the label_encoder.pth that a step-1 "
            "run writes into its OUTPUT_DIR"
        )
    local_path = PathManager.get_local_path(path)
    if not os.path.isfile(local_path):
        raise FileNotFoundError(
            f"MODEL.LABELENC.STEP1_FILE: {path} does not exist. Expected the label_encoder.pth "
            "that a step-1 run writes into its OUTPUT_DIR"
        )
    try:
        data = load_tensors(local_path)
    except Exception as error:
        raise ValueError(f"{path} is no step-1 file: {error}") from error
    keys = {"version", "description", "label_encoder", "head"}
    if not isinstance(data, dict) or not keys <= data.keys():
        content = some_of(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"{path} is no step-1 file: found {content}, expected {sorted(keys)}. Step 1 writes it "
            f"as {FILE_NAME}"
        )
    if data["version"] != VERSION:
        raise ValueError(
            f"The step-1 file {path} has version {data['version']}, expected version {VERSION}: "
            "run step 1 again"
        )
    for key in ("description", "label_encoder", "head"):
        if not isinstance(data[key], dict):
            raise ValueError(
                f"The step-1 file {path} has a {type(data[key]).__name__} as its {key!r}, expected "
                "a dict"
            )
    return data


def _check_description(found: dict, expected: dict, what: str) -> None:
    """Raises a ValueError that names all differences."""
    found, expected = _flat(found), _flat(expected)
    differences = [
        f"{key} is {found.get(key)} in the file and {expected[key]} in the config"
        for key in expected
        if found.get(key) != expected[key]
    ]
    if differences:
        raise ValueError(f"{what} does not fit: " + "; ".join(differences))


def _flat(description: dict) -> dict:
    """With a key for each of the settings."""
    rest = {key: value for key, value in description.items() if key != "settings"}
    return {**rest, **description.get("settings", {})}


def _check_keys(name: str, expected: dict, found: dict, path: str) -> None:
    if expected.keys() != found.keys():
        raise ValueError(
            f"{path} has another {name}: only in the config "
            f"{sorted(expected.keys() - found.keys())}, only in the file "
            f"{sorted(found.keys() - expected.keys())}"
        )


def _check_tensors(name: str, expected: dict, found: dict, path: str) -> None:
    _check_keys(name, expected, found, path)
    for key, value in found.items():
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        if shape != tuple(expected[key].shape):
            raise ValueError(
                f"{path} has another {name}: {key} is {shape} in the file and "
                f"{tuple(expected[key].shape)} in the config"
            )


def _load_matching_layers(
    detector: nn.Module, fpn: dict[str, torch.Tensor], head: dict[str, torch.Tensor], path: str
) -> None:
    """Loads every layer of FPN and head whose tensors all have the shapes of the detector's."""
    target, source = detector.state_dict(), {**fpn, **head}
    differing = {
        _layer(key): (tuple(value.shape), tuple(target[key].shape))
        for key, value in source.items()
        if value.shape != target[key].shape
    }
    inherited = {key: value for key, value in source.items() if _layer(key) not in differing}
    # Not load_state_dict: with a part of the keys it resets the statistics of FrozenBatchNorm2d.
    for key, value in inherited.items():
        target[key].copy_(value)
    rest = [f"{layer} {found} / {expected}" for layer, (found, expected) in differing.items()]
    logger.info(
        f"Inherited {len(inherited)} tensors of the head{' and the FPN' if fpn else ''} from {path}"
        + (f"; not inherited, with shapes there / here: {', '.join(rest)}" if rest else "")
    )


def _layer(key: str) -> str:
    """The convolution that a tensor belongs to, together with the norm inside it."""
    return key.rpartition(".")[0].removesuffix(".norm")
