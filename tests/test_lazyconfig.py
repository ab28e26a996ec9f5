"""LazyConfigs, from the file to a plain checkpoint that Detectron2 reads."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, default_argument_parser, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import JSONWriter

import train_net
from plaindet import get_config_file, read_config
from plaindet.engine import TrainingTask, build_optimizer, build_task, lazy
from plaindet.engine.lazy import plain_lazy_config

# Of three iterations.
KEPT = ("model_0000001.pth", "model_0000002.pth")
# A config of the user's, which makes one of this project tiny.
TINY = """
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet

parts = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
model, dataloader, optimizer, lr_multiplier, train = LazyConfig.load({config!r}, parts)


def shrink(detector):
    backbone = detector.backbone
    backbone.out_channels = 16
    if "bottom_up" in backbone:
        backbone.bottom_up.stem.norm, backbone.bottom_up.stem.out_channels = "BN", 8
        backbone.bottom_up.stages = [
            L(ResNet.make_stage)(
                block_class=BasicBlock,
                num_blocks=1,
                in_channels=8 * 2**i,
                out_channels=16 * 2**i,
                stride_per_block=[1 if i == 0 else 2],
                norm="BN",
            )
            for i in range(4)
        ]
    else:
        backbone.net.img_size = backbone.square_pad = 64
        backbone.net.embed_dim, backbone.net.num_heads = 32, 2
        backbone.net.depth, backbone.net.window_size = 4, 2
        backbone.net.window_block_indexes = [0, 2]
    if "roi_heads" in detector:
        heads = detector.roi_heads
        detector.proposal_generator.head.in_channels = 16
        heads.num_classes = 3
        heads.box_head.input_shape.channels = 16
        heads.box_head.conv_dims = [16 for _ in heads.box_head.conv_dims]
        heads.box_head.fc_dims = [32 for _ in heads.box_head.fc_dims]
        heads.box_predictor.input_shape.channels = 32
        if "mask_head" in heads:
            heads.mask_head.input_shape.channels = 16
            heads.mask_head.conv_dims = [16, 16]
    else:
        detector.num_classes = 3
        backbone.top_block.in_channels = 128
        detector.head.input_shape = [ShapeSpec(channels=16)] * 5
        detector.head.conv_dims = [16] * 4


shrink(model.get("detector", model))
for _method in model.get("methods", ()):
    if "teacher" in _method:
        shrink(_method.teacher.model)
train.device, train.init_checkpoint, train.eval_period, train.seed = "cpu", "", 0, 1
train.max_iter, train.checkpointer.period = 3, 2
train.amp.enabled, train.log_period = False, 1
dataloader.train.total_batch_size, dataloader.train.num_workers = 2, 0
dataloader.test.num_workers = 0
dataloader.train.dataset.names, dataloader.test.dataset.names = "tiny_train", "tiny_val"
for _mapper in (dataloader.train.mapper, dataloader.test.mapper):
    for _augmentation in _mapper.augmentations:
        if "short_edge_length" in _augmentation:
            _augmentation.short_edge_length = [64] if _mapper.is_train else 64
        if "target_height" in _augmentation:
            _augmentation.target_height = _augmentation.target_width = 64
            _augmentation.max_scale = 1.0
    # Which needs shapely for the polygons of masks.
    _mapper.augmentations = [x for x in _mapper.augmentations if "crop_size" not in x]
"""


@pytest.fixture
def tiny_config(tmp_path, tiny_data):
    """Returns a function that writes a tiny variant of a config of this project."""

    def write(config):
        path = tmp_path / f"{config}.py"
        path.write_text(TINY.format(config=get_config_file(f"LazyConfig/{config}.py")))
        return path

    return write


@pytest.fixture
def train(tmp_path, tiny_config):
    """Returns a function that trains a tiny variant of a config of this project, and returns the
    folder of the run."""

    def call(config, *arguments, main=train_net.main):
        path, output = tiny_config(config), tmp_path / config
        flags = [x for x in arguments if x.startswith("--")]
        overrides = [x for x in arguments if not x.startswith("--")]
        overrides.append(f"train.output_dir={output}")
        command = ["--config-file", str(path), *flags, *overrides]
        main(default_argument_parser().parse_args(command))
        return output

    return call


def metrics_of(output):
    """Of each iteration."""
    lines = (output / "metrics.json").read_text().splitlines()
    return {x["iteration"]: x for x in map(json.loads, lines) if "total_loss" in x}


def checkpoint_of(path):
    return torch.load(path, weights_only=True)


def check_plain(output):
    """The checkpoint of a run is that of the plain detector, whose config is beside it, for
    Detectron2 alone."""
    config = LazyConfig.load(str(output / "plain_lazyconfig.yaml"))
    detector = instantiate(config.model)
    assert type(detector).__module__.startswith("detectron2.")
    detector.load_state_dict(checkpoint_of(output / "model_final.pth")["model"], strict=True)
    text = (output / "plain_lazyconfig.yaml").read_text()
    assert "labelenc" not in text.lower().replace(str(output).lower(), "")
    assert not any(f"{name}." in text for name in ("plaindet", "crosskd"))


def detectron2_script(args):
    """What tools/lazyconfig_train_net.py of Detectron2 does with a config."""
    config = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    train = config.train
    model = instantiate(config.model).to(train.device)
    if args.eval_only:
        DetectionCheckpointer(model).load(train.init_checkpoint)
        loader, evaluator = (instantiate(config.dataloader[x]) for x in ("test", "evaluator"))
        assert "AP" in inference_on_dataset(model, loader, evaluator)["bbox"]
        return
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    trainer = SimpleTrainer(model, instantiate(config.dataloader.train), optimizer)
    Path(train.output_dir).mkdir(exist_ok=True)
    checkpointer = DetectionCheckpointer(model, train.output_dir, trainer=trainer)
    periodic = hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer)
    writer = hooks.PeriodicWriter([JSONWriter(f"{train.output_dir}/metrics.json")], 1)
    schedule = hooks.LRScheduler(scheduler=instantiate(config.lr_multiplier))
    trainer.register_hooks([schedule, periodic, writer])
    checkpointer.resume_or_load(train.init_checkpoint, resume=args.resume)
    trainer.train(trainer.iter + 1 if args.resume else 0, train.max_iter)


def test_both_steps_and_resume(train):
    """Of LabelEnc; resumed bit for bit."""
    method = "model.methods.0"
    step1 = train("retinanet_R_50_FPN_labelenc_step1", f"{method}.warmup_iters=1")
    distances = [x["loss_distance"] for x in metrics_of(step1).values()]
    assert distances[0] == 0
    assert min(distances[1:]) > 0
    check_plain(step1)
    expected = checkpoint_of(step1 / "model_final.pth")
    expected_file = checkpoint_of(step1 / "label_encoder.pth")
    (step1 / "last_checkpoint").write_text("model_0000001.pth")
    train("retinanet_R_50_FPN_labelenc_step1", f"{method}.warmup_iters=1", "--resume")
    assert "Starting training from iteration 2" in (step1 / "log.txt").read_text()
    found = checkpoint_of(step1 / "model_final.pth")
    assert found["iteration"] == expected["iteration"] == 2
    assert any(key.startswith("LabelEnc.label_encoder") for key in found["training_only"])
    for part in ("model", "training_only"):
        for key, value in expected[part].items():
            assert torch.equal(found[part][key], value), key
    # Not with another model.
    sizes = "model.detector.anchor_generator.offset=0.5"
    with pytest.raises(ValueError, match="model.anchor_generator.offset was 0.0 and is 0.5"):
        train("retinanet_R_50_FPN_labelenc_step1", sizes, "--resume")

    file = f"{method}.step1_file={step1}/label_encoder.pth"
    step2 = train("retinanet_R_50_FPN_labelenc_step2", file, f"{method}.cutoff_iters=2")
    assert "Inherited" in (step2 / "log.txt").read_text()
    distances = [x["loss_distance"] for x in metrics_of(step2).values()]  # medians
    assert distances == [distances[0], distances[0] / 2, 0]
    assert distances[0] > 0
    encoder = checkpoint_of(step2 / "model_final.pth")["training_only"]
    for key, value in expected_file["label_encoder"].items():  # a constant
        assert torch.equal(encoder[f"LabelEnc.label_encoder.{key}"], value)
    check_plain(step2)

    weights = f"train.init_checkpoint={step2}/model_final.pth"
    train("retinanet_R_50_FPN_labelenc_step2", weights, "--eval-only")
    assert (step2 / "inference" / "coco_instances_results.json").exists()
    config = LazyConfig.load(str(step2 / "plain_lazyconfig.yaml"))
    config.dataloader.evaluator.output_dir = str(step2)
    LazyConfig.save(config, str(step2 / "plain.yaml"))
    detectron2_script(
        default_argument_parser().parse_args(
            ["--eval-only", "--config-file", str(step2 / "plain.yaml"), weights]
        )
    )


def teacher_weights(config, path):
    """Of a teacher with random weights."""
    config = LazyConfig.load(str(config))
    torch.save({"model": instantiate(config.model.methods[0].teacher.model).state_dict()}, path)


@pytest.mark.parametrize(
    ("config", "main"),
    [
        ("retinanet_R_50_FPN_crosskd_from_R_101", detectron2_script),
        ("faster_rcnn_R_50_FPN_crosskd_from_R_101", train_net.main),
        ("mask_rcnn_ViT_B_crosskd_from_ViT_L", train_net.main),
    ],
)
def test_crosskd(train, tiny_config, tmp_path, config, main):
    """Detectron2's script loses nothing of it."""
    weights = tmp_path / "teacher.pth"
    teacher_weights(tiny_config(config), weights)
    checkpoints = ("train.checkpointer.period=1", "train.checkpointer.max_to_keep=2")
    output = train(config, f"model.methods.0.teacher.weights={weights}", *checkpoints, main=main)
    assert {x.name for x in output.glob("*.pth")} == {"model_final.pth", *KEPT}
    for losses in metrics_of(output).values():
        assert losses["loss_kd_cls"] > 0
        assert losses["loss_kd_box"] > 0
    if main is train_net.main:
        check_plain(output)
    else:
        plain = instantiate(LazyConfig.load(str(tiny_config(config))).model.detector)
        plain.load_state_dict(checkpoint_of(output / "model_final.pth")["model"], strict=True)


def test_labelenc_of_vitdet(train):
    """Both steps, with label maps of masks, and an optimizer that keeps its betas as they come."""
    name, method = "mask_rcnn_ViT_B_labelenc", "model.methods.0"
    step1 = train(f"{name}_step1", f"{method}.warmup_iters=1")
    file = f"{method}.step1_file={step1 / 'label_encoder.pth'}"
    optimizer = "optimizer._target_=torch.optim.NAdam"
    step2 = train(f"{name}_step2", file, f"{method}.cutoff_iters=2", optimizer)
    for output, expected in ((step1, [False, True, True]), (step2, [True, True, False])):
        distances = [losses["loss_distance"] for losses in metrics_of(output).values()]  # medians
        assert [distance > 0 for distance in distances] == expected
        check_plain(output)


def test_detectron2s_script_needs_the_hook(train, tmp_path):
    """LabelEnc would lose its phases and its file, and says so before the first step."""
    with pytest.raises(RuntimeError, match="would lose .* Train the config with this project's"):
        train("retinanet_R_50_FPN_labelenc_step1", main=detectron2_script)
    assert not list(tmp_path.glob("*/*.pth"))


def scalars(detector):
    """The settings of all parts."""
    return {
        f"{path}.{name}": value
        for path, module in detector.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and name not in ("training", "vis_period")
    }


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_same_as_yaml(detector):
    """The detector, the optimizer and the schedule of LabelEnc's step 1."""
    name = f"{detector}_R_50_FPN"
    cfg = read_config(get_config_file(f"LabelEnc/{name}_step1.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    config = LazyConfig.load(get_config_file(f"LazyConfig/{name}_labelenc_step1.py"))
    expected, found = build_task(cfg), instantiate(config.model)
    shapes = [{k: v.shape for k, v in x.detector.state_dict().items()} for x in (expected, found)]
    assert shapes[0] == shapes[1]
    assert scalars(found.detector) == pytest.approx(scalars(expected.detector))
    assert found.adapter.head_settings == expected.adapter.head_settings

    optimizers = [build_optimizer(cfg, expected)]
    config.optimizer.params.model = found
    optimizers.append(instantiate(config.optimizer))
    settings = []
    for task, optimizer in zip((expected, found), optimizers):
        groups = {id(x): group for group in optimizer.param_groups for x in group["params"]}
        names = ((name, groups.get(id(x))) for name, x in task.named_parameters())
        keys = ("lr", "weight_decay", "momentum")
        settings.append({name: group and [group[key] for key in keys] for name, group in names})
    assert settings[0] == settings[1]

    multiplier, max_iter = instantiate(config.lr_multiplier), cfg.SOLVER.MAX_ITER
    assert config.train.max_iter == max_iter
    schedule = build_lr_scheduler(cfg, optimizers[0])
    for iteration in (0, 100, 499, 600, 89999, 90001, 110001):
        factor = schedule._multiplier(iteration / max_iter)
        assert multiplier(iteration / max_iter) == pytest.approx(factor)


def test_learning_rates_of_vit(tiny_config):
    """Of each block, as Detectron2 has them for the plain detector, whose names it knows."""
    config = LazyConfig.load(str(tiny_config("mask_rcnn_ViT_B_100ep")))
    detector = instantiate(config.model)
    rates = []
    for plain, model in ((True, detector), (False, TrainingTask(detector))):
        optimizer = (plain_lazy_config(config) if plain else config).optimizer
        optimizer.params.model = model
        groups = instantiate(optimizer).param_groups
        rate_of = {id(x): group["lr"] for group in groups for x in group["params"]}
        rates.append([rate_of[id(x)] for x in detector.parameters()])
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 4


class RateOfBackbone:
    """By the names of a detector, with a setting."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, name):
        return self.rate if name.startswith("backbone.") else 1.0


def test_learning_rates_of_a_lazy_call(tiny_config, tmp_path):
    """Such a factor is made first, here as by Detectron2 from the config of the plain detector."""
    config = LazyConfig.load(str(tiny_config("retinanet_R_50_FPN_1x")))
    config.optimizer.params.lr_factor_func = L(RateOfBackbone)(rate=0.25)
    task = TrainingTask(instantiate(config.model))
    trainer = lazy.LazyTrainer.__new__(lazy.LazyTrainer)
    trainer.config = config
    LazyConfig.save(plain_lazy_config(config), str(tmp_path / "plain.yaml"))
    plain = LazyConfig.load(str(tmp_path / "plain.yaml")).optimizer
    plain.params.model = task.detector
    optimizers = (trainer.build_optimizer(None, task), instantiate(plain))
    for groups in (x.param_groups for x in optimizers):
        rate_of = {id(x): group["lr"] for group in groups for x in group["params"]}
        for name, x in task.detector.named_parameters():
            if id(x) in rate_of and not name.endswith("bias"):
                rate = config.optimizer.lr * (0.25 if name.startswith("backbone.") else 1)
                assert rate_of[id(x)] == pytest.approx(rate), name


def test_workers_of_the_test_loader(tiny_config, tmp_path, monkeypatch):
    """Which are not those of the train loader."""
    loaders = []
    monkeypatch.setattr(lazy, "inference_on_dataset", lambda _, loader, __: loaders.append(loader))
    monkeypatch.setattr(lazy, "print_csv_format", lambda _: None)
    config = LazyConfig.load(str(tiny_config("retinanet_R_50_FPN_1x")))
    config.train.output_dir = str(tmp_path)
    config.dataloader.train.num_workers, config.dataloader.test.num_workers = 3, 1
    lazy.evaluate_lazy(config, lazy.run_cfg(config), None)
    assert loaders[0].num_workers == 1


def test_ignored_keys_of_train(tiny_config, tmp_path, monkeypatch, caplog):
    """Are named once, and none of a config of this project, whose keys are Detectron2's."""
    monkeypatch.setattr(lazy.PlainTrainer, "__init__", lambda self, cfg: None)
    config = LazyConfig.load(str(tiny_config("retinanet_R_50_FPN_1x")))
    config.train.update({"cudnn_benchmark": True, "clip_grad": {"enabled": False}})
    lazy.LazyTrainer(config)
    assert not caplog.records
    config.train.update({"fast_dev_run": {"enabled": True}, "vis_period": 5, "notes": ["a"]})
    lazy.LazyTrainer(config)
    (record,) = caplog.records
    keys = "train.fast_dev_run, train.vis_period, train.notes"
    assert record.message == f"Nothing reads {keys} of the LazyConfig"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.detector.num_classes=2",
            r"is 2, but the data set tiny_train has 3.*num_classes of the detector\)",
        ),
        (
            "dataloader.train.dataset.names=unknown",
            r"DATASETS.TRAIN names unknown.*DATASETS.TRAIN is dataloader.train.dataset.names",
        ),
        ("+dataloader.train.sampler.size=3", "dataloader.train.sampler: expected .*exactly"),
        ("+dataloader.test.batch_size=2", "dataloader.test.batch_size: expected .* one by one"),
        (
            "dataloader.train._target_=torch.utils.data.DataLoader",
            r"train is of torch.* expected L\(build_detection_train_loader\)",
        ),
        (
            "dataloader.test._target_=torch.utils.data.DataLoader",
            r"test is of torch.* expected L\(build_detection_test_loader\)",
        ),
        ("+train.clip_grad.enabled=True", "clip_grad is on, .*gradient_clipping"),
        ("+train.model_ema.enabled=True", "model_ema is on, .*enabled to False"),
        ("+train.checkpointer.file_prefix=x", r"file_prefix: expected \['max_to_keep', 'period'\]"),
        ("train.amp.enabled=True", "SOLVER.AMP.ENABLED is train.amp.enabled"),
        ("SOLVER.MAX_ITER", "key=value, found SOLVER.MAX_ITER"),
    ],
)
def test_refused(train, override, message):
    with pytest.raises(ValueError, match=message):
        train("retinanet_R_50_FPN_labelenc_step1", override)
