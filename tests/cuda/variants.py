"""The table of what is checked on a device: every detector with every method that it has."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from labelenc import LabelMap
from plaindet.engine import Teacher
from plaindet.seeding import seed_everything

DENSE = ("retinanet", "fcos", "gfl", "atss")
TWO_STAGE = ("faster_rcnn", "mask_rcnn")
PLAIN = "plain"
# Each phase of LabelEnc has iterations of its own.
LABELENC = (
    "step 1 before the warm-up's end",
    "step 1",
    "step 2",
    "step 2 after the cut-off",
    "vanilla KD",
)
CROSSKD = ("CrossKD", "CrossKD bridged")
PKD = "CrossKD with PKD"
BOTH = "both"
METHODS = {
    **dict.fromkeys(DENSE, (PLAIN, *LABELENC, *CROSSKD, PKD, BOTH)),
    **dict.fromkeys(TWO_STAGE, (PLAIN, *LABELENC, *CROSSKD, BOTH)),
    "deformable_detr": (PLAIN, *CROSSKD),
}
# Batch statistics of few pixels turn the last digits into large differences.
NORMS = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "GN")
# All anchors and proposals, since generators of other devices draw other random samples.
NO_SAMPLING = (
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "100000"),
)
# A teacher whose features are wider than the student's.
WIDER = {
    **dict.fromkeys(DENSE + TWO_STAGE, ("MODEL.FPN.OUT_CHANNELS", "96")),
    "deformable_detr": ("MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "192"),
}


class Variant(NamedTuple):
    """A detector that trains with a method, or a phase of it."""

    detector: str  # as in configs/quick
    method: str

    def __str__(self):
        return f"{self.detector}, {self.method}"


VARIANTS = [
    Variant(detector, method) for detector, methods in METHODS.items() for method in methods
]
# What stands for the others on the CPU: every method with RetinaNet or GFL, and the parts that the
# other detectors have of their own (another assignment, an RPN, a mask head, a transformer) once.
REPRESENTATIVE = [
    *(Variant("retinanet", method) for method in METHODS["retinanet"] if method != BOTH),
    *(Variant("gfl", method) for method in (PLAIN, BOTH)),
    *(Variant("mask_rcnn", method) for method in (PLAIN, "step 1", "CrossKD")),
    Variant("atss", "CrossKD"),
    Variant("fcos", "step 2"),
    Variant("deformable_detr", "CrossKD bridged"),
]


def skip_without_libraries(detector: str) -> None:
    """Skips the test where the optional libraries of a detector are not installed."""
    if detector == "deformable_detr":
        for library in ("transformers", "scipy"):
            pytest.importorskip(library, reason=f"Deformable DETR needs {library}")


def build_variant(variant: Variant, make_cfg, *overrides: str) -> torch.nn.Module:
    """The model on the CPU, for training, with random weights and a random teacher.

    Args:
        make_cfg: of tests/conftest.py.
        overrides: of the config of the model and of the teacher.
    """
    detector, method = variant
    skip_without_libraries(detector)
    names = {method.startswith("step 1"): "labelenc_step1", method == PLAIN: "baseline"}
    names = {**names, method.startswith("CrossKD"): "crosskd"}
    name = names.get(True, "labelenc_step2")
    overrides = (*NORMS, *NO_SAMPLING, *overrides)
    cfg = make_cfg(f"quick/{detector}_R_18_{name}.yaml", *overrides)
    if method == "vanilla KD":
        cfg.MODEL.LABELENC.TEACHER.CONFIG_FILE = "a teacher"
    if method == PKD:
        cfg.MODEL.CROSSKD.FEATURE_WEIGHT = 1.0
    if method == BOTH:
        crosskd = make_cfg(f"quick/{detector}_R_18_crosskd.yaml").MODEL
        cfg.MODEL.CROSSKD = crosskd.CROSSKD
        cfg.MODEL.META_ARCHITECTURE = f"LabelEnc{crosskd.META_ARCHITECTURE}"
    seed_everything(0)
    model = build_model(cfg).train()
    if method in LABELENC:
        model.training_only["LabelEnc"].distance_enabled = method not in (LABELENC[0], LABELENC[3])
    if method == "vanilla KD" or method in (*CROSSKD, PKD, BOTH):
        wider = WIDER[detector] if method == "CrossKD bridged" else ()
        cfg = make_cfg(f"quick/{detector}_R_34_teacher.yaml", *overrides, *wider)
        teacher = Teacher(build_model(cfg))
        if method == "vanilla KD":
            model.set_feature_teacher(teacher)
        else:
            model.set_teacher(teacher)
    return model


def plain_class(model: torch.nn.Module) -> type:
    """The meta-architecture that a variant's model is trained to be."""
    return type(getattr(model, "detector", model))


def make_batch(sizes=((120, 160), (128, 144))) -> list[dict]:
    """Two images with objects, masks and label maps, on the CPU. The corners are no round numbers,
    so that no two anchors match an object equally well but for rounding, which another device does
    in another way."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for (height, width), classes in zip(sizes, ([0, 2, 1], [1])):
        size = torch.tensor([width, height])
        sides = size * (0.2 + 0.4 * torch.rand(len(classes), 2, generator=generator))
        corners = (size - sides) * torch.rand(len(classes), 2, generator=generator)
        boxes = torch.cat([corners, corners + sides], dim=1)
        masks = torch.zeros(len(classes), height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist()):
            mask[int(y0) : int(y1), int(x0) : int(x1)] = True
        labels = torch.tensor(classes)
        instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=labels)
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        label_map = LabelMap.from_boxes(boxes, labels, (height, width))
        batch.append({"image": image, "instances": instances, "label_map": label_map})
    return batch


def losses_of(model: torch.nn.Module, batch: list[dict]) -> dict[str, torch.Tensor]:
    """Of one iteration, with the same random numbers and the same normaliser whenever it is
    called."""
    seed_everything(0)
    detector = getattr(model, "detector", model)
    if hasattr(detector, "loss_normalizer"):
        detector.loss_normalizer = 100.0  # RetinaNet's moving average
    with EventStorage():
        return model(batch)


def share_proposals(model) -> tuple[list, list]:
    """Which proposals of an RPN survive the suppression of overlaps depends on the last digits.

    Returns:
        the proposals of the calls so far; and those that the next calls are to return
    """
    recorded, replayed = [], []
    if hasattr(model, "proposal_generator"):
        original = model.proposal_generator.forward

        def forward(*args):
            found, losses = original(*args)
            if replayed:
                return replayed.pop(0), losses
            recorded.append(found)
            return found, losses

        model.proposal_generator.forward = forward
    return recorded, replayed


def gradients_of(
    model: torch.nn.Module, losses: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Of all parameters that the losses reach."""
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Other kernels add up in another order. A loss is a mean of terms with errors of 1e-7 each. A
# gradient also jumps where an activation within that of 0 falls on the other side. With other
# kernels of the CPU (without oneDNN, and in channels_last) losses differed by 5e-7, and gradients
# of single parameters mostly by 1e-5 and at worst by 8e-3 of their norm.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 3e-2


def assert_losses_close(found: dict, expected: dict, tolerance: float = LOSS_TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=tolerance, atol=tolerance, msg=name)


def assert_gradients_close(
    found: dict, expected: dict, tolerance: float = GRADIENT_TOLERANCE
) -> None:
    """By their norms. Some are 0 but for rounding, as that of the bias of an attention's keys."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm().item()
        assert difference <= tolerance * gradient.norm().item() + 1e-6, name
