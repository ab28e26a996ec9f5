"""CrossKD for a meta-architecture of somebody else's project, by what the README documents."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from torch import nn

from crosskd import CrossKDDetector
from plaindet.engine import PlainTrainer


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


def test_former_base_class():
    """It says what has taken its place."""
    with pytest.raises(TypeError, match=r"Old is not needed.*TRAINING_METHODS \('CrossKD',\)"):

        class Old(CrossKDDetector, OwnDetector):
            pass
