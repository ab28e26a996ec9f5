"""The trainer that every run of this project shares, on top of Detectron2's."""

from __future__ import annotations

import inspect
import logging
import os
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.cuda.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from plaindet.data import (
    PlainDatasetMapper,
    TrainStream,
    build_train_stream,
    validate_datasets,
    validated_records,
)
from plaindet.signals import ignore_preemption

from .build import build_task, training_methods
from .checkpoints import ExactResume, PlainCheckpointer
from .checkpoints.training_only import NAME as TRAINING_ONLY
from .checks import check_datasets, check_device, check_equal_classes, check_num_classes
from .evaluation import build_evaluator, find_evaluator_type
from .finite import FiniteLosses
from .idle import IdleGradients
from .method import method_class
from .optimizer import build_optimizer
from .plain_config import write_plain_config
from .preemption import Preemption
from .task import TrainingTask

logger = logging.getLogger(__name__)

# What a trainer that evaluates in another way overrides.
_EVALUATION = ("test", "build_evaluator")


class PlainTrainer(DefaultTrainer):
    """Detectron2's DefaultTrainer, which trains a :class:`TrainingTask`, with the methods of
    MODEL.TRAINING_METHODS, and which also

    * checks the training data, and its classes against the detector's, before it trains,
    * trains on several CPU processes as well as on several GPUs,
    * resumes exactly, from checkpoints that are whole whenever the run is killed,
    * leaves with a checkpoint and the exit code `PREEMPTED` on SIGTERM and SIGUSR1,
    * stops before a loss that is infinite or NaN reaches the weights,
    * saves the modules that exist for training only in a checkpoint entry of their own,
    * writes the config of the plain detector, `plain_config.yaml`, for Detectron2 alone.
    """

    def __init__(self, cfg: CfgNode):
        # Not DefaultTrainer.__init__: it scales the config by its own auto_scale_workers, passes
        # device_ids to DistributedDataParallel, which fails on the CPU, and knows no mapper.
        super(DefaultTrainer, self).__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        if cfg.SEED < 0:
            cfg = _with_seed(cfg, comm.shared_random_seed())
            logger.info(f"Using the random seed {cfg.SEED}")

        check_device(cfg)
        check_datasets("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
        check_datasets("DATASETS.TEST", cfg.DATASETS.TEST)
        if all(inspect.getattr_static(type(self), x) is vars(PlainTrainer)[x] for x in _EVALUATION):
            for name in cfg.DATASETS.TEST:
                find_evaluator_type(name)
        dataset_names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
        validate_datasets(cfg, dataset_names)
        check_equal_classes(dataset_names)
        model = self.build_model(cfg)
        self.task = model if isinstance(model, TrainingTask) else TrainingTask(model)
        _check_methods(cfg, self.task)
        check_num_classes(self.plain_model, dataset_names)
        optimizer = self.build_optimizer(cfg, self.task)
        self.mapper = self.build_train_mapper(cfg)
        data_loader = self._train_loader(cfg)

        on_cpu = next(self.task.parameters()).device.type == "cpu"
        ddp_arguments = {**self.ddp_arguments(), **({"device_ids": None} if on_cpu else {})}
        ddp_model = create_ddp_model(self.task, **ddp_arguments)
        self._trainer = _inner_trainer(cfg, ddp_model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = self.build_checkpointer(cfg, self.plain_model)
        self.checkpointer.add_checkpointable("trainer", weakref.proxy(self))
        if self.task.methods:
            self.checkpointer.add_checkpointable(TRAINING_ONLY, self.task.training_only)
            self.checkpointer.before_save.append(self._write_files)
        if comm.is_main_process():
            self.write_plain_config(cfg)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())
        # Only the inner trainer calls after_backward.
        self._finite_losses = FiniteLosses(self.model, cfg.OUTPUT_DIR)
        self._trainer.register_hooks([self._finite_losses])

    @property
    def plain_model(self) -> nn.Module:
        """The detector that is trained."""
        return self.task.detector

    def ddp_arguments(self) -> dict:
        """Of Detectron2's `create_ddp_model`."""
        return {"broadcast_buffers": False}

    def write_plain_config(self, cfg: CfgNode) -> None:
        """Writes the config of the plain detector, in the main process."""
        write_plain_config(cfg, self.plain_model)

    def build_hooks(self) -> list[HookBase]:
        self._exact_resume = ExactResume(self.plain_model, self.cfg.SOLVER.CHECKPOINT_PERIOD)
        additions = getattr(self.mapper, "additions", [])
        of_methods = [h for x in self.task.methods for h in x.build_hooks(self.cfg, additions)]
        rest = [IdleGradients(self.task), self._exact_resume, *super().build_hooks()]
        return [*of_methods, *rest, Preemption()]

    def save_checkpoint(self) -> None:
        """Writes a checkpoint of this iteration; call it in all processes."""
        self._exact_resume.collect()
        self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
        comm.synchronize()

    def _write_files(self) -> None:
        for method in self.task.methods:
            method.write_files(self.cfg.OUTPUT_DIR, self.checkpointer.class_names)

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes the run, or loads weights, as DefaultTrainer's. Where nothing is resumed, the
        methods then start.

        Raises:
            ValueError: the checkpoint is of an iteration behind the end of the run.
        """
        super().resume_or_load(resume)
        if not (resume and self.checkpointer.has_checkpoint()):
            for method in self.task.methods:
                method.start(self.cfg)
        if 0 < self.max_iter < self.start_iter:
            raise ValueError(
                f"The checkpoint {self.checkpointer.newest_whole_checkpoint()} has "
                f"{self.start_iter} iterations, expected at most SOLVER.MAX_ITER {self.max_iter}"
            )

    def run_step(self):
        with self._finite_losses.guarding_iteration():
            super().run_step()

    def after_train(self):
        if self.iter < self.max_iter:
            # An error in the last iteration, after which Detectron2 evaluates, too, and waits there
            # for processes that wait elsewhere or have ended.
            evaluating = (hooks.EvalHook, hooks.BestCheckpointer)
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, evaluating)]
        super().after_train()

    def before_train(self):
        super().before_train()
        # A checkpoint is written before the evaluation of its iteration, which may have been cut
        # off. At the end, `after_train` evaluates anyway.
        period, iteration = self.cfg.TEST.EVAL_PERIOD, self.start_iter
        if period > 0 and iteration % period == 0 and 0 < iteration < self.max_iter:
            self.iter = self.storage.iter = iteration - 1
            for hook in self._hooks:
                if isinstance(hook, (hooks.EvalHook, hooks.BestCheckpointer)):
                    hook.after_step()

        if 0 < self.max_iter == self.start_iter:
            self._write_final_checkpoint()

    def _write_final_checkpoint(self) -> None:
        # The run was killed after the checkpoint of its last iteration, and before the final one,
        # which Detectron2 writes behind an iteration alone.
        if not self.checkpointer.has_checkpoint():
            return
        path = self.checkpointer.newest_whole_checkpoint()
        if os.path.basename(path) != "model_final.pth":
            self.iter = self.storage.iter = self.max_iter - 1
            self._exact_resume.collect()
            self.checkpointer.save("model_final", iteration=self.iter)

    def set_seed(self, seed: int) -> None:
        """Everything random in the run follows `seed` from here on."""
        self.cfg = _with_seed(self.cfg, seed)
        self._trainer.reset_data_loader(lambda: self._train_loader(self.cfg))

    def _train_loader(self, cfg: CfgNode):
        # An override of Detectron2's signature takes no mapper, and builds one itself.
        parameters = inspect.signature(self.build_train_loader).parameters.values()
        takes_mapper = any(x.name == "mapper" or x.kind is x.VAR_KEYWORD for x in parameters)
        return self.build_train_loader(cfg, **({"mapper": self.mapper} if takes_mapper else {}))

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Rescales a config to a number of processes, as DefaultTrainer's, methods included."""
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:
            factor = num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE
            frozen = scaled.is_frozen()
            scaled.defrost()
            for name in training_methods(cfg):
                method_class(name).scale_iterations(scaled, factor)
            if frozen:
                scaled.freeze()
        return scaled

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The detector, in a task if methods train it, and these with their teachers."""
        task = build_task(cfg)
        logger.info(f"Model:\n{task.detector}")
        return task if task.methods else task.detector

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:
        """Evaluates the plain detector, as DefaultTrainer's."""
        model = model.module if isinstance(model, DistributedDataParallel) else model
        model = model.detector if isinstance(model, TrainingTask) else model
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_checkpointer(cls, cfg: CfgNode, model: nn.Module) -> PlainCheckpointer:
        dataset = cfg.DATASETS.TRAIN[0]
        classes = MetadataCatalog.get(dataset).get("thing_classes")
        return PlainCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            dataset=dataset,
            class_names=classes,
            model_config=cfg.MODEL.dump(),
        )

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_mapper(cls, cfg: CfgNode) -> PlainDatasetMapper:
        """Detectron2's mapper, with what the methods add to a sample."""
        methods = [method_class(name) for name in training_methods(cfg)]
        additions = [addition for x in methods for addition in x.sample_additions(cfg)]
        return PlainDatasetMapper(cfg, is_train=True, additions=additions)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, mapper=None) -> TrainStream:
        """The images of DefaultTrainer's, as a stream that can start anywhere, with the mapper of
        :meth:`build_train_mapper` by default."""
        return build_train_stream(cfg, mapper or cls.build_train_mapper(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str, mapper=None) -> DataLoader:
        """The images of DefaultTrainer's, by default with a mapper whose errors name the image."""
        mapper = mapper or PlainDatasetMapper(cfg, is_train=False)
        records = None if cfg.MODEL.LOAD_PROPOSALS else validated_records(cfg, dataset_name)
        if records is None:
            loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        else:
            num_workers = cfg.DATALOADER.NUM_WORKERS
            loader = build_detection_test_loader(records, mapper=mapper, num_workers=num_workers)
        loader.worker_init_fn = ignore_preemption
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)


def _check_methods(cfg: CfgNode, task: TrainingTask) -> None:
    """A build_model as DefaultTrainer's returns a plain detector, which would train without the
    methods of the config."""
    names = training_methods(cfg)
    lacking = [name for name in names if name not in task.training_only]
    if lacking:
        raise ValueError(
            f"MODEL.TRAINING_METHODS of {cfg.MODEL.META_ARCHITECTURE} names {names}, but what "
            f"build_model returned would train without {lacking}: return "
            "plaindet.engine.build_task(cfg) or TrainingTask(model, methods)"
        )


def _inner_trainer(cfg: CfgNode, *arguments) -> SimpleTrainer:
    """Detectron2's trainer of single iterations, by SOLVER.AMP."""
    if not cfg.SOLVER.AMP.ENABLED:
        return SimpleTrainer(*arguments)
    precision = getattr(torch, cfg.SOLVER.AMP.PRECISION)
    # bfloat16 has the range of float32, so its gradients need no scale.
    scaler = GradScaler(enabled=precision is torch.float16)
    return AMPTrainer(*arguments, grad_scaler=scaler, precision=precision)


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    cfg.freeze()
    return cfg
