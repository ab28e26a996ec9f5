"""Studies: what they plan, train and report."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from detectron2.data import DatasetCatalog

from crosskd import add_crosskd_config
from labelenc import add_labelenc_config
from plaindet import read_config
from plaindet.config import merge_config

import study
import study_cost
import study_plan
import study_report

TINY = """
title: A study
question: Is it better?
detectors: {gfl: GFL}
overrides:
  DATALOADER.NUM_WORKERS: 0
  INPUT.MIN_SIZE_TRAIN: (64,)
  INPUT.MIN_SIZE_TEST: 64
  SOLVER.IMS_PER_BATCH: 2
  SOLVER.MAX_ITER: 10
  SOLVER.STEPS: (8,)
  SOLVER.CHECKPOINT_PERIOD: 1
  TEST.EVAL_PERIOD: 5
rows:
  teacher:
    title: teacher
    config: "{detector}_R_18_baseline.yaml"
    overrides: {SOLVER.BASE_LR: 0.01}
  student:
    title: student
    config: "{detector}_R_18_baseline.yaml"
    paper: 30.0
  crosskd:
    title: CrossKD
    config: "{detector}_R_18_crosskd.yaml"
    overrides:
      MODEL.CROSSKD.TEACHER.CONFIG_FILE: "{teacher}/plain_config.yaml"
      MODEL.CROSSKD.TEACHER.WEIGHTS: "{teacher}/model_final.pth"
    against: [student]
    paper: {gfl: 32.0}
"""


@pytest.mark.parametrize("name", study_plan.study_names())
def test_configs_of_studies(name, tmp_path, tiny_data):
    """Every row is a config that trains for its schedule, from rows before it."""
    content, folder = study_plan.read_study(name), Path(tiny_data[0][1]).parent.parent
    assert content["title"]
    for detector in content["detectors"]:
        runs = study_plan.plan_runs(content, detector, str(folder), 1, tmp_path)
        names = [run.name for run in runs.values()]
        # Rows that are one run differ in what they count of its cost.
        rows = {(runs[row].name, *x.get("shared", ())) for row, x in content["rows"].items()}
        assert len(rows) == len(runs)
        for run in runs.values():
            assert all(names.index(p.name) < names.index(run.name) for p in run.parents.values())
            folders = {row: tmp_path / row for row in run.parents}
            cfg = merge_config(
                study_plan.CONFIGS / run.config,
                [*run.data, *(item.format_map(folders) for item in run.overrides)],
                [add_labelenc_config, add_crosskd_config],
            )
            assert 0 < cfg.SOLVER.STEPS[0] <= cfg.SOLVER.STEPS[-1] < cfg.SOLVER.MAX_ITER
            assert (
                cfg.SOLVER.MAX_ITER > cfg.MODEL.LABELENC.WARMUP_ITERS or "step1" not in run.config
            )
            if "CrossKD" in cfg.MODEL.META_ARCHITECTURE:
                assert cfg.MODEL.CROSSKD.TEACHER.WEIGHTS.startswith(str(tmp_path))
                plain = cfg.MODEL.META_ARCHITECTURE.partition("CrossKD")[2]
                if plain in ("GFL", "RetinaNet", "ATSS", "FCOS"):
                    num_convs = cfg.MODEL[plain.upper()].NUM_CONVS
                    assert cfg.MODEL.CROSSKD.POSITION <= num_convs


def test_longer_schedule(tmp_path, tiny_data):
    """All phases are twice as long, and nothing else changes."""
    content, folder = study_plan.read_study("labelenc_table_1"), Path(tiny_data[0][1]).parent.parent
    plans = [
        study_plan.plan_runs(content, "retinanet", str(folder), 1, tmp_path, schedule)
        for schedule in (1, 2)
    ]
    assert not {run.name for run in plans[0].values()} & {run.name for run in plans[1].values()}
    for row in content["rows"]:
        cfg, longer = (
            merge_config(
                study_plan.CONFIGS / plan[row].config,
                [*plan[row].data, *plan[row].overrides],
                [add_labelenc_config, add_crosskd_config],
            )
            for plan in plans
        )
        assert longer.MODEL.LABELENC.WARMUP_ITERS == 2 * cfg.MODEL.LABELENC.WARMUP_ITERS
        assert longer.MODEL.LABELENC.CUTOFF_ITERS == 2 * cfg.MODEL.LABELENC.CUTOFF_ITERS
        assert longer.SOLVER.MAX_ITER == 2 * cfg.SOLVER.MAX_ITER
        assert longer.SOLVER.STEPS == tuple(2 * step for step in cfg.SOLVER.STEPS)
        assert longer.TEST.EVAL_PERIOD == 2 * cfg.TEST.EVAL_PERIOD
        cfg.merge_from_list(
            [x for key in study_plan.ITERATIONS for x in (key, value_of(longer, key))]
        )
        assert cfg == longer


def value_of(cfg, key):
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def test_rows_of_several_studies_are_one_run(tmp_path, tiny_data):
    names, folder = {}, Path(tiny_data[0][1]).parent.parent
    for name in ("labelenc_table_1", "labelenc_tables_2_5", "labelenc_scaling"):
        for seed in (1, 2):
            runs = study_plan.plan_runs(
                study_plan.read_study(name), "retinanet", "shapes", seed, None
            )
            names[name, seed] = {row: run.name for row, run in runs.items()}
    first, second, third = (names[name, 1] for name, seed in names if seed == 1)
    assert first["baseline_2x"] == second["baseline_2x"] == third["baseline_600"]
    for row in ("baseline", "step1", "step2"):
        assert first[row] == second[row] == third[f"{row}_300"]
    assert len({*first.values(), *second.values()}) == len(first) + len(second) - 4
    folder, seed = first["step2"].rsplit("/", 1)
    assert (folder, seed) == (names["labelenc_table_1", 2]["step2"].rsplit("/", 1)[0], "seed1")


def test_chosen_detectors():
    studies = {
        name: study_plan.read_study(name) for name in ("crosskd_detectors", "labelenc_table_1")
    }
    study.choose_detectors(studies, None)
    assert [len(content["detectors"]) for content in studies.values()] == [4, 3]
    with pytest.raises(ValueError, match=r"--detectors: found \['gfl', 'fcso'\], expected some of"):
        study.choose_detectors(studies, ["gfl", "fcso"])
    study.choose_detectors(studies, ["gfl", "fcos_imprv"])
    assert [list(content["detectors"]) for content in studies.values()] == [["gfl"], ["fcos_imprv"]]


def test_data_sets_of_one_name(tmp_path, tiny_data):
    """They are told apart by their annotations, and a copy is the same data set."""
    original, names = Path(tiny_data[0][1]).parent.parent, []
    for folder, ending in (("a", ""), ("b", " ")):
        shutil.copytree(original, tmp_path / folder / "tiny")
        path = tmp_path / folder / "tiny" / "annotations" / "val.json"
        path.write_text(path.read_text() + ending)
        names.append(study_plan.annotations_digest(str(tmp_path / folder / "tiny")))
    assert names[0] == study_plan.annotations_digest(str(original)) != names[1]

    content = study_plan.read_study("crosskd_ablations")
    tiny, shapes = (
        study_plan.plan_runs(content, "gfl", data, 1, tmp_path)["student"].name.split("/")
        for data in (str(original), "shapes")
    )
    assert (tiny[0], shapes[0]) == ("tiny", "shapes")
    assert tiny[1] != shapes[1]


def test_part_of_the_images(tmp_path, tiny_data):
    """A row with a fraction trains on that part, the smaller one within the larger one."""
    folder, images = Path(tiny_data[0][1]).parent.parent, {}
    for fraction in (0.25, 0.5, 1.0):
        overrides = study_plan.write_part(str(folder), fraction, tmp_path)
        cfg = read_config(study_plan.CONFIGS / "gfl_R_18_baseline.yaml", overrides)
        (name,) = cfg.DATASETS.TRAIN
        dataset_dicts = DatasetCatalog.get(name)
        images[fraction] = {d["image_id"]: len(d["annotations"]) for d in dataset_dicts}
        assert all(Path(d["file_name"]).is_file() for d in dataset_dicts)
    assert [len(part) for part in images.values()] == [2, 3, 6]
    everything = DatasetCatalog.get("tiny_train")
    assert images[1.0] == {d["image_id"]: len(d["annotations"]) for d in everything}
    assert images[0.25].items() < images[0.5].items() < images[1.0].items()

    (tmp_path / "part.yaml").write_text(TINY.replace("    paper: 30.0", "    fraction: 0.5"))
    content = study_plan.read_study(str(tmp_path / "part.yaml"))
    runs = study_plan.plan_runs(content, "gfl", str(folder), 1, tmp_path)
    assert "tiny_train_3" in " ".join(runs["student"].data)
    assert "tiny_train_3" not in " ".join(runs["teacher"].data)
    whole = study_plan.plan_runs(yaml.safe_load(TINY), "gfl", str(folder), 1, tmp_path)
    assert whole["student"].name != runs["student"].name
    assert whole["crosskd"].name == runs["crosskd"].name

    # A study's own part and schedule hold for all rows; the built-in set has no parts.
    (tmp_path / "study.yaml").write_text("fraction: 0.25\nschedule: 2\n" + TINY)
    content = study_plan.read_study(str(tmp_path / "study.yaml"))
    for dataset in (str(folder), "shapes"):
        for run in study_plan.plan_runs(content, "gfl", dataset, 1, tmp_path).values():
            assert ("tiny_train_2" in " ".join(run.data)) == (dataset != "shapes")
            pairs = dict(zip(run.overrides[::2], run.overrides[1::2]))
            assert (pairs["SOLVER.MAX_ITER"], pairs["SOLVER.STEPS"]) == ("20", "(16,)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("against: [student]", "against: [later]"), r"row crosskd names \['later'\]"),
        (("{teacher}/model", "{student_2}/model"), r"row crosskd names \['student_2'\]"),
    ],
)
def test_study_that_names_unknown_rows(tmp_path, change, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(TINY.replace(*change))
    with pytest.raises(ValueError, match=message):
        study_plan.read_study(str(path))
    with pytest.raises(FileNotFoundError, match="no study nothing"):
        study_plan.read_study("nothing")


@pytest.fixture
def start(tmp_path, tiny_data):
    """Returns a function that starts the tiny study, or another one, and returns its process and
    output folder."""
    folder = Path(tiny_data[0][1]).parent.parent

    def run(output, *arguments, content=TINY):
        (tmp_path / "tiny_study.yaml").write_text(content)
        command = [sys.executable, "-W", "ignore", str(study.REPOSITORY / "tools" / "study.py")]
        command += [str(tmp_path / "tiny_study.yaml"), "--data", str(folder)]
        command += ["--output", str(tmp_path / output), *arguments]
        # Its own session, so that it can be killed with the training that it has started.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return process, tmp_path / output

    return run


def without_times(output):
    lines = (output / "results.jsonl").read_text().splitlines()
    results = [json.loads(line) for line in lines]
    for result in results:
        assert result.pop("minutes") > 0
        assert result.pop("seconds per iteration") > 0
    return results


@pytest.mark.long
def test_study_that_is_killed(start):
    """Killed with and without its training, it ends in the results of one that is not."""
    process, whole = start("whole", "--seeds", "1", "--jobs", "2")
    log = process.communicate()[0]
    assert process.returncode == 0, log
    assert len(re.findall(r"of 3 runs", log)) == 3

    process, killed = start("killed", "--seeds", "1")
    wait_for(killed, "*baseline*/seed1/model_0000001.pth")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    process, _ = start("killed", "--seeds", "1")
    wait_for(killed, "*crosskd*/seed1/log.txt")
    process.kill()  # and not the training
    process.communicate()
    process, _ = start("killed", "--seeds", "1")
    log = process.communicate()[0]
    assert process.returncode == 0, log
    assert "1 of 1 runs" in log

    results = without_times(killed)
    assert results == without_times(whole)
    assert [result["iterations"] for result in results] == [10, 10, 10]
    assert all([i for i, _ in result["learning curve"]] == [5, 10] for result in results)

    # Nothing is left to do; the checkpoints are those that others start from.
    process, _ = start("whole", "--seeds", "1")
    assert "of" not in re.sub("Report: .*", "", process.communicate()[0])
    finals = [path.parent.parent.name for path in whole.glob("runs/*/*/*/model_final.pth")]
    teacher = next(r for r in results if r["config"] == "gfl_R_18_crosskd.yaml")["starts from"]
    assert finals == [teacher["teacher"].split("/")[1]]
    assert not list(whole.glob("runs/*/*/*/model_0*.pth"))

    report = (whole / "tiny_study" / "tiny" / "report.md").read_text()
    assert "Finished runs: 3 of 3" in report
    assert "| GFL | CrossKD | student | 1 |" in report
    assert "claims by 1 AP or more: 1; 0 reproduced, 0 contradicted, 1 undecided" in report
    assert (whole / "tiny_study" / "tiny" / "report.png").stat().st_size > 10_000

    # The report can be made from the results alone.
    (whole.parent / "copy").mkdir()
    shutil.copy(whole / "results.jsonl", whole.parent / "copy")
    process, copy = start("copy", "--seeds", "1", "--report-only")
    assert "of 3 runs" not in process.communicate()[0]
    assert (copy / "tiny_study" / "tiny" / "report.md").read_text() == report
    assert not (copy / "runs").exists()

    # A study that starts from one of the others trains that again.
    content = TINY.replace("{teacher}", "{student}")
    process, _ = start("whole", "--seeds", "1", content=content)
    log = process.communicate()[0]
    assert process.returncode == 0, log
    assert "2 of 2 runs" in log
    assert [r for r in without_times(whole) if "baseline" in r["name"]] == results[:2]


def test_runs_that_start_from_a_removed_one(tmp_path, tiny_data):
    """Their results are of the removed one, and are removed as well."""
    runs = list(
        study_plan.plan_runs(
            study_plan.read_study("labelenc_table_1"), "retinanet", "shapes", 1, tmp_path
        ).values()
    )
    step1, step2 = runs[-2:]
    results = {run.name: {} for run in runs}
    assert study.stale_runs(runs, results) == set()
    del results[step1.name]
    assert study.stale_runs(runs, results) == {step2.name}


@pytest.mark.parametrize("seed", [1, 3])
def test_seed_of_a_run(tmp_path, tiny_data, monkeypatch, seed):
    commands, data = [], str(Path(tiny_data[0][1]).parent.parent)
    monkeypatch.setattr(
        study.subprocess,
        "run",
        lambda command, **_: commands.append(command) or subprocess.CompletedProcess(command, 1),
    )
    run = study_plan.plan_runs(yaml.safe_load(TINY), "gfl", data, seed, tmp_path)["student"]
    with pytest.raises(RuntimeError, match="exit code 1"):
        study.train(run, tmp_path, jobs=1, device="cuda")
    (command,) = commands
    cfg = merge_config(
        command[command.index("--config-file") + 1],
        command[command.index("--config-file") + 2 :],
        [add_labelenc_config, add_crosskd_config],
    )
    assert (cfg.SEED, cfg.OUTPUT_DIR) == (seed, str(tmp_path / run.name))
    assert cfg.MODEL.DEVICE == "cuda"
    assert run.name.endswith(f"/seed{seed}")


def test_time_of_rows(tmp_path, tiny_data, monkeypatch):
    """In a short run of the same phases, for all seeds; rows that have not been trained are left
    out, and so are those whose teacher's checkpoint is gone."""
    folder, short = str(Path(tiny_data[0][1]).parent.parent), {}

    def train(run, folder, own, jobs, device, overrides):
        short[run.config] = dict(zip(overrides[::2], overrides[1::2]))
        lines = [{"time": 0.5}, {"bbox/AP": 1.0}, {"time": 0.7}]
        (own / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(study, "start_training", train)
    content = {**yaml.safe_load(TINY), "schedule": 30}
    plans = [study_plan.plan_runs(content, "gfl", folder, seed, tmp_path) for seed in (1, 2)]
    runs = [plan[row] for plan in plans for row in ("student", "crosskd")]
    results = {
        run.name: {"name": run.name, "iterations": 300, "minutes": 9.0, "timed alone": False}
        for run in runs
    }
    study.time_rows(runs, results, tmp_path, jobs=1, device="cpu")
    (schedule,) = short.values()
    assert schedule["SOLVER.MAX_ITER"] == "100"
    assert schedule["SOLVER.STEPS"] == "(80,)"
    assert schedule["DATASETS.TEST"] == "()"
    for run in runs:
        result = results[run.name]
        assert result["timed alone"] == ("crosskd" not in run.name)
        minutes = 9.0 if "crosskd" in run.name else 0.6 * 300 / 60
        assert result["minutes"] == pytest.approx(minutes)
    assert study.read_results(tmp_path) == results


def wait_for(output, pattern):
    for _ in range(6000):
        if list(output.glob(f"runs/*/{pattern}")):
            return
        time.sleep(0.1)
    raise AssertionError(f"no {pattern} after ten minutes")


def test_failed_run(start, monkeypatch):
    """It is named, with what starts from it; the others are trained, and the report is written."""
    process, output = start("failed", "--seeds", "1")
    wait_for(output, "*/seed1/lock")
    folder = next(output.glob("runs/*/*/seed1"))
    (folder / "metrics.json").mkdir()  # so that the writer of the metrics fails
    log = process.communicate()[0]
    assert process.returncode == 1
    failed = log.split("start from one that did:\n")[1].split()
    assert len(failed) == 2
    assert "gfl_R_18_crosskd" in failed[1]
    assert f"exit code 1, see {folder / 'output.txt'}" in log
    assert "Finished runs: 1 of 3" in (output / "tiny_study" / "tiny" / "report.md").read_text()


@pytest.mark.long
def test_two_studies_in_one_folder(start):
    process, output = start("same", "--seeds", "1")
    wait_for(output, "*/seed1/lock")
    other, _ = start("same")
    assert "Another study is running in" in other.communicate()[0]
    assert other.returncode == 1
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def make_study(papers):
    return {
        "title": "Title",
        "question": "Question?",
        "detectors": {"gfl": "GFL"},
        "rows": {
            "plain": {"title": "plain", "config": "a_baseline.yaml", "paper": papers[0]},
            "ours": {
                "title": "ours",
                "config": "ours.yaml",
                "against": ["plain"],
                "paper": papers[1],
            },
        },
    }


def make_results(aps, starts_from=()):
    """The results of a row, one for each seed."""
    return [
        {
            "name": f"data/{aps}/seed{seed}",
            "config": "a_baseline.yaml",
            "starts from": {str(i): runs[seed - 1]["name"] for i, runs in enumerate(starts_from)},
            "seed": seed,
            "iterations": 100,
            "AP": ap,
            "AP50": ap and ap + 20,
            "AP75": ap and ap - 10,
            "minutes": 2.0,
            "seconds per iteration": 1.2,
            "learning curve": [[50, ap / 2], [100, ap]] if ap else [],
        }
        for seed, ap in enumerate(aps, 1)
    ]


@pytest.mark.parametrize(
    ("aps", "papers", "verdict"),
    [
        # Differences 2, 3, 4: 3 +- 4.303 / sqrt(3) = 3 +- 2.48
        ([12, 23, 34], (38.7, 40.0), "reproduced"),
        ([12, 23, 34], (37.7, 38.7), "reproduced"),  # 1.0000000000000036 or so
        ([12, 23, 34], (38.7, 37.0), "contradicted"),
        ([12, 23, 34], (38.7, 38.0), "better"),
        ([12, 23, 34], (None, 38.0), "better"),
        ([8, 17, 26], (38.7, 40.0), "contradicted"),
        ([8, 17, 26], (38.7, 37.0), "reproduced"),
        ([8, 17, 26], (38.7, 38.7), "worse"),
        # Differences -1, 3, 4: 2 +- 6.57
        ([9, 23, 34], (38.7, 40.0), "undecided"),
        ([9, 23, 34], (38.7, 38.8), "no difference shown"),
        ([22], (38.7, 40.0), "undecided"),
        ([22], (38.7, 38.8), "one seed"),
        ([], (38.7, 40.0), "not measured"),
    ],
)
def test_verdict(aps, papers, verdict, tmp_path):
    tables = {"gfl": {"plain": make_results([10, 20, 30]), "ours": make_results(aps)}}
    results = {run["name"]: run for runs in tables["gfl"].values() for run in runs}
    (comparison,) = study_report.compare(make_study(papers), tables, results)
    assert comparison.verdict == verdict
    assert comparison.seeds == len(aps)
    if aps:
        assert comparison.mean == pytest.approx(fmean(ap - 10 * i for i, ap in enumerate(aps, 1)))
    if aps == [12, 23, 34]:
        assert comparison.half_width == pytest.approx(4.302652729911275 / math.sqrt(3))
        assert "3.0 AP above plain, interval +0.5 to +5.5." in str(comparison)
    counted = "\n".join(study_report.summary([comparison], with_claims=True))
    claims = ("reproduced", "contradicted", "undecided", "not measured")
    assert (f"claims by {1} AP or more: 1;" in counted) == (verdict in claims)
    assert f"{int(comparison.is_claim)} {verdict}" in counted or not comparison.is_claim
    assert (f"**{verdict}**: GFL, ours" in counted) == comparison.is_claim


def test_report_of_what_is_there(tmp_path):
    """Without a detector's runs, without a row, and with a row that is in no plan."""
    content, runs = make_study((38.7, 40.0)), make_results([10.0, 20.0])
    content["detectors"]["fcos"] = "FCOS"
    names = [study_plan.Run(run["name"], "", (), run["seed"], (), {}) for run in runs]
    plan = {"gfl": {"plain": names}, "fcos": {"plain": []}}
    results = {run["name"]: run for run in runs}
    report = study_report.write_report(
        content, plan, results, tmp_path / "study" / "data", "shapes"
    )
    text = report.read_text()
    assert "| plain | 2 | 100 | 100 | 1.20 | 2.0 | 15.0 ± 63.5 | 35.0 ± 63.5 |" in text
    assert "FCOS" not in text
    assert "by 1 AP or more: 0;" in text
    assert "The paper's numbers are of COCO" in text
    assert (report.parent / "report.png").stat().st_size > 10_000
    content["rows"] = {k: {**row, "paper": None} for k, row in content["rows"].items()}
    report = study_report.write_report(
        content, plan, results, tmp_path / "study" / "data", "shapes"
    )
    assert "paper's numbers" not in report.read_text()
    assert "claims" not in report.read_text()


def test_totals_count_each_run_once():
    """A teacher and a student that starts from it, and a run that starts from both."""
    teacher = make_results([1.0])
    student = make_results([2.0], [teacher])
    both = make_results([3.0], [teacher, student])
    results = {run["name"]: run for run in (*teacher, *student, *both)}
    assert study_cost.total(both[0], results, "iterations") == 300
    assert study_cost.total(both[0], results, "minutes") == pytest.approx(6)


def make_costs(aps, minutes):
    """A study with plain rows and another one, which starts from a run of 3 minutes."""
    content = make_study((None, None))
    rows = {"start": {"title": "start", "config": "start.yaml"}, **content["rows"]}
    rows["longer"] = {"title": "longer", "config": "a_baseline.yaml"}
    rows["shared"] = {**rows["ours"], "title": "ours, start shared", "shared": ["start"]}
    content.update(rows=rows, plain=["plain", "longer"])
    start = make_results([None, None])
    table = {"start": start, "plain": make_results(aps["plain"])}
    table["longer"] = make_results(aps["longer"])
    table["ours"] = table["shared"] = make_results(aps["ours"], [start])
    for row, runs in table.items():
        for run in runs:
            run["minutes"] = {"start": 3.0, **minutes}.get(row, run["minutes"])
    return content, table, {run["name"]: run for runs in table.values() for run in runs}


def test_equal_cost():
    """Against the straight line between the plain rows, seed by seed."""
    aps = {"plain": [20.0, 22.0], "longer": [40.0, 44.0], "ours": [36.0, 39.0]}
    costs = study_cost.equal_cost(*make_costs(aps, {"plain": 2.0, "longer": 10.0, "shared": 4.0}))
    by_row = {cost.row: cost for cost in costs}
    assert {row: cost.minutes for row, cost in by_row.items()} == {
        **{"plain": 2.0, "shared": 4.0, "ours": 7.0, "longer": 10.0}
    }
    # After 4 minutes a quarter of the way from 2 to 10: 25 and 27.5. After 7: 32.5 and 35.75.
    assert by_row["shared"].gains == pytest.approx([11.0, 11.5])
    assert by_row["ours"].gains == pytest.approx([3.5, 3.25])
    assert not by_row["plain"].gains
    assert [cost.row for cost in costs if cost.is_on_frontier] == ["plain", "shared", "longer"]
    assert by_row["ours"].pays
    assert not by_row["ours"].is_longer


def test_equal_cost_of_a_row_that_is_longer_than_all_plain_ones():
    aps = {"plain": [20.0, 22.0], "longer": [40.0, 44.0], "ours": [41.0, 44.5]}
    content, table, results = make_costs(aps, {"plain": 2.0, "longer": 6.0, "shared": 4.0})
    (ours,) = (c for c in study_cost.equal_cost(content, table, results) if c.row == "ours")
    assert ours.is_longer
    assert ours.gains == pytest.approx([1.0, 0.5])
    # 0.75 +- 12.7 * 0.354 / sqrt(2) = 0.75 +- 3.2
    assert not ours.pays
    text = study_cost.cost_section(content, table, results)
    assert "| ours | 7.0 | 3.5 | 42.8 ± 22.2 | +0.8 ± 3.2 (>) |  |" in text
    assert "Above plain training of the same cost, by the interval: ours, start shared;" in text
    assert text.endswith("from 2.0 times the cost of plain on.")


def test_where_a_baseline_stops():
    content, runs = make_study((None, None)), make_results([10.0, 30.0])
    for run in runs:
        run["learning curve"] = [[50, run["AP"] - 4], [80, run["AP"] - 1], [100, run["AP"]]]
    tables = {"gfl": {"plain": runs, "ours": make_results([1.0])}}
    (sentence, _) = study_report.stopping_points(content, tables)
    assert "plain: stops at 20.0 AP after 100 iterations, past its steepest part" in sentence
    assert "+32.0 AP from iteration 0 to 50" in sentence
    assert "+5.0 AP from 80 to 100" in sentence
    for run in runs:
        run["learning curve"] = [[50, run["AP"] - 15], [100, run["AP"]]]
    (sentence, _) = study_report.stopping_points(content, tables)
    assert "still near its steepest part" in sentence
    assert sentence.endswith("from iteration 50 to 100, its steepest part and its last.")
    for run in runs:
        run["learning curve"] = [[100, run["AP"]]]
    (sentence, _) = study_report.stopping_points(content, tables)
    assert sentence == "* GFL, plain: stops at 20.0 AP after 100 iterations, its only evaluation."
