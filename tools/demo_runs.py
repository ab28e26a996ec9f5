"""What the demos of both methods share: training runs one after another, and a table of them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog

from plaindet import add_plaindet_config
from plaindet.data import find_coco_folder, register_coco_format
from plaindet.engine.checks import thing_classes

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs" / "quick"
NUM_PICTURES = 4
# No threshold of the score suits a detector after a few hundred iterations as well as one after a
# few thousand.
DETECTIONS_CAPTION = """In each image as many detections as it has objects, those with the highest
scores (the numbers, in percent)."""


def parse_args(description: str, output: str, add_arguments=lambda parser: None):
    """The arguments of a demo, with the output folder of the data set as `output`."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--dataset", help="folder in COCO format; default: the built-in shapes")
    parser.add_argument("--output", default=output)
    add_arguments(parser)
    args = parser.parse_args()
    args.output = Path(args.output) / (Path(args.dataset).resolve().name if args.dataset else "")
    args.output.mkdir(parents=True, exist_ok=True)
    return args


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


def train(folder: Path, config: str, overrides: list[str]) -> None:
    """Runs train_net.py into a folder. A run that was interrupted is continued, a finished one is
    left as it is.

    Raises:
        ValueError: the folder has a run with other arguments.
    """
    record_file, arguments = folder / "demo.json", [config, *overrides]
    if record_file.exists():
        record = json.loads(record_file.read_text())
        if record["arguments"] != arguments:
            raise ValueError(
                f"{folder} has a run of {record['arguments']}, expected {arguments}: remove the "
                "folder, or choose another --output"
            )
        if record["is_finished"]:
            print(f"{folder} is finished already", flush=True)
            return
    folder.mkdir(exist_ok=True)
    record_file.write_text(json.dumps({"arguments": arguments, "is_finished": False}))
    # Threads that wait for each other should not keep the data loader's workers off the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "train_net.py"), "--resume"]
    command += ["--config-file", str(CONFIGS / config), *overrides]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
    record_file.write_text(json.dumps({"arguments": arguments, "is_finished": True}))


def read_metrics(folder: Path) -> dict:
    """The last value of every metric of a run."""
    lines = (folder / "metrics.json").read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


def results_table(
    output: Path, titles: dict[str, str], iterations: dict[str, int], totals: dict[str, int]
) -> str:
    """A table with a row for each run.

    Args:
        output: the folder with the folders of the runs.
        titles, iterations, totals: by run: what it is, its iterations, and those with the runs
            that it starts from.
    """
    lines = [
        "| run | iterations | total iterations | AP | AP50 | AP75 | s / iteration |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in titles.items():
        metrics = read_metrics(output / name)
        values = [metrics[f"bbox/{key}"] for key in ("AP", "AP50", "AP75")]
        lines.append(
            f"| {title} | {iterations[name]} | {totals[name]} | "
            + " | ".join(f"{value:.1f}" for value in values)
            + f" | {metrics['time']:.2f} |"
        )
    return "\n".join(lines)


def pictured_images(cfg: CfgNode) -> list[dict]:
    """The dataset dicts of a few validation images with annotations."""
    dataset_dicts = [d for d in DatasetCatalog.get(cfg.DATASETS.TEST[0]) if d["annotations"]]
    return dataset_dicts[:: max(len(dataset_dicts) // NUM_PICTURES, 1)][:NUM_PICTURES]
