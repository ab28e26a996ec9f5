import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_train_loader

from plaindet.data import PlainDatasetMapper, mapper

NOISE = np.random.RandomState(0).randint(0, 255, (64, 80, 3), dtype=np.uint8)
CONFIG = "quick/retinanet_R_18_baseline.yaml"


def test_equals_detectron2(make_cfg, tiny_data):
    cfg = make_cfg(CONFIG, "INPUT.RANDOM_FLIP", "none")
    dataset_dict = DatasetCatalog.get("tiny_train")[0]
    ours, theirs = (
        m(cfg, is_train=True)(dataset_dict) for m in (PlainDatasetMapper, DatasetMapper)
    )
    assert torch.equal(ours["image"], theirs["image"])
    boxes = [data["instances"].gt_boxes.tensor for data in (ours, theirs)]
    assert torch.equal(*boxes)


def test_crop_of_polygons(make_cfg, monkeypatch):
    """Detectron2 imports shapely for the first image that has some."""
    monkeypatch.setattr(mapper, "find_spec", lambda name: None)
    overrides = ["INPUT.CROP.ENABLED", "True", "MODEL.MASK_ON", "True"]
    PlainDatasetMapper(make_cfg(CONFIG, *overrides, "INPUT.MASK_FORMAT", "bitmask"))
    PlainDatasetMapper(make_cfg(CONFIG, *overrides), is_train=False)
    with pytest.raises(ModuleNotFoundError, match="needs shapely, .* INPUT.MASK_FORMAT bitmask"):
        PlainDatasetMapper(make_cfg(CONFIG, *overrides))


def missing(path):
    return str(path / "missing.jpg"), "No such file or directory"


def text(path):
    (path / "text.jpg").write_text("no image")
    return str(path / "text.jpg"), "cannot identify image file"


def truncated(path):
    cv2.imwrite(str(path / "whole.jpg"), NOISE)
    content = (path / "whole.jpg").read_bytes()
    (path / "truncated.jpg").write_bytes(content[: len(content) // 2])
    return str(path / "truncated.jpg"), "image file is truncated"


def other_size(path):
    cv2.imwrite(str(path / "other.png"), np.zeros((10, 10, 3), dtype=np.uint8))
    return str(path / "other.png"), r"Mismatched image shape.*got \(10, 10\), expect \(80, 64\)"


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("break_image", [missing, text, truncated, other_size])
def test_error_names_the_image(make_cfg, tiny_data, tmp_path, break_image, num_workers):
    file_name, reason = break_image(tmp_path)
    dataset_dict = {**DatasetCatalog.get("tiny_train")[0], "file_name": file_name, "image_id": 77}
    loader = build_detection_train_loader(
        [dataset_dict],
        mapper=PlainDatasetMapper(make_cfg(CONFIG), is_train=True),
        total_batch_size=1,
        num_workers=num_workers,
    )
    with pytest.raises(RuntimeError) as error:
        next(iter(loader))
    assert error.match(rf"(?s)Cannot load {file_name} \(image id 77\): \w+: .*{reason}")
