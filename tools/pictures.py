"""Pictures of ground truth and detections, and sheets of pictures."""

from __future__ import annotations

import colorsys
import math
import os
import textwrap

import numpy as np
from detectron2.structures import Instances
from torchvision.ops import nms

from picture_labels import label_positions

PANEL_INCHES = 3.5  # width of a picture in a sheet
DPI = 150
PICTURE_WIDTH = round(PANEL_INCHES * DPI)  # pixels, to which small images are enlarged
FONT_SIZE = 8  # points
TITLE_CHARACTERS = 32  # in a line
SAME_PLACE_IOU = 0.6

# Easy to tell apart, also on photographs, in the order in which they are taken.
COLORS = (
    *("#ff3b30", "#2f8fff", "#ffd60a", "#34c759", "#ff5fd2", "#ff9500", "#40e0e0", "#a463f2"),
    *("#a8e05f", "#b5793c", "#ffffff", "#7a8cff"),
)
LEGEND_INCHES = 1.3  # width of an entry


class ClassColors:
    """The colours of the classes that are drawn on a sheet, for its legend.

    A class gets the next colour when it is drawn first, so that the few classes of a sheet are told
    apart even where the data set has many.
    """

    def __init__(self, class_names: list[str]):
        """
        Args:
            class_names: of all classes.
        """
        self.class_names = class_names
        self._classes = []

    def __call__(self, category: int) -> str | tuple[float, float, float]:
        """The colour of a class, for matplotlib."""
        if category not in self._classes:
            self._classes.append(category)
        number = self._classes.index(category)
        # The golden ratio keeps the hues of any number of further classes apart.
        further = colorsys.hsv_to_rgb(0.618 * number % 1, 0.6, 1)
        return COLORS[number] if number < len(COLORS) else further

    def legend(self) -> dict[str, str | tuple[float, float, float]]:
        """The colours so far by the names of their classes, in the order of the data set."""
        return {self.class_names[c]: self(c) for c in sorted(self._classes)}


def ground_truth_picture(
    image: np.ndarray, instances: Instances, colors: ClassColors, masks: bool = False
) -> np.ndarray:
    """Draws the boxes of the ground truth, or its masks, over an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        instances: of the mapper.
        colors: of the sheet.
        masks: draw `gt_masks` and not `gt_boxes`.

    Returns:
        uint8 RGB; a small image is enlarged.
    """
    classes = instances.gt_classes.tolist()
    # The mapper gives an image without objects no masks.
    if masks and instances.has("gt_masks"):
        return _draw_masks(image, instances.gt_masks, [colors(c) for c in classes])
    return _draw_boxes(image, instances.gt_boxes.tensor, [colors(c) for c in classes])


def detections_picture(image: np.ndarray, instances: Instances, colors: ClassColors) -> np.ndarray:
    """Draws the boxes of detections over an image, with their scores in percent.

    Args:
        image: (H, W, 3) uint8 RGB.
        instances: of a detector, for an output of the size of the image; see
            :func:`best_detections`.
        colors: of the sheet.

    Returns:
        uint8 RGB; a small image is enlarged.
    """
    instances = instances.to("cpu")
    labels = [f"{100 * score:.0f}" for score in instances.scores.tolist()]
    classes = instances.pred_classes.tolist()
    return _draw_boxes(image, instances.pred_boxes.tensor, [colors(c) for c in classes], labels)


def best_detections(instances: Instances, number: int) -> Instances:
    """The detections with the highest scores, of those that lie on each other the best one alone,
    also where they are of several classes."""
    kept = nms(instances.pred_boxes.tensor, instances.scores, SAME_PLACE_IOU)
    return instances[kept[:number]]


def _draw_masks(image: np.ndarray, masks, colors: list) -> np.ndarray:
    visualizer = _visualizer(image)
    return visualizer.overlay_instances(masks=masks, assigned_colors=colors).get_image()


def _draw_boxes(image: np.ndarray, boxes, colors: list, labels: list[str] = ()) -> np.ndarray:
    # Here, as in the functions below, and not above: training does not need matplotlib.
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    output, boxes = _visualizer(image).output, np.asarray(boxes, dtype=float).reshape(-1, 4)
    # Points; more on images that a sheet makes smaller.
    point = output.scale * image.shape[1] / PICTURE_WIDTH
    # A dark rim sets lines and numbers off from whatever is behind them.
    rim = [withStroke(linewidth=3.2 * point, foreground="black", alpha=0.6)]
    for (x0, y0, x1, y1), color in zip(boxes, colors):
        style = {"edgecolor": color, "linewidth": 2 * point, "path_effects": rim}
        output.ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))
    font_size = FONT_SIZE * point
    pixels = font_size / 72 * output.fig.dpi / output.scale  # of the image
    sizes = [(0.65 * pixels * len(label), 1.1 * pixels) for label in labels]
    positions = label_positions(boxes, sizes, image.shape[:2])
    for (x, y), color, label in zip(positions, colors, labels):
        style = {"color": color, "fontsize": font_size, "fontweight": "bold", "path_effects": rim}
        output.ax.text(x, y, label, ha="left", va="top", clip_on=True, **style)
    return output.get_image()


def _visualizer(image: np.ndarray):
    from detectron2.utils.visualizer import Visualizer

    return Visualizer(image, scale=max(1, PICTURE_WIDTH / image.shape[1]))


def save_sheet(
    path: str | os.PathLike, rows: list[list[tuple[str, np.ndarray]]], legend: dict | None = None
) -> None:
    """Writes a PNG with rows of pictures.

    Args:
        path: of the file.
        rows: of (title, (H, W, 3) uint8 RGB); titles that repeat those of the row above are left
            out.
        legend: of :meth:`ClassColors.legend`, drawn below the pictures.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = max(len(row) for row in rows)
    heights = [max(picture.shape[0] / picture.shape[1] for _, picture in row) for row in rows]
    titles = [[textwrap.fill(title, TITLE_CHARACTERS) for title, _ in row] for row in rows]
    titles = [row if row != above else [] for row, above in zip(titles, [[], *titles])]
    title_lines = sum(max((title.count("\n") + 1 for title in row), default=0) for row in titles)
    width = PANEL_INCHES * columns
    entries = max(int(width / LEGEND_INCHES), 1)
    legend_lines = math.ceil(len(legend or {}) / entries)
    height = PANEL_INCHES * sum(heights) + 0.2 * (title_lines + len(rows)) + 0.3 * legend_lines
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    axes = figure.subplots(
        len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axes_row, row, row_titles in zip(axes, rows, titles):
        for axis, (_, picture) in zip(axes_row, row):
            axis.imshow(picture)
        for axis, title in zip(axes_row, row_titles):
            axis.set_title(title)
    if legend:
        patches = [Patch(facecolor=c, edgecolor="black", label=name) for name, c in legend.items()]
        figure.legend(
            handles=patches,
            loc="outside lower center",
            ncols=entries,
            frameon=False,
            fontsize="large",
        )
    figure.savefig(path, dpi=DPI)
