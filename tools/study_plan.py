"""What a study trains: its file, and the runs of its rows."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import random
import string
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode

from crosskd import add_crosskd_config
from labelenc import add_labelenc_config
from plaindet.config import merge_config
from plaindet.data import find_coco_folder
from plaindet.files import write_atomically

from demo_runs import CONFIGS, REPOSITORY, dataset_overrides

STUDIES = REPOSITORY / "configs" / "studies"
BUILT_IN = "shapes"
ITERATIONS = (
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "MODEL.LABELENC.WARMUP_ITERS",
    "MODEL.LABELENC.STEP1_ITERS",
    "MODEL.LABELENC.CUTOFF_ITERS",
    "TEST.EVAL_PERIOD",
)


@dataclass(frozen=True)
class Run:
    """A row of a study for a detector, a data set and a seed."""

    name: str  # its folder
    config: str
    overrides: tuple[str, ...]  # KEY VALUE pairs, where {ROW} is the folder of an earlier row
    seed: int
    data: tuple[str, ...]  # the overrides of the data set
    parents: dict[str, Run]  # the runs that it starts from, by row


def study_names() -> list[str]:
    return sorted(p.stem for p in STUDIES.glob("*.yaml") if not p.stem.startswith("Base"))


def read_study(name: str) -> dict:
    """The content of a study's file.

    Args:
        name: of a file in configs/studies without .yaml, or the path of a file.

    Raises:
        FileNotFoundError: there is no such study.
        ValueError: a row names one that does not come before it.
    """
    path = Path(name) if name.endswith(".yaml") else STUDIES / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no study {name}: expected one of {study_names()} or a yaml file"
        )
    study = CfgNode.load_yaml_with_base(str(path))
    earlier = set()
    for row_name, row in study["rows"].items():
        unknown = {*row.get("against", ()), *row.get("shared", ()), *parent_rows(row)} - earlier
        if unknown:
            raise ValueError(
                f"{path}: row {row_name} names {sorted(unknown)}, expected rows before it"
            )
        earlier.add(row_name)
    return study


def parent_rows(row: dict) -> set[str]:
    """The rows whose folders are in the overrides of a row."""
    values = []
    for value in row.get("overrides", {}).values():
        values += value.values() if isinstance(value, dict) else [value]
    fields = (field for v in values for _, field, _, _ in string.Formatter().parse(str(v)))
    return {field for field in fields if field}


def plan_runs(
    study: dict, detector: str, dataset: str, seed: int, output: Path, schedule: int = 1
) -> dict[str, Run]:
    """The runs of all rows of a study, by row. Those that train the same have the same name, also
    in another study. The built-in data set has no parts: rows that have a part of their own of the
    training images are left out of it.

    Args:
        dataset: shapes, or a folder in COCO format.
        output: for the json files of parts of the data set.
        schedule: how many times as long all schedules are, times the study's own `schedule`.
    """
    schedule *= study.get("schedule", 1)
    is_built_in = dataset == BUILT_IN
    if not is_built_in:
        dataset = str(Path(dataset).resolve())  # the runs are trained from another folder
    data = dataset_overrides(None if is_built_in else dataset)
    annotations = None if is_built_in else annotations_digest(dataset)
    runs = {}
    for row_name, row in study["rows"].items():
        if "fraction" in row and is_built_in:
            continue
        fraction = None if is_built_in else row.get("fraction", study.get("fraction"))
        config = row["config"].format(detector=detector)
        overrides = {**study.get("overrides", {}), **row.get("overrides", {})}
        overrides = {
            key: str(value[detector] if isinstance(value, dict) else value)
            for key, value in overrides.items()
        }
        if schedule != 1:
            overrides.update(scaled_schedule(config, overrides, schedule))
        parents = {parent: runs[parent] for parent in sorted(parent_rows(row))}
        # Without the seeds, so that a row has one folder, with one for each seed in it.
        starts = {parent: os.path.dirname(run.name) for parent, run in parents.items()}
        content = [
            CfgNode.load_yaml_with_base(str(CONFIGS / config)),
            {key: value.format_map(starts) for key, value in overrides.items()},
            fraction,
            annotations,
        ]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
        row_folder = f"{Path(config).stem}-{digest.hexdigest()[:8]}"
        runs[row_name] = Run(
            name=f"{dataset_name(dataset)}/{row_folder}/seed{seed}",
            config=config,
            overrides=tuple(item for pair in overrides.items() for item in pair),
            seed=seed,
            data=(*data, *(write_part(dataset, fraction, output) if fraction else ())),
            parents=parents,
        )
    return runs


def scaled_schedule(config: str, overrides: dict[str, str], factor: float) -> dict[str, str]:
    """The overrides of a config, in addition to those given, with which all of its phases, and the
    time between evaluations, are `factor` times as long."""
    pairs = [item for pair in overrides.items() for item in pair]
    cfg = merge_config(CONFIGS / config, pairs, [add_labelenc_config, add_crosskd_config])
    scaled = {}
    for key in ITERATIONS:
        value = functools.reduce(lambda node, name: node[name], key.split("."), cfg)
        is_tuple = isinstance(value, tuple)
        scaled[key] = str(
            tuple(round(factor * x) for x in value) if is_tuple else round(factor * value)
        )
    return scaled


def dataset_name(dataset: str) -> str:
    return dataset if dataset == BUILT_IN else Path(dataset).resolve().name


@functools.cache
def annotations_digest(folder: str) -> str:
    """So that data sets of the same name are not taken for each other."""
    content = b"".join(Path(json_file).read_bytes() for _, json_file, _ in find_coco_folder(folder))
    return hashlib.sha256(content).hexdigest()


def write_part(folder: str, fraction: float, output: Path) -> list[str]:
    """Writes the json file of a part of the training images of a COCO-format folder; smaller parts
    are in larger ones.

    Returns:
        the config overrides with this part as the training set
    """
    train, val = find_coco_folder(folder)
    content = json.loads(Path(train[1]).read_text())
    random.Random(0).shuffle(content["images"])
    content["images"] = content["images"][: math.ceil(fraction * len(content["images"]))]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    name = f"{train[0]}_{len(ids)}"
    path = output.resolve() / "data" / f"{name}-{annotations_digest(folder)[:8]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content))
    datasets = [[name, str(path), train[2]], list(val)]
    return ["DATASETS.COCO_FORMAT", str(datasets), "DATASETS.TRAIN", str((name,))]


def write_text(path: Path, text: str) -> None:
    """Writes a file that is whole whenever the process is killed."""
    write_atomically(str(path), lambda f: f.write(text.encode()))
