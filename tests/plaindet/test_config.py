"""Reading configs."""

import os
import sys

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from omegaconf import OmegaConf

from plaindet import config, read_config
from plaindet.engine import build_teacher, write_plain_config

TEACHER = "MODEL:\n  CROSSKD:\n    TEACHER:\n"


def read_teacher(file):
    return read_config(file).MODEL.CROSSKD.TEACHER


@pytest.mark.parametrize("current", ["configs", "elsewhere"])
def test_files_of_a_teacher_are_beside_the_config_that_names_them(tmp_path, monkeypatch, current):
    """From any current folder, and also where a base in another folder names them; the files
    beside a config come before those of the current folder."""
    for folder in ("configs", "bases", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "teacher.yaml").write_text("VERSION: 2\n")
    (tmp_path / "bases" / "weights.pth").touch()
    base = tmp_path / "bases" / "base.yaml"
    base.write_text(f"{TEACHER}      CONFIG_FILE: teacher.yaml\n      WEIGHTS: weights.pth\n")
    config = tmp_path / "configs" / "student.yaml"
    config.write_text("_BASE_: ../bases/base.yaml\n")
    monkeypatch.chdir(tmp_path / current)
    teacher = read_teacher(config)
    assert os.path.samefile(teacher.CONFIG_FILE, tmp_path / "bases" / "teacher.yaml")
    assert os.path.samefile(teacher.WEIGHTS, tmp_path / "bases" / "weights.pth")

    config.write_text(f"_BASE_: ../bases/base.yaml\n{TEACHER}      CONFIG_FILE: teacher.yaml\n")
    teacher = read_teacher(config)
    assert os.path.samefile(teacher.CONFIG_FILE, tmp_path / "configs" / "teacher.yaml")
    assert os.path.samefile(teacher.WEIGHTS, tmp_path / "bases" / "weights.pth")


def test_other_paths_of_a_teacher_are_left_as_they_are(tmp_path):
    """From the current folder, absolute, or a URL."""
    config = tmp_path / "student.yaml"
    for path in ("output/model_final.pth", "/nowhere/model.pth", "detectron2://a/b.pkl"):
        config.write_text(f"{TEACHER}      WEIGHTS: {path}\n")
        assert read_teacher(config).WEIGHTS == path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A module that registers config keys, named by PLAINDET_PROJECTS."""
    (tmp_path / "keys_of_a_project.py").write_text(
        "from detectron2.config import CfgNode\nfrom plaindet import register_config\n"
        "def add_config(cfg):\n    cfg.MODEL.setdefault('A_PROJECT', CfgNode({'WIDTH': 64}))\n"
        "register_config(add_config)\n"
    )
    monkeypatch.setattr(config, "_registered", [])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PLAINDET_PROJECTS", "keys_of_a_project")
    yield
    sys.modules.pop("keys_of_a_project", None)


def test_keys_of_a_project(make_cfg, tmp_path, project):
    """A detector that has them trains, writes them into its plain config, and is a teacher."""
    cfg = make_cfg("quick/retinanet_R_18_baseline.yaml", "MODEL.A_PROJECT.WIDTH", "32")
    model = build_model(cfg)
    write_plain_config(cfg, model)
    weights = tmp_path / "model.pth"
    torch.save({"model": model.state_dict()}, weights)
    node = cfg.MODEL.LABELENC.TEACHER
    node.CONFIG_FILE, node.WEIGHTS = f"{cfg.OUTPUT_DIR}/plain_config.yaml", str(weights)
    assert read_config(node.CONFIG_FILE).MODEL.A_PROJECT.WIDTH == 32
    build_teacher(node, "cpu", "MODEL.LABELENC.TEACHER")

    config._registered.clear()
    with pytest.raises(ValueError, match="A_PROJECT.* become known by plaindet.register_config"):
        build_teacher(node, "cpu", "MODEL.LABELENC.TEACHER")


def test_missing_project(monkeypatch):
    monkeypatch.setenv("PLAINDET_PROJECTS", "no_such_project")
    with pytest.raises(ImportError, match="PLAINDET_PROJECTS names no_such_project: No module"):
        read_config("configs/quick/retinanet_R_18_baseline.yaml")


def test_lazy_config(tmp_path):
    """As a run of a LazyConfig writes it, with tags or without."""
    path = tmp_path / "plain_lazyconfig.yaml"
    for shape in ({"channels": 4}, ShapeSpec(channels=4)):
        model = L(torch.nn.Linear)(in_features=1, out_features=1, shape=shape)
        LazyConfig.save(OmegaConf.create({"train": {}, "model": model}), str(path))
        assert ("!!python" in path.read_text()) == isinstance(shape, ShapeSpec)
        with pytest.raises(ValueError, match="lazyconfig.yaml is a LazyConfig, .* Detectron2's"):
            read_config(path)
    path.write_text("MODEL:\n  UNKNOWN: 1\n")
    with pytest.raises(KeyError, match="MODEL.UNKNOWN"):
        read_config(path)
