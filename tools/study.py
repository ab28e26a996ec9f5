#!/usr/bin/env python
"""Trains the rows of studies with several seeds, and reports what they show.

    python tools/study.py STUDY [STUDY ...] [--data shapes <COCO-format folder> ...] [--seeds 3]
        [--detectors NAME ...] [--schedule 1] [--jobs 1] [--device cpu] [--time]
        [--output output/studies] [--report-only]

A study is the name of a file in configs/studies, or a yaml file like those. It has detectors,
overrides, what its schedules are multiplied with (schedule), the part of the training images
(fraction), and rows, each of which has

* config: a file of configs/quick, in whose name {detector} is the detector,
* overrides: of its config; {ROW} is the output folder of an earlier row, which it starts from,
* against: the earlier rows that it is compared with,
* paper: the AP in the paper,
* fraction: of the training images, of data sets in COCO format; the study's without it,
* shared: the earlier rows that it starts from whose cost is not counted, since many runs share it.

A study with plain, a list of rows, also compares all others with plain training of the same cost. A
mapping, as a value of overrides or as the paper's AP, has a value for each detector.

Every row is a run of train_net.py. Its result is a line of <output>/results.jsonl; rows that train
the same, of one study or of several, are one run. Finished runs are skipped, interrupted ones are
continued. Checkpoints are kept of those that others start from. Each study gets a report for each
data set, <output>/<study>/<data set>/report.md; with --schedule 2, <data set>_2x/report.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import yaml

from demo_runs import CONFIGS, REPOSITORY, read_metrics
from study_plan import (
    BUILT_IN,
    Run,
    dataset_name,
    plan_runs,
    read_study,
    scaled_schedule,
    study_names,
    write_text,
)
from study_report import write_report

TIMED_ITERATIONS = 100


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="+", metavar="STUDY", help=", ".join(study_names()))
    parser.add_argument(
        "--data",
        nargs="+",
        default=[BUILT_IN],
        metavar="DATA",
        help="the built-in shapes, or folders in COCO format; default: shapes",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many: 1, 2, ... (3)")
    parser.add_argument("--detectors", nargs="+", metavar="NAME", help="some of the studies'")
    parser.add_argument(
        "--schedule", type=int, default=1, help="how many times as long all schedules are (1)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (1)")
    parser.add_argument("--device", default="cpu", help="of all runs: cpu or cuda (cpu)")
    parser.add_argument(
        "--time",
        action="store_true",
        help="then measure the time of an iteration of each row anew, one after the other, for "
        "reports on times that other work on the machine has not moved",
    )
    parser.add_argument("--output", type=Path, default=Path("output/studies"))
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    return parser.parse_args()


def unfinished_runs(runs: list[Run], results: dict[str, dict], folder: Path) -> list[Run]:
    """The runs to train: without a result, or without the files that another one starts from.

    Args:
        runs: each after its parents.
        folder: the folder of all runs.
    """
    by_name = {}
    for run in runs:
        by_name.setdefault(run.name, run)
    unfinished, starts = {}, set()
    for run in reversed(by_name.values()):
        has_files = (folder / run.name / "model_final.pth").is_file()
        if run.name not in results or (run.name in starts and not has_files):
            unfinished[run.name] = run
            starts.update(parent.name for parent in run.parents.values())
    return list(reversed(unfinished.values()))


def stale_runs(runs: list[Run], results: dict[str, dict]) -> set[str]:
    """The names of runs that start from one whose result has been removed, and so on.

    Args:
        runs: each after its parents.
    """
    stale = set()
    for run in runs:
        parents = {parent.name for parent in run.parents.values()}
        if run.name in results and (parents & stale or parents - results.keys()):
            stale.add(run.name)
    return stale


def train_all(
    runs: list[Run], results: dict[str, dict], output: Path, jobs: int, device: str
) -> list[str]:
    """Trains runs, each after its parents, and adds their results to <output>/results.jsonl.

    Returns:
        the names of the runs that failed, and of those that start from them
    """
    folder = output / "runs"
    waiting = {run.name: run for run in unfinished_runs(runs, results, folder)}
    is_parent = {parent.name for run in runs for parent in run.parents.values()}
    running, failed, number, start = {}, [], len(waiting), time.time()
    with ThreadPoolExecutor(jobs) as executor:
        while waiting or running:
            for run in list(waiting.values()):
                parents = {parent.name for parent in run.parents.values()}
                if parents.intersection(failed):
                    failed.append(waiting.pop(run.name).name)
                elif len(running) < jobs and not parents.intersection(
                    [*waiting, *(other.name for other in running.values())]
                ):
                    future = executor.submit(train, run, folder, jobs, device)
                    running[future] = waiting.pop(run.name)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                error = future.exception()
                if error:
                    failed.append(run.name)
                    print(f"{run.name} failed: {error}", flush=True)
                    continue
                results[run.name] = future.result()
                write_results(results, output)
                remove_checkpoints(folder / run.name, keep_last=run.name in is_parent)
                done, minutes = number - len(waiting) - len(running), (time.time() - start) / 60
                ap = results[run.name]["AP"]
                what = run.name if ap is None else f"{run.name}, AP {ap:.1f}"
                print(f"{done} of {number} runs, {minutes:.0f} minutes: {what}", flush=True)
    return failed


def train(run: Run, folder: Path, jobs: int, device: str) -> dict:
    """Trains a run with train_net.py, from where it was interrupted, and returns its result.

    Raises:
        RuntimeError: train_net.py failed.
    """
    own = folder / run.name
    start_training(run, folder, own, jobs, device)
    return read_result(run, own)


def start_training(
    run: Run, folder: Path, own: Path, jobs: int, device: str, overrides: Sequence[str] = ()
) -> None:
    """Runs train_net.py to its end.

    Args:
        folder: of all runs.
        own: the output folder.
        overrides: in addition to the run's.

    Raises:
        RuntimeError: it failed.
    """
    folder, own = folder.resolve(), own.resolve()
    own.mkdir(parents=True, exist_ok=True)
    starts = {row: folder / parent.name for row, parent in run.parents.items()}
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "train_net.py"), "--resume"]
    command += ["--config-file", str(CONFIGS / run.config), *run.data]
    command += [item.format_map(starts) for item in run.overrides]
    command += [*overrides, "MODEL.DEVICE", device, "SEED", str(run.seed), "OUTPUT_DIR", str(own)]
    threads = max(os.cpu_count() // jobs, 1)
    # Threads that wait for each other should not keep other runs off the cores.
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with open(own / "lock", "w") as lock, open(own / "output.txt", "a") as output:
        # The process of train_net.py holds the lock, too: it trains on if this one is killed, and
        # the next study waits for it here.
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=REPOSITORY,  # for the weights in output/weights, which configs name
            pass_fds=[lock.fileno()],
        ).returncode
    if code:
        raise RuntimeError(f"exit code {code}, see {own / 'output.txt'}")


def time_rows(
    runs: list[Run], results: dict[str, dict], output: Path, jobs: int, device: str
) -> None:
    """Measures the time of an iteration of every finished row, one after the other, in a run with
    the same phases of TIMED_ITERATIONS, and puts it into the results of all seeds.

    Args:
        jobs: as in the training, for the same number of threads.
    """
    folder = output / "runs"
    rows = {}
    for run in runs:
        has_starts = all(
            (folder / p.name / "model_final.pth").exists() for p in run.parents.values()
        )
        if run.name in results and has_starts:
            rows.setdefault(os.path.dirname(run.name), run)
    for number, (row, run) in enumerate(rows.items(), 1):
        pairs = dict(zip(run.overrides[::2], run.overrides[1::2]))
        factor = TIMED_ITERATIONS / results[run.name]["iterations"]
        short = scaled_schedule(run.config, pairs, factor)
        overrides = [item for pair in short.items() for item in pair]
        with tempfile.TemporaryDirectory() as own:
            overrides += ["DATASETS.TEST", "()"]
            start_training(run, folder, Path(own), jobs, device, overrides)
            seconds = [line["time"] for line in read_metrics(Path(own)) if "time" in line]
        cost = statistics.fmean(seconds)
        for result in results.values():
            if os.path.dirname(result["name"]) == row:
                result["seconds per iteration"] = cost
                result["minutes"] = cost * result["iterations"] / 60
                result["timed alone"] = True
        write_results(results, output)
        print(f"{number} of {len(rows)} rows: {row}, {cost:.3f} s an iteration", flush=True)


def read_result(run: Run, folder: Path) -> dict:
    """The line of results.jsonl for a run that is finished."""
    metrics = read_metrics(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    iterations = config["SOLVER"]["MAX_ITER"]
    last = {key: value for line in metrics for key, value in line.items()}
    # None at all in runs of a few iterations that were interrupted.
    seconds = [line["time"] for line in metrics if "time" in line] or [math.nan]
    cost = statistics.median(seconds)  # which other work on the machine moves least
    curve = {
        min(line["iteration"] + 1, iterations): _ap(line, "AP")
        for line in metrics
        if "bbox/AP" in line
    }
    return {
        "name": run.name,
        "config": run.config,
        "overrides": run.overrides,
        "starts from": {row: parent.name for row, parent in run.parents.items()},
        "seed": run.seed,
        "device": config["MODEL"]["DEVICE"],
        "iterations": iterations,
        **{key: _ap(last, key) for key in ("AP", "AP50", "AP75")},
        "timed alone": False,
        "minutes": cost * iterations / 60,  # of training alone
        "seconds per iteration": cost,
        "learning curve": sorted(curve.items()),
    }


def _ap(metrics: dict, key: str) -> float | None:
    """None for a run without a test set, as step 1 with the reconstruction alone."""
    ap = metrics.get(f"bbox/{key}")
    # COCOEvaluator's AP of no detections is NaN.
    return ap if ap is None else 0.0 if math.isnan(ap) else round(ap, 3)


def remove_checkpoints(folder: Path, keep_last: bool) -> None:
    for path in folder.glob("model_*.pth"):
        if not (keep_last and path.name == "model_final.pth"):
            path.unlink()
    if not keep_last:
        # Should another study start from it one day, it trains anew.
        (folder / "last_checkpoint").unlink()


def read_results(output: Path) -> dict[str, dict]:
    """The results so far, by the names of runs."""
    path = output / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def write_results(results: dict[str, dict], output: Path) -> None:
    lines = [json.dumps(result) + "\n" for _, result in sorted(results.items())]
    write_text(output / "results.jsonl", "".join(lines))


def choose_detectors(studies: dict[str, dict], detectors: list[str] | None) -> None:
    """Takes the other detectors out of studies.

    Raises:
        ValueError: no study has one of them.
    """
    known = {detector for study in studies.values() for detector in study["detectors"]}
    if detectors and not known.issuperset(detectors):
        raise ValueError(f"--detectors: found {detectors}, expected some of {sorted(known)}")
    for study in studies.values():
        for detector in known.difference(detectors or known):
            study["detectors"].pop(detector, None)


def main():
    args = parse_args()
    studies = {name: read_study(name) for name in args.studies}
    choose_detectors(studies, args.detectors)
    plans = {}  # (study, dataset) -> detector -> row -> the runs of all seeds
    runs = []
    for dataset in args.data:
        for seed in range(1, args.seeds + 1):
            for name, study in studies.items():
                for detector in study["detectors"]:
                    planned = plan_runs(study, detector, dataset, seed, args.output, args.schedule)
                    runs += planned.values()
                    rows = plans.setdefault((name, dataset), {}).setdefault(detector, {})
                    for row, run in planned.items():
                        rows.setdefault(row, []).append(run)

    args.output.mkdir(parents=True, exist_ok=True)
    failed = []
    with open(args.output / "lock", "w") as lock:
        if not args.report_only:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"Another study is running in {args.output}") from None
        results = read_results(args.output)
        for name in stale_runs(runs, results):
            del results[name]
            if not args.report_only:
                shutil.rmtree(args.output / "runs" / name, ignore_errors=True)
        if not args.report_only:
            failed = train_all(runs, results, args.output, args.jobs, args.device)
        if args.time and not args.report_only:
            time_rows(runs, results, args.output, args.jobs, args.device)
    for (name, dataset), plan in plans.items():
        planned = (run for rows in plan.values() for row in rows.values() for run in row)
        if not any(run.name in results for run in planned):
            print(f"No run of {name} on {dataset} is finished, so there is no report")
            continue
        data = dataset_name(dataset)
        folder = args.output / Path(name).stem / data
        if args.schedule != 1:
            folder = folder.with_name(f"{data}_{args.schedule}x")
            data += f", with schedules {args.schedule} times as long as the configs'"
        print(f"Report: {write_report(studies[name], plan, results, folder, data)}")
    if failed:
        raise SystemExit("These runs failed, or start from one that did:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
