"""Weights know the names of their classes, and are not used for others or in another order; and a
run is not continued with another model."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser

import train_net
from labelenc import LabelEncTrainer
from plaindet.data import register_coco_format
from plaindet.engine import PlainTrainer

BASELINE = "quick/retinanet_R_18_baseline.yaml"
OTHER = r"was trained for the classes \['red', 'green', 'blue'\], but turned_\w+ has \['blue', "


@pytest.fixture
def turned(tiny_data, tmp_path):
    """The tiny sets with their class ids in the other order, as an export may number them."""
    datasets = []
    for name, json_file, images in tiny_data:
        content = json.loads(Path(json_file).read_text())
        for entry, key in ((content["categories"], "id"), (content["annotations"], "category_id")):
            for x in entry:
                x[key] = 40 - x[key]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        datasets.append([name.replace("tiny", "turned"), str(path), images])
    register_coco_format(datasets)
    yield datasets
    for name, *_ in datasets:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def on_turned(cfg, turned):
    cfg.DATASETS.COCO_FORMAT = turned
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("turned_train",), ("turned_val",)
    return cfg


def finished(cfg):
    """A run's final checkpoint, without a training."""
    trainer = PlainTrainer(cfg)
    trainer.iter = 1
    trainer.checkpointer.save("model_final", iteration=1)
    return f"{cfg.OUTPUT_DIR}/model_final.pth"


def test_checkpoints_carry_the_names(make_cfg):
    checkpoint = torch.load(finished(make_cfg(BASELINE)), weights_only=False)
    assert checkpoint["thing_classes"] == ["red", "green", "blue"]


def test_resume(make_cfg, turned):
    cfg = make_cfg(BASELINE)
    finished(cfg)
    PlainTrainer(cfg).resume_or_load(resume=True)
    trainer = PlainTrainer(on_turned(cfg, turned))
    with pytest.raises(ValueError, match=f"The checkpoint .*model_final.pth {OTHER}"):
        trainer.resume_or_load(resume=True)
    PlainTrainer(cfg).resume_or_load(resume=False)


@pytest.mark.parametrize("has_names", [True, False])
def test_evaluation(make_cfg, turned, tmp_path, has_names):
    """Files without names, as from Detectron2's model zoo, are evaluated as ever."""
    weights = finished(make_cfg(BASELINE))
    if not has_names:
        checkpoint = torch.load(weights, weights_only=False)
        torch.save({"model": checkpoint["model"]}, weights)
    cfg = on_turned(make_cfg(BASELINE, "MODEL.WEIGHTS", weights), turned)
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    args = default_argument_parser().parse_args(["--eval-only", "--config-file", str(path)])
    if has_names:
        with pytest.raises(ValueError, match=OTHER):
            train_net.main(args)
    else:
        train_net.main(args)


@pytest.mark.parametrize("has_names", [True, False])
def test_step1_file(make_cfg, turned, has_names):
    step1 = LabelEncTrainer(make_cfg("quick/retinanet_R_18_labelenc_step1.yaml"))
    (labelenc,) = step1.task.methods
    labelenc.write_files(step1.cfg.OUTPUT_DIR, step1.checkpointer.class_names)
    path = f"{step1.cfg.OUTPUT_DIR}/label_encoder.pth"
    if not has_names:
        content = torch.load(path)
        del content["thing_classes"]
        torch.save(content, path)
    options = ("MODEL.LABELENC.STEP1_FILE", path)
    cfg = make_cfg("quick/retinanet_R_18_labelenc_step2.yaml", *options)
    LabelEncTrainer(cfg).resume_or_load(resume=False)
    step2 = LabelEncTrainer(on_turned(cfg, turned))
    if has_names:
        with pytest.raises(ValueError, match=f"The step-1 file .*label_encoder.pth {OTHER}"):
            step2.resume_or_load(resume=False)
    else:
        step2.resume_or_load(resume=False)


def test_teacher(make_method_cfg, make_cfg, turned):
    """By the names in its checkpoint, whatever data set its config names."""
    cfg = make_method_cfg("crosskd", "retinanet")
    weights = cfg.MODEL.CROSSKD.TEACHER.WEIGHTS
    content = torch.load(weights)
    torch.save({**content, "thing_classes": ["red", "green", "blue"]}, weights)
    PlainTrainer(cfg)
    cfg = on_turned(cfg, turned)
    cfg.MODEL.CROSSKD.TEACHER.OPTS[-1] = "('turned_train',)"
    with pytest.raises(ValueError, match=f"The teacher {OTHER}"):
        PlainTrainer(cfg)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.FPN.OUT_CHANNELS", "32"), "MODEL.FPN.OUT_CHANNELS was 64 and is 32"),
        (("MODEL.RETINANET.NUM_CONVS", "3"), "MODEL.RETINANET.NUM_CONVS was 2 and is 3"),
        (("MODEL.RETINANET.NORM", ""), "MODEL.RETINANET.NORM was 'GN' and is ''"),
        (("MODEL.RESNETS.DEPTH", "34"), "MODEL.RESNETS.DEPTH was 18 and is 34"),
        (
            ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [128], [256]]"),
            r"MODEL.ANCHOR_GENERATOR.SIZES was \[\[.* and is \[\[16\], ",
        ),
        (
            ("MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"),
            "MODEL.ANCHOR_GENERATOR.OFFSET was 0.0 and is 0.5",
        ),
        (
            ("MODEL.META_ARCHITECTURE", "FCOS"),
            "MODEL.META_ARCHITECTURE was 'RetinaNet' and is 'FCOS'",
        ),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_resume_with_another_model(make_cfg, overrides, message, has_config):
    cfg = make_cfg(BASELINE)
    weights = finished(cfg)
    if not has_config:  # of an earlier version
        content = torch.load(weights, weights_only=False)
        del content["model_config"]
        torch.save(content, weights)
        if "OFFSET" in message:
            return  # nothing tells
        message = ".* is .* there and .* here"
    cfg.merge_from_list(list(overrides))
    with pytest.raises(ValueError, match=f"(?s)The checkpoint .*final.pth is of .*{message}"):
        PlainTrainer(cfg).resume_or_load(resume=True)


def test_resume_with_other_settings(make_cfg):
    """Losses, thresholds, schedules and weights to start from may change."""
    cfg = make_cfg(BASELINE)
    finished(cfg)
    changes = [
        "MODEL.RETINANET.SCORE_THRESH_TEST",
        "0.3",
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA",
        "1.5",
    ]
    cfg.merge_from_list([*changes, "SOLVER.BASE_LR", "0.001", "MODEL.WEIGHTS", "elsewhere.pth"])
    PlainTrainer(cfg).resume_or_load(resume=True)
