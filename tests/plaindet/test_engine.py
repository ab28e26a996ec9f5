from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from plaindet import add_plaindet_config
from plaindet.data import build_train_stream
from plaindet.engine import (
    PlainTrainer,
    build_evaluator,
    check_num_classes,
    write_plain_config,
)
from plaindet.signals import ignore_preemption

CONFIG = "quick/retinanet_R_18_baseline.yaml"


@pytest.mark.parametrize("num_classes", ["2", "80"])
def test_num_classes_of_retinanet(make_cfg, num_classes):
    cfg = make_cfg(CONFIG, "MODEL.RETINANET.NUM_CLASSES", num_classes)
    message = (
        rf"MODEL.RETINANET.NUM_CLASSES is {num_classes}, but the data set tiny_train has 3 classes "
        r"\(red, green, blue\). Set MODEL.RETINANET.NUM_CLASSES 3"
    )
    with pytest.raises(ValueError, match=message):
        PlainTrainer(cfg)


def test_num_classes_of_roi_heads(make_cfg):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN = ("tiny_train",)
    with pytest.raises(ValueError, match=r"MODEL.ROI_HEADS.NUM_CLASSES is 80, .* Set .* 3"):
        check_num_classes(build_model(cfg), cfg.DATASETS.TRAIN)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    check_num_classes(build_model(cfg), cfg.DATASETS.TRAIN)


def test_other_classes_in_validation(make_cfg):
    DatasetCatalog.register("other_val", lambda: DatasetCatalog.get("tiny_val"))
    MetadataCatalog.get("other_val").thing_classes = ["blue", "green", "red"]
    cfg = make_cfg(CONFIG, "DATASETS.TEST", '("other_val",)')
    with pytest.raises(ValueError, match=r"tiny_train has \['red'.*other_val has \['blue'"):
        PlainTrainer(cfg)
    DatasetCatalog.remove("other_val")
    MetadataCatalog.remove("other_val")


def test_reference_world_size(make_cfg):
    """The config is for two processes, and this is one."""
    cfg = make_cfg(
        CONFIG,
        *("SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.IMS_PER_BATCH", "4"),
        *("SOLVER.MAX_ITER", "10", "SOLVER.BASE_LR", "0.02"),
    )
    trainer = PlainTrainer(cfg)
    assert trainer.data_loader.batch_size == 2
    assert (trainer.max_iter, trainer.cfg.SOLVER.BASE_LR) == (20, 0.01)


def test_workers_of_the_test_loader_ignore_preemption(make_cfg):
    loader = PlainTrainer.build_test_loader(make_cfg(CONFIG), "tiny_val")
    assert loader.worker_init_fn is ignore_preemption


def test_trains_like_detectron2(make_cfg):
    """The same losses as DefaultTrainer from the same seed."""
    losses, batch = [], None
    for trainer_class in (DefaultTrainer, PlainTrainer):
        seed_all_rng(0)
        cfg = make_cfg(CONFIG, "SOLVER.MAX_ITER", "2", "INPUT.RANDOM_FLIP", "none")
        trainer = trainer_class(cfg)
        batch = batch or [next(iter(trainer.data_loader))[0]] * 2
        trainer._trainer._data_loader_iter_obj = iter([batch, batch])
        trainer.test = lambda *_: {}
        trainer.train()
        losses.append(trainer.storage.latest()["total_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class LoaderOfDetectron2sSignature(PlainTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_stream(cfg, DatasetMapper(cfg, is_train=True))


class LoaderOfAMapper(PlainTrainer):
    @classmethod
    def build_train_loader(cls, cfg, *, mapper=None):
        return build_train_stream(cfg, mapper)


class LoaderOfAnything(PlainTrainer):
    @classmethod
    def build_train_loader(cls, cfg, **options):
        return super().build_train_loader(cfg, **options)


@pytest.mark.parametrize(
    ("trainer_class", "gets_mapper"),
    [
        (LoaderOfDetectron2sSignature, False),
        (LoaderOfAMapper, True),
        (LoaderOfAnything, True),
    ],
)
def test_train_loader_of_a_subclass(make_cfg, trainer_class, gets_mapper):
    """It gets the mapper if it takes one, also where resuming brings another seed."""
    trainer = trainer_class(make_cfg(CONFIG))
    for seed in (trainer.cfg.SEED, 5):
        trainer.set_seed(seed)
        dataset = trainer.data_loader.dataset
        assert dataset.seed == seed
        assert (dataset.dataset._map_func._obj is trainer.mapper) == gets_mapper
        assert len(next(iter(trainer.data_loader))) == 2


def test_plain_config_is_detectron2s(make_cfg):
    cfg = make_cfg("quick/retinanet_R_18_labelenc_step1.yaml")
    PlainTrainer(cfg)
    plain = get_cfg()
    plain.merge_from_file(f"{cfg.OUTPUT_DIR}/plain_config.yaml")
    assert plain.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert plain.MODEL.RETINANET == cfg.MODEL.RETINANET
    assert {**cfg.SOLVER.AMP} == {**plain.SOLVER.AMP, "PRECISION": "float16"}
    assert all(cfg.SOLVER[key] == value for key, value in plain.SOLVER.items() if key != "AMP")


def test_plain_config_has_the_differences_alone(make_cfg):
    """A key that only another version of Detectron2 has, at its default, is not in it."""
    cfg = make_cfg(CONFIG)
    write_plain_config(cfg, build_model(cfg))
    path = Path(cfg.OUTPUT_DIR) / "plain_config.yaml"
    found = yaml.safe_load(path.read_text())
    assert found["VERSION"] == get_cfg().VERSION
    assert found["MODEL"]["RETINANET"]["NUM_CLASSES"] == 3
    assert "ROI_BOX_HEAD" not in found["MODEL"]
    plain = get_cfg()
    plain.merge_from_file(str(path))
    for key, value in plain.items():
        if key not in ("MODEL", "DATASETS", "SOLVER", "INPUT"):
            assert value == cfg[key], key


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("DATASETS.TRAIN", "('odd',)"), ValueError, "TRAIN names odd, .*registered.*COCO_FORMAT"),
        (("DATASETS.TEST", "('odd',)"), ValueError, "DATASETS.TEST names odd, .*COCO_FORMAT"),
        (
            ("DATASETS.TRAIN", "('coco_2017_train',)"),
            FileNotFoundError,
            "coco_2017_train, whose .*json do not exist .*DETECTRON2_DATASETS",
        ),
        (("MODEL.DEVICE", "cuda"), ValueError, "DEVICE is cuda, .* no GPU: set MODEL.DEVICE cpu"),
    ],
)
def test_what_is_missing_is_said_first(make_cfg, monkeypatch, overrides, error, message):
    """Before the model is built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(PlainTrainer, "build_model", lambda cfg: pytest.fail("built"))
    with pytest.raises(error, match=message):
        PlainTrainer(make_cfg(CONFIG, *overrides))


def test_evaluator_type(make_cfg, monkeypatch):
    """One without evaluator is refused before the model is built, unless the trainer has one."""
    cfg = make_cfg(CONFIG)
    assert isinstance(build_evaluator(cfg, "tiny_val"), COCOEvaluator)

    class Built(Exception):
        pass

    class OwnEvaluator(PlainTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return COCOEvaluator(dataset_name)

    def build_model(*_):
        raise Built

    monkeypatch.setattr(PlainTrainer, "build_model", build_model)
    metadata = MetadataCatalog.get("tiny_val")
    monkeypatch.setitem(metadata.__dict__, "evaluator_type", "cityscapes_sem_seg")
    with pytest.raises(ValueError, match="tiny_val has evaluator_type 'cityscapes_sem_seg', exp"):
        PlainTrainer(cfg)
    with pytest.raises(Built):
        OwnEvaluator(cfg)


def test_plain_config_keeps_the_keys_of_plaindet_s_builders(make_cfg):
    """Also where such a builder makes Detectron2's classes alone."""
    cfg = make_cfg(
        CONFIG,
        *("MODEL.BACKBONE.NAME", "build_fpn_backbone", "MODEL.FPN.TOP_BLOCK_IN_FEATURE", "p5"),
    )
    write_plain_config(cfg, build_model(cfg))
    plain = get_cfg()
    add_plaindet_config(plain)
    plain.merge_from_file(f"{cfg.OUTPUT_DIR}/plain_config.yaml")
    assert plain.MODEL.FPN == cfg.MODEL.FPN
