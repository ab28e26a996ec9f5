"""The benchmarks, on tiny networks, and their arithmetic."""

import functools
import json
import re
import weakref
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

benchmark = import_module("benchmark")
benchmark_crosskd = import_module("benchmark_crosskd")
measure = import_module("benchmark_measure")
profiles = import_module("benchmark_profile")
reports = import_module("benchmark_report")
step_module = import_module("benchmark_steps")

TINY = "--size 64 96 --num-classes 20 --images 1 --rounds 1"
GIBIBYTE = 1024.0


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Returns a function that runs a benchmark with small networks, and returns what it printed and
    the folder of its results."""
    quick = {name: f"quick/{name}_R_18_crosskd.yaml" for name in benchmark_crosskd.CONFIG_FILES}
    monkeypatch.setattr(benchmark_crosskd, "CONFIG_FILES", quick)
    monkeypatch.setattr(benchmark, "PLAIN_CONFIG", "quick/{}_R_18_baseline.yaml")

    def call(tool, options):
        arguments = [tool.__name__, *TINY.split(), *options.split(), "--output", str(tmp_path)]
        monkeypatch.setattr("sys.argv", arguments)
        tool.main()
        return capsys.readouterr().out, tmp_path

    return call


def read_report(folder, name):
    (file,) = folder.glob(f"{name}-*.json")
    return file, json.loads(file.read_text())


@pytest.mark.usefixtures("alone")
def test_labelenc(run, monkeypatch):
    models, real = [], benchmark.build_random_model

    def build_model(cfg):
        models.append(real(cfg))
        return models[-1]

    monkeypatch.setattr(benchmark, "build_random_model", build_model)
    # Of five variants one does not fit.
    peaks = {"plain": 4 * GIBIBYTE, "step 1, warm-up without L3": 9 * GIBIBYTE}
    peaks.update({"step 2": 5 * GIBIBYTE, "step 2, after the cut-off": 4 * GIBIBYTE})
    monkeypatch.setattr(benchmark, "measure_memory", lambda builders, device: peaks)
    printed, folder = run(benchmark, "--detectors retinanet faster_rcnn --amp bfloat16")

    file, report = read_report(folder, "labelenc")
    assert re.fullmatch(r"labelenc-CPU-\w+-bfloat16-1-images\.json", file.name)
    assert report["torch"] == torch.__version__
    assert report["cuda"] is None
    assert report["settings"]["size"] == [64, 96]
    tables = {table["title"]: table["rows"] for table in report["tables"]}
    for detector in ("retinanet", "faster_rcnn"):
        rows = {row["name"]: row for row in tables[f"{detector} R-50, training iteration"]}
        assert list(rows) == list(benchmark.TRAINING)
        assert rows["step 1"]["seconds"] is rows["step 1"]["memory_mib"] is None
        plain, step2 = rows["plain"], rows["step 2"]
        assert plain["ratio"] == 1
        assert (plain["goal"], step2["goal"]) == (None, 1.2)
        # One round.
        assert step2["ratio"] == pytest.approx(step2["seconds"] / plain["seconds"])
        assert step2["epoch_seconds"] == pytest.approx(117_266 * step2["seconds"])
        assert (step2["memory_ratio"], step2["memory_goal"]) == (1.25, 1.25)
        names = [row["name"] for row in tables[f"{detector} R-50, inference"]]
        assert names == ["plain", "LabelEnc"]
        line = rf"\| step 2 \| {step2['seconds']:.4f} \| {step2['ratio']:.3f} \| 1.20 \| 5120 \| "
        assert re.search(line + rf"1.250 \| 1.25 \| {step2['epoch_seconds']:.0f} \|\n", printed)
    assert len(re.findall(r"\| step 1 \| out of memory \| - \| 2.00 \|( - \|)+\n", printed)) == 2
    written = file.with_suffix(".md").read_text()
    assert [line for line in written.splitlines() if line.startswith("|")] == [
        line for line in printed.splitlines() if line.startswith("|")
    ]
    for row in tables["drawing a label map"] + tables["stem, forward and backward"]:
        assert row["ratio"] > 0
    label_map = 3 * 64 * 96 * 4 / 2**20
    assert f"{label_map:.1f} MiB sparse, {label_map / 3 * 20:.1f} MiB dense" in printed

    # The phases are those of a training: L3 is on or off, and off it leaves the adapter alone.
    trained = [model.methods[0] for model in models if hasattr(model, "distance_enabled")][:3]
    assert [(m.step, m.distance_enabled) for m in trained] == [(1, False), (2, True), (2, False)]
    moved = [[p.grad is not None for p in m.feature_adapter.parameters()] for m in trained]
    assert [all(x) for x in moved] == [any(x) for x in moved] == [False, True, False]


@pytest.mark.usefixtures("alone")
def test_crosskd(run):
    options = "--detectors gfl faster_rcnn deformable_detr --no-memory --amp bfloat16"
    printed, folder = run(benchmark_crosskd, f"{options} --teacher-depth 18")
    _, report = read_report(folder, "crosskd")
    assert len(report["tables"]) == 3
    for table in report["tables"]:
        student, teacher, crosskd = table["rows"]
        assert student["ratio"] + teacher["ratio"] == pytest.approx(1)
        total = student["seconds"] + teacher["seconds"]
        assert crosskd["ratio"] == pytest.approx(crosskd["seconds"] / total)
        assert crosskd["goal"] == 1.1
        assert "memory_mib" not in crosskd
    assert re.search(r"gfl R-18 from R-18, .* \| s \| ratio to student \+ teacher \|", printed)


def test_profile_on_the_cpu(run):
    """No tables, and no gaps; a teacher's forward pass has no backward pass."""
    _, folder = run(benchmark_crosskd, "--detectors gfl --profile --teacher-depth 18")
    (file,) = folder.iterdir()
    assert re.fullmatch(r"crosskd-profile-CPU-\w+-float32-1-images\.md", file.name)
    sections = file.read_text().split("\n## ")[1:]
    names = [section.split("\n")[0] for section in sections]
    assert names == [f"gfl R-18 from R-18: {name}" for name in benchmark_crosskd.STEPS]
    for section, trains in zip(sections, (True, False, True)):
        rows = re.findall(r"\| `(.+)` \| ([\d.]+) \| ([\d.]+)% \| [\d.]+ \|", section)
        assert len(rows) == 10
        times = [float(time) for _, time, _ in rows]
        assert times == sorted(times, reverse=True)
        assert 50 < sum(float(share) for *_, share in rows) <= 100.5
        assert trains == any("backward" in name for name, *_ in rows)
        assert "waits" not in section


@pytest.mark.parametrize("detector", ["retinanet", "gfl"])
def test_size_of_features(detector):
    """They fit into float16, also of 101 layers, whether pixels are divided by their deviation or
    not; without the change they have a deviation above 10,000."""
    args = SimpleNamespace(device="cpu", num_classes=20)
    model, _ = benchmark_crosskd.build(args, detector, 101)
    images = model.preprocess_image([{"image": torch.randint(0, 256, (3, 64, 96))}])
    with torch.no_grad():
        features = model.backbone(images.tensor)
    assert 0.1 < features["p3"].std() < 10


class Toy(nn.Module):
    """Its loss is the sum of a matrix product; it keeps the product."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, batch):
        self.product = self.linear(batch)
        return {"loss": self.product.float().sum()}


@pytest.mark.parametrize("amp", [None, "bfloat16", "float16"])
def test_training_iteration(make_cfg, amp):
    """With mixed precision the forward pass is in that type, and the step is that of unscaled
    gradients."""
    cfg, toy = make_cfg("quick/retinanet_R_18_baseline.yaml"), Toy()
    cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.BIAS_LR_FACTOR = 0.0, 0.0, 1.0
    args = SimpleNamespace(amp=amp, device="cpu")
    before = toy.linear.weight.detach().clone()
    step = step_module.training_iteration(args, toy, cfg, torch.ones(2, 4))
    nn.init.zeros_(toy.linear.weight)  # so that a step of 1e-6 is no rounding
    step()
    assert toy.product.dtype == (getattr(torch, amp) if amp else torch.float32)
    torch.testing.assert_close(toy.linear.weight, torch.full_like(before, -2e-6))
    step_module.inference(toy, torch.ones(2, 4))()
    assert toy.product.dtype == torch.float32


def test_ratios():
    """Of the rounds, so that a slow machine in one of them does not matter."""
    seconds = {"plain": [1.0, 10.0, 1.0], "other": [1.5, 15.0, 2.0], "one more": [0.5, 5.0, 0.5]}
    names = ["plain", "missing", "other"]
    rows = reports.make_rows(names, seconds, seconds["plain"], {"other": 1.2})
    assert [row["ratio"] for row in rows] == [1.0, None, 1.5]
    assert [row["seconds"] for row in rows] == [1.0, None, 2.0]
    reports.add_epochs(rows, images=2)
    assert [row.get("epoch_seconds") for row in rows] == [58_633, None, 2 * 58_633]
    without = reports.make_rows(["other"], seconds, [], {})
    assert (without[0]["seconds"], without[0]["ratio"]) == (2.0, None)
    student_and_teacher = benchmark_crosskd.student_and_teacher
    pair = dict(zip((benchmark_crosskd.PLAIN, benchmark_crosskd.TEACHER), seconds.values()))
    assert student_and_teacher(pair) == [2.5, 25.0, 3.0]
    assert student_and_teacher({benchmark_crosskd.PLAIN: [1.0]}) == []


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is none: what is asked of it, in order, and a clock that only it moves."""
    log, clock = [], [0.0]

    def synchronize(device):
        log.append("synchronize")
        clock[0] += 10

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: log.append("reset"))
    peak = lambda _: log.append("peak") or 7 * 2**20  # noqa: E731
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    return SimpleNamespace(log=log, clock=clock)


def test_time_on_a_gpu(gpu):
    """It ends when the GPU is done; a step that does not fit leaves the others."""

    def launch():
        gpu.log.append("launch")
        gpu.clock[0] += 1

    def too_large():
        raise torch.cuda.OutOfMemoryError

    steps = {"a": launch, "large": too_large, "b": launch}
    seconds = measure.measure_seconds(steps, 2, "cuda")
    assert seconds == {"a": [11, 11], "b": [11, 11]}
    assert gpu.log == ["launch", "synchronize"] * 2 * (3 + 2)


def test_memory_on_a_gpu(gpu):
    """The peak is that of an iteration with the optimizer's state there, and the models of one
    variant are gone before the next is built."""
    models = []

    def build(fits):
        assert not [model for model in models if model() is not None]
        model = Toy()
        model.itself = [model]  # as models and hooks refer to each other
        models.append(weakref.ref(model))

        def step():
            gpu.log.append("step")
            if not fits:
                raise torch.cuda.OutOfMemoryError
            assert model.itself

        return step

    builders = {
        str(i): functools.partial(build, fits) for i, fits in enumerate((True, False, True))
    }
    assert measure.measure_memory(builders, "cuda") == {"0": 7, "2": 7}
    one = ["step"] * 3 + ["synchronize", "reset", "step", "synchronize", "peak", "empty"]
    assert gpu.log == [*one, "step", "empty", *one]


def test_memory_on_the_cpu(tmp_path):
    """Of a process of its own, not of this one, which is larger."""
    mebibyte = 2**20
    held = b"x" * (500 * mebibyte)
    code = f"x = b'x' * {200 * mebibyte}; open({str(tmp_path / 'done')!r}, 'w').close()"
    build = functools.partial(functools.partial, exec, code)
    peaks = measure.measure_memory({"a": build}, "cpu")
    assert (tmp_path / "done").exists()
    own = measure.peak_of_process(lambda: lambda: None)
    assert 200 < peaks["a"] < own - 200
    assert len(held) > 0


def event(name, start, end, device=DeviceType.CUDA, annotation=False):
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, time_range=times, device_type=device, is_user_annotation=annotation
    )


def test_gaps():
    """The times in which nothing runs on any stream, and what the host does then."""
    cpu = DeviceType.CPU
    events = [
        event("third", 5000, 6000),
        event("first", 0, 1000),
        event("second, on another stream", 500, 2000),
        event("inside", 600, 700),
        event("last", 6500, 7000),
        event("Optimizer.step", 0, 7000, annotation=True),
        event("ProfilerStep#2", 0, 9000, cpu, annotation=True),
        event("aten::item", 1900, 5100, cpu),
        event("aten::_local_scalar_dense", 1950, 5050, cpu),
        event("cudaStreamSynchronize", 2000, 5000, cpu),
        event("cudaLaunchKernel", 6900, 6950, cpu),
    ]
    text = profiles.gaps_text(events)
    recorded = profiles.RECORDED
    waiting = f"waits {3.5 / recorded:.2f} of {7 / recorded:.2f} ms in an iteration (50.0%)"
    assert f"{waiting}, in {2 / recorded:g} gaps" in text
    assert f"cudaStreamSynchronize {1 / recorded:g}, cudaLaunchKernel {1 / recorded:g}." in text
    rows = re.findall(r"^\| ([\d.]+) \| `(.*?)` \| (.*) \|$", text, re.M)
    assert rows == [
        ("3.000", "second, on another stream", "`aten::item` > `cudaStreamSynchronize`"),
        ("0.500", "third", "Python"),
    ]


def test_operators_of_a_gpu():
    """By their time on the device, in which their kernels, listed too, are not counted again."""

    def average(key, device_time, device=DeviceType.CPU, annotation=False):
        return SimpleNamespace(
            key=key,
            self_device_time_total=device_time,
            self_cpu_time_total=1e9 - device_time,
            device_type=device,
            is_user_annotation=annotation,
            count=4,
        )

    averages = [average(f"aten::{i}", 1000 * i) for i in range(12)]
    averages.append(average("kernel", 9e9, DeviceType.CUDA))
    averages.append(average("Optimizer.step", 9e9, annotation=True))
    rows = profiles.operators_table(averages, on_gpu=True).splitlines()[2:]
    recorded = profiles.RECORDED
    ran = [event("kernel", 0, 1000), event("aten::1", 0, 1000, DeviceType.CPU)]
    assert "\n".join(rows) in profiles.profile_text(averages, ran)
    unseen = profiles.profile_text(averages, ran[1:])  # by their time on the CPU
    assert re.findall("`(.+)`", unseen)[0] == "aten::0"
    assert rows[0] == f"| `aten::11` | {11 / recorded:.2f} | {11 / 66:.1%} | {4 / recorded:g} |"
    assert [row.split("`")[1] for row in rows] == [f"aten::{i}" for i in range(11, 1, -1)]


def test_backbones(monkeypatch, capsys):
    """The parts are measured, and the whole is compared to their sum."""
    pytest.importorskip("timm")
    tool = import_module("benchmark_backbone")
    options = ["--networks", "resnet18", "--size", "64", "96", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["benchmark_backbone", *options])
    monkeypatch.setattr(tool, "measure_seconds", times_of(measure.measure_seconds))
    tool.main()
    rows = re.findall(r"^\| (.*?) \| ([\d.]+) \| ([\d.]+) \|", capsys.readouterr().out, re.M)
    assert rows == [
        (tool.ALONE, "1.0000", "0.250"),
        (tool.REST, "3.0000", "0.750"),
        (tool.DETECTOR, "5.0000", "1.250"),
    ]


def times_of(measure_seconds):
    """Runs the steps, and returns times that are known."""

    def known(steps, rounds, device):
        assert measure_seconds(steps, rounds, device).keys() == steps.keys()
        return dict(zip(steps, ([1.0], [3.0], [5.0])))

    return known
