import pytest
import torch
from detectron2.modeling import build_model

from crosskd import CrossKDTrainer


@pytest.fixture
def teacher_file(make_cfg, tmp_path):
    """Returns a function that writes the weights of a quick teacher."""

    def make(detector, *overrides):
        torch.manual_seed(7)
        cfg = make_cfg(f"quick/{detector}_R_34_teacher.yaml")
        cfg.merge_from_list(list(overrides))
        model = build_model(cfg)
        path = tmp_path / f"{detector}_teacher.pth"
        torch.save({"model": model.state_dict()}, path)
        return path

    return make


@pytest.fixture
def make_trainer(make_cfg, teacher_file):
    """Returns a function that makes the trainer of a quick CrossKD run, for two iterations."""

    def make(detector, *overrides, teacher=()):
        node = "ROI_HEADS" if detector.endswith("rcnn") else detector.upper()
        options = [f"MODEL.{node}.NUM_CLASSES", 3, "DATASETS.TRAIN", ("tiny_train",), *teacher]
        return CrossKDTrainer(
            make_cfg(
                f"quick/{detector}_R_18_crosskd.yaml",
                *("MODEL.CROSSKD.TEACHER.WEIGHTS", str(teacher_file(detector, *teacher))),
                *("MODEL.CROSSKD.TEACHER.OPTS", str(options)),
                *("SOLVER.MAX_ITER", "2"),
                *overrides,
            )
        )

    return make
