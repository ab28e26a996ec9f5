"""The detections of the runs of a demo, side by side."""

from __future__ import annotations

import functools
from pathlib import Path

from detectron2.data import DatasetCatalog

from plaindet.engine.checks import thing_classes

from demo_runs import Run
from detectors import load_model, read_cfg
from pictures import ClassColors, best_detections, save_sheet
from visualize_distillation import draw_row, objects_of

NUM_PICTURES = 4
# No threshold of the score suits a detector after a few hundred iterations as well as one after a
# few thousand.
DETECTIONS_CAPTION = """In each image as many detections as it has objects: those with the highest
scores (the numbers, in percent), and at each place the best one alone."""


def pictured_images(dataset: str) -> list[dict]:
    """The dataset dicts of a few images of a data set, with objects."""
    dataset_dicts = [d for d in DatasetCatalog.get(dataset) if objects_of(d)]
    return dataset_dicts[:: max(len(dataset_dicts) // NUM_PICTURES, 1)][:NUM_PICTURES]


def load_detectors(runs: list[Run]) -> list[tuple]:
    """(title, model, config) of the plain detector of each run."""
    detectors = []
    for run in runs:
        cfg = read_cfg(run.folder / "plain_config.yaml", [])
        model, _ = load_model(cfg, str(run.folder / "model_final.pth"))
        detectors.append((run.title, model, cfg))
    return detectors


def draw_detections(path: Path, images: list[dict], detectors: list[tuple]) -> None:
    """Draws the sheet of the detections.

    Args:
        path: of the sheet.
        images: of :func:`pictured_images`.
        detectors: of :func:`load_detectors`.
    """
    colors = ClassColors(thing_classes(detectors[0][2].DATASETS.TEST[0]))
    rows = []
    for image in images:
        choose = functools.partial(best_detections, number=len(objects_of(image)))
        rows.append(draw_row(image, detectors, colors, choose))
    save_sheet(path, rows, colors.legend())
