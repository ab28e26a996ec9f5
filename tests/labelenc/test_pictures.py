import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from labelenc import LabelMap
from labelenc.pictures import feature_picture, label_map_picture

from feature_pictures import draw_encoding, draw_features, picture_mapper


def test_label_map_picture():
    """The image outside the boxes, something else inside; padding is cut off."""
    image = np.full((20, 30, 3), 100, dtype=np.uint8)
    label_map = LabelMap.from_boxes(torch.tensor([[5.0, 4, 15, 12]]), torch.tensor([1]), (20, 30))
    picture = label_map_picture(image, label_map.pad((32, 32)))
    inside = np.zeros((20, 30), dtype=bool)
    inside[4:12, 5:15] = True
    assert picture.shape == image.shape
    assert (picture[~inside] == 100).all()
    assert (picture[inside] != 100).any(axis=1).all()
    empty = LabelMap.from_boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (20, 30))
    assert (label_map_picture(image, empty) == image).all()


def test_feature_picture():
    """The L2 norm of each position, from black to white, at the size of the image."""
    feature = torch.zeros(2, 2, 3)
    feature[:, 0, 1] = torch.tensor([3.0, 4.0])
    feature[0, 1, 2] = 2.5
    picture = feature_picture(feature, stride=4, image_size=(8, 10))
    expected = np.repeat(np.repeat([[0, 255, 0], [0, 0, 128]], 4, axis=0), 4, axis=1)[:8, :10]
    assert (picture == expected[..., None]).all()
    constant = feature_picture(torch.ones(2, 2, 3), stride=4, image_size=(8, 12))
    assert (constant == 0).all()


def norm_picture(feature, stride, height, width):
    """The picture of a (C, Hi, Wi) feature map, in NumPy."""
    intensity = np.sqrt((feature.numpy().astype(np.float64) ** 2).sum(axis=0))
    intensity = np.kron(intensity, np.ones((stride, stride)))[:height, :width]
    intensity = (intensity - intensity.min()) / (intensity.max() - intensity.min())
    return 255 * np.stack([intensity] * 3, axis=2)


@torch.no_grad()
def test_draw_features_and_encoding(make_cfg):
    """Levels of an image that needs padding: 64 x 80 pixels, and 32 pixels a position of p5."""
    cfg = make_cfg("quick/retinanet_R_18_labelenc_step2.yaml")
    model = build_model(cfg).eval()
    inputs = picture_mapper(cfg)(DatasetCatalog.get("tiny_val")[0])
    image = F.pad((inputs["image"] - model.pixel_mean) / model.pixel_std, (0, 16))
    features = model.backbone(image[None])
    dense = F.pad(inputs["label_map"].to_dense(3), (0, 16))
    encodings = model.label_encoder(dense[None])

    pictures = draw_features(model.detector, inputs, ["p3", "p5"])
    encoding_pictures = draw_encoding(model.label_encoder, inputs["label_map"], ["p3", "p5"])
    for i, (level, stride) in enumerate([("p3", 8), ("p5", 32)]):
        expected = norm_picture(features[level][0], stride, 64, 80)
        np.testing.assert_allclose(pictures[i], expected, atol=0.6)
        expected = norm_picture(encodings[level][0], stride, 64, 80)
        np.testing.assert_allclose(encoding_pictures[i], expected, atol=0.6)

    levels = "There is no level p2: the levels are p3, p4, p5, p6, p7"
    with pytest.raises(ValueError, match=levels):
        draw_features(model.detector, inputs, ["p2"])
    with pytest.raises(ValueError, match=levels):
        draw_encoding(model.label_encoder, inputs["label_map"], ["p2"])
    unknown = LabelMap(torch.tensor([3]), torch.ones(1, 64, 80))
    with pytest.raises(ValueError, match="NUM_CLASSES"):
        draw_encoding(model.label_encoder, unknown, ["p3"])


def test_picture_mapper(make_cfg):
    """An image as in inference, whatever training does; with `augment`, what step 1 draws."""
    cfg = make_cfg("quick/retinanet_R_18_labelenc_step1.yaml")
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.MIN_SIZE_TRAIN = (32, 48)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "range"
    cfg.freeze()
    dataset_dict = DatasetCatalog.get("tiny_val")[0]
    image = cv2.imread(dataset_dict["file_name"])
    plain = picture_mapper(cfg)
    for _ in range(5):
        inputs = plain(dataset_dict)
        assert (inputs["image"].permute(1, 2, 0).numpy() == image).all()
        values = inputs["label_map"].values
        assert (values[values > 0] >= 0.5).all()

    random = picture_mapper(cfg, augment=True)
    drawn = [random(dataset_dict) for _ in range(8)]
    assert len({tuple(inputs["image"].shape) for inputs in drawn}) > 1
    values = torch.cat([inputs["label_map"].values.flatten() for inputs in drawn])
    assert ((values > 0) & (values < 0.5)).any()
