#!/usr/bin/env python
"""Trains and evaluates a detector from a config, plain or with training methods.

python train_net.py --config-file configs/... [--num-gpus N] [--resume] [KEY VALUE ...]

The config is yaml or, with key=value, a LazyConfig of Detectron2 in Python.

Where this project is installed from a wheel, the command `boosters-train` is the same.

Exit codes: 0, done; 75, preempted by SIGTERM or SIGUSR1 with a checkpoint, go on with --resume;
1, an error; 2, wrong options.
"""

import logging
import os
import warnings
from contextlib import nullcontext

# Threads that wait for each other should not keep the data loader's workers and other processes off
# the cores. PyTorch reads it when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Of calls inside Detectron2 and fvcore, which nobody here can change.
for message in ("`torch.jit.script", "torch.meshgrid", "`broadcast_buffers`"):
    warnings.filterwarnings("ignore", message)

from plaindet import find_config, read_config  # first: it says so where Detectron2 is missing

# isort: split
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

import crosskd  # noqa: F401, the methods of this project, which it registers
import labelenc  # noqa: F401
from plaindet.data import validate_datasets
from plaindet.engine import (
    METHODS,
    CompleteCheckpointer,
    LazyTrainer,
    PlainCheckpointer,
    PlainTrainer,
    check_datasets,
    check_device,
    check_equal_classes,
    check_num_classes,
    ending_process_group,
    load_lazy_config,
    plain_cfg,
    supervised_processes,
)
from plaindet.engine.checks import thing_classes
from plaindet.engine.lazy import evaluate_lazy, lazy_terms, plain_model, run_cfg
from plaindet.modeling import check_class_names, without_pretrained_weights
from plaindet.modeling.class_names import ENTRY as CLASSES

logger = logging.getLogger("plaindet.train_net")


def setup(args) -> tuple[CfgNode, DictConfig | None]:
    """The config of the command line, with its data sets registered. If it is a LazyConfig, its
    settings of the run, and itself."""
    lazy = None
    if args.config_file.endswith(".py"):
        lazy = load_lazy_config(args.config_file, args.opts)
    cfg = read_config(args.config_file, args.opts) if lazy is None else run_cfg(lazy)
    cfg.freeze()
    if args.num_gpus > 1 and cfg.MODEL.DEVICE == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // args.num_gpus))
    # Which sets up the loggers of Detectron2 alone.
    default_setup(cfg if lazy is None else lazy, args)
    for package in {"plaindet", *(method.__module__.split(".")[0] for _, method in METHODS)}:
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=package)
    if cfg.TEST.AUG.ENABLED:
        logger.warning(
            "TEST.AUG.ENABLED is True, but nothing is evaluated with test-time augmentation here: "
            "Detectron2's tools/train_net.py does so for R-CNNs, with the run's plain_config.yaml"
        )
    return cfg, lazy


@ending_process_group()
def main(args):
    cfg, lazy = setup(args)
    if args.eval_only:
        with nullcontext() if lazy is None else lazy_terms():
            return evaluate(cfg, lazy, args.resume)
    trainer = PlainTrainer(cfg) if lazy is None else LazyTrainer(lazy)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def evaluate(cfg: CfgNode, lazy: DictConfig | None, resume: bool) -> dict:
    """The results of the plain detector, from MODEL.WEIGHTS or to resume from."""
    check_device(cfg)
    check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
    validate_datasets(cfg, cfg.DATASETS.TEST)
    check_equal_classes(cfg.DATASETS.TEST)
    # Not the trainer's, which may need a teacher and pretrained weights.
    if lazy is None:
        model = build_model(without_pretrained_weights(plain_cfg(cfg)))
    else:
        model = instantiate(plain_model(lazy)).to(cfg.MODEL.DEVICE)
    check_num_classes(model, cfg.DATASETS.TEST)
    checkpointer = PlainCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    resume = resume and checkpointer.has_checkpoint()
    weights = checkpointer.newest_whole_checkpoint() if resume else cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError("MODEL.WEIGHTS is empty, expected the checkpoint to evaluate")
    checkpoint = CompleteCheckpointer(model).load(weights)
    for name in cfg.DATASETS.TEST:
        classes = checkpoint.get(CLASSES)
        check_class_names(weights, classes, name, thing_classes(name))
    if lazy is not None:
        return evaluate_lazy(lazy, cfg, model)
    results = PlainTrainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def command() -> None:
    """What the command line does."""
    args = default_argument_parser().parse_args()
    args.config_file = find_config(args.config_file)
    several_processes = args.num_gpus * args.num_machines > 1
    with supervised_processes() if several_processes else nullcontext():
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


if __name__ == "__main__":
    command()
