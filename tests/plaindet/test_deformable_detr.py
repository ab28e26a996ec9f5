"""Deformable DETR against the library's own whole model, and as a Detectron2 detector."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import find_unused_parameters
from torch import nn
from torchvision.ops import box_convert

import train_net
from plaindet import add_plaindet_config
from plaindet.data import PlainDatasetMapper
from plaindet.engine import PlainTrainer, build_optimizer
from plaindet.modeling import DeformableDETR
from plaindet.modeling.deformable_detr import pixel_mask

CONFIG = "quick/deformable_detr_R_18_baseline.yaml"
VARIANTS = [(False, False), (True, False), (True, True)]
variants = pytest.mark.parametrize(("box_refinement", "two_stage"), VARIANTS)
SMALL = (
    *("MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "32"),
    *("MODEL.DEFORMABLE_DETR.NUM_HEADS", "4"),
    *("MODEL.DEFORMABLE_DETR.NUM_QUERIES", "12"),
)


def options(box_refinement, two_stage):
    return (
        *SMALL,
        *("MODEL.DEFORMABLE_DETR.BOX_REFINEMENT", str(box_refinement)),
        *("MODEL.DEFORMABLE_DETR.TWO_STAGE", str(two_stage)),
    )


def make_batch(sizes=((64, 80), (48, 56)), num_objects=(3, 1)):
    """Images of random pixels with random objects of 3 classes."""
    batch = []
    for (height, width), count in zip(sizes, num_objects):
        instances = Instances((height, width))
        corner = torch.rand(count, 2) * torch.tensor([width / 2, height / 2])
        size = (0.2 + 0.2 * torch.rand(count, 2)) * torch.tensor([width, height])
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        instances.gt_classes = torch.randint(3, (count,))
        image = torch.rand(3, height, width) * 255
        batch.append({"image": image, "instances": instances})
    return batch


class LibraryBackbone(Backbone):
    """The backbone of the library's model."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return dict(zip(("res3", "res4", "res5"), self.network(x).feature_maps))


@pytest.fixture
def make_pair():
    """Returns a function that makes the library's own model, in a state in which every parameter
    matters, and ours with the same weights."""

    def make(box_refinement, two_stage):
        from transformers import (
            DeformableDetrConfig,
            DeformableDetrForObjectDetection,
            ResNetConfig,
        )

        from plaindet.modeling.deformable_transformer import DeformableTransformer, SetCriterion

        channels = [16, 32, 64]
        sizes = {"num_queries": 9, "num_points": 3, "num_encoder_layers": 2, "dropout": 0.0}
        config = DeformableDetrConfig(
            backbone_config=ResNetConfig(
                embedding_size=8, hidden_sizes=channels, depths=[1, 1, 1], out_indices=[1, 2, 3]
            ),
            d_model=32,
            encoder_layers=2,
            decoder_layers=3,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_n_points=3,
            decoder_n_points=3,
            num_queries=9,
            two_stage_num_proposals=9,
            num_labels=3,
            dropout=0.0,
            class_cost=2,
            auxiliary_loss=True,
            with_box_refine=box_refinement,
            two_stage=two_stage,
        )
        theirs = DeformableDetrForObjectDetection(config).eval()
        if box_refinement:  # the library ties the classifiers of a new model, not of a loaded one
            theirs.class_embed = nn.ModuleList(copy.deepcopy(x) for x in theirs.class_embed)
            theirs.model.decoder.bbox_embed = theirs.bbox_embed
        if two_stage:
            theirs.model.decoder.class_embed = theirs.class_embed
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.2)
        transformer = DeformableTransformer(
            in_channels=channels,
            num_classes=3,
            hidden_dim=32,
            num_heads=4,
            num_decoder_layers=3,
            feedforward_dim=48,
            box_refinement=box_refinement,
            two_stage=two_stage,
            **sizes,
        )
        expected = transformer.state_dict().keys()
        state = {key: value for key, value in theirs.state_dict().items() if key in expected}
        transformer.load_state_dict(state, strict=True)
        ours = DeformableDETR(
            backbone=LibraryBackbone(theirs.model.backbone.model),
            transformer=transformer,
            criterion=SetCriterion(num_classes=3),
            num_classes=3,
            in_features=["res3", "res4", "res5"],
            pixel_mean=(100.0, 110.0, 120.0),
            pixel_std=(57.0, 58.0, 59.0),
        ).eval()
        return ours, theirs

    return make


def run_theirs(theirs, ours, batch):
    images = ours.preprocess_image(batch)
    mask = torch.zeros(len(batch), *images.tensor.shape[-2:], dtype=torch.long)
    for image_mask, (height, width) in zip(mask, images.image_sizes):
        image_mask[:height, :width] = 1
    return theirs(images.tensor, pixel_mask=mask, labels=ours.targets(batch))


@variants
def test_equals_the_librarys_model(make_pair, box_refinement, two_stage):
    """Logits and boxes of each decoder layer and the losses, in a batch with padding."""
    ours, theirs = make_pair(box_refinement, two_stage)
    batch = make_batch()
    with torch.no_grad():
        expected = run_theirs(theirs, ours, batch)
        images = ours.preprocess_image(batch)
        decoded = ours.transformer.decode(ours.encode(ours.backbone(images.tensor), images))
        losses = ours.losses(decoded, ours.targets(batch))
    stages = [
        *expected.auxiliary_outputs,
        {"logits": expected.logits, "pred_boxes": expected.pred_boxes},
    ]
    assert len(stages) == len(decoded.predictions) == 3
    for stage, predictions in zip(stages, decoded.predictions):
        torch.testing.assert_close(predictions.logits, stage["logits"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(predictions.boxes, stage["pred_boxes"], rtol=1e-5, atol=1e-5)
    if two_stage:
        boxes = expected.enc_outputs_coord_logits.sigmoid()
        torch.testing.assert_close(decoded.proposals.logits, expected.enc_outputs_class)
        torch.testing.assert_close(decoded.proposals.boxes, boxes)
    for suffix in ("", "_0", "_1"):
        for name, theirs_name, weight in (
            ("loss_cls", "loss_ce", 2),
            ("loss_box_reg", "loss_bbox", 5),
            ("loss_giou", "loss_giou", 2),
        ):
            loss = weight * expected.loss_dict[theirs_name + suffix]
            torch.testing.assert_close(losses[name + suffix], loss, rtol=1e-5, atol=1e-5)
    proposals = {f"{x}_proposals" for x in ("loss_cls", "loss_box_reg", "loss_giou")}
    assert len(losses) == 9 + 3 * two_stage
    assert two_stage == (proposals < losses.keys())


@pytest.mark.parametrize("two_stage", [False, True])
def test_initialisation(make_cfg, two_stage):
    """That of the paper's code: the prior of the classes, boxes that are points (with two stages)
    or 0.12 of the image (without), and points around the reference, farther out one by one."""
    cfg = make_cfg(
        "quick/deformable_detr_R_18_baseline.yaml",
        *(
            "MODEL.DEFORMABLE_DETR.PRIOR_PROB",
            "0.2",
            "MODEL.DEFORMABLE_DETR.BOX_REFINEMENT",
            "True",
        ),
        *("MODEL.DEFORMABLE_DETR.TWO_STAGE", str(two_stage)),
    )
    transformer = build_model(cfg).transformer
    for i, (classes, boxes) in enumerate(zip(transformer.class_embed, transformer.bbox_embed)):
        torch.testing.assert_close(classes.bias.sigmoid(), torch.full_like(classes.bias, 0.2))
        last = boxes.layers[-1]
        assert not last.weight.any()
        assert last.bias.tolist() == ([0, 0, -2, -2] if i == 0 and not two_stage else [0] * 4)
    detr = cfg.MODEL.DEFORMABLE_DETR
    attention = transformer.model.encoder.layers[0].self_attn
    shape = (detr.NUM_HEADS, detr.NUM_FEATURE_LEVELS, detr.NUM_POINTS, 2)
    offsets = attention.sampling_offsets.bias.view(shape)
    for head in range(detr.NUM_HEADS):
        angle = 2 * math.pi * head / detr.NUM_HEADS
        direction = torch.tensor([math.cos(angle), math.sin(angle)])
        for point in range(detr.NUM_POINTS):
            expected = (point + 1) * direction / direction.abs().max()
            for level in range(detr.NUM_FEATURE_LEVELS):
                torch.testing.assert_close(offsets[head, level, point], expected)


def test_gradients_equal_the_librarys(make_pair):
    ours, theirs = make_pair(True, False)
    batch = make_batch()
    loss = run_theirs(theirs, ours, batch).loss
    names = [name for name, _ in ours.transformer.named_parameters()]
    parameters = dict(theirs.named_parameters())
    parameters = [parameters.get(name, parameters.get(f"model.decoder.{name}")) for name in names]
    expected = torch.autograd.grad(loss, parameters)
    ours.train()
    ours.criterion.weights["loss_cls"] = 1.0  # the library's weight; its matching cost has 2
    found = torch.autograd.grad(sum(ours(batch).values()), list(ours.transformer.parameters()))
    for name, gradient, other in zip(names, found, expected):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5, msg=name)


@variants
@pytest.mark.parametrize("num_objects", [(3, 1), (2, 0), (0, 0)])
def test_every_parameter_is_trained(make_cfg, box_refinement, two_stage, num_objects):
    """Also by images without objects, so that several processes can train."""
    model = build_model(make_cfg(CONFIG, *options(box_refinement, two_stage))).train()
    batch = make_batch(num_objects=num_objects)
    losses = model(batch)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert losses["loss_cls"] > 0
    assert (losses["loss_giou"] > 0) == any(num_objects)
    assert not find_unused_parameters(model, batch)


def test_proposals_know_one_class(make_cfg, make_pair):
    """Their losses do not depend on the objects' classes."""
    ours, _ = make_pair(True, True)
    ours.train()
    batch = make_batch()
    losses = []
    for labels in (0, 2):
        for x in batch:
            x["instances"].gt_classes[:] = labels
        losses.append(ours(batch))
    for name in ("loss_cls_proposals", "loss_box_reg_proposals", "loss_giou_proposals"):
        torch.testing.assert_close(losses[0][name], losses[1][name])
    assert losses[0]["loss_cls"] != losses[1]["loss_cls"]


def test_number_of_boxes_is_averaged_over_processes(make_pair, monkeypatch):
    """The losses of a process with 4 boxes, beside one with 12, are divided by 8."""
    ours, _ = make_pair(True, False)
    ours.train()
    batch = make_batch()
    losses = ours(batch)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.add_(6))
    for name, loss in ours(batch).items():
        torch.testing.assert_close(loss, losses[name] / 2)


def test_losses_under_amp(make_cfg):
    """They are float32, near those without AMP, and train."""
    model = build_model(make_cfg(CONFIG, *options(True, True))).train()
    batch = make_batch()
    expected = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    total = sum(losses.values())
    torch.testing.assert_close(total, sum(expected.values()), rtol=0.05, atol=0)
    total.backward()


def test_targets_are_relative_to_the_image(make_pair):
    ours, _ = make_pair(False, False)
    instances = Instances((40, 80))
    instances.gt_boxes = Boxes(torch.tensor([[8.0, 10, 24, 30]]))
    instances.gt_classes = torch.tensor([2])
    (target,) = ours.targets([{"instances": instances}])
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.2, 0.5, 0.2, 0.5]]))
    assert target["class_labels"].tolist() == [2]


def test_pixel_mask():
    mask = pixel_mask([(2, 3), (4, 1)], (4, 3), torch.device("cpu"))
    assert mask.shape == (2, 4, 3)
    assert mask[0].nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert mask[1].nonzero().tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]]


def test_inference_takes_the_best_pairs(make_pair):
    """The best (query, class) pairs, best first; boxes in the requested output size."""
    ours, _ = make_pair(True, False)
    ours.max_detections_per_image = 7
    sizes = ((64, 80), (48, 56))
    batch = [{"image": torch.rand(3, *size) * 255} for size in sizes]
    batch[0].update(height=128, width=240)
    with torch.no_grad():
        found = ours(batch)
        images = ours.preprocess_image(batch)
        memory = ours.encode(ours.backbone(images.tensor), images)
        last = ours.transformer.decode(memory).predictions[-1]
    for i, (height, width) in enumerate(((128, 240), (48, 56))):
        pairs = [
            (last.logits[i, query, label].sigmoid().item(), query, label)
            for query in range(9)
            for label in range(3)
        ]
        best = sorted(pairs, reverse=True)[:7]
        instances = found[i]["instances"]
        assert instances.image_size == (height, width)
        assert instances.scores.tolist() == pytest.approx([score for score, _, _ in best])
        assert instances.pred_classes.tolist() == [label for _, _, label in best]
        boxes = box_convert(last.boxes[i, [query for _, query, _ in best]], "cxcywh", "xyxy")
        boxes = boxes.clamp(0, 1) * torch.tensor([width, height, width, height])
        torch.testing.assert_close(instances.pred_boxes.tensor, boxes, rtol=1e-4, atol=1e-3)


def test_training_run(make_cfg):
    """The checkpoint is the plain detector's; a run resumes from it; DefaultPredictor reads it."""
    overrides = (*SMALL, "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "0")
    cfg = make_cfg(CONFIG, *overrides, "SOLVER.MAX_ITER", "2")
    trainer = PlainTrainer(cfg)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert any(not torch.equal(value, start[k]) for k, value in trainer.model.state_dict().items())

    plain = get_cfg()
    add_plaindet_config(plain)
    plain.merge_from_file(f"{cfg.OUTPUT_DIR}/plain_config.yaml")
    plain.MODEL.WEIGHTS = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    assert plain.MODEL.META_ARCHITECTURE == "DeformableDETR"
    checkpoint = torch.load(plain.MODEL.WEIGHTS, weights_only=False)
    predictor = DefaultPredictor(plain)
    predictor.model.load_state_dict(checkpoint["model"], strict=True)
    found = predictor(torch.randint(256, (40, 50, 3), dtype=torch.uint8).numpy())["instances"]
    assert len(found) == 12 * 3
    assert found.image_size == (40, 50)

    cfg.SOLVER.MAX_ITER = 3
    resumed = PlainTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    steps = [state["step"].item() for state in resumed.optimizer.state.values()]
    assert set(steps) == {2}
    resumed.train()


def test_number_of_classes_is_checked(make_cfg):
    cfg = make_cfg(CONFIG, *SMALL, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "5")
    with pytest.raises(ValueError, match="MODEL.DEFORMABLE_DETR.NUM_CLASSES is 5, .* 3 classes"):
        PlainTrainer(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("HIDDEN_DIM", 40, "HIDDEN_DIM is 40, expected a multiple of 32 and of NUM_HEADS 6"),
        ("HIDDEN_DIM", 32, "HIDDEN_DIM is 32, expected a multiple of 32 and of NUM_HEADS 6"),
        ("NUM_FEATURE_LEVELS", 2, "NUM_FEATURE_LEVELS is 2, expected at least the 3"),
        ("BOX_REFINEMENT", False, "TWO_STAGE needs BOX_REFINEMENT"),
    ],
)
def test_options_that_do_not_go_together(make_cfg, key, value, message):
    cfg = make_cfg(CONFIG, "MODEL.DEFORMABLE_DETR.TWO_STAGE", "True")
    cfg.MODEL.DEFORMABLE_DETR[key] = value
    with pytest.raises(ValueError, match=rf"MODEL.DEFORMABLE_DETR.{message}"):
        build_model(cfg)


def test_diverged_boxes_are_reported(make_pair):
    ours, _ = make_pair(True, False)
    ours.train()
    ours.transformer.bbox_embed[0].layers[-1].bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="boxes or scores are infinite or NaN"):
        ours(make_batch())


def test_without_the_extra():
    """plaindet does not need it, and a model of this kind names it."""
    program = """
import sys
sys.modules["transformers"] = None
from detectron2.modeling import build_model
import plaindet.engine
cfg = plaindet.read_config("configs/quick/deformable_detr_R_18_baseline.yaml")
build_model(cfg)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(train_net.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith("ImportError: DeformableDETR needs the optional extra [detr]")
    )


def test_augmentation_of_detr(make_cfg):
    """A crop of 384 to 600 pixels after a resize, for every second image; then 480 to 800."""
    mapper = PlainDatasetMapper(make_cfg("PlainDet/deformable_detr_R_50_50ep.yaml"))
    first, last, flip = mapper.augmentations.augs
    assert isinstance(first, T.RandomApply)
    assert first.prob == 0.5
    resize, crop = first.aug.augs
    assert resize.short_edge_length == (400, 500, 600)
    assert (crop.crop_type, list(crop.crop_size)) == ("absolute_range", [384, 600])
    assert isinstance(last, T.ResizeShortestEdge)
    assert isinstance(flip, T.RandomFlip)
    cfg = make_cfg("quick/retinanet_R_18_baseline.yaml", "INPUT.CROP.ENABLED", "True")
    assert type(PlainDatasetMapper(cfg).augmentations.augs[0]) is T.RandomCrop


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("deformable_detr_R_50_50ep", "torchvision/R-50.pkl"),
        ("deformable_detr_R_18_50ep", "resnet18-f37072fd.pth"),
    ],
)
def test_configs_for_coco(read_cfg, make_cfg, name, weights):
    """The settings of the paper, and a training iteration at a small image size."""
    cfg = read_cfg(f"PlainDet/{name}.yaml")
    solver = cfg.SOLVER
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.IMS_PER_BATCH) == ("AdamW", 2e-4, 32)
    assert (solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS) == ((146600,), 183250, 0)
    assert (solver.CLIP_GRADIENTS.CLIP_TYPE, solver.CLIP_GRADIENTS.CLIP_VALUE) == (
        "full_model",
        0.1,
    )
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(range(480, 801, 32))
    assert (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == ("RGB", False)
    assert cfg.MODEL.WEIGHTS.endswith(weights)
    assert cfg.OUTPUT_DIR == f"output/{name}"

    model = build_model(make_cfg(f"PlainDet/{name}.yaml")).train()
    assert [len(model.transformer.class_embed), model.transformer.num_stages] == [7, 6]
    losses = model(make_batch())
    assert all(loss.isfinite() for loss in losses.values())
    frozen = {n for n, p in model.backbone.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"stem", "res2"}
    groups = build_optimizer(cfg, model).param_groups
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert all(group["weight_decay"] == 1e-4 for group in groups)
    for parameter_name, parameter in model.named_parameters():
        slow = ("backbone", "sampling_offsets", "reference_points")
        if parameter.requires_grad:
            factor = 0.1 if any(part in parameter_name for part in slow) else 1
            assert rates[parameter] == pytest.approx(2e-4 * factor)
