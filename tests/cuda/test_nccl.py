"""Several processes with NCCL; tests/plaindet/test_distributed.py has those on the CPU."""

import pytest
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel
from variants import (
    Variant,
    assert_gradients_close,
    build_variant,
    gradients_of,
    losses_of,
    make_batch,
)

import train_net  # noqa: F401, which registers the methods in new processes
from plaindet.data import register_coco_format
from plaindet.engine import PlainTrainer, ending_process_group

pytestmark = pytest.mark.cuda

RUNS = [
    ("labelenc_step1", "retinanet"),
    ("labelenc_step2", "mask_rcnn"),
    ("labelenc_crosskd", "gfl"),
]


@pytest.mark.parametrize("method", ["step 1 before the warm-up's end", "step 1", "both"])
def test_one_process(method, gpu, make_tiny_cfg, tmp_path):
    """Every parameter gets the gradient that it has without NCCL, also in the second iteration,
    in which DistributedDataParallel complains of those that got none in the first."""
    model = gpu.move(build_variant(Variant("gfl", method), make_tiny_cfg))
    batch = make_batch()
    expected = {k: v.clone() for k, v in gradients_of(model, losses_of(model, batch)).items()}
    backend = "nccl" if gpu.device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        for _ in range(2):
            found = gradients_of(wrapped, losses_of(wrapped, batch))
    finally:
        torch.distributed.destroy_process_group()
    assert_gradients_close({k.removeprefix("module."): v for k, v in found.items()}, expected)


@ending_process_group()
def train(cfgs, folder):
    """Trains, and compares the weights of the processes."""
    register_coco_format(cfgs[0].DATASETS.COCO_FORMAT)
    for i, cfg in enumerate(cfgs):
        trainer = PlainTrainer(cfg)
        trainer.test = lambda *_: {}
        trainer.resume_or_load(resume=False)
        trainer.train()
        parameters = dict(trainer.task.named_parameters())
        sums = {name: p.detach().double().sum().item() for name, p in parameters.items()}
        different = [name for name in sums if len({x[name] for x in comm.all_gather(sums)}) > 1]
        if comm.is_main_process():
            torch.save(different, f"{folder}/{i}.pth")


def test_two_processes(gpu, make_method_cfg, tmp_path):
    """They train through the phases of the methods, and have the same weights at the end."""
    if gpu.device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    cfgs = [
        make_method_cfg(
            method,
            detector,
            *("MODEL.DEVICE", gpu.device.type, "OUTPUT_DIR", str(tmp_path / f"output_{i}")),
        )
        for i, (method, detector) in enumerate(RUNS)
    ]
    launch(train, 2, dist_url="auto", args=(cfgs, str(tmp_path)))
    for i in range(len(RUNS)):
        assert torch.load(tmp_path / f"{i}.pth") == []
