"""Renaming the tensors of another library's checkpoint, with all names and shapes checked."""

from __future__ import annotations

import torch

from plaindet.messages import some_of

# For each key there our key and the shape.
Layout = dict[str, tuple[str, tuple[int, ...]]]


def layer_keys(theirs: str, ours: str, *shape: int, bias: bool = True) -> Layout:
    """The keys of a layer: a weight of this shape, and a bias of its first dimension."""
    layout = {f"{theirs}.weight": (f"{ours}.weight", shape)}
    if bias:
        layout[f"{theirs}.bias"] = (f"{ours}.bias", shape[:1])
    return layout


def rename_keys(
    weights: dict[str, torch.Tensor], layout: Layout, where: str
) -> dict[str, torch.Tensor]:
    """The weights under our names.

    Args:
        weights: by their names.
        layout: all that they have to be.
        where: what they are of, for messages.

    Raises:
        ValueError: a key is missing or unknown, or a shape is another one.
    """
    missing, unknown = layout.keys() - weights.keys(), weights.keys() - layout.keys()
    if missing or unknown:
        raise ValueError(
            f"{where}: missing keys [{some_of(sorted(missing))}], unknown keys "
            f"[{some_of(sorted(unknown))}]"
        )
    wrong = [
        f"{key} is {shape_of(weights[key])} instead of {shape}"
        for key, (_, shape) in layout.items()
        if shape_of(weights[key]) != shape
    ]
    if wrong:
        raise ValueError(f"{where}: {some_of(wrong)}")
    return {ours: weights[key] for key, (ours, _) in layout.items()}


def shape_of(value) -> tuple[int, ...] | str:
    """The shape of a tensor, and the type of anything else."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def reorder_anchors(weights: dict[str, torch.Tensor], num_ratios: int, num_sizes: int) -> None:
    """Reorders the output channels of RetinaNet's predictors, in place. The anchors of a position
    count sizes within ratios in maskrcnn-benchmark and mmdet, ratios within sizes in Detectron2.

    Args:
        weights: by Detectron2's names, of (num_ratios * num_sizes * channels of an anchor, ...).
    """
    for layer in ("head.cls_score", "head.bbox_pred"):
        for key in (f"{layer}.weight", f"{layer}.bias"):
            by_ratio = weights[key].unflatten(0, (num_ratios, num_sizes, -1))
            weights[key] = by_ratio.transpose(0, 1).flatten(0, 2)
