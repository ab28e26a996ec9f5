"""What holds for LabelEnc with every detector."""

from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from detectron2.utils.analysis import find_unused_parameters
from detectron2.utils.events import EventStorage

from labelenc import LabelEncTrainer, LabelMap
from labelenc.step1_file import labelenc_of
from plaindet import add_plaindet_config

PLAIN_CLASS = {
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
    "fcos_imprv": "FCOS",
    "gfl": "GFL",
    "atss": "ATSS",
    "faster_rcnn": "GeneralizedRCNN",
    "mask_rcnn": "GeneralizedRCNN",
}
detectors = pytest.mark.parametrize("detector", PLAIN_CLASS)


def quick(detector, step):
    return f"quick/{detector}_R_18_labelenc_step{step}.yaml"


@pytest.fixture
def make_trainer(make_cfg):
    def make(detector, step, *overrides):
        return LabelEncTrainer(make_cfg(quick(detector, step), *overrides))

    return make


def losses_of(model, batch):
    torch.manual_seed(0)  # RPN and RoI heads sample at random
    with EventStorage():
        return model(batch)


@detectors
def test_gradient_of_each_term(make_trainer, detector):
    """Sec. 3.2: L1 reaches encoder and head, L2 backbone and head, L3 backbone and adapter."""
    trainer = make_trainer(detector, 1)
    batch = next(iter(trainer.data_loader))
    reached = {}
    losses = losses_of(trainer.model, batch)
    terms = {
        "L1": [loss for name, loss in losses.items() if "reconstruction" in name],
        "L2": [v for k, v in losses.items() if "reconstruction" not in k and k != "loss_distance"],
        "L3": [losses["loss_distance"]],
    }
    for term, parts in terms.items():
        trainer.model.zero_grad()
        sum(parts).backward(retain_graph=True)
        reached[term] = {
            name.removeprefix("training_only.LabelEnc.").removeprefix("detector.").split(".")[0]
            for name, parameter in trainer.model.named_parameters()
            if parameter.grad is not None and parameter.grad.any()
        }
    head = {"proposal_generator", "roi_heads"} if "rcnn" in detector else {"head"}
    assert reached == {
        "L1": {"label_encoder"} | head,
        "L2": {"backbone"} | head,
        "L3": {"backbone", "feature_adapter"},
    }
    # The head has the same losses on both features.
    assert len(terms["L1"]) == len(terms["L2"])
    assert ("loss_mask" in losses) == (detector == "mask_rcnn")


@detectors
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("distance_enabled", [True, False])
def test_no_unused_parameters(make_trainer, detector, step, distance_enabled):
    trainer = make_trainer(detector, step)
    labelenc_of(trainer.task).distance_enabled = distance_enabled
    with EventStorage():
        unused = find_unused_parameters(trainer.model, next(iter(trainer.data_loader)))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not trained & set(unused)


@detectors
def test_step2_after_cut_off_is_plain(make_trainer, make_cfg, detector):
    """Losses and gradients of the plain detector, from inputs without label maps."""
    trainer = make_trainer(detector, 2)
    model = trainer.plain_model
    labelenc_of(trainer.task).distance_enabled = False
    plain = build_model(make_cfg(f"quick/{detector}_R_18_baseline.yaml")).train()
    plain.load_state_dict(model.state_dict(), strict=True)
    trainer.mapper.additions[0].stop_label_maps()
    batch = next(iter(trainer.data_loader))
    expected, losses = losses_of(plain, batch), losses_of(trainer.model, batch)
    sum(expected.values()).backward()
    sum(losses.values()).backward()
    assert losses.pop("loss_distance") == 0
    assert losses == expected
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters()):
        assert torch.equal(parameter.grad, other.grad), name


@detectors
def test_both_steps_end_in_the_plain_detector(make_trainer, make_cfg, detector, tmp_path, caplog):
    """Step 2 takes over step 1's head; its checkpoint and config are those of the plain detector,
    which detects the same."""
    source = {}
    outputs = {step: tmp_path / f"step{step}" for step in (1, 2)}
    for step, output in outputs.items():
        output.mkdir()
        trainer = make_trainer(
            detector,
            step,
            *("SOLVER.MAX_ITER", "2", "MODEL.LABELENC.WARMUP_ITERS", "1"),
            *("MODEL.LABELENC.CUTOFF_ITERS", "1", "OUTPUT_DIR", str(output)),
            *("MODEL.LABELENC.STEP1_FILE", str(outputs[1] / "label_encoder.pth")),
        )
        trainer.resume_or_load(resume=False)
        for key, value in source.items():
            if not key.startswith("backbone."):
                assert torch.equal(value, trainer.plain_model.state_dict()[key]), key
        trainer.train()
        source = {key: value.clone() for key, value in trainer.plain_model.state_dict().items()}

    cfg = get_cfg()
    if PLAIN_CLASS[detector] in ("FCOS", "GFL", "ATSS"):
        add_plaindet_config(cfg)
    cfg.merge_from_file(str(outputs[2] / "plain_config.yaml"))
    plain = build_model(cfg).eval()
    assert type(plain).__name__ == PLAIN_CLASS[detector]
    checkpoint = torch.load(outputs[2] / "model_final.pth", weights_only=False)
    plain.load_state_dict(checkpoint["model"], strict=True)

    evaluated = build_model(make_cfg(quick(detector, 2))).eval()
    DetectionCheckpointer(evaluated).load(str(outputs[2] / "model_final.pth"))
    for model in (plain, evaluated.detector):
        show_everything(model)
    found = 0
    for inputs in build_detection_test_loader(make_cfg(quick(detector, 2)), "tiny_val"):
        with torch.no_grad():
            expected, actual = (m(inputs)[0]["instances"] for m in (plain, evaluated))
        found += len(expected)
        assert torch.equal(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(actual.scores, expected.scores)
        assert torch.equal(actual.pred_classes, expected.pred_classes)
        if detector == "mask_rcnn":
            assert torch.equal(actual.pred_masks, expected.pred_masks)
    assert found > 0
    assert Path(outputs[1] / "label_encoder.pth").exists()


def show_everything(model):
    """Sets the thresholds so low that an untrained detector detects something."""
    if hasattr(model, "roi_heads"):
        model.roi_heads.box_predictor.test_score_thresh = 0.0
    model.test_score_thresh = model.test_class_score_thresh = 0.0


def test_masks_make_the_label_map(read_cfg):
    """Mask R-CNN's label map (Sec. 4.5) lies within the masks, which are smaller than the boxes."""
    cfg = read_cfg(quick("mask_rcnn", 2))
    cfg.DATALOADER.NUM_WORKERS = 0
    inputs = next(iter(LabelEncTrainer.build_train_loader(cfg)))[0]
    instances, size = inputs["instances"], inputs["image"].shape[-2:]
    inside = torch.zeros(8, *size, dtype=torch.bool)
    for mask, c in zip(instances.gt_masks.tensor, instances.gt_classes):
        inside[c] |= mask
    drawn = inputs["label_map"].to_dense(8)
    assert torch.equal(drawn > 0, drawn >= 0.5)
    assert not (drawn[~inside] > 0).any()
    boxes = LabelMap.from_boxes(instances.gt_boxes, instances.gt_classes, size).to_dense(8)
    assert 0 < (drawn > 0).sum() < (boxes > 0).sum()
