"""The stream of training batches."""

import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MapDataset,
    build_detection_train_loader,
)
from detectron2.data.build import build_batch_data_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from plaindet.data import TrainStream, build_train_stream
from plaindet.engine import PlainTrainer
from plaindet.seeding import seeded

CONFIG = "quick/retinanet_R_18_baseline.yaml"
IMAGES = [{"id": i, "width": 2 + i % 3, "height": 3} for i in range(7)]


def draw(image):
    """An image with a random number of each generator that an augmentation may use."""
    return {**image, "random": (random.random(), np.random.rand(), torch.rand(1).item())}


def make_stream(num_workers=0, batch_size=2, group=True):
    dataset = MapDataset(DatasetFromList(IMAGES), draw)
    wide = [image["width"] > image["height"] for image in IMAGES] if group else None
    return TrainStream(dataset, TrainingSampler(7, seed=5), batch_size, 3, num_workers, wide)


def take(iterable, number):
    return list(itertools.islice(iterable, number))


@pytest.mark.parametrize("group", [True, False])
def test_batches_are_detectron2s(group):
    loader = build_batch_data_loader(
        DatasetFromList(IMAGES), TrainingSampler(7, seed=5), 2, aspect_ratio_grouping=group
    )
    expected = [[image["id"] for image in batch] for batch in take(loader, 20)]
    batches = take(make_stream(group=group), 20)
    assert [[image["id"] for image in batch] for batch in batches] == expected


def test_wide_and_tall_images(make_cfg, tiny_data):
    """A batch has one kind of them, in the order of Detectron2's loader."""
    records = DatasetCatalog.get("tiny_train") * 4
    for i, record in enumerate(records):
        record = records[i] = {**record, "image_id": i}
        record["height"], record["width"] = (64, 80) if i % 3 else (80, 64)
    DatasetCatalog.register("wide_and_tall", lambda: records)
    try:
        cfg = make_cfg(CONFIG, "DATASETS.TRAIN", "('wide_and_tall',)", "SEED", "5")
        cfg.DATASETS.CHECK_IMAGES = False  # the sizes are made up
        stream = build_train_stream(cfg, mapper=dict)
        with seeded(5):
            loader = build_detection_train_loader(cfg, mapper=dict)
        batches, expected = take(stream, 12), take(loader, 12)
    finally:
        DatasetCatalog.remove("wide_and_tall")
    kinds = [{image["width"] > image["height"] for image in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert {True} in kinds
    assert {False} in kinds
    assert batches == expected


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("start", [0, 5])
def test_same_images_and_augmentations_from_anywhere(num_workers, start):
    expected = take(make_stream(), 12)
    stream = make_stream(num_workers)
    stream.start = start
    assert take(stream, 12 - start) == expected[start:]
    # No two images have the same random numbers.
    numbers = [image["random"] for batch in expected for image in batch]
    assert len(set(numbers)) == len(numbers)


def test_training_random_numbers_are_left_alone():
    def numbers():
        return random.random(), np.random.rand(), torch.rand(1).item()

    with seeded(1):
        expected = numbers()
    with seeded(1):
        take(make_stream(), 3)
        assert numbers() == expected


def test_processes_share_the_stream(monkeypatch):
    """Two processes together have the images and augmentations of one with twice the batch."""
    one = take(make_stream(batch_size=4, group=False), 6)
    parts = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(take(make_stream(batch_size=2, group=False), 6))
    for batch, first, second in zip(one, *parts):
        assert batch == [first[0], second[0], first[1], second[1]]


def test_real_augmentation(make_cfg):
    """The pixels and boxes of Detectron2's random flips."""
    batches = []
    for num_workers in (0, 2):
        cfg = make_cfg(CONFIG, "DATALOADER.NUM_WORKERS", str(num_workers))
        batches.append(take(PlainTrainer.build_train_loader(cfg), 6))
    flipped = set()
    for first, second in zip(*(itertools.chain(*x) for x in batches)):
        assert first["file_name"] == second["file_name"]
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(*(x["instances"].gt_boxes.tensor for x in (first, second)))
        flipped.add((first["file_name"], first["image"].float().mean(dim=(0, 1)).argmax().item()))
    assert len({name for name, _ in flipped}) < len(flipped)


@pytest.mark.parametrize("sampler", ["RepeatFactorTrainingSampler", "TrainingSampler"])
def test_samplers_follow_the_seed(make_cfg, sampler):
    cfg = make_cfg(
        CONFIG,
        *("DATALOADER.SAMPLER_TRAIN", sampler),
        *("DATALOADER.REPEAT_THRESHOLD", "0.9"),
    )
    orders = []
    for seed in (1, 1, 2):
        cfg.SEED = seed
        torch.rand(1), np.random.rand()
        batches = take(build_train_stream(cfg, PlainTrainer.build_train_mapper(cfg)), 8)
        orders.append([image["file_name"] for batch in batches for image in batch])
    assert orders[0] == orders[1] != orders[2]


def test_no_seed(make_cfg):
    """A random one, as Detectron2 does it."""
    cfg = make_cfg(CONFIG, "SEED", "-1")
    streams = [PlainTrainer.build_train_loader(cfg) for _ in range(2)]
    orders = [[x["file_name"] for batch in take(s, 20) for x in batch] for s in streams]
    assert orders[0] != orders[1]


def test_batch_that_cannot_be_shared(make_cfg, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 1)
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 2, expected a multiple of the 4"):
        PlainTrainer.build_train_loader(make_cfg(CONFIG))
