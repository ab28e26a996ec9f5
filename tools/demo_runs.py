"""What the demos of both methods share: their arguments, their runs, and a table of them."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import zlib
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from plaindet import add_plaindet_config
from plaindet.data import find_coco_folder, register_coco_format
from plaindet.engine.checks import thing_classes

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs" / "quick"


@dataclass(frozen=True)
class Run:
    """A training of a demo.

    Args:
        folder: of its output.
        title: what it is, for tables and pictures.
        config: a yaml file.
        overrides: of the config, without OUTPUT_DIR.
        iterations: of the training.
        total: the iterations with those of the run that it starts from.
        cost: of an iteration, as a ratio to one of the first run, to estimate the time left.
    """

    folder: Path
    title: str
    config: Path
    overrides: list[str]
    iterations: int
    total: int
    cost: float = 1.0


def parse_args(description: str, output: str, add_arguments=lambda parser: None):
    """The arguments of a demo, with the output folder of the data set as `output`."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--dataset", help="folder in COCO format; default: the built-in shapes")
    parser.add_argument("--output", default=output)
    parser.add_argument("--seed", type=int, default=1, help="of every run (1)")
    add_arguments(parser)
    args = parser.parse_args()
    args.output = Path(args.output) / (folder_name(args.dataset) if args.dataset else "")
    return args


def folder_name(dataset: str) -> str:
    """The name of a data set's folder, with a few digits of its path: folders elsewhere often have
    the same name."""
    path = Path(dataset).resolve()
    return f"{path.name}-{zlib.crc32(str(path).encode()):08x}"


def dataset_overrides(folder: str | None) -> list[str]:
    """The config overrides for a data set, for any detector; none for the built-in one."""
    if folder is None:
        return []
    train, val = datasets = find_coco_folder(folder)
    register_coco_format(datasets)
    num_classes = str(len(thing_classes(train[0])))
    cfg = get_cfg()
    add_plaindet_config(cfg)
    detectors = [
        key
        for key, node in cfg.MODEL.items()
        if isinstance(node, CfgNode) and "NUM_CLASSES" in node
    ]
    return [
        *("DATASETS.COCO_FORMAT", str([list(dataset) for dataset in datasets])),
        *("DATASETS.TRAIN", str((train[0],)), "DATASETS.TEST", str((val[0],))),
        *(item for key in detectors for item in (f"MODEL.{key}.NUM_CLASSES", num_classes)),
    ]


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.json; none before its first one."""
    path = folder / "metrics.json"
    metrics = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            metrics.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # it is being written, or the run was killed while it wrote it
    return metrics


def read_ap(run: Run) -> dict[str, float]:
    """AP, AP50 and AP75 of a finished run."""
    last = {key: value for line in read_metrics(run.folder) for key, value in line.items()}
    values = {key: last[f"bbox/{key}"] for key in ("AP", "AP50", "AP75")}
    # COCOEvaluator's AP of no detections is NaN.
    return {key: 0.0 if math.isnan(value) else value for key, value in values.items()}


def results_table(runs: list[Run]) -> str:
    """A table with a row for each run."""
    lines = [
        "| run | iterations | total iterations | AP | AP50 | AP75 | s / iteration |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        seconds = statistics.fmean(x["time"] for x in read_metrics(run.folder) if "time" in x)
        lines.append(
            f"| {run.title} | {run.iterations} | {run.total} | "
            + " | ".join(f"{value:.1f}" for value in read_ap(run).values())
            + f" | {seconds:.2f} |"
        )
    return "\n".join(lines)
