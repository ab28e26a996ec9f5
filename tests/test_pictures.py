import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.structures import Boxes, Instances
from matplotlib.colors import to_rgb

from picture_labels import label_positions
from pictures import (
    COLORS,
    DPI,
    PANEL_INCHES,
    PICTURE_WIDTH,
    ClassColors,
    best_detections,
    detections_picture,
    ground_truth_picture,
    save_sheet,
)

CLASSES = ["red", "green", "blue"]


@pytest.mark.parametrize("masks", [False, True])
def test_ground_truth_picture(make_cfg, masks):
    """Boxes leave the inside of an object as it is, masks do not; an empty image stays."""
    cfg = make_cfg("quick/retinanet_R_18_baseline.yaml", "MODEL.MASK_ON", masks)
    cfg.INPUT.RANDOM_FLIP = "none"
    # The last image has a crowd alone, which is no object.
    first, *_, empty = (DatasetMapper(cfg)(d) for d in DatasetCatalog.get("tiny_val"))
    image = np.full((64, 80, 3), 128, dtype=np.uint8)
    picture = ground_truth_picture(image, first["instances"], ClassColors(CLASSES), masks)
    assert picture.shape == (420, 525, 3)
    scale = 525 / 80
    x0, y0, x1, y1 = first["instances"].gt_boxes.tensor[0].tolist()
    center = picture[round(scale * (y0 + y1) / 2), round(scale * (x0 + x1) / 2)]
    assert (center == 128).all() == (not masks)
    assert (picture != 128).any()
    empty_picture = ground_truth_picture(image, empty["instances"], ClassColors(CLASSES), masks)
    assert (empty_picture == 128).all()


def test_detections_picture():
    """In the colours of the same object in the ground truth; a score for each."""
    image = np.full((64, 80, 3), 128, dtype=np.uint8)
    boxes = torch.tensor([[10.0, 20, 30, 50], [50.0, 10, 70, 60]])
    detections = Instances((64, 80), pred_boxes=Boxes(boxes))
    detections.scores = torch.tensor([0.3, 0.9])
    detections.pred_classes = torch.tensor([2, 1])
    truth = Instances((64, 80), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([2, 1]))
    colors = ClassColors(CLASSES)
    expected = ground_truth_picture(image, truth, colors)
    both = detections_picture(image, detections, colors)
    one = detections_picture(image, best_detections(detections, 1), colors)
    assert list(colors.legend().items()) == [("green", COLORS[1]), ("blue", COLORS[0])]
    middle = np.s_[round(35 * PICTURE_WIDTH / 80), :]  # a row through both boxes, without a label
    assert (both[middle] == expected[middle]).all()
    left = np.s_[:, : PICTURE_WIDTH // 2]
    assert (expected[left] != 128).any()
    assert (both[left] != expected[left]).any()  # the score
    assert (one[left] == 128).all()
    assert (one[:, PICTURE_WIDTH // 2 :] == both[:, PICTURE_WIDTH // 2 :]).all()


def test_best_detections():
    """By their scores; of those at one place the best alone."""
    detections = Instances((64, 80))
    boxes = torch.tensor([[10.0, 20, 30, 50], [10.0, 20, 30, 52], [50.0, 10, 70, 60]])
    detections.pred_boxes = Boxes(boxes)
    detections.scores = torch.tensor([0.5, 0.9, 0.3])
    detections.pred_classes = torch.tensor([0, 1, 2])
    assert best_detections(detections, 3).pred_classes.tolist() == [1, 2]
    assert best_detections(detections, 1).pred_classes.tolist() == [1]


def test_colors_of_many_classes():
    colors = ClassColors([str(i) for i in range(100)])
    assert len({to_rgb(colors(i)) for i in range(99, 0, -1)}) == 99
    assert list(colors.legend()) == [str(i) for i in range(1, 100)]


def test_label_positions():
    """Above the box where there is room, next to each other, and never over another label."""
    size, image = (10, 5), (100, 100)

    def place(*boxes):
        return label_positions(np.array(boxes, dtype=float), [size] * len(boxes), image)

    assert place([20, 30, 60, 70]) == [(20, 25)]
    assert place([20, 0, 60, 70]) == [(20, 70)]  # below: there is no room above
    assert place([20, 0, 60, 100]) == [(20, 0)]  # inside
    assert place([20, 30, 60, 70], [20, 30, 60, 70]) == [(20, 25), (50, 25)]
    assert place([20, 30, 60, 70], [0, 0, 35, 30]) == [(50, 25), (0, 30)]  # not over the other box
    assert place() == []
    many = place(*[[20, 30, 60, 70]] * 8)
    assert len(set(many)) == 8


def test_save_sheet(tmp_path):
    """Panels lie at their places, upright, in their colours; a row may be shorter than others."""
    red, blue = (
        np.full((40, 80, 3), color, dtype=np.uint8) for color in [(255, 0, 0), (0, 0, 255)]
    )
    red[:20] = 0
    tall = np.full((160, 80, 3), (0, 255, 0), dtype=np.uint8)
    rows = [[("a", red), ("a title " * 9, blue), ("c", red)], [("d", tall)]]
    save_sheet(tmp_path / "sheet.png", rows)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))[..., ::-1]
    panel = int(PANEL_INCHES * DPI)
    assert sheet.shape[1] == 3 * panel
    assert 2.5 * panel < sheet.shape[0] < 2.9 * panel
    save_sheet(tmp_path / "legend.png", rows, {"a class": "red"})
    assert cv2.imread(str(tmp_path / "legend.png")).shape[0] > sheet.shape[0]

    def area(color):
        rows, columns = np.nonzero((sheet == color).all(axis=2))
        return [
            rows.min() / panel,
            rows.max() / panel,
            columns.min() / panel,
            columns.max() / panel,
        ]

    assert area((0, 0, 255)) == pytest.approx([0.15, 0.65, 1, 2], abs=0.15)
    assert area((255, 0, 0)) == pytest.approx([0.4, 0.65, 0, 3], abs=0.15)
    assert area((0, 255, 0)) == pytest.approx([0.7, 2.7, 0, 1], abs=0.15)
