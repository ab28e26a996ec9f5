"""What CrossKD adds to any detector: a teacher, and modules that exist for training only."""

from __future__ import annotations

import torch
from detectron2.structures import ImageList

from plaindet.modeling import Teacher, TrainingOnlyModules


class CrossKDDistiller(TrainingOnlyModules):
    """A detector that trains with a teacher. Put it before the plain meta-architecture in a list of
    base classes, and define :meth:`training_losses`.

    In inference, and in its state dict, it is the plain meta-architecture. The teacher is in
    neither, nor among the parameters; it comes by :meth:`set_teacher`.
    """

    def __init__(self, **detector):
        """
        Args:
            detector: the arguments of the plain meta-architecture.
        """
        super().__init__(**detector)
        self._teacher = None

    @property
    def teacher(self) -> Teacher:
        """
        Raises:
            RuntimeError: it has not been set.
        """
        if self._teacher is None:
            raise RuntimeError(f"{type(self).__name__} trains with a teacher: call set_teacher")
        return self._teacher

    def set_teacher(self, teacher: Teacher) -> None:
        """Takes a trained detector as the teacher. It may bring modules into `training_only`, so
        this comes before an optimizer is built.

        Raises:
            ValueError: the teacher does not fit, see :meth:`check_teacher`.
        """
        self.check_teacher(teacher)
        self._teacher = teacher

    def check_teacher(self, teacher: Teacher) -> None:
        """
        Raises:
            ValueError: its meta-architecture is not the student's, or its images are of a format
                into which the student's cannot be turned.
        """
        check_equal(
            {"meta-architecture": (type(teacher.model).__name__, self.plain_class().__name__)}
        )
        teacher.check_input_format(getattr(self, "input_format", "BGR"))

    def forward(self, batched_inputs: list[dict]):
        """As the plain detector; in training with the distillation losses too."""
        if not self.training:
            return super().forward(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        return self.training_losses(batched_inputs, images, self.backbone(images.tensor))

    def training_losses(
        self, batched_inputs: list[dict], images: ImageList, features: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The losses of an iteration: the plain detector's, and `loss_kd_*` of the distillation.

        Args:
            batched_inputs: as the plain detector's.
            images: these, preprocessed and padded to one size.
            features: of the images, as the backbone returns them.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define training_losses")


def check_option(key: str, value, expected) -> None:
    """
    Args:
        key: of the config, without MODEL.
        value: of this key.
        expected: the possible values.

    Raises:
        ValueError: the value is none of them.
    """
    if value not in expected:
        raise ValueError(f"MODEL.{key} is {value!r}, expected one of {list(expected)}")


def check_equal(found: dict) -> None:
    """
    Args:
        found: pairs (teacher's, student's) by what they are.

    Raises:
        ValueError: names the first pair that differs.
    """
    for what, (teacher, student) in found.items():
        if teacher != student:
            raise ValueError(
                f"The teacher's {what} is {teacher}, the student's is {student}: they have to be "
                "equal. The config of a teacher is the plain_config.yaml beside its checkpoint"
            )
