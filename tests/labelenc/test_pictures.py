import numpy as np
import torch

from labelenc import LabelMap
from labelenc.pictures import feature_picture, label_map_picture


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
