import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultPredictor, HookBase, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.analysis import FlopCountAnalysis
from detectron2.utils.events import EventStorage

from labelenc import LabelEncTrainer
from labelenc.step1_file import labelenc_of
from plaindet.data import register_coco_format
from plaindet.engine import ending_process_group

STEP1 = "quick/retinanet_R_18_labelenc_step1.yaml"
STEP2 = "quick/retinanet_R_18_labelenc_step2.yaml"


def clone(state):
    return {key: value.clone() for key, value in state.items()}


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


class Recorder(HookBase):
    """Keeps the adapter's weights, the losses and the calls of the encoder of every iteration."""

    def __init__(self, task):
        self.labelenc = labelenc_of(task)
        self.calls = 0
        self.adapters, self.losses, self.encoder_calls = [clone(self.adapter())], [], []
        self.labelenc.label_encoder.register_forward_hook(self.count)

    def adapter(self):
        return self.labelenc.feature_adapter.state_dict()

    def count(self, *_):
        self.calls += 1

    def after_step(self):
        self.adapters.append(clone(self.adapter()))
        latest = self.trainer.storage.latest()
        self.losses.append({k: x for k, (x, i) in latest.items() if i == self.trainer.iter})
        self.encoder_calls.append(self.calls)
        self.calls = 0


def train(cfg, resume=False):
    trainer = LabelEncTrainer(cfg)
    trainer.resume_or_load(resume)
    recorder = Recorder(trainer.task)
    trainer.register_hooks([recorder])
    trainer.train()
    return trainer, recorder


@pytest.fixture(scope="module")
def step1_run(tmp_path_factory):
    return {"folder": tmp_path_factory.mktemp("step1")}


@pytest.fixture
def step1(make_cfg, step1_run):
    """A finished step-1 run of 4 iterations, 2 of them without L3, a checkpoint every 2."""
    if "cfg" not in step1_run:
        cfg = make_cfg(
            STEP1,
            *("SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"),
            *("MODEL.LABELENC.WARMUP_ITERS", "2", "VIS_PERIOD", "2"),
            *("OUTPUT_DIR", str(step1_run["folder"])),
        )
        step1_run["cfg"] = cfg
        step1_run["trainer"], step1_run["recorder"] = train(cfg)
    return step1_run


@pytest.fixture
def step2_cfg(make_cfg, step1):
    return make_cfg(
        STEP2,
        *("SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"),
        *("MODEL.LABELENC.CUTOFF_ITERS", "2"),
        *("MODEL.LABELENC.STEP1_FILE", str(step1["folder"] / "label_encoder.pth")),
    )


def test_step1_warmup(step1):
    """No L3 in the warm-up: the adapter does not move by a bit, decay and momentum included."""
    adapters = step1["recorder"].adapters
    assert equal(adapters[0], adapters[1])
    assert equal(adapters[0], adapters[2])
    assert not equal(adapters[2], adapters[3])
    distances = [losses["loss_distance"] for losses in step1["recorder"].losses]
    assert distances[:2] == [0, 0]
    assert all(0 < distance <= 4 for distance in distances[2:])


def test_step1_reconstruction_from_the_start(step1):
    for losses in step1["recorder"].losses:
        assert losses["loss_reconstruction_cls"] > 0
        assert losses["loss_reconstruction_box_reg"] > 0


def test_step1_file(step1):
    folder = step1["folder"]
    saved = torch.load(folder / "label_encoder.pth", weights_only=True)
    task = step1["trainer"].task
    assert equal(saved["label_encoder"], labelenc_of(task).label_encoder.state_dict())
    assert equal(
        saved["head"], {f"head.{k}": v for k, v in task.detector.head.state_dict().items()}
    )
    assert saved["description"] == {
        "detector": "RetinaNet",
        "num_classes": 3,
        "fpn": {f"p{level}": [64, 2**level] for level in range(3, 8)},
        "fuse_type": "sum",
        "extra_levels": "LastLevelP6P7 on res5",
        "label_map": "boxes",
        "settings": {
            "box_weights": [1.0, 1.0, 1.0, 1.0],
            "anchor_sizes": [
                [12.0, 15.1, 19.0],
                [24.0, 30.2, 38.1],
                [48.0, 60.5, 76.2],
                [96.0, 121.0, 152.4],
                [192.0, 241.9, 304.8],
            ],
            "anchor_aspect_ratios": [[0.5, 1.0, 2.0]] * 5,
            "anchor_offset": 0.0,
        },
    }


class Interruption(HookBase):
    def after_step(self):
        raise KeyboardInterrupt


def test_interrupted_step1_leaves_a_step1_file(make_cfg, step2_cfg):
    trainer = LabelEncTrainer(make_cfg(STEP1, "SOLVER.CHECKPOINT_PERIOD", "1"))
    trainer.register_hooks([Interruption()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    step2_cfg.MODEL.LABELENC.STEP1_FILE = os.path.join(trainer.cfg.OUTPUT_DIR, "label_encoder.pth")
    LabelEncTrainer(step2_cfg).resume_or_load(resume=False)


def test_pictures_in_the_event_storage(make_cfg, monkeypatch):
    trainer = LabelEncTrainer(make_cfg(STEP1, "VIS_PERIOD", "1"))
    batch = next(iter(trainer.data_loader))
    with EventStorage() as storage:
        trainer.model(batch)
    pictures = {name: picture.shape for name, picture, _ in storage._vis_data}
    height, width = batch[0]["image"].shape[1:]
    assert pictures == {
        "label_map": (3, height, width),
        "features_p4: image | label encoding": (3, height, 2 * width),
    }
    # Nobody writes, or empties, the storage of another process.
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    with EventStorage() as storage:
        trainer.model(batch)
    assert not storage._vis_data


def test_step2_inherits_head_and_encoder_fpn(step2_cfg, step1, caplog):
    trainer = LabelEncTrainer(step2_cfg)
    before = clone(trainer.plain_model.state_dict())
    caplog.set_level(logging.INFO, "labelenc.step1_file")
    trainer.resume_or_load(resume=False)
    model, source = trainer.plain_model, step1["trainer"].plain_model
    encoder, expected = (labelenc_of(x.task).label_encoder for x in (trainer, step1["trainer"]))
    assert equal(encoder.state_dict(), expected.state_dict())
    assert equal(model.head.state_dict(), source.head.state_dict())

    after, encoder_fpn = model.state_dict(), expected.state_dict()
    # ResNet-18 has other widths than the encoder, so what reads its features cannot be inherited.
    kept = ("fpn_lateral3", "fpn_lateral4", "fpn_lateral5", "top_block.p6")
    for key in (key for key in after if key.startswith("backbone.")):
        name = key.removeprefix("backbone.")
        inherited = not name.startswith(("bottom_up.", *kept))
        assert torch.equal(after[key], encoder_fpn[name] if inherited else before[key]), key
    (line,) = [record.message for record in caplog.records if "not inherited" in record.message]
    assert all(f"backbone.{layer} (" in line for layer in kept)


def test_step2_phases(step2_cfg, step1):
    trainer, recorder = train(step2_cfg)
    assert recorder.encoder_calls == [1, 1, 0, 0]
    assert [losses["loss_distance"] > 0 for losses in recorder.losses] == [True, True, False, False]
    assert all("loss_reconstruction_cls" not in losses for losses in recorder.losses)
    # The adapter learns until the cut-off and then stays; the encoder is frozen.
    assert not equal(recorder.adapters[0], recorder.adapters[2])
    assert equal(recorder.adapters[2], recorder.adapters[4])
    encoder, expected = (labelenc_of(x.task).label_encoder for x in (trainer, step1["trainer"]))
    assert equal(encoder.state_dict(), expected.state_dict())
    # No label map is drawn any more.
    dataset_dict = {"file_name": step2_cfg.DATASETS.COCO_FORMAT[0][2] + "/1.png", "annotations": []}
    assert "label_map" not in trainer.mapper(dataset_dict)


def test_step2_cut_off_with_a_mapper_of_somebody_else(step2_cfg):
    class Trainer(LabelEncTrainer):
        @classmethod
        def build_train_mapper(cls, cfg):
            mapper = super().build_train_mapper(cfg)
            return lambda dataset_dict: mapper(dataset_dict)

    trainer = Trainer(step2_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.iter == 4


def test_step2_cut_off_reaches_forked_workers(step2_cfg):
    step2_cfg.DATALOADER.NUM_WORKERS = 1
    trainer = LabelEncTrainer(step2_cfg)
    batches = iter(trainer.data_loader)
    assert "label_map" in next(batches)[0]
    trainer.mapper.additions[0].stop_label_maps()
    prefetched = 4  # batches that the worker may have had ready
    assert any("label_map" not in next(batches)[0] for _ in range(prefetched))


def test_loss_normalizer_moves_once(make_cfg):
    trainer = LabelEncTrainer(make_cfg(STEP1))
    model = trainer.plain_model
    batch = next(iter(trainer.data_loader))
    with EventStorage() as storage:
        trainer.model(batch)
        positives = storage.latest()["num_pos_anchors"][0] * len(batch)
    assert model.loss_normalizer == pytest.approx(0.9 * 100 + 0.1 * positives)


def plain_keys(make_cfg):
    return build_model(make_cfg("quick/retinanet_R_18_baseline.yaml")).state_dict().keys()


@pytest.mark.parametrize("name", ["model_0000001.pth", "model_final.pth"])
def test_checkpoint_is_the_plain_detector(step1, make_cfg, name):
    checkpoint = torch.load(step1["folder"] / name, weights_only=False)
    assert checkpoint["model"].keys() == plain_keys(make_cfg)
    more = {"trainer", "training_only", "iteration", "thing_classes", "model_config"}
    assert checkpoint.keys() == {"model", *more}
    plain = build_model(make_cfg("quick/retinanet_R_18_baseline.yaml"))
    plain.load_state_dict(checkpoint["model"], strict=True)


@pytest.mark.parametrize("name", ["model_0000001.pth", "model_final.pth"])
def test_unmodified_detectron2_detects_the_same(step1, name):
    """With a config that has only Detectron2's keys, bit for bit."""
    cfg = get_cfg()
    cfg.merge_from_file(str(step1["folder"] / "plain_config.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.WEIGHTS = str(step1["folder"] / name)
    predictor = DefaultPredictor(cfg)

    model = build_model(step1["cfg"]).eval()
    model.detector.test_score_thresh = 0.0
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    for inputs in build_detection_test_loader(step1["cfg"], "tiny_val"):
        with torch.no_grad():
            ours = model(inputs)[0]["instances"]
            plain = predictor.model(inputs)[0]["instances"]
        assert len(plain) > 0
        assert torch.equal(ours.pred_boxes.tensor, plain.pred_boxes.tensor)
        assert torch.equal(ours.scores, plain.scores)
        assert torch.equal(ours.pred_classes, plain.pred_classes)


def test_inference_costs_what_plain_costs(step1):
    cfg = get_cfg()
    cfg.merge_from_file(str(step1["folder"] / "plain_config.yaml"))
    inputs = [{"image": torch.rand(3, 64, 80) * 255}]
    plain, ours = (build_model(c).eval() for c in (cfg, step1["cfg"]))
    flops = [FlopCountAnalysis(model, (inputs,)).by_operator() for model in (plain, ours)]
    assert flops[0]["conv"] > 0
    assert flops[0] == flops[1]
    sizes = [sum(value.numel() for value in m.state_dict().values()) for m in (plain, ours)]
    assert sizes[0] == sizes[1]


def test_resume_needs_no_step1_file(step2_cfg, step1, tmp_path):
    """A step-2 checkpoint has all it needs to go on."""
    step1_file = tmp_path / "label_encoder.pth"
    shutil.copy(step1["folder"] / "label_encoder.pth", step1_file)
    step2_cfg.MODEL.LABELENC.STEP1_FILE = str(step1_file)
    first, _ = train(step2_cfg)
    step1_file.unlink()
    step2_cfg.SOLVER.MAX_ITER = 6
    step2_cfg.MODEL.LABELENC.CUTOFF_ITERS = 0
    resumed = LabelEncTrainer(step2_cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4
    assert equal(resumed.plain_model.state_dict(), first.plain_model.state_dict())
    training_only = resumed.task.training_only.state_dict()
    assert equal(training_only, first.task.training_only.state_dict())
    resumed.train()
    assert resumed.iter == 6


SINGLE_RUN = (
    *("SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2", "MODEL.LABELENC.STEP1_ITERS", "3"),
    *("MODEL.LABELENC.WARMUP_ITERS", "1", "MODEL.LABELENC.CUTOFF_ITERS", "1"),
    *("MODEL.LABELENC.LAMBDA2", "0.5", "MODEL.LABELENC.LAMBDA", "2.0"),
)


class EncoderRecorder(Recorder):
    """Keeps the weights of the encoder and of the backbone, too."""

    def __init__(self, task):
        super().__init__(task)
        self.detector = task.detector
        self.encoders = [clone(self.labelenc.label_encoder.state_dict())]
        self.backbones = []

    def after_step(self):
        super().after_step()
        self.encoders.append(clone(self.labelenc.label_encoder.state_dict()))
        self.backbones.append(clone(self.detector.backbone.state_dict()))


def test_single_run(make_cfg):
    trainer = LabelEncTrainer(make_cfg(STEP1, *SINGLE_RUN))
    trainer.resume_or_load(resume=False)
    recorder = EncoderRecorder(trainer.task)
    trainer.register_hooks([recorder])
    trainer.train()
    # Step 1, and then step 2 with the constant label encoder of step 1, with its norms.
    reconstructs = ["loss_reconstruction_cls" in losses for losses in recorder.losses]
    assert reconstructs == [True, True, True, False, False, False]
    learns = [not equal(*pair) for pair in zip(recorder.encoders, recorder.encoders[1:])]
    assert learns == reconstructs
    # L3 after the warm-up, the auxiliary loss until the cut-off, for which nothing is encoded.
    distances = [losses["loss_distance"] for losses in recorder.losses]
    assert [distance > 0 for distance in distances] == [False, True, True, True, True, False]
    assert recorder.encoder_calls == [1, 1, 1, 1, 1, 0]
    assert equal(recorder.adapters[5], recorder.adapters[6])
    # The backbone goes on from its own weights.
    steps = [
        max((second[k] - first[k]).abs().max() for k in first if k.endswith("weight"))
        for first, second in zip(recorder.backbones, recorder.backbones[1:])
    ]
    assert all(0 < step < 0.1 for step in steps)


def test_single_run_with_a_warmup_beyond_step1(make_cfg):
    """The warm-up is of step 1 alone."""
    overrides = ("MODEL.LABELENC.WARMUP_ITERS", "5")
    _, recorder = train(make_cfg(STEP1, *SINGLE_RUN, *overrides))
    distances = [losses["loss_distance"] for losses in recorder.losses]
    assert [distance > 0 for distance in distances] == [False, False, False, True, True, False]


def test_single_run_has_the_losses_of_step2(make_cfg):
    trainer = LabelEncTrainer(make_cfg(STEP1, *SINGLE_RUN))
    model = trainer.task
    labelenc_of(model).begin_step2()
    own = LabelEncTrainer(make_cfg(STEP2, "MODEL.LABELENC.LAMBDA", "2.0")).task
    own.load_state_dict(model.state_dict())
    own.training_only.load_state_dict(model.training_only.state_dict())
    batch = next(iter(trainer.data_loader))
    with EventStorage():
        losses, expected = model(batch), own(batch)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_single_run_resumes_exactly(make_cfg, tmp_path):
    """From a checkpoint of step 1, and from one of step 2."""
    cfg = make_cfg(STEP1, *SINGLE_RUN)
    whole, _ = train(cfg)
    for done in (2, 4):
        Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text(f"model_{done - 1:07d}.pth")
        resumed, recorder = train(cfg, resume=True)
        assert len(recorder.losses) == 6 - done
        assert equal(resumed.plain_model.state_dict(), whole.plain_model.state_dict())
        training_only = resumed.task.training_only.state_dict()
        assert equal(training_only, whole.task.training_only.state_dict())


@pytest.mark.parametrize(
    "overrides",
    [
        ("SOLVER.MAX_ITER", "3"),
        ("MODEL.LABELENC.STEP", "2"),
        ("MODEL.LABELENC.LAMBDA1", "0.0", "MODEL.LABELENC.LAMBDA2", "0.0"),
    ],
)
def test_single_run_that_cannot_be(make_cfg, overrides):
    with pytest.raises(ValueError, match="MODEL.LABELENC.STEP1_ITERS is 3"):
        LabelEncTrainer(make_cfg(STEP1, *SINGLE_RUN, *overrides))


def test_single_run_whose_cutoff_is_in_step1(make_cfg):
    """Which still needs its label maps."""
    cfg = make_cfg(STEP1, *SINGLE_RUN, "MODEL.LABELENC.CUTOFF_ITERS", "4")
    with pytest.raises(ValueError, match=r"CUTOFF_ITERS is 4, .* at iteration 2, .* at most 3"):
        LabelEncTrainer(cfg)


@pytest.mark.parametrize(("step", "key"), [(1, "WARMUP_ITERS"), (2, "CUTOFF_ITERS")])
@pytest.mark.parametrize(("iterations", "is_warned"), [(2, True), (1, False)])
def test_phase_as_long_as_the_run_is_warned_of(make_cfg, caplog, step, key, iterations, is_warned):
    cfg = make_cfg(
        STEP1 if step == 1 else STEP2,
        *("SOLVER.MAX_ITER", "2", f"MODEL.LABELENC.{key}", str(iterations)),
    )
    LabelEncTrainer(cfg)
    warning = f"MODEL.LABELENC.{key} {iterations}, expected less than SOLVER.MAX_ITER 2"
    assert (warning in caplog.text) == is_warned


def test_reference_world_size_scales_the_phases(make_cfg):
    cfg = make_cfg(
        "LabelEnc/retinanet_R_50_FPN_step1.yaml",
        *("SOLVER.REFERENCE_WORLD_SIZE", "8", "SOLVER.IMS_PER_BATCH", "16"),
    )
    cfg.freeze()
    scaled = LabelEncTrainer.auto_scale_workers(cfg, 4)
    assert scaled.SOLVER.MAX_ITER == 240000
    assert scaled.MODEL.LABELENC.WARMUP_ITERS == 60000
    assert scaled.MODEL.LABELENC.CUTOFF_ITERS == 20000
    assert scaled.is_frozen()
    assert LabelEncTrainer.auto_scale_workers(cfg, 8).MODEL.LABELENC.WARMUP_ITERS == 30000


@ending_process_group()
def train_distributed(cfg):
    torch.set_num_threads(1)
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    trainer, recorder = train(cfg)
    for parameter in trainer.task.parameters():
        # The same on both, although they trained on different images.
        assert torch.equal(*comm.all_gather(parameter.detach()))
    if comm.is_main_process():
        distances = [losses["loss_distance"] for losses in recorder.losses]
        torch.save(distances, os.path.join(cfg.OUTPUT_DIR, "distances.pth"))


@pytest.mark.parametrize(
    ("step", "expected"), [("both", "-++++-"), pytest.param(2, "+-", marks=pytest.mark.long)]
)
@pytest.mark.usefixtures("alone")
def test_two_processes(step, expected, make_cfg, step2_cfg):
    """DistributedDataParallel with Detectron2's settings, through every phase: those of step 1 are
    in a single run too."""
    cfg = make_cfg(STEP1, *SINGLE_RUN)
    if step == 2:
        cfg = step2_cfg
        cfg.SOLVER.MAX_ITER, cfg.MODEL.LABELENC.CUTOFF_ITERS = 2, 1
    launch(train_distributed, num_gpus_per_machine=2, dist_url="auto", args=(cfg,))
    distances = torch.load(os.path.join(cfg.OUTPUT_DIR, "distances.pth"))
    assert "".join("+" if distance > 0 else "-" for distance in distances) == expected
