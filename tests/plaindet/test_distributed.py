"""Two processes with two images each follow one process with the four: losses and gradients.

What Detectron2 itself normalises with the images of one process alone cannot follow, and is left
out below: RetinaNet's moving average of positives, and the number of sampled proposals of an RoI
head. Neither can what has statistics over the images of a process: batch norms (here FrozenBN and
GN take their place), and CrossKD's alignment of features, as in the original (strategy "a"; the
other losses and strategy "mimicking" follow).
"""

import gc

import pytest
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

import train_net  # noqa: F401, which registers the methods in new processes
from plaindet.data import register_coco_format
from plaindet.engine import PlainTrainer, ending_process_group
from plaindet.seeding import seed_everything

pytestmark = pytest.mark.usefixtures("alone")

ALL = None
STRATEGY = "MODEL.CROSSKD.STRATEGY"
DENSE = ("fcos", "gfl", "atss")
DISTANCE = {"loss_distance"}
KD = {"loss_kd_cls", "loss_kd_box"}
RPN = {"loss_rpn_cls", "loss_rpn_loc"}
# All anchors and proposals, and not a random sample.
NO_SAMPLING = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000")
NO_SAMPLING += ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "100000")
# (method, detector, phase: L3 switched on, losses that follow, more of the config)
CASES = [
    *((f"labelenc_step{step}", d, True, ALL, ()) for step in (1, 2) for d in DENSE),
    *((f"labelenc_step{step}", "gfl", False, ALL, ()) for step in (1, 2)),
    *((f"labelenc_step{step}", "retinanet", True, DISTANCE, ()) for step in (1, 2)),
    ("labelenc_step1", "faster_rcnn", False, RPN, NO_SAMPLING),
    *(
        (f"labelenc_step{step}", d, True, {*RPN, *DISTANCE}, NO_SAMPLING)
        for step in (1, 2)
        for d in ("faster_rcnn", "mask_rcnn")
    ),
    *(("crosskd", d, None, ALL, (STRATEGY, "mimicking")) for d in DENSE),
    ("crosskd", "retinanet", None, KD, (STRATEGY, "mimicking")),
    ("crosskd", "faster_rcnn", None, {*RPN, *KD}, (STRATEGY, "mimicking", *NO_SAMPLING)),
    ("crosskd", "deformable_detr", None, ALL, ()),
    ("crosskd", "gfl", None, {"loss_cls", "loss_dfl", "loss_box_reg"}, (STRATEGY, "a")),
    ("labelenc_crosskd", "gfl", True, ALL, (STRATEGY, "mimicking")),
]
# Those of `make test-long`: their parts are in the others.
LONG = [
    *(f"labelenc_step{step} {d} True" for step in (1, 2) for d in ("fcos", "atss", "retinanet")),
    *(f"labelenc_step{step} faster_rcnn True" for step in (1, 2)),
    *(f"crosskd {d}" for d in ("fcos", "atss")),
]
NAMES = [f"{m} {d} {on} {' '.join(more)}".strip() for m, d, on, _, more in CASES]


def is_long(case):
    return NAMES[case].startswith(tuple(LONG))


def losses_and_gradients(cfg, distance_enabled):
    """Of the first batch; averaged over the processes."""
    seed_everything(0)
    trainer = PlainTrainer(cfg)
    if distance_enabled is not None:
        trainer.task.training_only["LabelEnc"].distance_enabled = distance_enabled
    batch = next(iter(trainer.data_loader))
    files = {image["file_name"] for images in comm.all_gather(batch) for image in images}
    assert len(files) == 4  # the same four images, two in each process
    with EventStorage():
        losses = trainer.model(batch)
    sum(losses.values()).backward()
    parameters = trainer.task.named_parameters()
    gradients = {name: p.grad for name, p in parameters if p.grad is not None}
    return comm.reduce_dict({k: v.detach() for k, v in losses.items()}), gradients


def save_all(cfgs, folder):
    """A file for each case, since all gradients together take gigabytes."""
    for i, cfg in cfgs.items():
        _, _, distance_enabled, following, _ = CASES[i]
        losses, gradients = losses_and_gradients(cfg, distance_enabled)
        if comm.is_main_process():
            torch.save((losses, gradients if following is ALL else {}), f"{folder}/{i}.pth")
        del gradients
        gc.collect()  # the trainer


@ending_process_group()
def save_all_of_a_process(cfgs, folder):
    gc.freeze()  # what is imported, as tests/conftest.py does it
    torch.set_num_threads(1)
    register_coco_format(next(iter(cfgs.values())).DATASETS.COCO_FORMAT)
    save_all(cfgs, folder)


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the two processes: more threads add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [tmp_path_factory.mktemp(name) for name in ("two", "one")]


@pytest.fixture
def load_results(make_method_cfg, folders):
    """Returns a function that loads the results of a case, of two processes and of one. With it are
    computed all that are as long, those of the two processes in one launch."""
    two, one = folders

    def load(case):
        if not (one / f"{case}.pth").exists():
            cfgs = {
                i: make_method_cfg(
                    method,
                    detector,
                    *("SOLVER.IMS_PER_BATCH", "4", "DATALOADER.ASPECT_RATIO_GROUPING", "False"),
                    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "GN"),
                    # So that the sum of class probabilities in a process, GFL's normaliser of
                    # boxes, is not below its minimum of 1.
                    *("MODEL.GFL.PRIOR_PROB", "0.5"),
                    *more,
                )
                for i, (method, detector, _, _, more) in enumerate(CASES)
                if is_long(i) == is_long(case)
            }
            launch(save_all_of_a_process, 2, dist_url="auto", args=(cfgs, str(two)))
            save_all(cfgs, one)
        return [torch.load(f / f"{case}.pth", weights_only=True) for f in folders]

    return load


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(i, id=NAMES[i], marks=pytest.mark.long if is_long(i) else ())
        for i in range(len(CASES))
    ],
)
def test_two_processes_follow_one(case, load_results):
    following = CASES[case][3]
    (losses, gradients), (expected_losses, expected_gradients) = load_results(case)
    assert losses.keys() == expected_losses.keys()
    assert (following or set()) <= losses.keys()
    for name in following or losses:
        assert losses[name].item() == pytest.approx(expected_losses[name].item(), rel=1e-5), name
    if following is ALL:
        assert gradients.keys() == expected_gradients.keys()
        for name, expected in expected_gradients.items():
            # The sums of a convolution's gradient have another order.
            scale = expected.abs().max().item()
            torch.testing.assert_close(gradients[name], expected, rtol=0, atol=1e-5 * (1 + scale))


def test_retinanets_own_losses(load_results):
    """What is left out above, and why."""
    (case,) = (i for i, x in enumerate(CASES) if x[:2] == ("crosskd", "retinanet"))
    losses, expected = (x[0] for x in load_results(case))
    assert set(expected) - KD == {"loss_cls", "loss_box_reg"}
    # The normalisers start at 100 for two images as for four, and move by a tenth.
    assert (losses["loss_cls"] / expected["loss_cls"]).item() == pytest.approx(0.5, rel=0.05)
