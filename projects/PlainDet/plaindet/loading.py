"""Reading weights without running what a file says: a pickle can call any function."""

from __future__ import annotations

import pickle
import re
import zipfile

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

# What arrays of weights are made of in a pickle.
_ALLOWED = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
}


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which reads tensors, arrays, numbers and texts alone, also from
    the .pkl files of Detectron2's model zoo, and refuses files with anything else. torchvision's
    weights of ResNets get the names of Detectron2's."""

    def _load_file(self, filename):
        """As Detectron2's.

        Raises:
            ValueError: the file is damaged or holds something else.
        """
        if filename.endswith(".pkl"):
            check_pickle(filename)
        if filename.endswith(".pyth"):
            load_tensors(filename)
        return super()._load_file(filename)

    def _torch_load(self, f):
        loaded = load_tensors(f)
        if isinstance(loaded, dict) and {"layer4.1.conv2.weight", "fc.weight"} <= loaded.keys():
            # The heuristics find where the backbone is in the model.
            return {"model": _rename_resnet(loaded), "matching_heuristics": True}
        return loaded


def _rename_resnet(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's names to Detectron2's, as its tools/convert-torchvision-to-d2.py."""
    renamed = {}
    for key, value in weights.items():
        key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
        key = re.sub(r"^(conv1|bn1|fc)\b", r"stem.\1", key)
        key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[key] = value
    return renamed


def load_tensors(path: str):
    """The content of a file that `torch.save` wrote, on the CPU.

    Raises:
        ValueError: the file is damaged, holds other objects than tensors, numbers, texts, lists
            and dicts, or unpacks to more than its size.
    """
    try:
        if zipfile.is_zipfile(path):  # the format since PyTorch 1.6
            _check_not_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a malformed pickle raises anything
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than tensors, numbers, texts, lists "
            f"and dicts ({error})"
        ) from error


def _check_not_compressed(path: str) -> None:
    """A small compressed file may fill the memory; `torch.save` does not compress."""
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{entry.filename} is compressed")


def check_pickle(path: str) -> None:
    """Checks that a pickle has data alone.

    Raises:
        ValueError: a pickle is damaged, or holds more than arrays, numbers, texts, lists and dicts.
    """
    try:
        with PathManager.open(path, "rb") as f:
            _ArrayUnpickler(f, encoding="latin1").load()
    except Exception as error:  # a malformed pickle raises anything
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than arrays, numbers, texts, lists "
            f"and dicts ({error})"
        ) from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
