"""LabelEncRetinaNet against the official step-1 and step-2 networks on one batch."""

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

GOLDEN = golden.load("e2e_retinanet")
LEVELS = ["p3", "p4", "p5", "p6", "p7"]


@pytest.fixture(scope="module")
def models(read_cfg):
    """The networks of step 1 and step 2, with the same weights."""
    step1, step2 = build(read_cfg, 1), build(read_cfg, 2)
    golden.fill(step1)
    with torch.no_grad():
        step1.backbone.bottom_up.stem.conv1.norm.weight *= 0.02
        # The official frozen batch norm has no epsilon.
        for name, buffer in step1.named_buffers():
            if name.endswith("running_var"):
                buffer -= 1e-5
    step2.load_state_dict(step1.state_dict())
    step2.training_only.load_state_dict(step1.training_only.state_dict())
    return {1: step1, 2: step2}


def build(read_cfg, step):
    cfg = read_cfg(f"LabelEnc/retinanet_R_50_FPN_step{step}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RETINANET.NUM_CLASSES = 5
    cfg.MODEL.PIXEL_MEAN = [0.0, 0.0, 0.0]
    return build_model(cfg).train()


@pytest.fixture
def make_model(models):
    def make(step):
        models[step].zero_grad()
        return models[step]

    return make


def batch(step):
    inputs = []
    factors = torch.from_numpy(GOLDEN["step1_aug_factors"]).split([5, 3])
    for i, size in enumerate(GOLDEN["image_sizes"].tolist(), start=1):
        boxes = torch.from_numpy(GOLDEN[f"boxes{i}"]) + 0.5
        classes = torch.from_numpy(GOLDEN[f"labels{i}_0"])
        instances = Instances(tuple(size), gt_boxes=Boxes(boxes), gt_classes=classes)
        scale = factors[i - 1] if step == 1 else None
        inputs.append(
            {
                "image": torch.from_numpy(randn(f"e2e_img{i}", (3, *size), 50)),
                "instances": instances,
                "label_map": LabelMap.from_boxes(boxes, classes, tuple(size), scale),
            }
        )
    return inputs


@pytest.mark.parametrize("step", [1, 2])
def test_features_and_predictions(make_model, step):
    model, inputs = make_model(step), batch(step)
    images = model.preprocess_image(inputs)
    maps = model.preprocess_label_maps(inputs, images)
    assert_golden(torch.stack([m.to_dense(5) for m in maps]), GOLDEN, f"step{step}_labelmap")
    sources = {"backbone": model.backbone(images.tensor), "encoding": model.label_encoder(maps)}
    for branch, (name, features) in enumerate(sources.items()):
        for i, level in enumerate(LEVELS):
            assert_golden(features[level], GOLDEN, f"step{step}_{name}_level{i}", rtol=2e-5)
        if branch == 1 and step == 2:
            break  # no reconstruction in step 2
        for out, predictions in enumerate(model.head([features[level] for level in LEVELS])):
            for i, prediction in enumerate(predictions):
                key = f"step{step}_head{branch}_out{out}_level{i}"
                assert_golden(prediction, GOLDEN, key, rtol=5e-5)


def gradient_norms(model):
    """Official names and norms of all gradients, NaN without a gradient."""
    return {
        golden.official_name(name): np.nan if p.grad is None else p.grad.norm().item()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("step", [1, 2])
def test_losses_and_gradients(make_model, step):
    model = make_model(step)
    with EventStorage():
        losses = model(batch(step))
    # The terms: L2, L1 in step 1 only, L3.
    expected_terms = {"loss_cls", "loss_box_reg", "loss_distance"}
    if step == 1:
        expected_terms |= {"loss_reconstruction_cls", "loss_reconstruction_box_reg"}
    assert set(losses) == expected_terms
    name = "distance_loss" if step == 1 else "auxiliary_loss"
    expected = float(GOLDEN[f"step{step}_loss_{name}"])
    assert losses["loss_distance"].item() == pytest.approx(expected, rel=1e-5)

    sum(losses.values()).backward()
    official = dict(zip(GOLDEN[f"step{step}_grad_names"], GOLDEN[f"step{step}_grad_norms"]))
    actual = gradient_norms(model)
    assert actual.keys() == official.keys()
    with_gradient = {key for key, norm in official.items() if np.isfinite(norm) and norm > 0}
    assert {key for key, norm in actual.items() if norm > 0} == with_gradient
    # The distance's gradients can be compared in numbers; the detection losses are normalised in
    # another way.
    for key in official:
        if key.startswith("feature_adapt."):
            assert actual[key] == pytest.approx(official[key], rel=1e-4), key


@pytest.mark.parametrize(
    ("term", "reached"),
    [
        ("loss_reconstruction_", {"label_encoding_function", "rpn"}),
        ("loss_cls loss_box_reg", {"backbone", "rpn"}),
        ("loss_distance", {"backbone", "feature_adapt"}),
    ],
)
def test_gradient_of_each_term(make_model, term, reached):
    """L1, L2 and L3 reach what Sec. 3.2 says, as in the official network, and nothing else."""
    model = make_model(1)
    with EventStorage():
        losses = model(batch(1))
    sum(v for k, v in losses.items() if k in term.split() or k.startswith(term)).backward()
    squared = dict.fromkeys(["backbone", "label_encoding_function", "rpn", "feature_adapt"], 0.0)
    for key, norm in gradient_norms(model).items():
        squared[key.split(".")[0]] += 0 if np.isnan(norm) else norm**2
    assert {part for part, value in squared.items() if value > 0} == reached

    number = {"loss_r": 1, "loss_c": 2, "loss_d": 3}[term[:6]]
    official = json.loads(str(GOLDEN[f"split_L{number}"]))["grad_norm"]
    assert {part for part, norm in official.items() if norm > 0} == reached
    if number == 3:
        for part in reached:
            assert squared[part] ** 0.5 == pytest.approx(official[part], rel=1e-4)
