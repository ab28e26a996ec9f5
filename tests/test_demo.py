"""How the demos train their runs, with a training that takes no time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import demo_progress
import demo_training
from demo_runs import CONFIGS, Run, dataset_overrides, results_table

# In place of train_net.py: writes what a training writes, five iterations at a time, and fails at
# an iteration if it has not failed before.
TRAIN_NET = """
import json, shutil, sys, time
from pathlib import Path

opts = dict(zip(sys.argv[4::2], sys.argv[5::2]))
folder = Path(opts["OUTPUT_DIR"])
checkpoint = folder.parent / "checkpoint.pth"
for done in range(5, 31, 5):
    line = {"iteration": done - 1, "time": 2.0}
    if done == 30:
        line |= {"bbox/AP": 12.34, "bbox/AP50": float("nan"), "bbox/AP75": 0.0}
    with open(folder / "metrics.json", "a") as f:
        print(json.dumps(line), file=f)
    print("iteration", done, flush=True)
    shutil.copy(checkpoint, folder / f"model_{done - 1:07d}.pth")
    time.sleep(float(opts["SECONDS"]))
    if done == int(opts["FAILS_AT"]) and not (folder / "failed").exists():
        (folder / "failed").touch()
        raise RuntimeError("out of luck")
shutil.copy(checkpoint, folder / "model_final.pth")
"""


@pytest.fixture
def make_runs(tmp_path, monkeypatch):
    """Returns a function that makes runs, of which each but the first fails at an iteration."""
    (tmp_path / "train_net.py").write_text(TRAIN_NET)
    torch.save({"model": {"weight": torch.ones(2)}, "optimizer": {}}, tmp_path / "checkpoint.pth")
    monkeypatch.setattr(demo_training, "TRAIN_NET", tmp_path / "train_net.py")
    monkeypatch.setattr(demo_training, "SECONDS_BETWEEN_LINES", 0.02)

    def make(*titles, fails_at=0, seconds=0.1):
        opts = {title: ["SECONDS", str(seconds), "FAILS_AT", "0"] for title in titles}
        for title in titles[1:]:
            opts[title][-1] = str(fails_at)
        config = Path("none.yaml")
        return [Run(tmp_path / t, f"the {t}", config, opts[t], 30, 30) for t in titles]

    return make


def test_progress(make_runs, capfd):
    """Plain lines, with the time left for all runs; what the training prints is in its log."""
    runs = make_runs("first", "second")
    demo_training.train_all(runs)
    output = capfd.readouterr().out
    first, second = (run.folder / "output.txt" for run in runs)
    assert output.startswith(f"run 1 of 2 (the first): 30 iterations, log: {first}\n")
    assert f"run 2 of 2 (the second): 30 iterations, log: {second}\n" in output
    assert re.search(
        r"^run 1 of 2 \(the first\), iteration \d+ of 30: 8 minutes left$", output, re.M
    )
    assert output.endswith("run 2 of 2 (the second): finished, AP 12.3\n")
    assert second.read_text().count("iteration") == 6
    assert output.count("\n") < 100
    assert "| the second | 30 | 30 | 12.3 | 0.0 | 0.0 | 2.00 |" in results_table(runs)


def test_files(make_runs):
    """The weights of a finished run, without what only its training needs; few checkpoints of one
    that is not finished."""
    (run,) = make_runs("first")
    numbers = []
    demo_training.check_arguments(run)
    demo_training.train(run, lambda: numbers.append(len(list(run.folder.glob("model_0*.pth")))))
    assert 2 <= max(numbers) <= 3
    demo_training.train_all([run])
    assert [path.name for path in run.folder.glob("model_*")] == ["model_final.pth"]
    content = torch.load(run.folder / "model_final.pth")
    assert content.keys() == {"model"}
    assert content["model"]["weight"].tolist() == [1, 1]


def test_a_second_call_trains_nothing_again(make_runs, capfd):
    runs = make_runs("first", "second", seconds=0)
    demo_training.train_all(runs)
    logs = [(run.folder / "output.txt").read_text() for run in runs]
    capfd.readouterr()
    demo_training.train_all(runs)
    assert capfd.readouterr().out == (
        "run 1 of 2 (the first): finished already, AP 12.3\n"
        "run 2 of 2 (the second): finished already, AP 12.3\n"
    )
    assert [(run.folder / "output.txt").read_text() for run in runs] == logs


def test_a_training_that_fails(make_runs, capfd):
    """The end of its log, and a message, with which Python exits with 1; the next call goes on."""
    runs = make_runs("first", "second", "third", fails_at=15, seconds=0)
    with pytest.raises(SystemExit, match=r"second failed with the exit code 1\..*output.txt") as e:
        demo_training.train_all(runs)
    assert isinstance(e.value.code, str)
    output = capfd.readouterr().out
    assert "run 1 of 3 (the first): finished, AP 12.3" in output
    assert output.endswith("RuntimeError: out of luck\n")
    assert not runs[2].folder.exists()

    (runs[2].folder).mkdir()
    (runs[2].folder / "failed").touch()
    demo_training.train_all(runs)
    output = capfd.readouterr().out
    assert "run 1 of 3 (the first): finished already" in output
    assert "run 2 of 3 (the second): finished, AP 12.3" in output
    assert "run 3 of 3 (the third): finished, AP 12.3" in output


@pytest.mark.parametrize(
    "stop", ["keyboard", pytest.param("SIGTERM", marks=pytest.mark.long), "SIGKILL"]
)
def test_a_demo_that_is_stopped(make_runs, stop):
    """Its training ends with it, or trains on under a lock, for which the next call waits."""
    (run,) = make_runs("first", seconds=0.3)
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import PosixPath
import demo_training
from demo_runs import Run
demo_training.TRAIN_NET = {str(demo_training.TRAIN_NET)!r}
demo_training.train_all([{run!r}])
"""
    demo = subprocess.Popen(
        [sys.executable, "-c", code],
        # Where the tests run in the background of a shell, they ignore the keyboard's signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = run.folder / "output.txt"
    while not log.exists() or "iteration" not in log.read_text():
        time.sleep(0.02)
    demo.send_signal({"keyboard": 2, "SIGTERM": 15, "SIGKILL": 9}[stop])
    demo.wait()
    demo_training.train_all([run])
    # The next call trains from the start, since this training cannot go on.
    starts = log.read_text().splitlines().count("iteration 5")
    assert starts == 2
    assert log.read_text().splitlines().count("iteration 30") == (2 if stop == "SIGKILL" else 1)
    assert json.loads((run.folder / "demo.json").read_text())["is_finished"]


def test_time_left(tmp_path):
    """From the seconds of the last iterations, for all runs, each with the cost of its own."""
    runs = [
        Run(tmp_path / name, name, Path(), [], iterations, iterations, cost)
        for name, iterations, cost in (("a", 100, 1.0), ("b", 200, 2.0), ("c", 300, 3.0))
    ]
    assert demo_progress.progress_line(runs, 0) == "run 1 of 3 (a), it starts"
    for run, done, seconds in ((runs[0], (20, 40, 60, 80, 100), 50.0), (runs[1], (20, 40), 4.0)):
        run.folder.mkdir()
        lines = [json.dumps({"iteration": x - 1, "time": seconds}) + "\n" for x in done]
        if run.title == "b":
            lines = lines * 5 + ['{"iteration": 5']
        (run.folder / "metrics.json").write_text("".join(lines))
    work = 160 * 2 + 300 * 3 + 2 * demo_progress.OVERHEAD
    assert demo_progress.seconds_left(runs, 1) == pytest.approx(2.0 * work)
    minutes = round(2 * work / 60)
    line = f"run 2 of 3 (b), iteration 40 of 200: {minutes} minutes left"
    assert demo_progress.progress_line(runs, 1) == line
    for seconds, text in ((10, "less than a minute"), (60, "1 minute"), (200, "3 minutes")):
        assert demo_progress.describe_time(seconds) == text
    assert demo_progress.progress_line(runs[:1], 0).startswith("run 1 of 1 (a), evaluation: ")


def test_another_run_in_the_folder(make_runs):
    runs = make_runs("first", seconds=0)
    demo_training.train_all(runs)
    with pytest.raises(ValueError, match="remove the folder, or choose another --output"):
        demo_training.train_all(make_runs("first", seconds=0.5))


def test_a_real_training(tiny_data, tmp_path, capfd):
    """What it writes can be read: metrics, weights, log."""
    overrides = dataset_overrides(str(Path(tiny_data[0][1]).parent.parent))
    overrides += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
    overrides += ["SOLVER.MAX_ITER", "5", "SOLVER.IMS_PER_BATCH", "2"]
    overrides += ["DATALOADER.NUM_WORKERS", "0"]
    config = CONFIGS / "retinanet_R_18_baseline.yaml"
    run = Run(tmp_path / "run", "plain", config, overrides, 5, 5)
    demo_training.train_all([run])
    assert re.search(r"finished, AP [\d.]+\n", capfd.readouterr().out)
    assert demo_progress.iterations_done(run) == 5
    assert "| plain | 5 | 5 | " in results_table([run])
    assert "Starting training from iteration 0" in (run.folder / "output.txt").read_text()
    assert set(os.listdir(run.folder)) >= {"model_final.pth", "plain_config.yaml"}
    assert torch.load(run.folder / "model_final.pth").keys() == {"model"}
