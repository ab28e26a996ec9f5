"""Runs whose config is a LazyConfig of Detectron2, in Python, and not yaml.

The model of such a config is `L(TrainingTask)(detector=..., methods=[...])`, and all else is as in
Detectron2's own: `train`, `optimizer`, `lr_multiplier` and `dataloader`.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.registry import _convert_target_to_string, locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from plaindet.config import add_method_configs, add_plaindet_config
from plaindet.data import PlainDatasetMapper

from .checkpoints import PlainCheckpointer
from .checks import check_teacher_classes
from .evaluation import PlainCOCOEvaluator
from .task import TrainingTask
from .teacher import Teacher
from .trainer import PlainTrainer

logger = logging.getLogger(__name__)

# What a run writes into its folder.
PLAIN_LAZY_CONFIG = "plain_lazyconfig.yaml"
# The keys that the engine reads, and what they are in a LazyConfig.
KEYS = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.PRECISION": "train.amp.precision",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "DATALOADER.ASPECT_RATIO_GROUPING": "dataloader.train.aspect_ratio_grouping",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "dataloader.train.dataset.filter_empty",
    "MODEL.MASK_ON": "dataloader.train.mapper.use_instance_mask",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
}
# Regular expressions of more keys that errors name.
_FURTHER_KEYS = {
    r"MODEL\.[A-Z_]*\.NUM_CLASSES": "num_classes of the detector",
    r"DATASETS\.COCO_FORMAT": "what plaindet.data.register_coco_format takes, in the config",
    r"MODEL\.LABELENC\.\w+": "an argument of LabelEnc",
    r"MODEL\.CROSSKD\.\w+": "an argument of CrossKD",
}
# The loaders and what is read of them, of their data sets and of `train`. The rest would be lost.
_LOADERS = {"train": build_detection_train_loader, "test": build_detection_test_loader}
_KNOWN = {
    "train": {"dataset", "mapper", "total_batch_size", "num_workers", "aspect_ratio_grouping"},
    "test": {"dataset", "mapper", "num_workers"},
}
_KNOWN_OF_DATASETS = {"names", "filter_empty"}
_KNOWN_OF_TRAIN = {
    *(key.split(".")[1] for key in KEYS.values() if key.startswith("train.")),
    *("ddp", "log_period"),
    *("cudnn_benchmark", "float32_precision"),  # of Detectron2's default_setup
}
_KNOWN_OF_CHECKPOINTER = {"period", "max_to_keep"}
# What takes the place of Detectron2's own.
_OURS = {DatasetMapper: PlainDatasetMapper, COCOEvaluator: PlainCOCOEvaluator}


def load_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Reads a LazyConfig.

    Args:
        config_file: in Python.
        overrides: as "train.max_iter=1000".

    Raises:
        ValueError: an override is no assignment, or the config lacks a part.
    """
    wrong = [x for x in overrides if "=" not in x]
    if wrong:
        raise ValueError(f"Overrides of a LazyConfig are key=value, found {' '.join(wrong)}")
    config = LazyConfig.apply_overrides(LazyConfig.load(config_file), list(overrides))
    parts = ("model", "optimizer", "lr_multiplier", "dataloader.train", "train")
    lacking = [name for name in parts if OmegaConf.select(config, name) is None]
    if lacking:
        raise ValueError(f"{config_file} has no {', '.join(lacking)}")
    return config


def run_cfg(config: DictConfig) -> CfgNode:
    """What the engine reads of a run, under the keys of a yaml config.

    Raises:
        ValueError: the data are made, or the run is to be, in a way that the engine does not know.
    """
    for name in _LOADERS:
        _check_loader(name, config.dataloader.get(name))
    _check_train(config.train)
    cfg = get_cfg()
    add_plaindet_config(cfg)
    add_method_configs(cfg)
    cfg.DATASETS.TEST = ()
    for key, lazy_key in KEYS.items():
        value = OmegaConf.select(config, lazy_key)
        if value is None or (key == "DATASETS.TEST" and "evaluator" not in config.dataloader):
            continue
        if key.startswith("DATASETS."):
            value = (value,) if isinstance(value, str) else tuple(value)
        *path, name = key.split(".")
        node = cfg
        for part in path:
            node = node[part]
        node[name] = value
    if len(cfg.DATASETS.TEST) > 1:
        raise ValueError(
            f"dataloader.test.dataset.names is {cfg.DATASETS.TEST}, expected one data set, which "
            "dataloader.evaluator evaluates"
        )
    return cfg


def _check_loader(split: str, loader: DictConfig | None) -> None:
    if loader is None:
        return
    name, function = f"dataloader.{split}", _LOADERS[split]
    if _target(loader) is not function:
        raise ValueError(
            f"{name} is of {loader.get('_target_')}, expected L({function.__name__})(...) of "
            "Detectron2, which a stream of this project takes the place of: what another loader "
            "does to an image can be done in the mapper, and data of other kinds can be registered "
            "in the DatasetCatalog"
        )
    dataset = loader.get("dataset")
    if dataset is None or _target(dataset) is not get_detection_dataset_dicts:
        raise ValueError(
            f"{name}.dataset has to be L(get_detection_dataset_dicts)(names=...), so that the data "
            "are checked before the run: register data of other kinds in the DatasetCatalog"
        )
    unknown = [f"{name}.{key}" for key in loader if key not in {"_target_", *_KNOWN[split]}]
    known = {"_target_", *_KNOWN_OF_DATASETS}
    unknown += [f"{name}.dataset.{key}" for key in dataset if key not in known]
    if unknown:
        reason = {
            "train": "which can be continued exactly",
            "test": "since images are evaluated one by one",
        }
        raise ValueError(
            f"{', '.join(unknown)}: expected {sorted(_KNOWN[split])} and of the data set "
            f"{sorted(_KNOWN_OF_DATASETS)} alone, {reason[split]}"
        )


def _check_train(train: DictConfig) -> None:
    """Refuses what would end in another model, or in other checkpoints, than the config asks for.
    Some scripts for LazyConfigs have such keys."""
    if _is_on(train, "clip_grad"):
        raise ValueError(
            "train.clip_grad is on, but gradients are not clipped by this key: let "
            "optimizer._target_ be a function of yours that returns an optimizer which clips, as "
            "those of Detectron2's maybe_add_gradient_clipping"
        )
    if _is_on(train, "model_ema"):
        raise ValueError(
            "train.model_ema is on, but there is no moving average of the weights here: set "
            "train.model_ema.enabled to False"
        )
    unknown = [key for key in train.get("checkpointer") or () if key not in _KNOWN_OF_CHECKPOINTER]
    if unknown:
        names = ", ".join(f"train.checkpointer.{key}" for key in unknown)
        raise ValueError(f"{names}: expected {sorted(_KNOWN_OF_CHECKPOINTER)} alone")


def _is_on(node: DictConfig, key: str) -> bool:
    """Whether there is a key that asks for something, and is not switched off by its `enabled`."""
    value = node.get(key)
    return bool(value.get("enabled", True) if isinstance(value, DictConfig) else value)


def _warn_of_ignored(train: DictConfig) -> None:
    """Of keys of `train` that ask for something, in one line."""
    ignored = [f"train.{key}" for key in train if key not in _KNOWN_OF_TRAIN and _is_on(train, key)]
    if ignored:
        logger.warning(f"Nothing reads {', '.join(ignored)} of the LazyConfig")


def _target(node: DictConfig) -> Any:
    target = node.get("_target_")
    return locate(target) if isinstance(target, str) else target


def _build(node: DictConfig, **defaults) -> Any:
    """What a node describes, of this project's class where that has more than Detectron2's."""
    ours = _OURS.get(_target(node))
    if ours is not None:
        node = copy.deepcopy(node)
        node._target_ = ours
        for key, value in defaults.items():
            node.setdefault(key, value)
    return instantiate(node)


def plain_model(config: DictConfig) -> DictConfig:
    """The node of the plain detector."""
    target = _target(config.model)
    is_task = isinstance(target, type) and issubclass(target, TrainingTask)
    return config.model.detector if is_task else config.model


def plain_lazy_config(config: DictConfig) -> DictConfig:
    """The LazyConfig of the plain detector: without the methods, and without this project but for
    parts of the detector that are from it."""
    plain = copy.deepcopy(config)
    plain.model = plain_model(plain)
    for loader in (plain.dataloader.get("train"), plain.dataloader.get("test")):
        if loader is not None and _target(loader.mapper) is PlainDatasetMapper:
            loader.mapper._target_ = DatasetMapper
            loader.mapper.pop("additions", None)
    factor = OmegaConf.select(plain, "optimizer.params.lr_factor_func")
    if isinstance(factor, partial) and factor.func is detector_lr_factor:
        plain.optimizer.params.lr_factor_func = factor.keywords["factor"]
    return plain


def detector_lr_factor(name: str, factor: Callable[[str], float]) -> float:
    """What a function for the parameters of a detector, as Detectron2's `get_vit_lr_decay_rate`,
    says of the parameter of a task, whose name has a prefix. Not knowing it, such a function says 1
    of all. For `lr_factor_func` of Detectron2's `get_default_optimizer_params`, by
    `functools.partial`."""
    return factor(name.removeprefix("detector."))


def evaluate_lazy(config: DictConfig, cfg: CfgNode, detector: nn.Module) -> dict:
    """The results of a detector on `dataloader.test`; none if there is none.

    Args:
        cfg: of :func:`run_cfg`.
    """
    if not cfg.DATASETS.TEST:
        return {}
    mapper = _build(config.dataloader.test.mapper)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = config.dataloader.test.get("num_workers", 0)
    loader = PlainTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0], mapper)
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    evaluator = _build(config.dataloader.evaluator, output_dir=folder)
    results = inference_on_dataset(detector, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


@contextmanager
def lazy_terms() -> Iterator[None]:
    """Around checks that name the keys of yaml configs: the errors also have those of LazyConfigs.

    Raises:
        ValueError, FileNotFoundError: instead of the error.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        keys = {**{re.escape(x): y for x, y in KEYS.items()}, **_FURTHER_KEYS}
        used = [
            f"{found[0]} is {lazy_key}"
            for key, lazy_key in keys.items()
            if (found := re.search(rf"(?<![A-Z._]){key}\b", str(error)))
        ]
        if not used or type(error) not in (ValueError, FileNotFoundError):
            raise
        raise type(error)(f"{error} (In a LazyConfig {', '.join(used)})") from error


class LazyTrainer(PlainTrainer):
    """PlainTrainer of a LazyConfig. It writes `plain_lazyconfig.yaml` instead of a yaml config."""

    def __init__(self, config: DictConfig):
        self.config = config
        _warn_of_ignored(config.train)
        with lazy_terms():
            super().__init__(run_cfg(config))

    def build_model(self, cfg: CfgNode) -> nn.Module:
        model = instantiate(self.config.model).to(cfg.MODEL.DEVICE)
        cfg.defrost()  # it is this trainer's own
        for method in getattr(model, "methods", ()):
            method.write_settings(cfg)
            for teacher in vars(method).values():
                if isinstance(teacher, Teacher):
                    check_teacher_classes(teacher, cfg)
        return model

    def build_optimizer(self, cfg: CfgNode, model: nn.Module):
        node = copy.deepcopy(self.config.optimizer)
        node.params.model = model
        factor = node.params.get("lr_factor_func")
        if factor is not None:
            node.params.lr_factor_func = partial(detector_lr_factor, factor=instantiate(factor))
        optimizer = instantiate(node)
        for group in optimizer.param_groups:
            # Such as NAdam's betas. Checkpoints have them, and are read as tensors and lists alone.
            group.update({k: list(x) for k, x in group.items() if isinstance(x, ListConfig)})
        return optimizer

    def build_lr_scheduler(self, cfg: CfgNode, optimizer):
        return LRMultiplier(optimizer, instantiate(self.config.lr_multiplier), cfg.SOLVER.MAX_ITER)

    def build_train_mapper(self, cfg: CfgNode):
        return _build(self.config.dataloader.train.mapper)

    def build_checkpointer(self, cfg: CfgNode, model: nn.Module) -> PlainCheckpointer:
        checkpointer = super().build_checkpointer(cfg, model)
        plain = OmegaConf.to_container(plain_model(self.config), resolve=True)
        checkpointer.model_config = yaml.safe_dump(_plain_values(plain))
        return checkpointer

    def ddp_arguments(self) -> dict:
        return {**super().ddp_arguments(), **self.config.train.get("ddp", {})}

    def write_plain_config(self, cfg: CfgNode) -> None:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        path = os.path.join(cfg.OUTPUT_DIR, PLAIN_LAZY_CONFIG)
        LazyConfig.save(plain_lazy_config(self.config), path)

    def build_hooks(self) -> list[HookBase]:
        built, train = super().build_hooks(), self.config.train
        for hook in built:
            if isinstance(hook, hooks.PeriodicWriter):
                hook._period = train.get("log_period", 20)
            elif isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = OmegaConf.select(train, "checkpointer.max_to_keep")
        return built

    def test(self, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:
        return evaluate_lazy(self.config, cfg, self.plain_model)


def _plain_values(x: Any) -> Any:
    """Of texts, numbers, lists and dicts alone."""
    if isinstance(x, dict):
        return {str(key): _plain_values(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain_values(value) for value in x]
    if x is None or isinstance(x, (str, bool, int, float)):
        return x
    if isinstance(x, partial):
        return _plain_values({"_target_": x.func, "args": x.args, **x.keywords})
    return _convert_target_to_string(x) if hasattr(x, "__qualname__") else str(x)
