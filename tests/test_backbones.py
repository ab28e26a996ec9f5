"""Detectors with backbones of timm: training with each method, and what is left of it."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.engine import default_argument_parser

import train_net
from plaindet.engine import PlainTrainer, build_teacher

timm = pytest.importorskip("timm")

BACKBONES = [
    "resnet18",
    "mobilenetv2_100",
    "convnext_atto",
    "tf_efficientnet_lite0",
    "vit_tiny_patch16_224",
]
MORE_BACKBONES = ["resnet34", "mobilenetv3_small_050", "regnety_002"]
SWIN = "swin_tiny_patch4_window7_224"  # takes a gigabyte
# A plain ViT has one stride. What an FPN needs for it:
ONE_LEVEL = {
    "MODEL.TIMM.OUT_FEATURES": "['res4']",
    "MODEL.FPN.IN_FEATURES": "['res4']",
    "MODEL.FPN.TOP_BLOCK_IN_FEATURE": "res4",
    "MODEL.RETINANET.IN_FEATURES": "['p4', 'p5', 'p6']",
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[32], [64], [128]]",
}
RUNS = {
    "plain": "baseline",
    "step1": "labelenc_step1",
    "step2": "labelenc_step2",
    "crosskd": "crosskd",
}


def network_options(name):
    levels = ONE_LEVEL if name.startswith("vit") else {}
    return [
        "MODEL.TIMM.NAME",
        name,
        "MODEL.TIMM.NORM",
        "BN",
        *(x for kv in levels.items() for x in kv),
    ]


@pytest.fixture
def run_cfg(make_cfg, tmp_path):
    """Returns a function that makes the config of one iteration."""

    def make(run, name, *overrides):
        cfg = make_cfg(f"quick/retinanet_lite0_{RUNS[run]}.yaml", *network_options(name))
        cfg.DATASETS.TEST = ()
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1, ()
        cfg.MODEL.LABELENC.WARMUP_ITERS = cfg.MODEL.LABELENC.CUTOFF_ITERS = 0
        cfg.OUTPUT_DIR = str(tmp_path / name / run)
        cfg.MODEL.LABELENC.STEP1_FILE = str(tmp_path / name / "step1" / "label_encoder.pth")
        cfg.merge_from_list(list(overrides))
        return cfg

    return make


def teacher_options(cfg, name):
    """Of a plain run of another network."""
    folder = f"{cfg.OUTPUT_DIR.removesuffix('/crosskd').rpartition('/')[0]}/{name}/plain"
    return [
        *("MODEL.CROSSKD.TEACHER.CONFIG_FILE", f"{folder}/plain_config.yaml"),
        *("MODEL.CROSSKD.TEACHER.WEIGHTS", f"{folder}/model_final.pth"),
    ]


def train(cfg):
    _train(cfg)
    gc.collect()  # the trainer, see tests/conftest.py


def _train(cfg):
    trainer = PlainTrainer(cfg)
    trainer.resume_or_load(resume=False)
    before = {key: value.clone() for key, value in trainer.plain_model.state_dict().items()}
    trainer.train()
    unused = [n for n, p in trainer.task.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []  # of which DistributedDataParallel would complain
    after = trainer.plain_model.state_dict()
    assert before.keys() == after.keys()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert any(key.startswith("backbone.bottom_up.model.") for key in moved)


# Reads checkpoints where neither these tests nor the methods have been imported.
LOAD = """
import sys, torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from plaindet import add_plaindet_config
for folder in sys.argv[1:]:
    cfg = get_cfg()
    add_plaindet_config(cfg)
    cfg.merge_from_file(f"{folder}/plain_config.yaml")
    model = build_model(cfg).eval()
    assert type(model).__module__.startswith("detectron2."), type(model)
    checkpoint = torch.load(f"{folder}/model_final.pth", weights_only=True)
    model.load_state_dict(checkpoint["model"], strict=True)
    with torch.no_grad():
        model([{"image": torch.zeros(3, 70, 90)}])
assert not {"labelenc", "crosskd", "train_net"} & sys.modules.keys()
"""


@pytest.mark.parametrize(
    "names",
    [
        BACKBONES,
        pytest.param(MORE_BACKBONES, marks=pytest.mark.long),
        pytest.param([SWIN], marks=pytest.mark.long),
    ],
)
def test_every_backbone_with_every_method(run_cfg, tmp_path, names, request):
    """One iteration each, whose checkpoint is that of the plain detector."""
    if SWIN in names:
        request.getfixturevalue("alone")
    folders = []
    for name in names:
        for run in RUNS:
            cfg = run_cfg(run, name)
            if run == "crosskd":
                other = "resnet18" if "resnet18" in names and "vit" not in name else name
                cfg.merge_from_list(teacher_options(cfg, other))
            train(cfg)
            folders.append(cfg.OUTPUT_DIR)
    subprocess.run([sys.executable, "-c", LOAD, *folders], check=True, cwd=tmp_path)


@pytest.mark.parametrize("name", [pytest.param(SWIN, marks=pytest.mark.long), "convnext_atto"])
def test_teacher_of_another_family(run_cfg, name, request):
    if name == SWIN:
        request.getfixturevalue("alone")
    train(run_cfg("plain", name))
    cfg = run_cfg("crosskd", "tf_efficientnet_lite0")
    cfg.merge_from_list(teacher_options(run_cfg("crosskd", name), name))
    train(cfg)


def test_teacher_with_other_strides(run_cfg):
    train(run_cfg("plain", "vit_tiny_patch16_224"))
    cfg = run_cfg("crosskd", "tf_efficientnet_lite0")
    cfg.merge_from_list(
        teacher_options(run_cfg("crosskd", "vit_tiny_patch16_224"), "vit_tiny_patch16_224")
    )
    with pytest.raises(ValueError, match="strides"):
        PlainTrainer(cfg)


def test_weights_are_loaded_for_training_alone(run_cfg, tmp_path):
    """Not for a teacher, an evaluation or the result, which have theirs in a checkpoint."""
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet18").state_dict(), weights)
    cfg = run_cfg("plain", "resnet18", "MODEL.TIMM.CHECKPOINT_PATH", str(weights))
    cfg.MODEL.TIMM.PRETRAINED = True
    train(cfg)
    weights.unlink()
    config, checkpoint = (
        os.path.join(cfg.OUTPUT_DIR, x) for x in ("plain_config.yaml", "model_final.pth")
    )
    timm_keys = yaml.safe_load(Path(config).read_text())["MODEL"]["TIMM"]
    assert timm_keys == {"NAME": "resnet18", "NORM": "BN"}

    full = str(tmp_path / "config.yaml")
    Path(full).write_text(cfg.dump())
    node = cfg.MODEL.CROSSKD.TEACHER.clone()
    node.CONFIG_FILE, node.WEIGHTS = config, checkpoint
    node.OPTS = ["MODEL.TIMM.CHECKPOINT_PATH", str(weights)]
    build_teacher(node, "cpu", "MODEL.CROSSKD.TEACHER")
    options = ["--eval-only", "--config-file", full, "MODEL.WEIGHTS", checkpoint]
    args = default_argument_parser().parse_args([*options, "DATASETS.TEST", "('tiny_val',)"])
    assert "bbox" in train_net.main(args)
