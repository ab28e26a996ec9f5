import pytest
import torch
from detectron2.data import DatasetCatalog, detection_utils
from detectron2.structures import BitMasks

from labelenc import LabelMap, LabelMapDatasetMapper

STEP1 = "quick/retinanet_R_18_labelenc_step1.yaml"
STEP2 = "quick/retinanet_R_18_labelenc_step2.yaml"


@pytest.fixture
def dataset_dicts(tiny_data):
    return DatasetCatalog.get("tiny_train")


def test_label_map_of_the_augmented_image(make_cfg, dataset_dicts):
    """It fits the resized and flipped boxes, in step 2 without random scales."""
    mapper = LabelMapDatasetMapper(make_cfg(STEP2, "INPUT.MIN_SIZE_TRAIN", "(96,)"), is_train=True)
    for _ in range(6):  # both with and without flip
        data = mapper(dataset_dicts[0])
        instances = data["instances"]
        expected = LabelMap.from_boxes(instances.gt_boxes, instances.gt_classes, (96, 120))
        assert data["image"].shape == (3, 96, 120)
        assert torch.equal(data["label_map"].to_dense(3), expected.to_dense(3))


def test_random_scale_in_step1(make_cfg, dataset_dicts):
    """A factor of 1 with probability 0.5, otherwise uniform in (0, 1), for each object."""
    mapper = LabelMapDatasetMapper(make_cfg(STEP1, "INPUT.RANDOM_FLIP", "none"), is_train=True)
    one_object = {**dataset_dicts[0], "annotations": dataset_dicts[0]["annotations"][:1]}
    plain = LabelMapDatasetMapper(make_cfg(STEP2, "INPUT.RANDOM_FLIP", "none"), is_train=True)
    peak = plain(one_object)["label_map"].values.max()
    factors = torch.stack([mapper(one_object)["label_map"].values.max() for _ in range(400)]) / peak
    whole = factors == 1
    assert 0.4 < whole.float().mean() < 0.6
    quartiles = torch.quantile(factors[~whole], torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([0.25, 0.5, 0.75]), atol=0.12, rtol=0)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_masks(make_cfg, dataset_dicts, mask_format):
    cfg = make_cfg(
        STEP2,
        *("MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", mask_format),
        *("MODEL.LABELENC.LABEL_MAP", "masks", "INPUT.RANDOM_FLIP", "none"),
    )
    triangle = dict(dataset_dicts[0]["annotations"][0])
    x, y, width, height = triangle["bbox"]
    triangle["segmentation"] = [[x, y, x + width, y, x, y + height]]
    data = LabelMapDatasetMapper(cfg, is_train=True)(
        {**dataset_dicts[0], "annotations": [triangle]}
    )
    annotation = detection_utils.transform_instance_annotations(dict(triangle), [], (64, 80))
    instances = detection_utils.annotations_to_instances([annotation], (64, 80))
    mask = BitMasks.from_polygon_masks(instances.gt_masks, 64, 80).tensor[0]
    ramp = LabelMap.from_boxes(instances.gt_boxes, instances.gt_classes, (64, 80)).values[0]
    assert 0 < (mask & (ramp > 0)).sum() < (ramp > 0).sum()
    assert torch.equal(data["label_map"].values[0], ramp * mask)


def test_masks_need_masks(make_cfg):
    cfg = make_cfg(STEP1, "MODEL.LABELENC.LABEL_MAP", "masks")
    with pytest.raises(ValueError, match="LABEL_MAP is 'masks', which needs MODEL.MASK_ON"):
        LabelMapDatasetMapper(cfg, is_train=True)


def test_unknown_label_map(make_cfg):
    cfg = make_cfg(STEP1, "MODEL.LABELENC.LABEL_MAP", "mask")
    with pytest.raises(ValueError, match="LABEL_MAP is 'mask', expected 'boxes' or 'masks'"):
        LabelMapDatasetMapper(cfg, is_train=True)


@pytest.mark.parametrize("index", [1, 2], ids=["empty", "crowd only"])
def test_image_without_objects(make_cfg, dataset_dicts, index):
    data = LabelMapDatasetMapper(make_cfg(STEP1), is_train=True)(dataset_dicts[index])
    assert data["label_map"].values.shape == (0, 64, 80)


def test_no_label_map_in_inference(make_cfg, dataset_dicts):
    assert "label_map" not in LabelMapDatasetMapper(make_cfg(STEP1), is_train=False)(
        dataset_dicts[0]
    )
