"""tools/export.py: a file is written when it detects what the detector does, and not before."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from plaindet.engine.plain_config import write_plain_config

import export

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def run_folder(make_cfg, tmp_path):
    """As of a finished plain run, with a detector that finds something."""
    cfg = make_cfg("quick/retinanet_R_18_baseline.yaml", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, Path(cfg.OUTPUT_DIR) / "model_final.pth")
    write_plain_config(cfg, build_model(cfg))
    return Path(cfg.OUTPUT_DIR)


@pytest.fixture
def run(run_folder, monkeypatch):
    def call(output, *arguments):
        config = str(run_folder / "plain_config.yaml")
        command = ["export.py", "--config-file", config, "--output", str(output), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        export.main()

    return call


@pytest.mark.parametrize("suffix", [".onnx", ".pt"])
def test_file_is_verified_in_a_fresh_process(run, tmp_path, capsys, suffix):
    output = tmp_path / "new" / f"detector{suffix}"
    run(output, "--images", "2")
    assert "detections in 8 images of" in capsys.readouterr().out
    image = torch.rand(3, 100, 140) * 255
    if suffix == ".onnx":
        boxes, *_ = onnxruntime.InferenceSession(output).run(None, {"image": image.numpy()})
    else:
        boxes, *_ = torch.jit.load(output)(image)
    assert boxes.shape[1] == 4
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_file_that_detects_something_else(run, tmp_path, monkeypatch):
    def export_other(model, image):
        model.head.bbox_pred.bias.data += 0.1
        return exported(model, image)

    exported = export.export_onnx
    monkeypatch.setattr(export, "export_onnx", export_other)
    with pytest.raises(SystemExit, match=r"is not written: in an image of .* boxes differ by"):
        run(tmp_path / "detector.onnx")
    assert not (tmp_path / "detector.onnx").exists()


def test_file_that_does_not_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "export_onnx", lambda model, image: b"nothing")
    with pytest.raises(SystemExit, match="does not run on these images"):
        run(tmp_path / "detector.onnx")


def test_detector_that_finds_nothing(run, tmp_path):
    with pytest.raises(SystemExit, match="finds nothing in these 8 images"):
        run(tmp_path / "detector.pt", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.99")


def test_data_set_that_is_not_known(run, tmp_path):
    """As after a training on own data, where plain_config.yaml has Detectron2's keys alone."""
    with pytest.raises(SystemExit, match=r"cells_val is not registered.*--images FILE"):
        run(tmp_path / "detector.pt", "DATASETS.TEST", "('cells_val',)")


def test_name_of_no_format(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "detector.engine")
    assert "expected a name that ends in .onnx or .pt" in capsys.readouterr().err


def test_onnx_that_is_not_installed(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SystemExit, match=r"optional extra \[export\]"):
        run(tmp_path / "detector.onnx")


def test_differences_of_detections_in_another_order():
    boxes = np.array([[0.0, 0, 9, 9], [5, 5, 8, 8], [1, 1, 3, 3]])
    expected = (boxes, np.array([0.9, 0.5, 0.5]), np.array([1, 0, 2]))
    swapped = tuple(x[[0, 2, 1]] for x in expected)
    assert export.differences(expected, swapped) == {"boxes": 0, "scores": 0, "classes": 0}
    moved = (boxes + np.array([0, 0.5, 0, 0]), *expected[1:])
    assert export.differences(expected, moved)["boxes"] == 0.5
    fewer = tuple(x[:2] for x in expected)
    assert export.differences(expected, fewer)["boxes"] == np.inf
    none = tuple(x[:0] for x in expected)
    assert export.differences(none, none) == {"boxes": 0, "scores": 0, "classes": 0}
