"""The dense detectors against the official step-1 and step-2 networks on one batch."""

import json

import golden
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from golden import assert_golden
from recipe import randn

from labelenc import LabelMap

DETECTORS = ["retinanet", "fcos", "fcos_imprv"]
GOLDEN = {detector: golden.load(f"e2e_{detector}") for detector in DETECTORS}
LEVELS = ["p3", "p4", "p5", "p6", "p7"]
# Official names of the losses that have the same normalisation. RetinaNet's differs in Detectron2.
OFFICIAL_LOSS = {
    "loss_fcos_cls": "loss_cls",
    "loss_fcos_loc": "loss_reg",
    "loss_fcos_ctr": "loss_centerness",
}


@pytest.fixture(scope="module", params=DETECTORS)
def case(request, read_cfg):
    """A detector, and its networks of step 1 and step 2 with the same weights."""
    detector = request.param
    step1, step2 = (build(read_cfg, detector, step) for step in (1, 2))
    golden.fill(step1)
    with torch.no_grad():
        step1.backbone.bottom_up.stem.conv1.norm.weight *= 0.02
        # The official frozen batch norm has no epsilon.
        for name, buffer in step1.named_buffers():
            if name.endswith("running_var"):
                buffer -= 1e-5
    step2.load_state_dict(step1.state_dict())
    step2.training_only.load_state_dict(step1.training_only.state_dict())
    return detector, {1: step1, 2: step2}


def build(read_cfg, detector, step):
    cfg = read_cfg(f"LabelEnc/{detector}_R_50_FPN_step{step}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.FCOS.NUM_CLASSES = 5
    cfg.MODEL.PIXEL_MEAN = [0.0, 0.0, 0.0]
    return build_model(cfg).train()


@pytest.fixture
def make_model(case):
    def make(step):
        detector, models = case
        models[step].zero_grad()
        return GOLDEN[detector], models[step]

    return make


def batch(numbers, step):
    inputs = []
    factors = torch.from_numpy(numbers["step1_aug_factors"]).split([5, 3])
    for i, size in enumerate(numbers["image_sizes"].tolist(), start=1):
        boxes = torch.from_numpy(numbers[f"boxes{i}"])
        classes = torch.from_numpy(numbers[f"labels{i}_0"])
        # The official FCOS takes the boxes as they are, with positions at stride // 2.
        instances = Instances(tuple(size), gt_boxes=Boxes(boxes.clone()), gt_classes=classes)
        scale = factors[i - 1] if step == 1 else None
        inputs.append(
            {
                "image": torch.from_numpy(randn(f"e2e_img{i}", (3, *size), 50)),
                "instances": instances,
                "label_map": LabelMap.from_boxes(boxes + 0.5, classes, tuple(size), scale),
            }
        )
    return inputs


@pytest.mark.parametrize("step", [1, 2])
def test_features_and_predictions(make_model, step):
    numbers, model = make_model(step)
    inputs = batch(numbers, step)
    images = model.preprocess_image(inputs)
    maps = model.preprocess_label_maps(inputs, images)
    assert_golden(torch.stack([m.to_dense(5) for m in maps]), numbers, f"step{step}_labelmap")
    sources = {"backbone": model.backbone(images.tensor), "encoding": model.label_encoder(maps)}
    for branch, (name, features) in enumerate(sources.items()):
        for i, level in enumerate(LEVELS):
            assert_golden(features[level], numbers, f"step{step}_{name}_level{i}", rtol=2e-5)
        if branch == 1 and step == 2:
            break  # no reconstruction in step 2
        for out, predictions in enumerate(model.head([features[level] for level in LEVELS])):
            for i, prediction in enumerate(predictions):
                key = f"step{step}_head{branch}_out{out}_level{i}"
                assert_golden(prediction, numbers, key, rtol=5e-5)


def gradient_norms(model):
    """Official names and norms of all gradients, NaN without a gradient."""
    return {
        key: np.nan if p.grad is None else part.norm().item()
        for name, p in model.named_parameters()
        for key, part in golden.official_tensors(name, p if p.grad is None else p.grad)
    }


@pytest.mark.parametrize("step", [1, 2])
def test_losses_and_gradients(make_model, step):
    numbers, model = make_model(step)
    with EventStorage():
        losses = model(batch(numbers, step))
    detection = {name for name in losses if name.startswith(("loss_cls", "loss_box", "loss_fcos"))}
    # The terms: L2, L1 in step 1 only, L3.
    expected_terms = detection | {"loss_distance"}
    if step == 1:
        expected_terms |= {f"loss_reconstruction_{name[5:]}" for name in detection}
    assert set(losses) == expected_terms
    official_losses = {"loss_distance": "distance_loss" if step == 1 else "auxiliary_loss"}
    for name, official in OFFICIAL_LOSS.items():
        official_losses[name] = official
        official_losses[f"loss_reconstruction_{name[5:]}"] = f"ae_{official}"
    for name, loss in losses.items():
        if name in official_losses:
            expected = float(numbers[f"step{step}_loss_{official_losses[name]}"])
            assert loss.item() == pytest.approx(expected, rel=1e-5), name

    sum(losses.values()).backward()
    official = dict(zip(numbers[f"step{step}_grad_names"], numbers[f"step{step}_grad_norms"]))
    actual = gradient_norms(model)
    assert actual.keys() == official.keys()
    with_gradient = {key for key, norm in official.items() if np.isfinite(norm) and norm > 0}
    assert {key for key, norm in actual.items() if norm > 0} == with_gradient
    same_losses = "loss_fcos_cls" in losses
    for key in with_gradient:
        if same_losses or key.startswith("feature_adapt."):
            assert actual[key] == pytest.approx(official[key], rel=2e-4), key


@pytest.mark.parametrize(
    ("term", "reached"),
    [
        (1, {"label_encoding_function", "rpn"}),
        (2, {"backbone", "rpn"}),
        (3, {"backbone", "feature_adapt"}),
    ],
)
def test_gradient_of_each_term(make_model, term, reached):
    """L1, L2 and L3 reach what Sec. 3.2 says, as in the official network, and nothing else."""
    numbers, model = make_model(1)
    with EventStorage():
        losses = model(batch(numbers, 1))

    def number(name):
        return 1 if "reconstruction" in name else 3 if name == "loss_distance" else 2

    sum(loss for name, loss in losses.items() if number(name) == term).backward()
    squared = dict.fromkeys(["backbone", "label_encoding_function", "rpn", "feature_adapt"], 0.0)
    for key, norm in gradient_norms(model).items():
        squared[key.split(".")[0]] += 0 if np.isnan(norm) else norm**2
    assert {part for part, value in squared.items() if value > 0} == reached

    official = json.loads(str(numbers[f"split_L{term}"]))["grad_norm"]
    assert {part for part, norm in official.items() if norm > 0} == reached
    if term == 3 or "loss_fcos_cls" in losses:
        for part in reached:
            assert squared[part] ** 0.5 == pytest.approx(official[part], rel=1e-4)
