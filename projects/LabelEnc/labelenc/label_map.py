"""The label map y of one image: the ground truth drawn as class planes.

Every object is a ramp in the plane of its class: 1 at the centre of its box, falling linearly to
0.5 at the boundary, 0 outside::

    1 - max(|x - cx| / w, |y - cy| / h)        where that is at least 0.5

in absolute pixels with pixel centres at +0.5. Where objects of one class overlap, the larger value
counts. Shape shorthand: N objects, K classes that are present, C classes in all, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, PolygonMasks


@dataclass
class LabelMap:
    """A label map that stores only the planes of the classes that are present.

    Attributes:
        classes: (K,) int64, the classes that are present, ascending.
        values: (K, H, W) float32, their planes.
    """

    classes: torch.Tensor
    values: torch.Tensor

    @classmethod
    def from_boxes(
        cls,
        boxes: Boxes | torch.Tensor,
        classes: torch.Tensor,
        image_size: tuple[int, int],
        scale: torch.Tensor | None = None,
    ) -> LabelMap:
        """Draws the ramps of the boxes.

        Args:
            boxes: (N, 4) XYXY absolute pixels. Boxes that are not finite or have no area draw
                nothing; parts outside the image are left out.
            classes: (N,) int64, in [0, C).
            image_size: (H, W).
            scale: (N,) factor of each object's ramp, applied after the threshold; None is 1.
        """
        return _draw(boxes, classes, image_size, scale, masks=None)

    @classmethod
    def from_masks(
        cls,
        masks: BitMasks | PolygonMasks,
        boxes: Boxes | torch.Tensor,
        classes: torch.Tensor,
        image_size: tuple[int, int],
        scale: torch.Tensor | None = None,
    ) -> LabelMap:
        """Draws the ramps of the boxes, each kept only inside its object's mask (Sec. 4.5).

        Args:
            masks: N masks at the resolution of the image.
            boxes, classes, image_size, scale: see :meth:`from_boxes`.

        Raises:
            ValueError: the masks' number or size is not that of the boxes and the image.
        """
        if len(masks) != len(classes):
            raise ValueError(f"Label map: {len(masks)} masks for {len(classes)} objects")
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks.polygons, *image_size)
        bitmaps = masks.tensor
        if len(masks) and tuple(bitmaps.shape[1:]) != tuple(image_size):
            raise ValueError(
                f"Label map: masks of size {tuple(bitmaps.shape[1:])} in an image of size "
                f"{tuple(image_size)} (height, width)"
            )
        return _draw(boxes, classes, image_size, scale, masks=bitmaps)

    def to_dense(self, num_classes: int) -> torch.Tensor:
        """Returns all planes, (C, H, W) float32 with zeros for the absent classes.

        Raises:
            ValueError: a class is outside [0, num_classes).
        """
        self.check_classes(num_classes)
        dense = self.values.new_zeros((num_classes, *self.values.shape[1:]))
        dense[self.classes] = self.values
        return dense

    def check_classes(self, num_classes: int) -> None:
        """Raises ValueError where a class is outside [0, num_classes). Call it on the CPU: it reads
        the classes."""
        if (
            len(self.classes)
            and not 0 <= int(self.classes[0]) <= int(self.classes[-1]) < num_classes
        ):
            raise ValueError(
                f"Label map with classes {self.classes.tolist()}, expected classes in "
                f"[0, {num_classes}): does NUM_CLASSES match the data set?"
            )

    def pad(self, size: tuple[int, int]) -> LabelMap:
        """Returns the map padded with zeros at the right and bottom to `size` (H, W).

        Raises:
            ValueError: the map is larger than `size`.
        """
        height, width = self.values.shape[1:]
        if height > size[0] or width > size[1]:
            raise ValueError(
                f"Label map of size {(height, width)} does not fit into {tuple(size)} "
                "(height, width)"
            )
        padding = (0, size[1] - width, 0, size[0] - height)
        return LabelMap(self.classes, F.pad(self.values, padding))

    def to(self, device: torch.device | str) -> LabelMap:
        """Returns the map on `device`."""
        return LabelMap(
            self.classes.to(device, non_blocking=True), self.values.to(device, non_blocking=True)
        )


def _draw(boxes, classes, image_size, scale, masks) -> LabelMap:
    """Draws N ramps, times `masks` (N, H, W) if there are any, into the planes of their classes.

    On the CPU and in NumPy: an object's window is too little work for more, and memory that NumPy
    hands out as zeros costs nothing where nobody draws.
    """
    boxes = boxes.tensor if isinstance(boxes, Boxes) else boxes
    device = boxes.device
    boxes, classes = boxes.detach().float().cpu().numpy(), classes.cpu().numpy()
    scale = np.ones(len(boxes), np.float32) if scale is None else scale.float().cpu().numpy()
    masks = None if masks is None else masks.cpu().numpy()
    height, width = image_size

    sizes = boxes[:, 2:] - boxes[:, :2]
    valid = np.isfinite(boxes).all(axis=1) & (sizes > 0).all(axis=1)
    present, planes = np.unique(classes[valid], return_inverse=True)
    values = np.zeros((len(present), height, width), np.float32)

    for plane, index in zip(planes, np.flatnonzero(valid)):
        x0, y0, x1, y1 = boxes[index]
        # The ramp is the minimum of one in x and one in y, so only these need the arithmetic.
        columns, ramp_x = _ramp(x0, x1, width, scale[index])
        rows, ramp_y = _ramp(y0, y1, height, scale[index])
        ramp = np.minimum(ramp_y[:, None], ramp_x[None, :])
        if masks is not None:
            ramp *= masks[index, rows, columns]
        window = values[plane, rows, columns]
        np.maximum(window, ramp, out=window)
    return LabelMap(torch.from_numpy(present.astype(np.int64)), torch.from_numpy(values)).to(device)


def _ramp(start: np.float32, stop: np.float32, length: int, scale: np.float32):
    """The ramp of an interval of pixels, zero below 0.5, times `scale`.

    Returns:
        slice of [0, length): the pixels whose centres can lie in the interval, and one more at
        each end, where rounding decides
        its values, float32
    """
    first = int(np.clip(np.floor(start - 0.5), 0, length))
    end = int(np.clip(np.ceil(stop - 0.5) + 1, first, length))
    centers = np.arange(first, end, dtype=np.float32) + np.float32(0.5)
    ramp = 1 - np.abs(centers - (start + stop) / 2) / (stop - start)
    return slice(first, end), ramp * (ramp >= 0.5) * scale
