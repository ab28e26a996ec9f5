"""CrossKD's training of Deformable DETR."""

import math
import os

import pytest
import torch
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.analysis import find_unused_parameters
from detectron2.utils.events import EventStorage
from iteration import (
    check_needs_teacher,
    check_training_run,
    losses_of,
    method_of,
    with_gradient,
)

from crosskd import CrossKDTrainer, DETRCrossKD
from plaindet.data import register_coco_format
from plaindet.engine import Teacher, ending_process_group
from plaindet.modeling import DeformableDETR
from plaindet.modeling.deformable_transformer import Predictions

SMALL = [
    *("MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "32", "MODEL.DEFORMABLE_DETR.NUM_HEADS", "4"),
    *("MODEL.DEFORMABLE_DETR.NUM_QUERIES", "12", "MODEL.DEFORMABLE_DETR.FEEDFORWARD_DIM", "48"),
    *("MODEL.DEFORMABLE_DETR.TWO_STAGE", "False"),
]
# The teacher's other queries show that none of them are mixed up.
TEACHER = [*SMALL, "MODEL.DEFORMABLE_DETR.NUM_QUERIES", "9"]
KD = ("loss_kd_cls", "loss_kd_box", "loss_kd_giou")
SUFFIXES = ("_0", "_1", "")
queries = pytest.mark.parametrize("queries", ["teacher", "student"])


@pytest.fixture
def make_trainer(make_cfg, tmp_path):
    """Returns a function that makes a trainer with a teacher of random weights."""

    def make(*overrides, teacher=()):
        torch.manual_seed(7)
        cfg = make_cfg("quick/deformable_detr_R_34_teacher.yaml", *TEACHER, *teacher)
        path = tmp_path / "teacher.pth"
        model = build_model(cfg)
        transformer = model.transformer
        for classifier, head in zip(transformer.class_embed, transformer.bbox_embed):
            # At the start of a training they say the same of all queries.
            torch.nn.init.normal_(classifier.weight, std=0.5)
            torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
        torch.save({"model": model.state_dict()}, path)
        classes = ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3", "DATASETS.TRAIN", "('tiny_train',)"]
        return CrossKDTrainer(
            make_cfg(
                "quick/deformable_detr_R_18_crosskd.yaml",
                *SMALL,
                *("MODEL.CROSSKD.TEACHER.WEIGHTS", str(path)),
                *("MODEL.CROSSKD.TEACHER.OPTS", str([*classes, *TEACHER, *teacher])),
                *("SOLVER.MAX_ITER", "2"),
                *overrides,
            )
        )

    return make


@queries
def test_gradient_of_distillation(make_trainer, queries):
    """It reaches backbone and encoder, and nothing of the decoder if the queries are the teacher's.
    The student's queries take it to the layers that make them: not to the last one, nor to the
    predictors."""
    trainer = make_trainer("MODEL.CROSSKD.QUERIES", queries)
    model, losses = trainer.plain_model, losses_of(trainer)
    names = [name + suffix for name in KD for suffix in SUFFIXES]
    assert set(names) == {name for name in losses if name.startswith("loss_kd")}
    distilled = with_gradient(model, [losses[name] for name in names])
    assert "backbone.stem.conv1.weight" in distilled
    for part in ("input_proj.0", "input_proj.3", "encoder.layers.0", "encoder.layers.1"):
        assert any(name.startswith(f"transformer.model.{part}") for name in distilled)
    predictors = ("transformer.class_embed", "transformer.bbox_embed")
    assert not any(name.startswith(predictors) for name in distilled)
    decoder = {name.split(".")[4] for name in distilled if ".decoder." in name}
    assert decoder == (set() if queries == "teacher" else {"0", "1"})
    embeddings = "transformer.model.query_position_embeddings.weight"
    assert (embeddings in distilled) == (queries == "student")
    detection = with_gradient(model, [v for k, v in losses.items() if not k.startswith("loss_kd")])
    assert "transformer.model.decoder.layers.2.mlp.fc2.weight" in detection


@queries
@pytest.mark.parametrize("two_stage", ["False", "True"])
def test_teacher_that_is_the_student(make_trainer, queries, two_stage):
    """Then the cross-head predictions are the teacher's own: no loss, with the modulating factor of
    the quality focal loss."""
    same = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DEFORMABLE_DETR.TWO_STAGE", two_stage]
    same += ["MODEL.DEFORMABLE_DETR.NUM_QUERIES", "12"]
    trainer = make_trainer(
        *("MODEL.RESNETS.DEPTH", "34", "MODEL.CROSSKD.QUERIES", queries),
        *("MODEL.CROSSKD.CLS_LOSS", "qfl"),
        *same,
        teacher=same,
    )
    teacher = method_of(trainer.task).teacher.model
    trainer.plain_model.load_state_dict(teacher.state_dict())
    losses = losses_of(trainer)
    for name in KD:
        for suffix in SUFFIXES:
            assert losses[name + suffix].item() == pytest.approx(0, abs=1e-4)


def test_detection_losses_are_the_plain_detector_s(make_trainer, make_cfg):
    trainer = make_trainer()
    plain = build_model(make_cfg("quick/deformable_detr_R_18_baseline.yaml", *SMALL)).train()
    plain.load_state_dict(trainer.plain_model.state_dict(), strict=True)
    batch = next(iter(trainer.data_loader))
    with EventStorage():
        losses, expected = trainer.model(batch), plain(batch)
    assert len(expected) == 9
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)


@queries
def test_layers_read_the_other_memory(make_trainer, queries):
    """The cross-head predictions and their targets, with the library's decoder layers alone."""
    trainer = make_trainer("MODEL.CROSSKD.QUERIES", queries)
    method, model = method_of(trainer.task), trainer.plain_model
    teacher, task = method.teacher.model, trainer.task.eval()
    batch = next(iter(trainer.data_loader))
    calls = []
    method.distillation_losses = lambda *arguments: calls.append(arguments) or {}
    with torch.no_grad():
        images = model.preprocess_image(batch)
        memory, teacher_memory = (
            x.encode(x.backbone(images.tensor), images) for x in (model, teacher)
        )
        own = teacher.transformer.decode(teacher_memory).predictions
        source = (teacher, teacher_memory) if queries == "teacher" else (model, memory)
        embeddings = source[0].transformer.model.query_position_embeddings.weight
        positions, hidden = (x.expand(len(batch), -1, -1) for x in embeddings.chunk(2, dim=-1))
        reference = source[0].transformer.model.reference_points(positions).sigmoid()
        expected = []
        for i in range(3):
            outputs = []
            for x, read in (source, (teacher, memory), (teacher, teacher_memory)):
                ratios = torch.cat([read.valid_ratios] * (reference.shape[-1] // 2), dim=-1)
                output = x.transformer.model.decoder.layers[i](
                    hidden,
                    positions,
                    reference[:, :, None] * ratios[:, None],
                    read.spatial_shapes,
                    read.spatial_shapes_list,
                    read.level_start_index,
                    read.features,
                    read.mask,
                )
                boxes = x.transformer.bbox_embed[i](output)
                boxes[..., : reference.shape[-1]] += reference.logit()
                outputs.append((output, x.transformer.class_embed[i](output), boxes.sigmoid()))
            (hidden, _, reference), *both = outputs
            expected.append(both)
        for module in (task, model, model.transformer):
            module.training = True  # not the norms
        task(batch)
    cross_head, target, _ = calls[0]
    for i, both in enumerate(expected):
        for predictions, (_, logits, boxes) in zip((cross_head[i], target[i]), both):
            torch.testing.assert_close(predictions.logits, logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(predictions.boxes, boxes, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(cross_head[0].logits, target[0].logits, atol=1e-3)
    if queries == "teacher":
        assert all(torch.equal(mine.logits, x.logits) for mine, x in zip(target, own))


def test_losses_in_closed_form(make_trainer):
    """One query, two classes, two layers: BCE to the teacher's probabilities; L1 of centre and size
    and GIoU, both times the highest of the probabilities; the weights of detection."""
    options = ("MODEL.CROSSKD.CLS_WEIGHT", "3.0", "MODEL.CROSSKD.BOX_WEIGHT", "0.5")
    method = method_of(make_trainer(*options).task)
    found = Predictions(
        torch.tensor([[[0.5, 0.25]]]).logit(), torch.tensor([[[0.5, 0.5, 0.4, 0.2]]])
    )
    target = Predictions(
        torch.tensor([[[0.8, 0.1]]]).logit(), torch.tensor([[[0.5, 0.6, 0.2, 0.2]]])
    )
    losses = method.distillation_losses([found, target], [target, target], torch.tensor(2.0))
    entropy = -math.log(0.5) - 0.1 * math.log(0.25) - 0.9 * math.log(0.75)
    assert losses["loss_kd_cls_0"].item() == pytest.approx(3 * entropy / 2)
    assert losses["loss_kd_box_0"].item() == pytest.approx(0.5 * 5 * 0.3 * 0.8 / 2)
    # Areas 0.08 and 0.04, intersection 0.2 x 0.1, in an enclosing 0.4 x 0.3.
    giou = 0.02 / 0.1 - (0.12 - 0.1) / 0.12
    assert losses["loss_kd_giou_0"].item() == pytest.approx(0.5 * 2 * (1 - giou) * 0.8 / 2)
    assert losses["loss_kd_box"].item() == losses["loss_kd_giou"].item() == 0


@queries
def test_training_run(make_trainer, queries):
    """The teacher does not change and is in no checkpoint; the result is the plain detector."""
    check_training_run(make_trainer("MODEL.CROSSKD.QUERIES", queries), DeformableDETR)


def test_losses_fall(make_trainer):
    """On one batch. The quality focal loss, since the cross entropy does not fall to 0."""
    trainer = make_trainer("MODEL.CROSSKD.CLS_LOSS", "qfl")
    batch = next(iter(trainer.data_loader))
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=0.001)
    history = []
    for _ in range(12):
        losses = trainer.model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: sum(losses[name + suffix] for suffix in SUFFIXES) for name in KD})
    for name in KD:
        assert history[-1][name] < 0.9 * history[0][name]


@ending_process_group()
def train_distributed(cfg):
    torch.set_num_threads(1)
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    trainer = CrossKDTrainer(cfg)
    trainer.train()
    for parameter in trainer.plain_model.parameters():
        # The same on both, although they trained on different images.
        assert torch.equal(*comm.all_gather(parameter.detach()))


@pytest.mark.long
@pytest.mark.usefixtures("alone")
def test_two_processes(make_trainer):
    """DistributedDataParallel with Detectron2's settings."""
    cfg = make_trainer("DATASETS.TEST", "()").cfg
    launch(train_distributed, num_gpus_per_machine=2, dist_url="auto", args=(cfg,))
    assert os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "model_final.pth"))


@queries
def test_transformers_of_another_width(make_trainer, queries):
    """Learned projections, for training only."""
    trainer = make_trainer(
        *("MODEL.CROSSKD.QUERIES", queries), teacher=["MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "64"]
    )
    method = method_of(trainer.task)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    names = {"memory"} if queries == "teacher" else {"memory", "queries", "positions"}
    assert {key.split(".")[0] for key in before} == names
    assert before["memory.weight"].shape == (64, 32)
    with EventStorage():
        assert not find_unused_parameters(trainer.model, next(iter(trainer.data_loader)))
    trainer.train()
    after = method.state_dict()
    assert not any(torch.equal(value, after[key]) for key, value in before.items())
    assert not any("training_only" in key for key in trainer.task.state_dict())


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (["MODEL.DEFORMABLE_DETR.NUM_CLASSES", 5], "number of classes is 5, the student's is 3"),
        (
            ["MODEL.DEFORMABLE_DETR.NUM_FEATURE_LEVELS", 3],
            "feature levels is 3, the student's is 4",
        ),
        (
            ["MODEL.DEFORMABLE_DETR.IN_FEATURES", ["res4", "res5"]],
            r"strides of the features is \[16, 32\], the student's is \[8, 16, 32\]",
        ),
        (
            ["MODEL.DEFORMABLE_DETR.NUM_DECODER_LAYERS", 2],
            "decoder layers is 2, the student's is 3",
        ),
        (
            ["MODEL.DEFORMABLE_DETR.TWO_STAGE", True],
            "TWO_STAGE is True, the student's is False",
        ),
        (["MODEL.META_ARCHITECTURE", "CrossKDDeformableDETR"], "meta-architecture is ShortName"),
    ],
)
def test_teacher_that_does_not_fit(make_cfg, teacher, message):
    cfg = make_cfg("quick/deformable_detr_R_34_teacher.yaml", *SMALL)
    cfg.merge_from_list(teacher)
    student = build_model(
        make_cfg(
            "quick/deformable_detr_R_18_crosskd.yaml", *SMALL, "MODEL.CROSSKD.QUERIES", "student"
        )
    )
    with pytest.raises(ValueError, match=message):
        student.set_teacher(Teacher(build_model(cfg)))


def test_options(make_cfg):
    for key, value, message in (
        ("QUERIES", "both", "is 'both', expected one of"),
        ("CLS_LOSS", "focal", r"is 'focal', expected one of \['qfl', 'bce'\]"),
        ("STRATEGY", "b", r"is 'b', expected one of \['a'\]: it means nothing for DETR"),
        ("FEATURE_WEIGHT", 1.0, r"is 1.0, expected one of \[0\]: it means nothing for DETR"),
    ):
        cfg = make_cfg("quick/deformable_detr_R_18_crosskd.yaml", *SMALL)
        cfg.MODEL.CROSSKD[key] = value
        with pytest.raises(ValueError, match=f"MODEL.CROSSKD.{key} {message}"):
            build_model(cfg)


def test_without_teacher(make_cfg):
    check_needs_teacher(build_model(make_cfg("quick/deformable_detr_R_18_crosskd.yaml", *SMALL)))


def test_config_for_coco(read_cfg, make_cfg):
    """Table 3 of the supplement: the student's config is the plain one's, and an iteration."""
    name = "CrossKD/deformable_detr_R_18_from_R_50_50ep.yaml"
    cfg, plain = read_cfg(name), read_cfg("PlainDet/deformable_detr_R_18_50ep.yaml")
    crosskd = cfg.MODEL.CROSSKD
    teacher = read_cfg("PlainDet/deformable_detr_R_50_50ep.yaml")
    assert (cfg.SOLVER, cfg.INPUT) == (plain.SOLVER, plain.INPUT)
    assert cfg.MODEL.DEFORMABLE_DETR == plain.MODEL.DEFORMABLE_DETR == teacher.MODEL.DEFORMABLE_DETR
    settings = {"cls_weight": DETRCrossKD().cls_weight, **DETRCrossKD.settings(crosskd)}
    assert [settings[x] for x in ("cls_loss", "cls_weight", "box_weight")] == ["bce", 1, 1]
    assert crosskd.QUERIES == "teacher"
    assert crosskd.TEACHER.CONFIG_FILE.endswith("PlainDet/deformable_detr_R_50_50ep.yaml")
    assert crosskd.TEACHER.WEIGHTS.endswith(f"{teacher.OUTPUT_DIR}/model_final.pth")

    cfg = make_cfg(name)
    student = build_model(cfg).train()
    cfg = make_cfg("PlainDet/deformable_detr_R_50_50ep.yaml")
    student.set_teacher(Teacher(build_model(cfg), cfg.INPUT.FORMAT))
    with EventStorage():
        losses = student(next(iter(CrossKDTrainer.build_train_loader(make_cfg(name)))))
    sum(losses.values()).backward()
    assert len(losses) == 3 * 7 + 3 * 6
    assert all(torch.isfinite(loss) for loss in losses.values())
