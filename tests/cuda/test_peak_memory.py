"""The memory of an iteration on a GPU."""

import pytest
import torch
from detectron2.modeling import build_model
from variants import losses_of, make_batch

from plaindet.modeling import Teacher

pytestmark = pytest.mark.cuda

STEP = "LabelEnc/retinanet_R_50_FPN_step{}.yaml"


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
    step2.distance_enabled = False
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
