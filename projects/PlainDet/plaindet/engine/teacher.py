"""A trained detector that supervises the training of another one."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from plaindet.config import merge_config
from plaindet.loading import SafeCheckpointer
from plaindet.messages import some_of
from plaindet.modeling import without_pretrained_weights
from plaindet.modeling.class_names import ENTRY as CLASSES

# What a run writes into its folder.
PLAIN_CONFIG = "plain_config.yaml"
_REMEDY = "The config of a teacher is the plain_config.yaml beside its checkpoint"


class Teacher:
    """A frozen detector in eval mode.

    It is no `nn.Module`, so that a model which holds it has none of it in its parameters, state
    dict, optimizer or DistributedDataParallel wrapper.
    """

    def __init__(
        self,
        model: nn.Module,
        input_format: str = "BGR",
        train_datasets: Sequence[str] = (),
        class_names: Sequence[str] | None = None,
    ):
        """
        Args:
            model: a Detectron2 detector with a `backbone` and `preprocess_image`.
            input_format: of its images, as INPUT.FORMAT: the order of the channels, or a colour
                space.
            train_datasets: the names of the data sets it was trained on, if they are known.
            class_names: that its checkpoint has, if it has them.
        """
        self.model = model.eval().requires_grad_(False)
        self.input_format = input_format
        self.train_datasets = train_datasets
        self.class_names = class_names

    def check_input_format(self, input_format: str) -> None:
        """Checks that the student's images can be turned into the teacher's.

        Args:
            input_format: of the student's images.

        Raises:
            ValueError: they cannot be turned into the teacher's.
        """
        formats = {input_format, self.input_format}
        if len(formats) > 1 and formats != {"BGR", "RGB"}:
            raise ValueError(
                f"The teacher was trained on images in {self.input_format}, the student's are in "
                f"{input_format}, and only BGR and RGB can be turned into each other: set the "
                f"student's INPUT.FORMAT {self.input_format}"
            )

    @torch.no_grad()
    def features(
        self, batched_inputs: list[dict], input_format: str, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """The features of its backbone, from images normalised with its own mean and deviation.

        Args:
            batched_inputs: the student's, with "image" (3, H, W).
            input_format: of these images, see :meth:`check_input_format`.
            device: of the student, to which the teacher moves.
        """
        if self.model.device != device:
            self.model.to(device)
        # Detectron2's preprocessing would make the host wait for each copy.
        images = [x["image"].to(device, non_blocking=True) for x in batched_inputs]
        if input_format != self.input_format:
            images = [image.flip(0) for image in images]
        images = self.model.preprocess_image([{"image": image} for image in images])
        return self.model.backbone(images.tensor)


def load_teacher(model: nn.Module, weights: str, train_datasets: Sequence[str] = ()) -> Teacher:
    """A teacher from a detector and the file of its trained weights: of a LazyConfig, as
    `L(load_teacher)(model=..., weights="output/teacher/model_final.pth")`.

    Args:
        model: a Detectron2 detector.
        weights: of the whole detector.
        train_datasets: see :class:`Teacher`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none is given, or the weights are not those of the detector.
    """
    _check_file(weights, "The file of the teacher's weights")
    checkpoint = CompleteCheckpointer(model).load(weights)
    input_format = getattr(model, "input_format", "BGR")
    return Teacher(model, input_format, train_datasets, checkpoint.get(CLASSES))


def build_teacher(node: CfgNode, device: str, key: str) -> Teacher:
    """Builds a teacher with its trained weights.

    Args:
        node: CONFIG_FILE, a config with the keys of Detectron2, plaindet and
            :func:`plaindet.register_config`, or the folder of the run that trained the teacher;
            WEIGHTS, if empty the newest checkpoint of the folder or the config's MODEL.WEIGHTS;
            OPTS, overrides of the config as KEY VALUE pairs.
        device: where to put it.
        key: of the node, for messages.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: no file is given, the config has unknown keys or those of a method, or the
            weights are not those of the config's detector.
    """
    config_file, weights = node.CONFIG_FILE, node.WEIGHTS
    if os.path.isdir(config_file):
        folder, config_file = config_file, os.path.join(config_file, PLAIN_CONFIG)
        weights = weights or SafeCheckpointer(nn.Module(), folder).get_checkpoint_file()
    _check_file(config_file, f"{key}.CONFIG_FILE")
    try:
        cfg = merge_config(config_file, node.OPTS)
    except KeyError as error:
        raise ValueError(
            f"{key}.CONFIG_FILE: {config_file} is not the config of a plain detector "
            f"({error.args[0]}). {_REMEDY}. The keys of a project of yours become known by "
            "plaindet.register_config; those of another version of Detectron2 have to be removed"
        ) from error
    cfg.MODEL.DEVICE = device
    weights = weights or cfg.MODEL.WEIGHTS
    _check_file(weights, f"{key}.WEIGHTS")
    try:
        model = build_model(without_pretrained_weights(cfg))
        checkpoint = CompleteCheckpointer(model).load(weights)
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{key}: cannot build the teacher of {config_file} with {weights}: "
            f"{type(error).__name__}: {error}. {_REMEDY}"
        ) from error
    return Teacher(model, cfg.INPUT.FORMAT, cfg.DATASETS.TRAIN, checkpoint.get(CLASSES))


def _check_file(path: str, key: str) -> None:
    if not path:
        raise ValueError(f"{key} is empty, expected a file of the teacher")
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"{key}: {path} does not exist (from {os.getcwd()})")


class CompleteCheckpointer(SafeCheckpointer):
    """A checkpointer which does not accept that a file has only a part of the model, or more layers
    of a sequence than the model; other networks in the file, as a mask head, are left out."""

    def load(self, path: str, *args, **kwargs) -> dict:
        """Loads a file, as Detectron2's, of which the whole model has to be there.

        Raises:
            ValueError: names the file, and the parameters that it lacks, has in another shape, or
                has of more layers.
        """
        self._file = path
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint):
        name = type(self.model).__name__
        try:
            incompatible = super()._load_model(checkpoint)
        except ValueError as error:  # the file holds something else
            raise ValueError(f"{self._file} does not fit this {name}: {error}") from error
        if incompatible.incorrect_shapes:
            shapes = [
                f"{key} {found} instead of {expected}"
                for key, found, expected in incompatible.incorrect_shapes
            ]
            raise ValueError(f"{self._file} does not fit this {name}: it has {some_of(shapes)}")
        if incompatible.missing_keys:
            raise ValueError(
                f"{self._file} does not fit this {name}: it lacks "
                f"{some_of(incompatible.missing_keys)}"
            )
        keys = incompatible.unexpected_keys
        more_layers = [key for key in keys if _is_of_another_layer(self.model, key)]
        if more_layers:
            raise ValueError(
                f"{self._file} does not fit this {name}: it has more layers, {some_of(more_layers)}"
            )
        return incompatible


def _is_of_another_layer(model: nn.Module, key: str) -> bool:
    """Whether a key that a model does not have is of a layer of one of its sequences."""
    module = model
    for name in key.split("."):
        child = module._modules.get(name)
        if child is None:
            return isinstance(module, (nn.Sequential, nn.ModuleList))
        module = child
    return False
