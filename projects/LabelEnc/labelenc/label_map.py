"""The label map y of one image: the ground truth drawn as class planes.

Every object is a ramp in the plane of its class: 1 at the centre of its box, falling linearly to
0.5 at the boundary, 0 outside::

    1 - max(|x - cx| / w, |y - cy| / h)        where that is at least 0.5

in absolute pixels with pixel centres at +0.5. Where objects of one class overlap, the larger value
counts. Shape shorthand: N objects, K classes that are present, C classes in all, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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

    def pin_memory(self) -> LabelMap:
        """Returns the map in pinned memory; data loaders for a GPU call it."""
        return LabelMap(self.classes.pin_memory(), self.values.pin_memory())

    def to(self, device: torch.device | str) -> LabelMap:
        """Returns the map on `device`. The host does not wait for the copy of pinned memory."""
        return LabelMap(
            self.classes.to(device, non_blocking=True), self.values.to(device, non_blocking=True)
        )


def _draw(boxes, classes, image_size, scale, masks) -> LabelMap:
    """Draws N ramps, times `masks` (N, H, W) if there are any, into the planes of their classes.

    On the CPU, where an object's window is little work.
    """
    boxes = boxes.tensor if isinstance(boxes, Boxes) else boxes
    device = boxes.device
    boxes, classes = boxes.detach().float().cpu(), classes.cpu()
    scale = torch.ones(len(boxes)) if scale is None else scale.float().cpu()
    height, width = image_size

    valid = torch.isfinite(boxes).all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scale = boxes[valid], scale[valid]
    present, planes = torch.unique(classes[valid], return_inverse=True)
    values = torch.zeros(len(present), height, width)

    # A ramp is the minimum of one in x and one in y, so only these need the arithmetic.
    ramps_x = _ramps(boxes[:, 0], boxes[:, 2], width) * scale[:, None]
    ramps_y = _ramps(boxes[:, 1], boxes[:, 3], height) * scale[:, None]
    objects = valid.nonzero().flatten().tolist()
    for i, (plane, (x0, y0, x1, y1)) in enumerate(zip(planes.tolist(), boxes.tolist())):
        rows, columns = _window(y0, y1, height), _window(x0, x1, width)
        ramp = torch.minimum(ramps_y[i, rows, None], ramps_x[i, None, columns])
        if masks is not None:
            ramp *= masks[objects[i], rows, columns].cpu()
        target = values[plane, rows, columns]
        torch.maximum(target, ramp, out=target)
    return LabelMap(present.to(torch.int64), values).to(device)


def _ramps(start: torch.Tensor, stop: torch.Tensor, length: int) -> torch.Tensor:
    """The ramps of N intervals over the pixels [0, length), zero below 0.5: (N, length)."""
    centers = torch.arange(length) + 0.5
    middle, size = (start + stop) / 2, stop - start
    ramps = 1 - (centers - middle[:, None]).abs() / size[:, None]
    return torch.where(ramps >= 0.5, ramps, 0.0)  # not a product: a denormal size gives -inf


def _window(start: float, stop: float, length: int) -> slice:
    """The pixels of [0, length) whose centres lie in the interval, and one more at each end, where
    rounding decides."""
    first = min(max(math.floor(start - 0.5), 0), length)
    return slice(first, min(max(math.ceil(stop - 0.5) + 1, first), length))
