"""How a batch reaches the device."""

import pytest
import torch
from devices import to_cpu

from labelenc import LabelEncTrainer, LabelMap

pytestmark = pytest.mark.cuda

CONFIG = "quick/retinanet_R_18_labelenc_step1.yaml"


def make_label_map():
    boxes = torch.tensor([[3.0, 4, 30, 20], [10, 10, 25, 40]])
    return LabelMap.from_boxes(boxes, torch.tensor([2, 0]), (48, 40))


def test_the_host_does_not_wait_for_label_maps(device):
    label_map = make_label_map()
    with device.in_use() as waits:
        found = label_map.to(device.device)
    assert not waits
    assert torch.equal(to_cpu(found.classes), label_map.classes)
    assert torch.equal(to_cpu(found.values), label_map.values)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned(workers, gpu, make_cfg):
    cfg = make_cfg(CONFIG, "MODEL.DEVICE", "cuda", "DATALOADER.NUM_WORKERS", str(workers))
    for image in next(iter(LabelEncTrainer.build_train_loader(cfg))):
        assert image["image"].is_pinned()
        assert image["label_map"].classes.is_pinned()
        assert image["label_map"].values.is_pinned()
        assert image["instances"].gt_boxes.device.type == "cpu"


@pytest.mark.parametrize(("on", "pins"), [("cuda", True), ("cuda:1", True), ("cpu", False)])
def test_batches_for_a_gpu_are_to_be_pinned(on, pins, make_cfg, monkeypatch):
    """What PyTorch's data loader is asked for, and does with a label map."""
    arguments, pinned = {}, []
    monkeypatch.setattr(
        "plaindet.data.stream.DataLoader", lambda _, **kw: arguments.update(kw) or []
    )
    iter(LabelEncTrainer.build_train_loader(make_cfg(CONFIG, "MODEL.DEVICE", on)))
    assert arguments["pin_memory"] == pins
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *_: pinned.append(x) or x)
    label_map = make_label_map()
    (batch,) = torch.utils.data._utils.pin_memory.pin_memory([{"label_map": label_map}])
    assert [id(x) for x in pinned] == [id(label_map.classes), id(label_map.values)]
    assert batch["label_map"].values is label_map.values
