"""Detectors of somebody else, without a class of this project in their code, as training tasks."""

import copy

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from crosskd import DenseCrossKD, TwoStageCrossKD
from labelenc import LabelEnc, LabelMap
from plaindet import config, register_config
from plaindet.engine import PlainTrainer, Teacher, TrainingTask
from plaindet.seeding import seed_everything

BASELINE = "quick/retinanet_R_18_baseline.yaml"


@META_ARCH_REGISTRY.register()
class OwnLosses(RetinaNet):
    """With a config key of its own, and a third loss."""

    def __init__(self, cfg):
        super().__init__(**RetinaNet.from_config(cfg))
        self.weight = cfg.MODEL.OWN_LOSSES.WEIGHT

    def losses(self, anchors, pred_logits, *others):
        losses = super().losses(anchors, pred_logits, *others)
        losses["loss_sparsity"] = self.weight * torch.cat(pred_logits, dim=1).sigmoid().mean()
        return losses


@META_ARCH_REGISTRY.register()
class OwnForwardTraining(RetinaNet):
    """Has its losses by other functions, and a moving average of its own."""

    def forward_training(self, images, features, predictions, gt_instances):
        logits, deltas = self._transpose_dense_predictions(predictions, [self.num_classes, 4])
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        losses = self.losses(anchors, logits, labels, deltas, boxes)
        scale = self._ema_update("own_scale", losses["loss_cls"].detach(), 1.0)
        return {"loss_own": sum(losses.values()) / scale}


@META_ARCH_REGISTRY.register()
class OwnForward(RetinaNet):
    """Does more with the features in its `forward`."""

    def forward(self, batched_inputs):
        if not self.training:
            return super().forward(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        levels = [features[name] for name in self.head_in_features]
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        losses = self.forward_training(images, levels, self.head(levels), gt_instances)
        return {**losses, "loss_norm": 1e-3 * features["p3"].square().mean()}


def add_own_config(cfg):
    cfg.MODEL.setdefault("OWN_LOSSES", CfgNode({"WEIGHT": 0.5}))


@pytest.fixture(autouse=True)
def _own_config(monkeypatch):
    monkeypatch.setattr(config, "_registered", [])
    register_config(add_own_config)


OWN = ["OwnLosses", "OwnForwardTraining", "OwnForward", "PanopticFPN"]
own_detectors = pytest.mark.parametrize("name", OWN)
PANOPTIC = [
    *("MODEL.MASK_ON", "True", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
]


def options_of(name):
    return ["MODEL.META_ARCHITECTURE", name, *(PANOPTIC if name == "PanopticFPN" else ())]


@pytest.fixture
def make_own_cfg(make_cfg):
    def make(name, *overrides):
        detector = "mask_rcnn" if name == "PanopticFPN" else "retinanet"
        file = f"quick/{detector}_R_18_baseline.yaml"
        return make_cfg(file, *options_of(name), *overrides)

    return make


def make_batch():
    batch = []
    for size, corners in (((64, 80), [8.0, 8, 40, 40]), ((60, 64), [20.0, 4, 60, 33])):
        boxes, classes = torch.tensor([corners]), torch.tensor([1])
        instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
        polygon = [corners[i] for i in (0, 1, 2, 1, 2, 3)]
        instances.gt_masks = PolygonMasks([[np.array(polygon)]])
        batch.append(
            {
                "image": (torch.rand(3, *size) * 255),
                "instances": instances,
                "sem_seg": torch.randint(0, 5, size),
                "label_map": LabelMap.from_boxes(boxes, classes, size),
            }
        )
    return batch


def losses_of(model, batch):
    seed_everything(0)  # of sampled proposals
    with EventStorage() as storage:
        return model(copy.deepcopy(batch)), storage.latest()


def methods_of(names, name, teacher):
    crosskd = TwoStageCrossKD if name == "PanopticFPN" else DenseCrossKD
    options = {} if name == "PanopticFPN" else {"position": 1}
    made = {
        "step 1": lambda: LabelEnc(step=1, norm="BN"),
        "step 2": lambda: LabelEnc(step=2, norm="BN"),
        "CrossKD": lambda: crosskd(teacher=teacher, **options),
    }
    return [made[x]() for x in names]


@own_detectors
@pytest.mark.parametrize("names", [["step 1"], ["step 2"], ["CrossKD"], ["step 2", "CrossKD"]])
def test_detection_losses_are_the_detector_s(make_own_cfg, name, names):
    """Bit for bit, with all of its own, its state and what it logs."""
    cfg, batch = make_own_cfg(name), make_batch()
    plain = build_model(cfg).train()
    task = TrainingTask(
        copy.deepcopy(plain), methods_of(names, name, Teacher(build_model(cfg)))
    ).train()
    for _ in range(2):  # the second time with a moving average
        (losses, logged), (expected, expected_logged) = (losses_of(x, batch) for x in (task, plain))
        assert {"loss_sparsity", "loss_own", "loss_norm", "loss_sem_seg"} & expected.keys()
        assert all(torch.equal(losses[key], loss) for key, loss in expected.items())
        assert expected_logged.items() <= logged.items()
    for key in ("loss_normalizer", "own_scale"):
        assert getattr(task.detector, key, None) == getattr(plain, key, None)
    more = {key.split("_")[1] for key in losses.keys() - expected.keys()}
    wanted = {"step 1": {"reconstruction", "distance"}, "step 2": {"distance"}, "CrossKD": {"kd"}}
    assert more == set().union(*(wanted[x] for x in names))
    if "step 1" in names:
        reconstruction = {key for key in losses if key.startswith("loss_reconstruction_")}
        assert len(reconstruction) == len(expected)
    assert type(task.detector) is type(plain)
    assert vars(task.detector).keys() == vars(plain).keys()  # nothing is left of the observer


class Trainer(PlainTrainer):
    """With semantic segmentation, which the data set has not."""

    @classmethod
    def build_train_mapper(cls, cfg):
        mapper = super().build_train_mapper(cfg)

        def add_segmentation(sample):
            sample["sem_seg"] = torch.zeros(sample["image"].shape[1:], dtype=torch.int64)

        mapper.additions = [*mapper.additions, add_segmentation]
        return mapper


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.long) for name in OWN[:2]),
        *OWN[2:],
    ],
)
def test_from_its_plain_config(make_own_cfg, name, tmp_path):
    """One key more for LabelEnc, for CrossKD and for both, with the folder of the teacher's run;
    what they train is the plain detector."""
    step1_file, teacher = tmp_path / "step1" / "label_encoder.pth", tmp_path / "teacher"
    phases = ["MODEL.LABELENC.WARMUP_ITERS", "1", "MODEL.LABELENC.CUTOFF_ITERS", "0"]
    step2 = ["MODEL.LABELENC.STEP", "2", "MODEL.LABELENC.STEP1_FILE", str(step1_file)]
    crosskd = ["MODEL.CROSSKD.TEACHER.CONFIG_FILE", str(teacher)]
    if name != "PanopticFPN":  # a head of two convolutions
        crosskd += ["MODEL.CROSSKD.POSITION", "1"]
    runs = {
        "teacher": [],
        "step1": ["MODEL.TRAINING_METHODS", "('LabelEnc',)"],
        "step2": ["MODEL.TRAINING_METHODS", "('LabelEnc',)", *step2],
        "crosskd": ["MODEL.TRAINING_METHODS", "('CrossKD',)", *crosskd],
        "both": ["MODEL.TRAINING_METHODS", "('LabelEnc', 'CrossKD')", *step2, *crosskd],
    }
    for run, options in runs.items():
        cfg = make_own_cfg(
            name,
            *("SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / run)),
            *(*phases, *options),
        )
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        logged = trainer.storage.latest()
        assert ("loss_distance" in logged) == (run in ("step1", "step2", "both"))
        assert ("loss_kd_cls" in logged) == (run in ("crosskd", "both"))
        assert type(trainer.plain_model) is META_ARCH_REGISTRY.get(name)
    plain = build_model(make_own_cfg(name))
    checkpoint = torch.load(tmp_path / "both" / "model_final.pth", weights_only=False)
    plain.load_state_dict(checkpoint["model"], strict=True)
    assert f"META_ARCHITECTURE: {name}" in (tmp_path / "both" / "plain_config.yaml").read_text()


class TwoCalls(RetinaNet):
    def forward(self, batched_inputs):
        self.backbone(self.preprocess_image(batched_inputs).tensor)
        return super().forward(batched_inputs)


def test_observer(make_cfg):
    """A second call of the backbone is refused, and an exception leaves nothing behind."""
    detector = build_model(make_cfg(BASELINE))
    task = TrainingTask(detector, [LabelEnc(step=1, norm="BN")]).train()
    before, batch = vars(detector).copy(), make_batch()
    detector.forward_training = lambda *_: 1 / 0
    with EventStorage(), pytest.raises(ZeroDivisionError):
        task(batch)
    del detector.forward_training
    assert vars(detector) == before
    assert not any(x._forward_hooks for x in detector.modules())

    detector.__class__ = TwoCalls
    with EventStorage(), pytest.raises(RuntimeError, match="backbone was called 2 times"):
        task(batch)
    assert not any(x._forward_hooks for x in detector.modules())


def test_old_training_only_entries(make_cfg):
    """Of checkpoints in which the parts of the methods were not told apart."""
    tasks = [
        TrainingTask(build_model(make_cfg(BASELINE)), [LabelEnc(step=1, norm="BN")])
        for _ in range(2)
    ]
    state = tasks[0].training_only.state_dict()
    assert all(key.startswith("LabelEnc.") for key in state)
    old = {key.removeprefix("LabelEnc."): value for key, value in state.items()}
    tasks[1].training_only.load_state_dict(old)
    for key, value in tasks[1].training_only.state_dict().items():
        assert torch.equal(value, state[key])


def test_two_methods_of_one_name(make_cfg):
    methods = [LabelEnc(step=2), LabelEnc(step=2)]
    with pytest.raises(ValueError, match="two methods of the name LabelEnc"):
        TrainingTask(build_model(make_cfg(BASELINE)), methods)


def test_unknown_method(make_cfg):
    cfg = make_cfg(BASELINE, "MODEL.TRAINING_METHODS", "('LabelDec',)")
    with pytest.raises(ValueError, match="names 'LabelDec', expected some of .*'LabelEnc'"):
        PlainTrainer(cfg)


@pytest.mark.parametrize(
    "config",
    [
        (BASELINE, "MODEL.TRAINING_METHODS", "('LabelEnc',)"),
        ("quick/retinanet_R_18_labelenc_step1.yaml",),
    ],
)
def test_build_model_of_a_plain_detector(make_cfg, config):
    """As of a DefaultTrainer. It would train without the methods, also those of a short name."""

    class PlainModelTrainer(PlainTrainer):
        @classmethod
        def build_model(cls, cfg):
            return build_model(make_cfg(BASELINE))

    assert not PlainModelTrainer(make_cfg(BASELINE)).task.methods
    with pytest.raises(ValueError, match=r"without \['LabelEnc'\]: return .*build_task\(cfg\)"):
        PlainModelTrainer(make_cfg(*config))


def test_resuming_under_the_plain_name(make_cfg):
    """A run of a short name goes on as the plain detector with its methods."""
    options = ("SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "1")
    cfg = make_cfg("quick/retinanet_R_18_labelenc_step1.yaml", *options)
    PlainTrainer(cfg).train()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.TRAINING_METHODS = "RetinaNet", ("LabelEnc",)
    cfg.SOLVER.MAX_ITER = 3
    trainer = PlainTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    trainer.train()
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    with pytest.raises(ValueError, match="META_ARCHITECTURE was 'RetinaNet' and is 'FCOS'"):
        PlainTrainer(cfg).resume_or_load(resume=True)
