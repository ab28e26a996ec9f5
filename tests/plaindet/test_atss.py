"""The scores of ATSS; see test_anchor_center.py for the rest."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes


@pytest.fixture
def atss(read_cfg):
    cfg = read_cfg("quick/atss_R_18_baseline.yaml")
    cfg.MODEL.ATSS.TOPK_CANDIDATES_TEST = 2
    return build_model(cfg).eval()


def detect(atss, probabilities, centerness):
    """Detections of one class at far positions of one level."""
    anchors = Boxes(torch.tensor([[100.0 * i, 0, 100.0 * i + 50, 50] for i in range(3)]))
    return atss.inference_single_image(
        [anchors],
        [torch.tensor(probabilities)[:, None].logit()],
        [torch.zeros(3, 4)],
        [torch.tensor(centerness)[:, None].logit()],
        image_size=(100, 300),
    )


def test_centerness_is_a_factor_but_does_not_choose_candidates(atss):
    result = detect(atss, [0.9, 0.5, 0.4], [0.1, 0.4, 0.99])
    assert result.scores.tolist() == pytest.approx([0.5 * 0.4, 0.9 * 0.1])
    assert result.pred_boxes.tensor[:, 0].tolist() == [100, 0]  # no deltas: the anchors


def test_threshold_is_for_the_class_probability(atss):
    """A score below it stays, a class probability below it does not."""
    result = detect(atss, [0.06, 0.04, 0.01], [0.1, 0.99, 0.99])
    assert result.scores.tolist() == pytest.approx([0.006])


def test_boxes_are_clipped_before_the_suppression(atss):
    """Boxes that differ only outside the image are the same one, and those outside are none."""
    atss.test_topk_candidates = 10
    boxes = Boxes(torch.tensor([[50.0, 0, 100, 50], [50, 0, 300, 50], [300, 0, 350, 50]]))
    result = atss.inference_single_image(
        [boxes],
        [torch.tensor([[0.9], [0.8], [0.7]]).logit()],
        [torch.zeros(3, 4)],
        [torch.zeros(3, 1)],
        image_size=(100, 100),
    )
    assert result.pred_boxes.tensor.tolist() == [[50, 0, 100, 50]]


def test_deltas_have_mmdets_standard_deviations(atss):
    anchors = torch.tensor([[0.0, 0, 40, 40]])
    box = atss.box2box_transform.apply_deltas(torch.tensor([[1.0, -1, 0, 5]]), anchors)
    height = 40 * torch.tensor(1.0).exp().item()
    expected = [4, 16 - height / 2, 44, 16 + height / 2]
    assert box[0].tolist() == pytest.approx(expected, rel=1e-5)
