import ast

import golden
import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, PolygonMasks

from labelenc import LabelMap

BOX_ENCODE = golden.load("box_encode")
MASK_ENCODE = golden.load("mask_encode")
# What the official code makes of these boxes is NaN or garbage; here they draw nothing.
DEGENERATE = {"c5_zero_width", "c5_zero_height", "c5_zero_both_plus_valid", "c5_reversed"}
CASES = [name for name in BOX_ENCODE["names"] if name not in DEGENERATE]


def draw_case(name, scale=None):
    num_classes = int(BOX_ENCODE[f"{name}__num_classes"])
    size = tuple(BOX_ENCODE[f"{name}__hw"].tolist())
    counts = BOX_ENCODE[f"{name}__counts"].tolist()
    boxes, classes = golden.inputs(BOX_ENCODE, f"{name}__")
    scales = [None] * len(counts) if scale is None else torch.from_numpy(scale).split(counts)
    return torch.stack(
        [
            LabelMap.from_boxes(b, c, size, s).to_dense(num_classes)
            for b, c, s in zip(boxes.split(counts), classes.split(counts), scales)
        ]
    ).numpy()


def naive_map(boxes, classes, size, num_classes):
    """The ramps by a loop over boxes and pixels, in float64."""
    planes = np.zeros((num_classes, *size))
    for (x0, y0, x1, y1), c in zip(boxes.tolist(), classes.tolist()):
        for i in range(size[0]):
            for j in range(size[1]):
                dx = abs(j + 0.5 - (x0 + x1) / 2) / (x1 - x0)
                dy = abs(i + 0.5 - (y0 + y1) / 2) / (y1 - y0)
                value = 1 - max(dx, dy)
                if value >= 0.5:
                    planes[c, i, j] = max(planes[c, i, j], value)
    return planes


@pytest.mark.parametrize("name", CASES)
def test_equals_official(name):
    assert np.array_equal(draw_case(name), BOX_ENCODE[f"{name}__out"])


@pytest.mark.parametrize(
    "key", [key[: -len("__factors")] for key in BOX_ENCODE.files if key.endswith("__factors")]
)
def test_scale_equals_official(key):
    name = key.rpartition("__aug")[0]
    drawn = draw_case(name, BOX_ENCODE[f"{key}__factors"])
    np.testing.assert_allclose(drawn, BOX_ENCODE[f"{key}__out"], rtol=0, atol=1e-7)


def test_equals_naive_on_fractional_boxes():
    corners = torch.rand(20, 2) * 30
    boxes = torch.cat([corners, corners + 1 + torch.rand(20, 2) * 20], dim=1)
    classes = torch.randint(0, 4, (20,))
    drawn = LabelMap.from_boxes(Boxes(boxes), classes, (37, 41)).to_dense(4)
    np.testing.assert_allclose(drawn, naive_map(boxes, classes, (37, 41), 4), atol=1e-6)


@pytest.mark.parametrize(
    "box",
    [
        (5.0, 5.0, 5.0, 20.0),
        (5.0, 5.0, 20.0, 5.0),
        (20.0, 5.0, 5.0, 20.0),
        (float("nan"), 5.0, 20.0, 20.0),
        (5.0, 5.0, float("inf"), 20.0),
        (100.0, 100.0, 120.0, 120.0),
        (-30.0, -30.0, -10.0, -10.0),
        (5.1, 5.1, 5.2, 5.2),
        (0.0, 5.0, 1e-40, 20.0),
    ],
)
def test_degenerate_and_outside_boxes_draw_nothing(box):
    valid = (4.0, 4.0, 30.0, 24.0)
    drawn = LabelMap.from_boxes(torch.tensor([box, valid]), torch.tensor([1, 1]), (32, 40))
    alone = LabelMap.from_boxes(torch.tensor([valid]), torch.tensor([1]), (32, 40))
    assert torch.equal(drawn.to_dense(3), alone.to_dense(3))
    only_bad = LabelMap.from_boxes(torch.tensor([box]), torch.tensor([1]), (32, 40))
    assert torch.equal(only_bad.to_dense(3), torch.zeros(3, 32, 40))


def test_stores_only_present_classes():
    boxes = torch.tensor([[1.0, 1, 9, 9], [2, 2, 8, 8], [0, 0, 4, 4]])
    label_map = LabelMap.from_boxes(boxes, torch.tensor([70, 3, 70]), (10, 12))
    assert label_map.classes.tolist() == [3, 70]
    assert label_map.classes.dtype == torch.int64
    assert label_map.values.shape == (2, 10, 12)
    assert label_map.values.dtype == torch.float32


def test_no_objects():
    label_map = LabelMap.from_boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (10, 12))
    assert label_map.values.shape == (0, 10, 12)
    assert torch.equal(label_map.to_dense(5), torch.zeros(5, 10, 12))


def test_pad():
    label_map = LabelMap.from_boxes(torch.tensor([[1.0, 1, 9, 9]]), torch.tensor([2]), (10, 12))
    padded = label_map.pad((16, 32)).to_dense(3)
    assert torch.equal(padded[:, :10, :12], label_map.to_dense(3))
    assert padded.sum() == label_map.values.sum()
    with pytest.raises(ValueError, match=r"\(10, 12\) does not fit into \(8, 32\)"):
        label_map.pad((8, 32))


@pytest.mark.parametrize("bad", [-1, 3])
def test_class_out_of_range(bad):
    label_map = LabelMap.from_boxes(torch.tensor([[1.0, 1, 9, 9]]), torch.tensor([bad]), (10, 12))
    with pytest.raises(ValueError, match=rf"classes \[{bad}\], expected classes in \[0, 3\)"):
        label_map.to_dense(3)


def draw_masks(masks, boxes_key="boxes", scale=None):
    boxes = torch.from_numpy(MASK_ENCODE[boxes_key]) + 0.5
    classes = torch.from_numpy(MASK_ENCODE["labels0"])
    size = tuple(MASK_ENCODE["hw"].tolist())
    return LabelMap.from_masks(masks, boxes, classes, size, scale).to_dense(5).numpy()


def test_bit_masks_equal_official():
    masks = BitMasks(torch.from_numpy(MASK_ENCODE["bitmasks"]).bool())
    assert np.array_equal(draw_masks(masks), MASK_ENCODE["out"][0])
    for case in ("aug0", "aug1"):
        drawn = draw_masks(masks, scale=torch.from_numpy(MASK_ENCODE[f"{case}_factors"]))
        np.testing.assert_allclose(drawn, MASK_ENCODE[f"{case}_out"][0], rtol=0, atol=1e-7)


def test_masks_with_holes_equal_official_inside_the_image():
    masks = BitMasks(torch.from_numpy(MASK_ENCODE["bitmap2"]).bool())
    height, width = MASK_ENCODE["hw"]
    expected = MASK_ENCODE["out2_padded_80x128"][0, :, :height, :width]
    assert np.array_equal(draw_masks(masks, "boxes2"), expected)


def test_polygon_masks_equal_official():
    polygons = ast.literal_eval(str(MASK_ENCODE["polys"]))
    assert np.array_equal(draw_masks(PolygonMasks(polygons)), MASK_ENCODE["out"][0])


def test_masks_of_another_image():
    masks = BitMasks(torch.ones(1, 20, 20, dtype=torch.bool))
    boxes, classes = torch.tensor([[1.0, 1, 9, 9]]), torch.tensor([2])
    with pytest.raises(
        ValueError, match=r"masks of size \(20, 20\) in an image of size \(10, 12\)"
    ):
        LabelMap.from_masks(masks, boxes, classes, (10, 12))
    with pytest.raises(ValueError, match="1 masks for 2 objects"):
        LabelMap.from_masks(masks, boxes.repeat(2, 1), classes.repeat(2), (20, 20))
