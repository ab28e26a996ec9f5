"""LabelEncRetinaNet on odd inputs and as a part of other projects."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from labelenc import LabelEnc, LabelMap, build_label_encoder
from plaindet.engine import TrainingTask

STEP = {
    1: "quick/retinanet_R_18_labelenc_step1.yaml",
    2: "quick/retinanet_R_18_labelenc_step2.yaml",
}


def make_input(boxes, classes, size=(64, 80)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.tensor(classes, dtype=torch.int64)
    return {
        "image": torch.rand(3, *size) * 255,
        "instances": Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes),
        "label_map": LabelMap.from_boxes(boxes, classes, size),
    }


BATCHES = {
    "empty": [make_input([], []), make_input([], [])],
    "half empty": [make_input([], []), make_input([[5, 5, 40, 40]], [1])],
    "tiny boxes": [make_input([[5, 5, 5.4, 5.4], [9, 9, 9.01, 30]], [0, 2])],
    "other sizes": [make_input([[5, 5, 40, 40]], [1]), make_input([[0, 0, 33, 50]], [2], (50, 33))],
    "smaller than a stride": [make_input([[1, 1, 9, 9]], [0], (10, 12))] * 2,
}


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_are_finite(make_cfg, step, name):
    model = build_model(make_cfg(STEP[step])).train()
    with EventStorage():
        losses = model(BATCHES[name])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_loss_weights(make_cfg):
    """L1 + lambda_1 L2 + lambda_2 L3."""
    losses = {}
    for weights in ((1.0, 1.0), (0.5, 0.25)):
        torch.manual_seed(0)
        cfg = make_cfg(STEP[1])
        cfg.MODEL.LABELENC.LAMBDA1, cfg.MODEL.LABELENC.LAMBDA2 = weights
        with EventStorage():
            losses[weights] = build_model(cfg).train()(BATCHES["half empty"])
    for name, loss in losses[1.0, 1.0].items():
        factor = 0.25 if name == "loss_distance" else 1 if "reconstruction" in name else 0.5
        assert losses[0.5, 0.25][name].item() == pytest.approx(factor * loss.item(), rel=1e-5), name


def test_missing_label_map(make_cfg):
    model = build_model(make_cfg(STEP[1])).train()
    batch = [{key: value for key, value in make_input([], []).items() if key != "label_map"}]
    with (
        EventStorage(),
        pytest.raises(KeyError, match="needs a 'label_map'.*found only.*LabelMapDatasetMapper"),
    ):
        model(batch)


def test_class_beyond_num_classes(make_cfg):
    model = build_model(make_cfg(STEP[2])).train()
    batch = [make_input([[5, 5, 40, 40]], [0])]
    batch[0]["label_map"] = make_input([[5, 5, 40, 40]], [3])["label_map"]
    with EventStorage(), pytest.raises(ValueError, match=r"classes \[3\], expected .* \[0, 3\)"):
        model(batch)


def test_from_plain_python(make_cfg):
    """Built by its constructor's arguments, without the keys of LabelEnc."""
    detector = build_model(make_cfg("quick/retinanet_R_18_baseline.yaml"))
    model = TrainingTask(detector, [LabelEnc(step=1, lambda2=0.5, norm="BN")]).train()
    with EventStorage():
        assert "loss_reconstruction_cls" in model(BATCHES["half empty"])


def test_arguments_are_checked(make_cfg, monkeypatch):
    with pytest.raises(ValueError, match="MODEL.LABELENC.STEP is 3, expected 1 or 2"):
        build_model(make_cfg(STEP[1], "MODEL.LABELENC.STEP", "3"))
    detector = build_model(make_cfg("quick/retinanet_R_18_baseline.yaml"))

    def narrow(*arguments):
        encoder = build_label_encoder(*arguments)
        encoder._out_feature_channels = dict.fromkeys(encoder._out_features, 7)
        return encoder

    monkeypatch.setattr("labelenc.method.build_label_encoder", narrow)
    with pytest.raises(ValueError, match="label encoder's features are .*channels=7"):
        TrainingTask(detector, [LabelEnc(step=1)])


def test_parts_for_training_only(make_cfg):
    """They are trained and moved, but in no state dict, also below a wrapper."""
    model = build_model(make_cfg(STEP[1]))
    assert model.backbone.output_shape()["p3"] == ShapeSpec(channels=64, stride=8)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"detector", "training_only"}
    assert {*dict(model.training_only["LabelEnc"].named_children())} == {
        "feature_adapter",
        "label_encoder",
    }
    wrapper = torch.nn.ModuleDict({"module": model})
    plain_keys = build_model(make_cfg("quick/retinanet_R_18_baseline.yaml")).state_dict().keys()
    assert model.state_dict().keys() == plain_keys
    assert wrapper.state_dict().keys() == {f"module.{key}" for key in plain_keys}
    wrapper.load_state_dict(wrapper.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({}, strict=True)
