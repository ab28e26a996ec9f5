"""What a project of somebody else does with the public names: checked by `make lint`, never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from typing_extensions import assert_type

from crosskd import DenseCrossKD, DETRCrossKD, TwoStageCrossKD, align_features, quality_focal_loss
from labelenc import LabelEnc, LabelMaps, feature_distance, inherit_step1_file, save_step1_file
from plaindet import find_config, get_config_file, keep_training_only, read_config, register_config
from plaindet.data import find_coco_folder, register_coco_format, validate_datasets
from plaindet.engine import (
    DetectorAdapter,
    LazyTrainer,
    Method,
    PlainCheckpointer,
    PlainTrainer,
    Seen,
    Teacher,
    TrainingTask,
    build_task,
    load_lazy_config,
    load_teacher,
    register_adapter,
    register_method,
    write_plain_config,
)
from plaindet.export import export_onnx, export_torchscript


def a_run(folder: str) -> None:
    register_config(lambda cfg: None)
    register_coco_format(find_coco_folder(folder))
    assert_type(get_config_file("quick/retinanet_R_18_baseline.yaml"), str)
    cfg = read_config(Path(find_config("my.yaml")), ["SOLVER.MAX_ITER", "10"])
    validate_datasets(cfg, ["my_train", "my_val"])
    trainer = PlainTrainer(cfg)
    assert_type(trainer.task, TrainingTask)
    assert_type(trainer.checkpointer, PlainCheckpointer)
    trainer.resume_or_load(resume=True)
    write_plain_config(cfg, trainer.plain_model)


def a_lazy_run(teacher: torch.nn.Module) -> None:
    trainer = LazyTrainer(load_lazy_config("my.py", ["train.max_iter=10"]))
    assert_type(trainer.task, TrainingTask)
    assert_type(load_teacher(teacher, "model_final.pth", ["my_train"]), Teacher)
    LabelEnc(step=2, step1_file="label_encoder.pth", cutoff_iters=10)


def a_trainer_of_ones_own(cfg: Any, detector: torch.nn.Module, teacher: Teacher) -> None:
    step2 = TrainingTask(detector, [LabelEnc(step=2, label_map="masks"), DenseCrossKD(position=3)])
    assert_type(step2.methods, tuple[Method, ...])
    inherit_step1_file(step2, "label_encoder.pth", with_detector=True, dataset="my_train")
    TrainingTask(detector, [TwoStageCrossKD(strategy="a", teacher=lambda: teacher)])
    TrainingTask(detector, [DETRCrossKD(teacher=teacher)])
    step1 = build_task(cfg, with_teachers=False)
    keep_training_only(PlainCheckpointer(step1, "output", class_names=["cat", "dog"]))
    save_step1_file(step1, "label_encoder.pth", ["cat", "dog"])
    LabelMaps(use_masks=True, augment=False)


def losses(x: torch.Tensor) -> None:
    align_features(x, x)
    quality_focal_loss(x, x, 1.0)
    feature_distance([x], [x])


@register_adapter(torch.nn.Module)
class Adapter(DetectorAdapter):
    @property
    def num_classes(self) -> int:
        return 2


@register_method
class Imitation(Method):
    name = "Imitation"

    def losses(self, batched_inputs: list[dict], seen: Seen | None) -> dict[str, torch.Tensor]:
        assert seen is not None
        assert_type(self.adapter, DetectorAdapter)
        return {"loss_imitation": next(iter(seen.features.values())).mean()}


def exported(detector: torch.nn.Module, image: torch.Tensor) -> None:
    assert_type(export_onnx(detector, image), bytes)
    export_torchscript(detector, image)
