"""The memory of an iteration."""

import pytest
import torch
from detectron2.modeling import build_model
from devices import GPU
from variants import LABELENC, PLAIN, Variant, build_variant, losses_of, make_batch

from plaindet.engine import Teacher

pytestmark = pytest.mark.cuda

STEP = "LabelEnc/retinanet_R_50_FPN_step{}.yaml"


def kept_for_backward(model) -> int:
    """The bytes that the forward pass keeps, without the weights."""
    weights = {x.untyped_storage().data_ptr() for x in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses_of(model, make_batch())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_kept_for_the_backward_pass(detector, device, make_tiny_cfg):
    """Most of the peak. Step 2 may keep a quarter more than the plain detector, for the adapter,
    and nothing of the label encoder; after the cut-off nothing."""
    kept = {}
    for method in (PLAIN, "step 2", LABELENC[3]):
        model = build_variant(Variant(detector, method), make_tiny_cfg)
        if isinstance(device, GPU):
            device.move(model)
        kept[method] = kept_for_backward(model)
    assert kept[PLAIN] < kept["step 2"] <= 1.25 * kept[PLAIN]
    assert kept[LABELENC[3]] == kept[PLAIN]


def test_peak_memory(gpu, make_tiny_cfg, capsys):
    """Of RetinaNet with ResNet-50 and 80 classes. Step 2 may take a quarter more than the plain
    detector, since the label encoder keeps nothing for a backward pass; and after the cut-off, when
    its weights are all that is left of it, a twentieth."""

    def build(config_file):
        return build_model(make_tiny_cfg(config_file, "MODEL.RETINANET.NUM_CLASSES", "80"))

    def peak(model):
        before = torch.cuda.memory_allocated()
        gpu.move(model.train())
        batch = make_batch(((640, 832), (608, 800)))
        for _ in range(2):  # the first one chooses algorithms
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            sum(losses_of(model, batch).values()).backward()
        model.zero_grad()
        model.to("cpu")
        return torch.cuda.max_memory_allocated() - before

    step2 = build(STEP.format(2))
    peaks = {
        "plain": peak(build("PlainDet/retinanet_R_50_FPN_1x.yaml")),
        "step 1": peak(build(STEP.format(1))),
        "step 2": peak(step2),
    }
    step2.training_only["LabelEnc"].distance_enabled = False
    peaks["step 2 after the cut-off"] = peak(step2)
    student = build("CrossKD/retinanet_R_50_FPN_from_R_101.yaml")
    student.set_teacher(Teacher(build("PlainDet/retinanet_R_101_FPN_1x.yaml")))
    peaks["CrossKD"] = peak(student)
    with capsys.disabled():
        print(f"\nPeak memory, {torch.cuda.get_device_name()}:")
        for name, memory in peaks.items():
            print(f"  {name}: {memory / 2**20:.0f} MiB, {memory / peaks['plain']:.2f} x plain")
    assert peaks["step 2"] <= 1.25 * peaks["plain"]
    assert peaks["step 2 after the cut-off"] <= 1.05 * peaks["plain"]
