"""The tools, on tiny inputs."""

import importlib.util
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_demo(tiny_data, tmp_path):
    """From a COCO-format folder to the report; a second call trains nothing again."""
    demo = load_tool("demo")
    folder = Path(tiny_data[0][1]).parent.parent
    small = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
    small += ["SOLVER.MAX_ITER", "5", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
    overrides = [*demo.dataset_overrides(str(folder)), *small]
    for name in demo.RUNS:
        demo.train(tmp_path, name, overrides)
    finished = (tmp_path / "step2" / "model_final.pth").stat().st_mtime
    demo.train(tmp_path, "step2", overrides)
    assert (tmp_path / "step2" / "model_final.pth").stat().st_mtime == finished

    cfgs = {name: demo.read_cfg(tmp_path, name, overrides) for name in demo.RUNS}
    demo.draw_pictures(tmp_path, cfgs)
    report = demo.write_report(tmp_path, cfgs).read_text()
    number = r"(?:nan|[\d.]+)"
    row = re.search(rf"\| LabelEnc, step 2 \| 5 \| 10 \|(?: {number} \|){{3}} ([\d.]+) \|", report)
    assert float(row[1]) > 0  # seconds an iteration
    for picture in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (tmp_path / picture).stat().st_size > 10_000, picture


def test_benchmark(monkeypatch, capsys):
    arguments = "benchmark --size 64 96 --num-classes 20 --rounds 1 --no-memory"
    monkeypatch.setattr("sys.argv", arguments.split())
    load_tool("benchmark").main()
    table = capsys.readouterr().out
    assert re.search(r"\| plain \| [\d.]+ \| 1.000 \|", table)
    for row in ("step 1", "step 2", "step 2, after the cut-off", "LabelEnc", "dense"):
        assert re.search(rf"\| {row} \| [\d.]+ \| [\d.]+ \|", table), row
    label_map = 3 * 64 * 96 * 4 / 2**20
    assert f"{label_map:.1f} MiB sparse, {label_map / 3 * 20:.1f} MiB dense" in table


@pytest.mark.parametrize("tool", ["demo", "benchmark"])
def test_help(tool, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [tool, "--help"])
    with pytest.raises(SystemExit) as stop:
        load_tool(tool).main()
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out
