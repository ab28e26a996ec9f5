"""From a config to a task: MODEL.TRAINING_METHODS, and the short names for plain detectors with
methods that MODEL.META_ARCHITECTURE may have."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from .adapters import adapter_of
from .method import method_class
from .task import TrainingTask

logger = logging.getLogger(__name__)


def training_methods(cfg: CfgNode) -> list[str]:
    """The names of the methods that train the detector of a config."""
    short = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    names = short.methods if isinstance(short, ShortName) else ()
    return [*names, *(x for x in cfg.MODEL.get("TRAINING_METHODS", ()) if x not in names)]


def plain_cfg(cfg: CfgNode) -> CfgNode:
    """The config of the plain detector, with its own name as MODEL.META_ARCHITECTURE."""
    short = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if not isinstance(short, ShortName):
        return cfg
    logger.info(
        f"MODEL.META_ARCHITECTURE {short.__name__} is short for {short.detector} with "
        f"MODEL.TRAINING_METHODS {short.methods}"
    )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = short.detector
    return cfg


def build_task(cfg: CfgNode, with_teachers: bool = True) -> TrainingTask:
    """The detector of a config with its methods, and with their teachers unless these come later.

    Raises:
        ValueError: an unknown method.
    """
    methods = [method_class(name) for name in training_methods(cfg)]
    detector = build_model(plain_cfg(cfg))
    adapter = adapter_of(detector) if methods else None
    short = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    task_class = ShortNameTask if isinstance(short, ShortName) else TrainingTask
    return task_class(detector, [x.from_config(cfg, adapter, with_teachers) for x in methods])


class ShortName:
    """A name in META_ARCH_REGISTRY that Detectron2's `build_model` makes a task of. Teachers come
    later, by `set_teacher` and `set_feature_teacher`, since inference needs none."""

    def __init__(self, prefix: str, methods: tuple[str, ...], detector: str):
        self.__name__ = prefix + detector
        self.methods = methods
        self.detector = detector

    def plain_class(self) -> type[nn.Module]:
        """The plain meta-architecture."""
        return META_ARCH_REGISTRY.get(self.detector)

    def __call__(self, cfg: CfgNode) -> TrainingTask:
        return build_task(cfg, with_teachers=False)


class ShortNameTask(TrainingTask):
    """A task that answers for the attributes of its detector and its methods, as models did when
    each of these names was a class."""

    def __getattr__(self, name: str):
        owner = self._owner(name)
        return super().__getattr__(name) if owner is None else getattr(owner, name)

    def __setattr__(self, name: str, value) -> None:
        owner = None if name in vars(self) else self._owner(name)
        super().__setattr__(name, value) if owner is None else setattr(owner, name, value)

    def _owner(self, name: str) -> nn.Module | None:
        modules = vars(self).get("_modules", {})
        owners = (modules["detector"], *self.methods) if "training_only" in modules else ()
        return next((x for x in owners if name not in modules and hasattr(x, name)), None)


def _register_short_names() -> dict[str, ShortName]:
    dense_and_two_stage = ("RetinaNet", "FCOS", "GFL", "ATSS", "GeneralizedRCNN")
    names = [
        *(ShortName("LabelEnc", ("LabelEnc",), x) for x in dense_and_two_stage),
        *(ShortName("CrossKD", ("CrossKD",), x) for x in (*dense_and_two_stage, "DeformableDETR")),
        *(ShortName("LabelEncCrossKD", ("LabelEnc", "CrossKD"), x) for x in dense_and_two_stage),
    ]
    for name in names:
        META_ARCH_REGISTRY.register(name)
    return {name.__name__: name for name in names}


SHORT_NAMES = _register_short_names()


def former_base(name: str, method: str) -> type:
    """A class of this name that says, when one is derived from it, what has taken its place."""

    def refuse(cls, **kwargs):
        raise TypeError(
            f"{name} is no base class any more: {cls.__name__} is not needed. Train the plain "
            f"detector itself, with MODEL.META_ARCHITECTURE its own name and "
            f"MODEL.TRAINING_METHODS ('{method}',). A detector that is unlike Detectron2's gets an "
            "adapter: plaindet.engine.register_adapter"
        )

    return type(name, (), {"__init_subclass__": classmethod(refuse)})
