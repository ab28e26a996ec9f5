"""LabelEnc for detectors whose pyramid is no FPN of Detectron2's."""

import pyramids  # noqa: F401, which it registers
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.utils.events import EventStorage

from labelenc import LabelMap, build_label_encoder
from labelenc.step1_file import labelenc_of
from plaindet.engine import PlainTrainer

CONFIG = "quick/faster_rcnn_R_18_labelenc_step{}.yaml"
PYRAMIDS = {
    "build_vitdet_backbone": (4, 64),
    "build_tests_pafpn": (4, 64),
    "build_tests_bifpn": (4, 128),
}


def maps(height, width):
    boxes = torch.tensor([[4.0, 4.0, 40.0, 50.0]])
    return [LabelMap.from_boxes(boxes, torch.tensor([1]), (height, width))]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_levels_of_any_pyramid(make_cfg, name):
    """Names, channels and strides of the detector's, and the sizes that it really has."""
    if "vit" in name:
        pytest.importorskip("timm")
    cfg = make_cfg("quick/mask_rcnn_ViT_tiny_baseline.yaml", "MODEL.BACKBONE.NAME", name)
    cfg.MODEL.VIT.IMAGE_SIZE = 128
    backbone = build_backbone(cfg)
    strides = [x.stride for x in backbone.output_shape().values()]
    assert (strides[0], strides[-1]) == PYRAMIDS[name]
    encoder = build_label_encoder(backbone, num_classes=3, norm="BN")
    assert encoder.output_shape() == backbone.output_shape()
    sizes = {key: x.shape for key, x in backbone(torch.rand(1, 3, 128, 128)).items()}
    assert {key: x.shape for key, x in encoder(maps(128, 128)).items()} == sizes


class Levels(Backbone):
    """A backbone that is asked for its outputs alone."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes = {name: ShapeSpec(channels=c, stride=s) for name, (c, s) in shapes.items()}

    def output_shape(self):
        return self.shapes

    def forward(self, x):
        raise NotImplementedError


def test_one_level():
    """Of a detector without a pyramid."""
    encoder = build_label_encoder(Levels({"res4": (1024, 16)}), num_classes=3)
    assert encoder.output_shape() == {"res4": ShapeSpec(channels=1024, stride=16)}
    assert encoder(maps(64, 96))["res4"].shape == (1, 1024, 4, 6)


@pytest.mark.parametrize(
    "shapes",
    [
        {"p3": (64, 8), "p4": (128, 16)},
        {"p3": (64, 8), "p5": (64, 32)},
        {"p1": (64, 2), "p2": (64, 4)},
        {"p6": (64, 64), "p7": (64, 128), "p8": (64, 256)},
    ],
)
def test_levels_that_it_cannot_have(shapes):
    with pytest.raises(ValueError, match="levels of equal channels, with strides from 4 to"):
        build_label_encoder(Levels(shapes), num_classes=3)


def test_fpn_over_other_strides(make_cfg):
    """An FPN that the encoder's features cannot be put under keeps its levels all the same."""

    network = Levels({"c4": (32, 16), "c5": (32, 32), "c6": (32, 64)})
    fpn = FPN(network, ["c4", "c5", "c6"], out_channels=64)
    assert build_label_encoder(fpn, num_classes=3).output_shape() == fpn.output_shape()


@pytest.fixture
def make_trainer(make_cfg, tmp_path):
    def make(step, backbone, *overrides):
        cfg = make_cfg(
            CONFIG.format(step),
            *("MODEL.BACKBONE.NAME", backbone, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1"),
            *("MODEL.LABELENC.WARMUP_ITERS", "0", "MODEL.LABELENC.CUTOFF_ITERS", "0"),
            *("MODEL.LABELENC.STEP1_FILE", str(tmp_path / "output" / "label_encoder.pth")),
            *overrides,
        )
        trainer = PlainTrainer(cfg)
        trainer.resume_or_load(resume=False)
        return trainer

    return make


def test_inheritance(make_trainer):
    """Between pyramids of another kind the head alone, from an FPN to an FPN both."""
    trainer = make_trainer(1, "build_tests_pafpn")
    trainer.train()
    head = trainer.plain_model.roi_heads.state_dict()
    encoder = labelenc_of(trainer.task).label_encoder
    for backbone, inherits in (("build_tests_pafpn", False), ("build_resnet_fpn_backbone", True)):
        model = make_trainer(2, backbone).plain_model
        for key, value in model.roi_heads.state_dict().items():
            assert torch.equal(value, head[key]), key
        fpn = model.backbone.fpn_output3.weight
        assert torch.equal(fpn, encoder.fpn_output3.weight) == inherits


@pytest.mark.parametrize("step", [1, 2])
def test_sizes_that_are_rounded_down(make_trainer, step):
    """A pyramid that pads nothing: the label maps are padded for the encoder, and its levels lie
    on the detector's cell by cell."""
    pytest.importorskip("timm")
    size = ("INPUT.MIN_SIZE_TRAIN", "(70,)", "INPUT.RANDOM_FLIP", "none")
    trainer = make_trainer(1, "build_tests_unpadded_vit", *size)
    if step == 2:
        trainer.train()
        trainer = make_trainer(2, "build_tests_unpadded_vit", *size)
    method, batch = labelenc_of(trainer.task), next(iter(trainer.data_loader))
    assert batch[0]["image"].shape[1:] == (70, 88)
    with EventStorage():
        seen = method.adapter.observe(batch)
        encodings = method.encode(batch, seen.images)
        losses = trainer.model(batch)
    assert seen.features["p2"].shape[-2:] == (16, 20)
    assert encodings["p2"].shape[-2:] == (18, 22)
    assert 0 < losses["loss_distance"] < 4
    canvas = torch.zeros(len(batch), 3, 96, 96)  # a multiple of 32
    for x, plane in zip(batch, canvas):
        plane[:, :70, :88] = x["label_map"].to_dense(3)
    with torch.no_grad():
        expected = method.label_encoder(canvas)["p2"][:, :, :18, :22]
    torch.testing.assert_close(encodings["p2"], expected, rtol=1e-4, atol=1e-5)
