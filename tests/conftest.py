import ctypes
import fcntl
import gc
import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

import train_net  # noqa: F401, which registers the methods
from labelenc import save_step1_file
from plaindet import read_config
from plaindet.data import find_coco_folder, register_coco_format

REPOSITORY = Path(__file__).parent.parent
CLASSES = ["red", "green", "blue"]
# Of glibc alone.
malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="of the checks in tests/cuda; with cuda they are all that is collected",
    )


def pytest_ignore_collect(collection_path, config):
    """With a GPU only its checks, so that a bare machine needs no more than these do."""
    is_check = Path(__file__).parent / "cuda" in collection_path.parents
    if config.getoption("--device") == "cuda" and collection_path.suffix == ".py" and not is_check:
        return True
    return None


def _lacks_gpu(config):
    return config.getoption("--device") == "cuda" and not torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    if _lacks_gpu(config):
        skip = pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False")
        for item in items:
            item.add_marker(skip)


def pytest_sessionfinish(session, exitstatus):
    if _lacks_gpu(session.config) and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter, config):
    if _lacks_gpu(config):
        message = "NOTHING WAS CHECKED: PyTorch finds no GPU (torch.cuda.is_available() is False)"
        terminalreporter.write_sep("=", message, red=True, bold=True)


def pytest_collection_finish():
    """All that is imported stays. What looks for garbage after every test need not pass through it,
    which takes longer than most tests."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """A trainer and its hooks refer to each other, so it lives on with its models until Python
    looks for garbage. By itself it does so by the number of objects, of which these are few: the
    tests then need gigabytes.

    After the last test of a file the freed memory also goes back to the system, half a gigabyte."""
    try:
        return (yield)
    finally:
        gc.collect()
        if nextitem is None or nextitem.path != item.path:
            malloc_trim(0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _propagate():
    """To caplog, also after a test in this process has set up the loggers."""
    for package in ("plaindet", "labelenc", "crosskd"):
        logging.getLogger(package).propagate = True


@pytest.fixture
def alone(tmp_path_factory):
    """For tests that need gigabytes, with several processes (of 0.5 GB each) or large networks: one
    at a time among all workers."""
    with open(tmp_path_factory.getbasetemp().parent / "several_processes.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def read_cfg():
    """Returns a function that reads a file below configs/."""

    def read(config_file):
        return read_config(REPOSITORY / "configs" / config_file)

    return read


@pytest.fixture(scope="session")
def make_tiny_cfg(read_cfg, tiny_data):
    """Returns a function that reads a config for a tiny run on the CPU, on `tiny_data`, without a
    folder for its output."""

    def make(config_file, *overrides):
        cfg = read_cfg(config_file)
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.CHECKPOINT_PATH = False, ""
        for name in ("RETINANET", "FCOS", "GFL", "ATSS", "DEFORMABLE_DETR", "ROI_HEADS"):
            cfg.MODEL[name].NUM_CLASSES = len(CLASSES)
        cfg.DATASETS.COCO_FORMAT = [list(entry) for entry in tiny_data]
        cfg.DATASETS.TRAIN = ("tiny_train",)
        cfg.DATASETS.TEST = ("tiny_val",)
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (64,), "choice"
        cfg.INPUT.MIN_SIZE_TEST = 64
        cfg.SOLVER.IMS_PER_BATCH = 2
        cfg.VIS_PERIOD = 0
        cfg.merge_from_list(list(overrides))
        return cfg

    return make


@pytest.fixture
def make_cfg(tmp_path, make_tiny_cfg):
    """As `make_tiny_cfg`, with a folder of the test for its output."""

    def make(config_file, *overrides):
        output = ("OUTPUT_DIR", str(tmp_path / "output"))
        cfg = make_tiny_cfg(config_file, *output, *overrides)
        Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
        return cfg

    return make


@pytest.fixture
def make_method_cfg(make_cfg, tmp_path):
    """Returns a function that makes the config of a tiny run of a method with a detector, with the
    step-1 file or the teacher that it needs (of random weights)."""

    def make(method, detector, *overrides):
        cfg = make_cfg(f"quick/{detector}_R_18_{method}.yaml", "SOLVER.MAX_ITER", "4")
        if method in ("labelenc_step2", "labelenc_crosskd"):
            path = tmp_path / f"{detector}_label_encoder.pth"
            step1 = make_cfg(f"quick/{detector}_R_18_labelenc_step1.yaml")
            save_step1_file(build_model(step1), str(path))
            cfg.MODEL.LABELENC.STEP1_FILE = str(path)
        if method in ("crosskd", "labelenc_crosskd"):
            path = tmp_path / f"{detector}_teacher.pth"
            teacher = build_model(make_cfg(f"quick/{detector}_R_34_teacher.yaml"))
            torch.save({"model": teacher.state_dict()}, path)
            head = "ROI_HEADS" if detector.endswith("rcnn") else detector.upper()
            num_classes = f"MODEL.{head}.NUM_CLASSES"
            cfg.MODEL.CROSSKD.TEACHER.WEIGHTS = str(path)
            cfg.MODEL.CROSSKD.TEACHER.OPTS = [
                *(num_classes, len(CLASSES)),
                *("DATASETS.TRAIN", "('tiny_train',)"),
            ]
        cfg.MODEL.LABELENC.WARMUP_ITERS = cfg.MODEL.LABELENC.CUTOFF_ITERS = 2
        cfg.merge_from_list(list(overrides))
        return cfg

    return make


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """The training and validation set of a COCO-format folder with a few images of rectangles,
    registered as tiny_train and tiny_val."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    for split, num_images in (("train", 6), ("val", 3)):
        write_coco_split(folder, split, num_images)
    datasets = find_coco_folder(str(folder))
    register_coco_format(datasets)
    return datasets


def write_coco_split(folder, split, num_images):
    """Writes `folder`/annotations/`split`.json and images of coloured rectangles, one of them
    without annotations and one with a crowd alone."""
    random = np.random.RandomState(num_images)
    images, annotations = [], []
    (folder / split).mkdir(parents=True)
    for image_id in range(1, num_images + 1):
        picture = random.randint(0, 60, (64, 80, 3), dtype=np.uint8)
        for _ in range(0 if image_id == 2 else 1 if image_id == 3 else 3):
            category = random.randint(len(CLASSES))
            x, y = random.randint(0, 48), random.randint(0, 32)
            width, height = random.randint(12, 32, size=2)
            picture[y : y + height, x : x + width, 2 - category] = 220
            width, height = min(width, 80 - x), min(height, 64 - y)
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 10 * (category + 1),
                    "bbox": [float(value) for value in (x, y, width, height)],
                    "area": float(width * height),
                    "segmentation": [[float(value) for value in corners]],
                    "iscrowd": int(image_id == 3),
                }
            )
        name = f"{image_id}.png"
        cv2.imwrite(str(folder / split / name), picture)
        images.append({"id": image_id, "file_name": name, "height": 64, "width": 80})
    content = {
        "info": {},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(CLASSES)],
    }
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
