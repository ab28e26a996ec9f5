"""The stream of training batches: a function of a seed and the number of the batch alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    build_detection_train_loader,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from plaindet.seeding import seeded
from plaindet.signals import ignore_preemption

from .gate import training_records

Sample = tuple[int, int]  # position in the stream of all processes, index in the data set


class TrainStream:
    """An endless iterable of training batches, as Detectron2's train loader makes them, which can
    start at any batch.

    The random augmentation of an image follows from the seed and the image's position in the
    stream. So the batches, augmentation included, are the same for any number of workers.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        wide: list[bool] | None = None,
        pin_memory: bool = False,
    ):
        """
        Args:
            dataset: map-style, of mapped images.
            sampler: the endless indices of this process; the same ones whenever it is iterated.
            batch_size: of this process.
            seed: not negative.
            num_workers: processes that load images; 0: this one.
            wide: groups images by this property of each index, so that a batch has images of one
                group (aspect ratio grouping); None: no groups.
            pin_memory: puts tensors, and what has a `pin_memory` of its own, into pinned memory,
                from which copies to a GPU are fast.
        """
        self.dataset = _SeededDataset(dataset, seed)
        self.sampler = sampler
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.wide = wide
        self.pin_memory = pin_memory
        # The number of the batch with which an iteration over the stream starts.
        self.start = 0

    def __iter__(self) -> Iterator[list[dict]]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=itertools.islice(self._batches(), self.start, None),
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
            worker_init_fn=ignore_preemption,
            pin_memory=self.pin_memory,
            # Of its own: the loader draws from it, and must not from the training's.
            generator=torch.Generator(),
        )
        return iter(loader)

    def layout(self) -> dict[str, int | bool]:
        """What the order of images depends on, besides the seed and the sampler."""
        return {
            "images": len(self.dataset),
            "images in a batch": self.batch_size,
            "processes": comm.get_world_size(),
            "aspect ratio grouping": self.wide is not None,
        }

    def _batches(self) -> Iterator[list[Sample]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        groups: tuple[list[Sample], list[Sample]] = ([], [])
        for number, index in enumerate(self.sampler):
            group = groups[self.wide is not None and self.wide[index]]
            group.append((number * world_size + rank, index))
            if len(group) == self.batch_size:
                yield group[:]
                group.clear()


class _SeededDataset(Dataset):
    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: Sample) -> dict:
        position, index = sample
        with seeded(self.seed, position):
            return self.dataset[index]


def build_train_stream(cfg: CfgNode, mapper: DatasetMapper) -> TrainStream:
    """The stream of `cfg.DATASETS.TRAIN` with Detectron2's samplers and `cfg.SEED`, or a random one
    if that is negative. A list of images is checked before.

    Raises:
        ValueError: an image or annotation cannot be used, the batch cannot be shared by the
            processes, or the data set has no order.
    """
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    # From the seed samplers draw their own. In newer versions of Detectron2 one takes that of the
    # config as it is, and -1 would be a fixed order.
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    records = training_records(cfg)
    with seeded(seed):
        arguments = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=records)
    images = arguments["dataset"]
    if isinstance(images, IterableDataset):
        raise ValueError(
            f"DATASETS.TRAIN {cfg.DATASETS.TRAIN} is an iterable data set, in which a run cannot "
            "be continued: expected a list of images or a map-style data set"
        )
    batch_size, rest = divmod(arguments["total_batch_size"], comm.get_world_size())
    if batch_size == 0 or rest:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {arguments['total_batch_size']}, expected a multiple of the "
            f"{comm.get_world_size()} processes"
        )
    wide = None
    if arguments["aspect_ratio_grouping"]:
        # Images that are not files may have no size.
        wide = [image.get("width", 0) > image.get("height", 0) for image in images]
    if isinstance(images, list):
        images = DatasetFromList(images, copy=False)
    return TrainStream(
        MapDataset(images, arguments["mapper"]),
        arguments["sampler"],
        batch_size,
        seed,
        arguments["num_workers"],
        wide,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
    )
