"""LabelEnc for a meta-architecture of somebody else's project, by what the README documents."""

import pytest
import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_model
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from labelenc import LabelEnc, LabelMap
from plaindet.engine import DetectorAdapter, PlainTrainer, TrainingTask, register_adapter


@META_ARCH_REGISTRY.register()
class CountingDetector(nn.Module):
    """Says how many objects of each class an image has."""

    @configurable
    def __init__(self, *, backbone, num_categories, pixel_mean):
        super().__init__()
        self.backbone = backbone
        self.counter = nn.Linear(backbone.output_shape()["p3"].channels, num_categories)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        return {
            "backbone": build_backbone(cfg),
            "num_categories": cfg.MODEL.RETINANET.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        }

    @property
    def device(self):
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs):
        images = [x["image"].to(self.device) - self.pixel_mean for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def count(self, features):
        return self.counter(features["p3"].mean(dim=(2, 3)))

    def forward(self, batched_inputs):
        counts = self.count(self.backbone(self.preprocess_image(batched_inputs).tensor))
        if not self.training:
            return [{"count": count} for count in counts]
        classes = [x["instances"].gt_classes for x in batched_inputs]
        targets = torch.stack([x.bincount(minlength=counts.shape[1]) for x in classes])
        return {"loss_count": F.l1_loss(counts, targets.to(counts))}


@register_adapter(CountingDetector)
class CountingAdapter(DetectorAdapter):
    @property
    def num_classes(self):
        return self.detector.counter.out_features


def test_meta_architecture_of_another_project(make_cfg, tmp_path):
    """Both steps train; the checkpoint is the plain detector's."""
    cfgs, counter = {}, None
    for step in (1, 2):
        cfg = cfgs[step] = make_cfg(
            f"quick/retinanet_R_18_labelenc_step{step}.yaml",
            *("MODEL.META_ARCHITECTURE", "CountingDetector", "SOLVER.MAX_ITER", "2"),
            *("MODEL.TRAINING_METHODS", "('LabelEnc',)"),
            *("MODEL.LABELENC.WARMUP_ITERS", "1", "MODEL.LABELENC.CUTOFF_ITERS", "1"),
            *("MODEL.LABELENC.STEP1_FILE", str(tmp_path / "output" / "label_encoder.pth")),
            *("DATASETS.TEST", "()", "VIS_PERIOD", "1"),
        )
        trainer = PlainTrainer(cfg)
        trainer.resume_or_load(resume=False)
        if step == 2:
            assert torch.equal(trainer.plain_model.counter.weight, counter)
        trainer.train()
        counter = trainer.plain_model.counter.weight.detach().clone()
        logged = trainer.storage.latest()
        assert ("loss_reconstruction_count" in logged) == (step == 1)
        assert "loss_count" in logged

    plain = build_model(cfgs[2])
    checkpoint = torch.load(tmp_path / "output" / "model_final.pth", weights_only=False)
    plain.load_state_dict(checkpoint["model"], strict=True)
    batch = [{"image": torch.rand(3, 64, 80) * 255}]
    trained = trainer.plain_model.eval()
    assert torch.equal(plain.eval()(batch)[0]["count"], trained(batch)[0]["count"])


@pytest.mark.parametrize("step", [1, 2])
def test_detectron2_fcos_without_config(make_cfg, step):
    """Detectron2's own FCOS is in no yaml registry; it is built in Python."""
    backbone = build_backbone(make_cfg("quick/retinanet_R_18_baseline.yaml"))
    shapes = [ShapeSpec(channels=64, stride=2**level) for level in range(3, 8)]
    head = detectron2_fcos.FCOSHead(input_shape=shapes, conv_dims=[64], num_classes=3)
    detector = detectron2_fcos.FCOS(
        backbone=backbone,
        head=head,
        num_classes=3,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
    )
    task = TrainingTask(detector, [LabelEnc(step=step, norm="BN")]).train()
    boxes, classes = torch.tensor([[5.0, 5.0, 40.0, 40.0]]), torch.tensor([1])
    batch = [
        {
            "image": torch.rand(3, 64, 80),
            "instances": Instances((64, 80), gt_boxes=Boxes(boxes), gt_classes=classes),
            "label_map": LabelMap.from_boxes(boxes, classes, (64, 80)),
        }
    ]
    with EventStorage():
        losses = task(batch)
    assert ("loss_reconstruction_fcos_cls" in losses) == (step == 1)
    # The normaliser moves once although two branches use it.
    positives = model_positives(detector, batch)
    assert detector.loss_normalizer == pytest.approx(0.9 * 300 + 0.1 * positives)


def model_positives(model, batch):
    features = model.backbone(model.preprocess_image(batch).tensor)
    anchors = model.anchor_generator([features[name] for name in model.head_in_features])
    labels, _ = model.label_anchors(anchors, [batch[0]["instances"]])
    return max((labels[0] != 3).sum().item(), 1)


def test_adapter_is_asked_for(make_cfg):
    """Of a detector that is unlike all that are known."""

    class Unknown(nn.Module):
        pass

    with pytest.raises(TypeError, match="no detector of the class Unknown: register a Detector"):
        TrainingTask(Unknown(), [LabelEnc(step=1)])
