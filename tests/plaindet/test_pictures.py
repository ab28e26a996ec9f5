import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.structures import Boxes, Instances

from plaindet.pictures import (
    DPI,
    PANEL_INCHES,
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
    picture = ground_truth_picture(image, first["instances"], CLASSES, masks)
    assert picture.shape == (384, 480, 3)
    x0, y0, x1, y1 = first["instances"].gt_boxes.tensor[0].tolist()
    center = picture[round(3 * (y0 + y1)), round(3 * (x0 + x1))]
    assert (center == 128).all() == (not masks)
    assert (picture != 128).any()
    assert (ground_truth_picture(image, empty["instances"], CLASSES, masks) == 128).all()


def test_detections_picture():
    """Those above the threshold, in the colour of the same object in the ground truth."""
    image = np.full((64, 80, 3), 128, dtype=np.uint8)
    boxes = torch.tensor([[10.0, 20, 30, 50], [50.0, 10, 70, 60]])
    detections = Instances((64, 80), pred_boxes=Boxes(boxes))
    detections.scores = torch.tensor([0.9, 0.3])
    detections.pred_classes = torch.tensor([1, 2])
    truth = Instances((64, 80), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([1, 2]))
    both = detections_picture(image, detections, CLASSES, score_threshold=0.2)
    one = detections_picture(image, detections, CLASSES, score_threshold=0.3)
    expected = ground_truth_picture(image, truth, CLASSES)
    sides = [(210, 60), (210, 180)]  # of the first box, in the enlarged picture
    assert all((both[side] == expected[side]).all() for side in sides)
    assert all((both[side] != 128).any() for side in sides)
    right = np.s_[:, 270:]  # of the first box, where the second one is
    assert (both[right] != 128).any()
    assert (one[right] == 128).all()


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
    assert 2.5 * panel < sheet.shape[0] < 2.8 * panel

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
