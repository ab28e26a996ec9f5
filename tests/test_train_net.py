"""The command line, from a config to an evaluated detector."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from torch import distributed

import train_net

REPOSITORY = Path(train_net.__file__).parent


def run(config, tiny_data, output, *more):
    """Runs train_net.main on a few small images."""
    options = {
        "DATASETS.COCO_FORMAT": str([list(entry) for entry in tiny_data]),
        "DATASETS.TRAIN": "('tiny_train',)",
        "DATASETS.TEST": "('tiny_val',)",
        "DATALOADER.NUM_WORKERS": "0",
        "MODEL.RETINANET.NUM_CLASSES": "3",
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "SOLVER.IMS_PER_BATCH": "2",
        "SOLVER.MAX_ITER": "2",
        "MODEL.LABELENC.WARMUP_ITERS": "1",
        "MODEL.LABELENC.CUTOFF_ITERS": "1",
        "OUTPUT_DIR": str(output),
    }
    flags = [argument for argument in more if argument.startswith("--")]
    overrides = [argument for argument in more if not argument.startswith("--")]
    arguments = ["--config-file", str(REPOSITORY / "configs" / "quick" / config), *flags]
    arguments += [item for pair in options.items() for item in pair] + overrides
    return train_net.main(default_argument_parser().parse_args(arguments))


def test_both_steps_and_evaluation(tiny_data, tmp_path):
    step1, step2 = tmp_path / "step1", tmp_path / "step2"
    run("retinanet_R_18_labelenc_step1.yaml", tiny_data, step1)
    step1_file = ("MODEL.LABELENC.STEP1_FILE", str(step1 / "label_encoder.pth"))
    run("retinanet_R_18_labelenc_step2.yaml", tiny_data, step2, *step1_file)
    assert "Inherited" in (step2 / "log.txt").read_text()
    weights = ("MODEL.WEIGHTS", str(step2 / "model_final.pth"))
    # The step-2 config evaluates without the step-1 file, and the baseline's config evaluates too.
    options, detections = (*weights, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"), []
    for config in ("retinanet_R_18_labelenc_step2.yaml", "retinanet_R_18_baseline.yaml"):
        augmented = ("TEST.AUG.ENABLED", str("baseline" in config))
        results = run(config, tiny_data, tmp_path / config, "--eval-only", *options, *augmented)
        assert "AP" in results["bbox"]
        log = (tmp_path / config / "log.txt").read_text()
        assert ("WARNING: TEST.AUG.ENABLED is True, but" in log) == ("baseline" in config)
        path = tmp_path / config / "inference" / "coco_instances_results.json"
        detections.append(json.loads(path.read_text()))
    assert detections[0] == detections[1] != []
    # Other weights detect something else.
    weights = ("MODEL.WEIGHTS", str(step1 / "model_final.pth"))
    run(config, tiny_data, tmp_path / "random", "--eval-only", *weights, *options[2:])
    path = tmp_path / "random" / "inference" / "coco_instances_results.json"
    assert json.loads(path.read_text()) != detections[0]


def test_resume(tiny_data, tmp_path):
    config = "retinanet_R_18_labelenc_step1.yaml"
    run(config, tiny_data, tmp_path)
    run(config, tiny_data, tmp_path, "--resume", "SOLVER.MAX_ITER", "3")
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert checkpoint["iteration"] == 2
    assert "Starting training from iteration 2" in (tmp_path / "log.txt").read_text()


def test_num_classes_in_evaluation(tiny_data, tmp_path):
    with pytest.raises(ValueError, match="NUM_CLASSES is 5, but the data set tiny_val has 3"):
        run(
            "retinanet_R_18_baseline.yaml",
            tiny_data,
            tmp_path,
            *("--eval-only", "MODEL.RETINANET.NUM_CLASSES", "5", "DATASETS.TRAIN", "()"),
        )


def test_evaluation_needs_no_training_data(tiny_data, make_cfg, tmp_path):
    train, val = tiny_data
    model = build_model(make_cfg("quick/retinanet_R_18_baseline.yaml"))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    datasets = [["absent_train", str(tmp_path / "absent.json"), str(tmp_path / "absent")], val]
    results = run(
        "retinanet_R_18_baseline.yaml",
        [list(dataset) for dataset in datasets],
        tmp_path / "output",
        *("--eval-only", "DATASETS.TRAIN", "('absent_train',)"),
        *("MODEL.WEIGHTS", str(tmp_path / "model.pth")),
    )
    assert "AP" in results["bbox"]


def test_evaluation_of_a_part_of_the_detector(tiny_data, tmp_path):
    """The rest would have random weights."""
    torch.save(
        {"model": {"backbone.fpn_lateral3.norm.bias": torch.ones(64)}}, tmp_path / "part.pth"
    )
    weights = ("MODEL.WEIGHTS", str(tmp_path / "part.pth"))
    with pytest.raises(ValueError, match="part.pth does not fit this RetinaNet: it lacks backbone"):
        run("retinanet_R_18_baseline.yaml", tiny_data, tmp_path, "--eval-only", *weights)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty, expected the checkpoint to eval"):
        run("retinanet_R_18_baseline.yaml", tiny_data, tmp_path, "--eval-only")


def test_ends_its_process_group(tiny_data, tmp_path):
    """But not after an error, where other processes may be waiting in it."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
            run("retinanet_R_18_baseline.yaml", tiny_data, tmp_path, "--eval-only")
        assert distributed.is_initialized()
        run("retinanet_R_18_baseline.yaml", tiny_data, tmp_path)
        assert not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_import_changes_nothing():
    """Importing the packages registers their parts and leaves Detectron2's defaults alone; the
    config functions may be called in any order and twice."""
    code = """
from detectron2.config import get_cfg
before = get_cfg().dump()
import crosskd, labelenc, plaindet
assert get_cfg().dump() == before
dumps = []
for order in ([0, 1, 2], [2, 1, 0, 2, 1, 0]):
    cfg = get_cfg()
    for i in order:
        package = (plaindet, labelenc, crosskd)[i]
        getattr(package, f"add_{package.__name__}_config")(cfg)
    dumps.append(cfg.dump())
assert dumps[0] == dumps[1] != before
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_import_without_pkg_resources():
    """Which setuptools has no more. Detectron2's model zoo alone needs it."""
    code = "import sys; sys.modules['pkg_resources'] = None; import train_net"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=REPOSITORY)


def import_without(missing, module):
    """What importing `module` prints where another module is missing."""
    code = f"import sys; sys.modules['{missing}'] = None; import {module}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY).stderr


@pytest.mark.parametrize("module", ["plaindet", "labelenc", "crosskd", "train_net"])
def test_missing_detectron2(module):
    message = "extends Detectron2, which is not installed in this environment"
    assert message in import_without("detectron2", module)


def test_missing_part_of_detectron2():
    error = import_without("torch", "plaindet")  # which Detectron2 imports
    assert "ModuleNotFoundError: import of torch halted" in error
    assert "extends Detectron2" not in error
