"""Whole iterations of CrossKD against the official implementation's: converted weights of student
and teacher, every loss, every gradient.

The numbers are too big for the repository: `make golden GOLDEN=<folder>` runs this file, the folder
having `e2e/11_gfl_e2e.npz` and the two state dicts beside it.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import train_net
from plaindet import read_config
from plaindet.engine import build_teacher

import convert_mmdet
from converters.mmdet_weights import convert_mmdet_weights, find_network

pytestmark = pytest.mark.golden
FOLDER = Path(os.environ.get("GOLDEN", "")) / "e2e"
CASES = ["both", "second_empty"]


@pytest.fixture(scope="module")
def numbers():
    return np.load(FOLDER / "11_gfl_e2e.npz")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The student with its teacher, from the files that the converter writes."""
    folder = tmp_path_factory.mktemp("converted")
    for name in ("student", "teacher"):
        convert_mmdet.convert(str(FOLDER / f"11_gfl_{name}_state.pt"), str(folder / f"{name}.pth"))
    cfg = read_config(folder / "student.yaml")
    official = read_config(
        Path(train_net.__file__).parent / "configs/CrossKD/gfl_R_50_FPN_from_R_101_pkd.yaml",
        (),
    )
    cfg.MODEL.CROSSKD = official.MODEL.CROSSKD
    cfg.MODEL.META_ARCHITECTURE = official.MODEL.META_ARCHITECTURE
    cfg.MODEL.DEVICE = "cpu"
    # The images are normalised already. mmdet trains the weights of the frozen statistics.
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 3, [1.0] * 3
    cfg.MODEL.RESNETS.NORM = "BN"
    model = build_model(cfg).train()
    model.backbone.eval()
    state = torch.load(folder / "student.pth", weights_only=True)["model"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert {key.rpartition(".")[2] for key in missing} == {"num_batches_tracked"}
    assert not unexpected
    node = cfg.MODEL.CROSSKD.TEACHER
    node.CONFIG_FILE, node.WEIGHTS = str(folder / "teacher.yaml"), str(folder / "teacher.pth")
    node.OPTS = ["MODEL.PIXEL_MEAN", [0.0] * 3, "MODEL.PIXEL_STD", [1.0] * 3]
    model.set_teacher(build_teacher(node, "cpu", "MODEL.CROSSKD.TEACHER"))
    return model


def make_batch(numbers, case):
    batch = []
    for i in (0, 1):
        height, width = numbers[f"img{i}_img_shape"].tolist()
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.from_numpy(numbers[f"{case}/gt{i}_boxes"]))
        instances.gt_classes = torch.from_numpy(numbers[f"{case}/gt{i}_labels"])
        image = torch.from_numpy(numbers["images"])[i, :, :height, :width]
        batch.append({"image": image, "instances": instances})
    return batch


def our_names():
    """{our parameter: the official parameters it is made of}"""
    path = FOLDER / "11_gfl_student_state.pt"
    state = torch.load(path, weights_only=True)
    keys = list(state)
    tagged = {key: torch.full_like(state[key], i, dtype=torch.float) for i, key in enumerate(keys)}
    converted = convert_mmdet_weights(tagged, find_network(state, str(path)), str(path))
    return {
        ours: [keys[int(tag)] for tag in dict.fromkeys(value.flatten().tolist())]
        for ours, value in converted.items()
        if not (ours.endswith(".bias") and "_subnet" in ours and not value.any())
    }


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(student, numbers, case):
    with EventStorage():
        losses = student(make_batch(numbers, case))
    official = {
        "loss_cls": "loss_cls",
        "loss_box_reg": "loss_bbox",
        "loss_dfl": "loss_dfl",
        "loss_kd_cls": "loss_cls_kd",
        "loss_kd_box": "loss_reg_kd",
        "loss_kd_feature": "loss_feat_kd",
    }
    assert losses.keys() == official.keys()
    for ours, theirs in official.items():
        expected = float(numbers[f"{case}/{theirs}"])
        assert losses[ours].item() == pytest.approx(expected, rel=1e-4), ours

    distillation = {"loss_kd_cls", "loss_kd_box"}
    groups = {
        "total": losses.keys(),
        "det_only": {"loss_cls", "loss_box_reg", "loss_dfl"},
        "kd_only": distillation,
        "feat_only": {"loss_kd_feature"},
    }
    parameters, names = dict(student.detector.named_parameters()), our_names()
    for group, members in groups.items():
        student.zero_grad()
        sum(losses[name] for name in members).backward(retain_graph=True)
        prefix = f"{case}/gradnorm_{group}"
        expected = dict(zip(numbers[f"{prefix}/__keys__"], numbers[f"{prefix}/__norms__"]))
        seen = set()
        for ours, theirs in names.items():
            if theirs[0] not in expected:
                continue
            seen.update(theirs)
            grad = parameters[ours].grad
            grad = torch.zeros_like(parameters[ours]) if grad is None else grad
            norms = grad.abs().tolist() if len(theirs) > 1 else [grad.norm().item()]
            wanted = [expected[name] for name in theirs]
            scale = max(expected.values())
            assert norms == pytest.approx(wanted, rel=1e-4, abs=1e-7 * scale), (group, ours)
        assert seen == expected.keys()


def test_predictions_of_student_and_teacher(student, numbers):
    batch = [
        {
            "image": x["image"],
            "height": int(numbers[f"img{i}_ori_shape"][0]),
            "width": int(numbers[f"img{i}_ori_shape"][1]),
        }
        for i, x in enumerate(make_batch(numbers, "both"))
    ]
    for name, model in (("student", student.eval()), ("teacher", student.teacher.model)):
        with torch.no_grad():
            results = model(batch)
        for i, result in enumerate(results):
            result = result["instances"]
            prefix = f"{name}_pred/img{i}"
            np.testing.assert_allclose(result.scores, numbers[f"{prefix}_scores"], rtol=1e-3)
            np.testing.assert_allclose(
                result.pred_boxes.tensor, numbers[f"{prefix}_boxes"], atol=0.05
            )
    student.train()
    student.backbone.eval()
