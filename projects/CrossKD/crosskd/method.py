"""CrossKD as a training method: a teacher, and a class for each family of detectors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import CfgNode

from plaindet.engine import (
    DetectorAdapter,
    Method,
    Teacher,
    adapter_of,
    build_teacher,
    check_teacher_classes,
)

from .config import add_crosskd_config

# In configs that runs wrote when all families had the defaults of dense detectors.
FORMER_DEFAULTS = {"POSITION": 3, "BOX_LOSS": "giou"}


class CrossKD(Method):
    """A detector that trains with a teacher.

    What is done with it depends on the family of the detector: :class:`DenseCrossKD`,
    :class:`TwoStageCrossKD` and :class:`DETRCrossKD`, of which :meth:`from_config` takes the one
    that fits. The teacher is no module, and so in no checkpoint.
    """

    name = "CrossKD"
    add_config = staticmethod(add_crosskd_config)
    # Of the detectors that a subclass is for.
    adapter_class: type[DetectorAdapter]

    def __init__(self, teacher: Teacher | Callable[[], Teacher] | None = None):
        """
        Args:
            teacher: a trained detector. It may be built when it is needed, or come later by
                :meth:`set_teacher` (None).
        """
        super().__init__()
        self._given_teacher = teacher
        self._teacher_adapter = None

    @classmethod
    def from_config(cls, cfg: CfgNode, adapter: DetectorAdapter, with_teacher: bool = True):
        """The CrossKD of the detector's family, with the settings of a config.

        Raises:
            TypeError: there is no CrossKD for the family of the detector.
        """
        for subclass in CrossKD.__subclasses__():
            if isinstance(adapter, subclass.adapter_class):
                teacher = partial(_build_teacher, cfg) if with_teacher else None
                return subclass(teacher=teacher, **subclass.settings(cfg.MODEL.CROSSKD))
        raise TypeError(
            "CrossKD is for dense and two-stage detectors and Deformable DETR, not for "
            f"{type(adapter.detector).__name__}"
        )

    @classmethod
    def settings(cls, crosskd: CfgNode) -> dict:
        """The arguments of the constructor, which have the names of the keys of MODEL.CROSSKD. None
        is their own default.

        Raises:
            ValueError: a key that means nothing here has another value than its default.
        """
        default = CfgNode({"MODEL": {}})
        add_crosskd_config(default)
        settings, arguments = {}, inspect.signature(cls).parameters
        for key, value in crosskd.items():
            expected = default.MODEL.CROSSKD[key]
            if key == "TEACHER" or value is None:
                continue
            if key.lower() in arguments:
                settings[key.lower()] = value
            elif value not in (expected, FORMER_DEFAULTS.get(key)):
                expected = f"{expected:g}" if isinstance(expected, float) else repr(expected)
                raise ValueError(
                    f"MODEL.CROSSKD.{key} is {value!r}, expected one of [{expected}]: it means "
                    f"nothing for {cls.adapter_class.__name__.removesuffix('Adapter')} detectors"
                )
        return settings

    def attach(self, adapter: DetectorAdapter) -> None:
        """Takes the student, and then the teacher.

        Raises:
            TypeError: this class is for another family of detectors.
            ValueError: the student or the teacher does not fit.
        """
        if not isinstance(adapter, self.adapter_class):
            raise TypeError(f"{type(self).__name__} is not for {type(adapter.detector).__name__}")
        super().attach(adapter)
        self.check_student()
        teacher = self._given_teacher
        if teacher is not None:
            self.set_teacher(teacher if isinstance(teacher, Teacher) else teacher())

    def check_student(self) -> None:
        """Checks the settings against the student.

        Raises:
            ValueError: an option has a value that this detector cannot have.
        """

    @property
    def teacher_adapter(self) -> DetectorAdapter:
        """The teacher, seen through the adapter of its own family.

        Raises:
            RuntimeError: there is no teacher.
        """
        if self._teacher_adapter is None:
            raise RuntimeError("CrossKD trains with a teacher: call set_teacher")
        return self._teacher_adapter

    def set_teacher(self, teacher: Teacher) -> None:
        """Takes a trained detector as the teacher. It may bring modules for training, so this comes
        before an optimizer is built.

        Raises:
            ValueError: the teacher does not fit, see :meth:`check_teacher`.
        """
        names = [type(x).__name__ for x in (teacher.model, self.adapter.detector)]
        check_equal({"meta-architecture": names})
        teacher.check_input_format(self.adapter.input_format)
        self.teacher, self._teacher_adapter = teacher, adapter_of(teacher.model)
        self.teacher_adapter.position = self.adapter.position
        self.check_teacher()
        self.build_projections()
        self.to(self.adapter.device)

    def check_teacher(self) -> None:
        """Checks the settings against the teacher.

        Raises:
            ValueError: names the first thing in which the teacher differs from the student.
        """

    def build_projections(self) -> None:
        """Builds what adapts features to the teacher's, where their widths differ."""

    def teacher_features(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        """The features of the teacher's backbone."""
        adapter = self.adapter
        return self.teacher.features(batched_inputs, adapter.input_format, adapter.device)

    def project(self, name: str, features: torch.Tensor) -> torch.Tensor:
        """What goes through the projection of this name, if there is one."""
        return getattr(self, name)(features) if name in self._modules else features


def check_option(key: str, value, expected) -> None:
    """Checks that a config key has one of the known values.

    Args:
        key: of the config, without MODEL.
        value: of this key.
        expected: the possible values.

    Raises:
        ValueError: the value is none of them.
    """
    if value not in expected:
        raise ValueError(f"MODEL.{key} is {value!r}, expected one of {list(expected)}")


def check_gamma(gamma: float) -> None:
    """Checks CLS_GAMMA, an exponent of |p - q|: between 0 and 1 its slope is infinite where the
    probabilities are equal.

    Raises:
        ValueError: it is neither 0 nor at least 1.
    """
    if gamma != 0 and not gamma >= 1:
        raise ValueError(f"MODEL.CROSSKD.CLS_GAMMA is {gamma}, expected 0 or at least 1")


def check_equal(found: dict) -> None:
    """Checks that student and teacher agree.

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


def _build_teacher(cfg: CfgNode) -> Teacher:
    teacher = build_teacher(cfg.MODEL.CROSSKD.TEACHER, cfg.MODEL.DEVICE, "MODEL.CROSSKD.TEACHER")
    check_teacher_classes(teacher, cfg)
    return teacher
