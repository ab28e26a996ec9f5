"""Where to write the labels of boxes."""

from __future__ import annotations

import numpy as np

HIDDEN = 10  # how much worse it is to hide a part of a label than a part of an object


def label_positions(
    boxes: np.ndarray, sizes: list[tuple[float, float]], image_size: tuple[int, int]
) -> list[tuple[float, float]]:
    """Places a label at a corner of each box, outside of it where there is room, so that labels
    hide each other and the objects as little as possible.

    Args:
        boxes: (N, 4), x0, y0, x1, y1.
        sizes: (width, height) of the N labels.
        image_size: (height, width).

    Returns:
        the upper left corners of the labels
    """
    image = np.array([[0, 0, image_size[1], image_size[0]]])
    placed = np.empty((0, 4))
    for (x0, y0, x1, y1), (width, height) in zip(boxes, sizes):
        rows = (y0 - height, y1, y0, y1 - height)  # above, below, and inside of the box
        corners = np.array([(x, y) for y in rows for x in (x0, x1 - width)])
        candidates = np.concatenate([corners, corners + (width, height)], axis=1)
        cut_off = width * height - _overlap(candidates, image)
        cost = HIDDEN * (cut_off + _overlap(candidates, placed)) + _overlap(candidates, boxes)
        placed = np.concatenate([placed, candidates[[cost.argmin()]]])  # the first of the best
    return [(x, y) for x, y, _, _ in placed.tolist()]


def _overlap(candidates: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The area that each of K candidates shares with N boxes, added up: (K,)."""
    lower = np.maximum(candidates[:, None, :2], boxes[None, :, :2])
    upper = np.minimum(candidates[:, None, 2:], boxes[None, :, 2:])
    return (upper - lower).clip(min=0).prod(axis=2).sum(axis=1)
