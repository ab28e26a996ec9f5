"""Checkpoints that are whole or not there, of tensors and numbers alone."""

from __future__ import annotations

import glob
import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch import nn

from plaindet.files import write_atomically
from plaindet.loading import SafeCheckpointer, load_tensors
from plaindet.messages import some_of
from plaindet.modeling import check_class_names
from plaindet.modeling.class_names import ENTRY as CLASSES

from .same_run import check_same_model

logger = logging.getLogger(__name__)

# What `load_tensors` takes besides tensors, lists and dicts.
_READABLE = (int, float, complex, bool, str, bytes, type(None), torch.Size, torch.dtype)
_READABLE += (torch.device,)


class PlainCheckpointer(SafeCheckpointer):
    """Detectron2's checkpointer, which also

    * replaces files at once, so that a kill in the middle leaves the one before,
    * writes no weights that are infinite or NaN,
    * resumes from the checkpoint before if the newest one is damaged, and never from the best,
    * carries the names of the classes and the config of the model, and does not resume with others.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        dataset: str = "",
        class_names: Sequence[str] | None = None,
        model_config: str | None = None,
        **kwargs,
    ):
        """
        Args:
            model, save_dir, kwargs: as Detectron2's.
            dataset, class_names: of the training; None: unknown.
            model_config: MODEL of the run's config as yaml; None: unknown.
        """
        super().__init__(model, save_dir, **kwargs)
        self.dataset = dataset
        self.class_names = class_names
        self.model_config = model_config
        # Called right before a checkpoint is written, in the process that writes it.
        self.before_save = []
        self._resumed_file = None
        self._warned = False

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """Resumes from the newest whole checkpoint, or loads weights, as Detectron2's.

        Raises:
            ValueError: the checkpoint to resume from is of other classes or of another model.
        """
        if not (resume and self.has_checkpoint()):
            return super().resume_or_load(path, resume=False)
        self._resumed_file = self.newest_whole_checkpoint()
        try:
            return self.load(self._resumed_file)
        finally:
            self._resumed_file = None

    def _load_model(self, checkpoint):
        if self._resumed_file is not None:
            check_class_names(
                f"The checkpoint {self._resumed_file}",
                checkpoint.get(CLASSES),
                self.dataset,
                self.class_names,
            )
            if self.model_config is not None:
                found = (checkpoint["model"], checkpoint.get("model_config"))
                check_same_model(self._resumed_file, *found, self.model, self.model_config)
        return super()._load_model(checkpoint)

    def save(self, name: str, **kwargs) -> None:
        """Writes a checkpoint, as Detectron2's, which is whole or not there at all.

        Raises:
            FloatingPointError: a weight is infinite or NaN; nothing is written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        self.check_finite()
        for write_file in self.before_save:
            write_file()
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        states = _python_numbers({**states, **kwargs})
        self._warn_of_others(states)
        data = {"model": self.model.state_dict(), **states}
        if self.class_names is not None:
            data[CLASSES] = list(self.class_names)
        if self.model_config is not None:
            data["model_config"] = self.model_config
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info(f"Saving checkpoint to {path}")
        write_atomically(path, lambda f: torch.save(data, f))
        self.tag_last_checkpoint(os.path.basename(path))

    def _warn_of_others(self, states: dict) -> None:
        others = [] if self._warned else list(_unreadable(states))
        if others:
            self._warned = True
            logger.warning(
                "This run cannot be resumed: its checkpoints hold more than tensors, numbers, "
                f"texts, lists and dicts, which are all that is read of a file: {some_of(others)}. "
                "Let the state_dict() of that hook, schedule or optimizer return them alone"
            )

    def check_finite(self) -> None:
        """Checks all weights that a checkpoint would have.

        Raises:
            FloatingPointError: a weight is infinite or NaN.
        """
        modules = {"": self.model, **self.checkpointables}
        bad = [
            f"{name}.{key}".removeprefix(".")
            for name, module in modules.items()
            if isinstance(module, nn.Module)
            for key, tensor in (*module.named_parameters(), *module.named_buffers())
            if not torch.isfinite(tensor).all()
        ]
        if bad:
            raise FloatingPointError(
                f"No checkpoint is written, since weights are infinite or NaN: {some_of(bad)}"
            )

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if re.fullmatch(r"model_(\d+|final)\.pth", last_filename_basename):
            path = os.path.join(self.save_dir, "last_checkpoint")
            write_atomically(path, lambda f: f.write(last_filename_basename.encode()))

    def newest_whole_checkpoint(self) -> str:
        """The newest checkpoint that is whole; call it in all processes, which get the same.

        Raises:
            ValueError: all are damaged.
        """
        # Only one process decides, so that all of them continue from the same iteration.
        path = self._newest_whole_checkpoint() if comm.is_main_process() else None
        return comm.all_gather(path)[0]

    def _newest_whole_checkpoint(self) -> str:
        tagged = super().get_checkpoint_file()
        damages = {}
        for path in (tagged, *self._older_checkpoints(tagged)):
            damage = find_damage(path)
            if damage is None:
                for name, reason in damages.items():
                    logger.warning(f"{name} is damaged ({reason}): resuming from {path} instead")
                return path
            damages[path] = damage
        raise ValueError(f"No checkpoint in {self.save_dir} can be resumed from: {damages}")

    def _older_checkpoints(self, tagged: str) -> list[str]:
        """The periodic checkpoints of earlier iterations, newest first."""
        newest = _iteration(tagged)
        files = glob.glob(os.path.join(glob.escape(self.save_dir), "model_*.pth"))
        iterations = {path: _iteration(path) for path in files if path != tagged}
        older = [
            path
            for path, iteration in iterations.items()
            if iteration is not None and (newest is None or iteration < newest)
        ]
        return sorted(older, key=iterations.get, reverse=True)


def _python_numbers(x: Any) -> Any:
    """The same with Python's numbers in the place of NumPy's scalars, such as a learning rate that
    a schedule has computed with NumPy: `load_tensors` refuses these."""
    if isinstance(x, np.generic):
        return x.item()
    if type(x) in (dict, OrderedDict):
        return type(x)((_python_numbers(k), _python_numbers(v)) for k, v in x.items())
    if type(x) in (list, tuple):
        return type(x)(map(_python_numbers, x))
    return x


def _unreadable(x: Any, name: str = "") -> Iterator[str]:
    """What `load_tensors` refuses, as names of entries with the types there."""
    if type(x) in (dict, OrderedDict):
        for key, value in x.items():
            yield from _unreadable(value, f"{name}.{key}".removeprefix("."))
    elif type(x) in (list, tuple, set):
        for value in x:
            yield from _unreadable(value, name)
    elif not isinstance(x, torch.Tensor) and type(x) not in _READABLE:
        yield f"{name} ({type(x).__name__})"


def _iteration(path: str) -> int | None:
    match = re.fullmatch(r"model_(\d+)\.pth", os.path.basename(path))
    return int(match.group(1)) if match else None


def find_damage(path: str) -> str | None:
    """What is wrong with a file that `torch.save` wrote: missing, cut off, with other bytes, or
    refused by `load_tensors`. None if it is whole. Reads the whole file."""
    try:
        with zipfile.ZipFile(path) as file:
            member = file.testzip()
        if member is not None:
            return f"wrong checksum of {member}"
        load_tensors(path)
    except MemoryError:
        raise
    except Exception as error:  # a damaged directory at the end of the file raises anything
        return f"{type(error).__name__}: {error}"
    return None
