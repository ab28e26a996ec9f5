"""Iterations of training, what their losses reach, and what has to hold after them."""

import os

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import find_unused_parameters
from detectron2.utils.events import EventStorage

from labelenc import LabelMap
from plaindet import add_plaindet_config


def losses_of(trainer):
    with EventStorage():
        return trainer.model(next(iter(trainer.data_loader)))


def method_of(task):
    """The method of a task, CrossKD or LabelEnc, which is the only one."""
    (method,) = task.methods
    return method


def with_gradient(model, losses):
    """The parameters that the losses reach."""
    model.zero_grad()
    sum(losses).backward(retain_graph=True)
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def check_needs_teacher(model):
    """A training iteration without a teacher says so."""
    instances = Instances(
        (128, 128), gt_boxes=Boxes([[8, 8, 40, 40]]), gt_classes=torch.tensor([0])
    )
    label_map = LabelMap.from_boxes(instances.gt_boxes, instances.gt_classes, (128, 128))
    batch = [{"image": torch.zeros(3, 128, 128), "instances": instances, "label_map": label_map}]
    message = "CrossKD trains with a teacher: call set_teacher"
    with EventStorage(), pytest.raises(RuntimeError, match=message):
        model.train()(batch)


def check_training_run(trainer, plain_class, prepare=lambda model: None):
    """Trains, and checks that no parameter is unused, that the teacher is untouched and in no
    checkpoint, and that the checkpoint is the plain detector, with the same detections.

    Args:
        plain_class: of the detector; Detectron2's own are read without the keys of plaindet.
        prepare: what to do with both models before they detect.

    Returns:
        the detections
    """
    path = trainer.cfg.MODEL.CROSSKD.TEACHER.WEIGHTS
    saved = torch.load(path, weights_only=True)["model"]
    with EventStorage():
        unused = find_unused_parameters(trainer.model, next(iter(trainer.data_loader)))
    assert not {n for n, p in trainer.model.named_parameters() if p.requires_grad} & set(unused)
    trainer.train()
    teacher = trainer.task.training_only["CrossKD"].teacher.model
    assert all(torch.equal(value, saved[key]) for key, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())

    folder = trainer.cfg.OUTPUT_DIR
    checkpoint = torch.load(os.path.join(folder, "model_final.pth"), weights_only=False)
    cfg = get_cfg()
    if not plain_class.__module__.startswith("detectron2."):
        add_plaindet_config(cfg)
    cfg.merge_from_file(os.path.join(folder, "plain_config.yaml"))
    plain = build_model(cfg)
    assert type(plain) is plain_class
    plain.load_state_dict(checkpoint["model"], strict=True)
    batch, found = [{"image": torch.rand(3, 64, 80) * 255}], []
    for model in (plain.eval(), trainer.plain_model.eval()):
        prepare(model)
        found.append(model(batch)[0]["instances"].get_fields())
    assert found[0].keys() == found[1].keys()
    assert len(found[0]["scores"]) > 0
    for name, expected in found[0].items():
        assert torch.equal(*(getattr(x, "tensor", x) for x in (found[1][name], expected))), name
    return found[0]
