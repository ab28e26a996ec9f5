"""CrossKD for a meta-architecture of somebody else's project, by what the README documents."""

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.utils.events import EventStorage
from torch import nn

from crosskd import CrossKDDetector, DenseCrossKD
from plaindet.engine import PlainTrainer, Teacher, TrainingTask, adapter_of


class OwnHead(RetinaNetHead):
    """A head with a temperature for each level, so that predictions need to know their level."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.temperatures = nn.Parameter(torch.ones(5))

    def predict(self, cls_feature, box_feature, level):
        return self.cls_score(cls_feature) * self.temperatures[level], self.bbox_pred(box_feature)

    def forward(self, features):
        levels = [
            self.predict(self.cls_subnet(feature), self.bbox_subnet(feature), level)
            for level, feature in enumerate(features)
        ]
        return [list(prediction) for prediction in zip(*levels)]


@META_ARCH_REGISTRY.register()
class OwnDetector(RetinaNet):
    @classmethod
    def from_config(cls, cfg):
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        arguments["head"] = OwnHead(
            input_shape=[shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES],
            num_classes=cfg.MODEL.RETINANET.NUM_CLASSES,
            num_anchors=9,
            conv_dims=[64, 64],
        )
        return arguments


def test_meta_architecture_of_another_project(make_cfg, tmp_path):
    """It trains, its predictors learn from the ground truth alone, and the result is plain."""
    plain = ("MODEL.META_ARCHITECTURE", "OwnDetector")
    teacher = build_model(make_cfg("quick/retinanet_R_34_teacher.yaml", *plain))
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    options = [*plain, "MODEL.RETINANET.NUM_CLASSES", 3, "DATASETS.TRAIN", ("tiny_train",)]
    trainer = PlainTrainer(
        make_cfg(
            "quick/retinanet_R_18_crosskd.yaml",
            *plain,
            *("MODEL.TRAINING_METHODS", "('CrossKD',)", "SOLVER.MAX_ITER", "2"),
            *("MODEL.CROSSKD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")),
            *("MODEL.CROSSKD.TEACHER.OPTS", str(options)),
        )
    )
    trainer.train()
    assert trainer.storage.latest()["loss_kd_cls"][0] > 0
    checkpoint = torch.load(trainer.checkpointer.get_checkpoint_file(), weights_only=False)
    result = build_model(make_cfg("quick/retinanet_R_18_baseline.yaml", *plain))
    result.load_state_dict(checkpoint["model"], strict=True)
    assert (result.head.temperatures != 1).any()


class DecoupledHead(nn.Module):
    """As in YOLOX and RTMDet: a stem and two towers for each level, whose convolutions all levels
    share and whose norms they do not, in blocks that end in an activation of another kind."""

    def __init__(self, channels, num_classes, width, depth, activation, levels=5):
        super().__init__()
        self.stems = nn.ModuleList(
            Conv2d(channels, width, 1, activation=activation()) for _ in range(levels)
        )
        for name in ("cls_subnet", "bbox_subnet"):
            convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)]
            blocks = [
                nn.Sequential(
                    *(nn.Sequential(x, nn.GroupNorm(4, width), activation()) for x in convs)
                )
                for _ in range(levels)
            ]
            self.add_module(name, nn.ModuleList(blocks))
        self.cls_score = nn.Conv2d(width, 9 * num_classes, 1)
        self.bbox_pred = nn.Conv2d(width, 9 * 4, 1)

    def forward(self, features):
        features = [stem(x) for stem, x in zip(self.stems, features)]
        cls, box = (
            [tower(x) for tower, x in zip(towers, features)]
            for towers in (self.cls_subnet, self.bbox_subnet)
        )
        return [self.cls_score(x) for x in cls], [self.bbox_pred(x) for x in box]


ACTIVATIONS = {"SiLU": nn.SiLU, "GELU": nn.GELU, "LeakyReLU": nn.LeakyReLU, "ReLU": nn.ReLU}


@pytest.fixture
def make_decoupled(make_cfg):
    """Returns a function that makes a RetinaNet with a decoupled head."""

    def make(activation, depth, channels=64):
        width = ("MODEL.FPN.OUT_CHANNELS", channels)
        model = build_model(make_cfg("quick/retinanet_R_18_baseline.yaml", *width))
        model.head = DecoupledHead(channels, 3, 16, depth, ACTIVATIONS[activation])
        return model

    return make


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_decoupled_head_in_parts(make_decoupled, activation):
    """Of each level's own tower, from each position: the predictions of the whole."""
    adapter = adapter_of(make_decoupled(activation, 2).eval())
    assert adapter.num_positions == 2
    features = {f"p{i}": torch.randn(2, 64, 2 ** (7 - i), 2 ** (7 - i)) for i in range(3, 8)}
    head = adapter.detector.head
    for position in range(3):
        adapter.position = position
        run = adapter.run_head(features)
        assert adapter.width == (16 if position else 64)
        assert adapter.is_rectified == (position > 0 and activation == "ReLU")
        if position == 1:
            expected = head.bbox_subnet[3][0](head.stems[3](features["p6"]))
            assert torch.equal(run.held.box[3], expected)
        parts, whole = adapter.predictions_from(run.held), adapter.flatten(run.predictions)
        assert torch.equal(parts.logits, whole.logits)
        assert torch.equal(parts.regression, whole.regression)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_heads_of_other_depths(make_decoupled, make_cfg, position):
    """From the student's i-th activation through all that the teacher has behind its own i-th."""
    student = make_decoupled("SiLU", 2).train()
    teacher = make_decoupled("SiLU", 3, channels=32)
    method = DenseCrossKD(position=position, teacher=Teacher(teacher))
    task = TrainingTask(student, [method])
    # Where the FPNs differ in width, both towers read the same projected features.
    assert {*method.state_dict()} == ({"cls_projection.weight"} if position == 0 else set())
    cfg = make_cfg("quick/retinanet_R_18_baseline.yaml")
    batch = next(iter(PlainTrainer.build_train_loader(cfg)))
    with EventStorage():
        losses = task(batch)
    (losses["loss_kd_cls"] + losses["loss_kd_box"]).backward()
    reached = {
        name.rpartition(".")[0]
        for name, parameter in student.head.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    # The convolutions are shared, and named after the first level.
    convs = {name for name in reached if "_subnet.0" in name and name.endswith(".0")}
    blocks = range(position)
    assert convs == {f"{x}_subnet.0.{i}.0" for x in ("cls", "bbox") for i in blocks}
    assert ("stems.2" in reached) == (position > 0)
    assert not {"cls_score", "bbox_pred"} & reached


def test_position_that_one_head_does_not_have(make_decoupled):
    shallow, deep = make_decoupled("SiLU", 1), make_decoupled("SiLU", 2)
    with pytest.raises(ValueError, match=r"POSITION is 2, expected one of \[0, 1\]"):
        TrainingTask(shallow, [DenseCrossKD(position=2, teacher=Teacher(deep))])
    with pytest.raises(
        ValueError, match="POSITION is 2, but the last position of the teacher's head is 1"
    ):
        TrainingTask(deep, [DenseCrossKD(position=2, teacher=Teacher(shallow))])


def test_former_base_class():
    """It says what has taken its place."""
    with pytest.raises(TypeError, match=r"Old is not needed.*TRAINING_METHODS \('CrossKD',\)"):

        class Old(CrossKDDetector, OwnDetector):
            pass
