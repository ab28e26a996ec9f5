"""Reading configs."""

import os

import pytest

import train_net
from plaindet import read_config

TEACHER = "MODEL:\n  CROSSKD:\n    TEACHER:\n"


def read_teacher(file):
    return read_config(file, (), train_net.ADD_CONFIGS).MODEL.CROSSKD.TEACHER


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
