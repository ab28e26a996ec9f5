"""Pictures of ground truth and detections, and sheets of pictures."""

from __future__ import annotations

import colorsys
import os
import textwrap

import numpy as np
from detectron2.structures import Instances

PANEL_INCHES = 3.5  # width of a picture in a sheet
DPI = 100
PICTURE_WIDTH = 480  # pixels, to which small images are enlarged


def ground_truth_picture(
    image: np.ndarray, instances: Instances, class_names: list[str], masks: bool = False
) -> np.ndarray:
    """Draws the boxes of the ground truth, or its masks, with their classes over an image, in a
    colour for each class.

    Args:
        image: (H, W, 3) uint8 RGB.
        instances: of the mapper.
        class_names: of all classes.
        masks: draw `gt_masks` and not `gt_boxes`.

    Returns:
        uint8 RGB; a small image is enlarged.
    """
    labels = [class_names[c] for c in instances.gt_classes]
    # The mapper gives an image without objects no masks.
    objects = "gt_masks" if masks and instances.has("gt_masks") else "gt_boxes"
    what = {objects.removeprefix("gt_"): instances.get(objects)}
    return _overlay(image, instances.gt_classes.tolist(), labels, **what)


def detections_picture(
    image: np.ndarray, instances: Instances, class_names: list[str], score_threshold: float
) -> np.ndarray:
    """Draws the boxes of detections with their classes and scores over an image, in the colours of
    :func:`ground_truth_picture`.

    Args:
        image: (H, W, 3) uint8 RGB.
        instances: of a detector, for an output of the size of the image.
        class_names: of all classes.
        score_threshold: detections need a score above it.

    Returns:
        uint8 RGB; a small image is enlarged.
    """
    instances = instances[instances.scores > score_threshold].to("cpu")
    classes = instances.pred_classes.tolist()
    labels = [f"{class_names[c]} {s:.0%}" for c, s in zip(classes, instances.scores.tolist())]
    return _overlay(image, classes, labels, boxes=instances.pred_boxes.tensor.numpy())


def _overlay(image: np.ndarray, classes: list[int], labels: list[str], **objects) -> np.ndarray:
    # Here, and not above: it imports matplotlib, which training does not need.
    from detectron2.utils.visualizer import Visualizer

    visualizer = Visualizer(image, scale=max(1, PICTURE_WIDTH / image.shape[1]))
    # The golden ratio keeps the hues of any number of classes apart.
    colors = [colorsys.hsv_to_rgb(0.618 * c % 1, 1, 1) for c in classes]
    drawn = visualizer.overlay_instances(labels=labels, assigned_colors=colors, **objects)
    return drawn.get_image()


def save_sheet(path: str | os.PathLike, rows: list[list[tuple[str, np.ndarray]]]) -> None:
    """Writes a PNG with rows of pictures, each a (title, (H, W, 3) uint8 RGB)."""
    # Here, and not above: training does not need it.
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    heights = [max(picture.shape[0] / picture.shape[1] for _, picture in row) for row in rows]
    titles = 0.4 * len(rows)
    figure = Figure(
        figsize=(PANEL_INCHES * columns, PANEL_INCHES * sum(heights) + titles), layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.1)
    axes = figure.subplots(
        len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axes_row, row in zip(axes, rows):
        for axis, (title, picture) in zip(axes_row, row):
            axis.set_title(textwrap.fill(title, 30))
            axis.imshow(picture)
    figure.savefig(path, dpi=DPI)
