"""The tools, on tiny inputs."""

import re
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor, default_argument_parser
from detectron2.modeling import build_model

import train_net
from labelenc import save_step1_file
from plaindet import read_config
from plaindet.data.shapes import SHAPES_CLASSES
from plaindet.engine import build_task, check_num_classes
from plaindet.engine.checks import thing_classes

from pictures import (
    PICTURE_WIDTH,
    ClassColors,
    detections_picture,
    save_sheet,
)

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs"


ROWS = {
    "demo": (
        "baseline",
        "baseline, twice the iterations",
        "baseline, iterations of both steps",
        "LabelEnc, step 1 (its image branch)",
        "LabelEnc, step 2",
    ),
    "demo_crosskd": ("teacher", "student alone", "student with CrossKD"),
}


@pytest.mark.parametrize("name", ROWS)
def test_demo(tiny_data, tmp_path, monkeypatch, name):
    """From a COCO-format folder to the report, with trainings of a few iterations in this process
    (test_demo.py has those in processes of their own)."""
    demo, demo_training = import_module(name), import_module("demo_training")
    small = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
    small += ["SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
    real = demo.dataset_overrides
    monkeypatch.setattr(demo, "dataset_overrides", lambda *args: real(*args) + small)

    def train(run, report):
        options = ["--config-file", str(run.config), *run.overrides, "OUTPUT_DIR", str(run.folder)]
        train_net.main(default_argument_parser().parse_args(options))
        demo_training.write_record(run, is_finished=True)

    monkeypatch.setattr(demo_training, "train", train)
    folder = Path(tiny_data[0][1]).parent.parent
    monkeypatch.setattr("sys.argv", [name, "--dataset", str(folder), "--output", str(tmp_path)])
    demo.main()

    (output,) = tmp_path.glob("tiny-*")
    report = (output / "report.md").read_text()
    for row in ROWS[name]:
        total = 6 if row in (ROWS[name][-1], "LabelEnc, step 2") else 3
        pattern = rf"^\| {re.escape(row)} \| 3 \| {total} \|(?: [\d.]+ \|){{4}}$"
        assert re.search(pattern, report, re.M), row
    for picture in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (output / picture).stat().st_size > 10_000, picture
    weights = [path.name for path in output.glob("*/*.pth")]
    step1_file = ["label_encoder.pth"] if name == "demo" else []
    assert sorted(weights) == step1_file + ["model_final.pth"] * len(ROWS[name])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("folder", ["none", "empty"])
def test_demo_without_data(tmp_path, monkeypatch, name, folder):
    """No such folder, or one of another layout: nothing is left behind."""
    (tmp_path / "empty").mkdir()
    demo, output = import_module(name), tmp_path / "output"
    arguments = [name, "--dataset", str(tmp_path / folder), "--output", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    message = {"none": "none does not exist", "empty": "empty: expected one annotations/train"}
    with pytest.raises(FileNotFoundError, match=message[folder]):
        demo.main()
    assert not output.exists()


def test_folders_of_one_name():
    runs = import_module("demo_runs")
    names = {runs.folder_name(path) for path in ("/a/cells", "/b/cells", "/b/cells/")}
    assert len(names) == 2
    assert all(name.startswith("cells-") for name in names)


@pytest.mark.parametrize(
    ("aps", "verdict"),
    [
        ((10, 20, 22, 18, 26), "LabelEnc gains more here than the same number"),
        ((10, 20, 22, 18, 21), "are about as good here"),
        ((10, 20, 26, 18, 21), "the plain detector gains more"),
        ((10, 20, 22, 18, 11), "gains nothing"),
    ],
)
def test_what_the_demo_says(aps, verdict):
    """Step 2 is compared with all baselines, whichever way they come out."""
    demo = import_module("demo")
    text = demo.compare(dict(zip(demo.TITLES, map(float, aps))))
    assert verdict in text
    differences = re.findall(r"^\* ([\d.]+) AP (above|below) .* \(([\d.]+)\)", text, re.M)
    assert [
        (float(ap), float(difference) * (1 if direction == "above" else -1))
        for difference, direction, ap in differences
    ] == [(ap, aps[-1] - ap) for ap in aps[:-1]]


def test_schedules_of_the_demo(read_cfg):
    """The baselines have once and twice the iterations of step 2, and those of both steps, which
    is clearly more; the learning rate falls at the same parts of all schedules."""
    demo = import_module("demo")
    solvers = {name: read_cfg(f"demo/{name}.yaml").SOLVER for name in demo.TITLES}
    iterations = {name: solver.MAX_ITER for name, solver in solvers.items()}
    step1, step2 = iterations["labelenc_step1"], iterations["labelenc_step2"]
    assert iterations["baseline"] == step2
    assert iterations["baseline_2x"] == 2 * step2
    assert iterations["baseline_total"] == step1 + step2 >= 1.3 * iterations["baseline_2x"]
    for solver in solvers.values():
        steps = [step / solver.MAX_ITER for step in solver.STEPS]
        assert steps == pytest.approx([0.8, 14 / 15], abs=0.002)


def test_data_set_of_the_demos(tiny_data):
    """The overrides for a data set fit every detector, and those of no data set are the shapes'."""
    folder = Path(tiny_data[0][1]).parent.parent
    demo, runs = import_module("demo_crosskd"), import_module("demo_runs")
    for detector in demo.DETECTORS:
        for overrides, num_classes in ((runs.dataset_overrides(str(folder)), 3), ([], 8)):
            cfg = read_config(CONFIGS / f"quick/{detector}_R_18_baseline.yaml", overrides)
            cfg.MODEL.DEVICE = "cpu"
            check_num_classes(build_model(cfg), cfg.DATASETS.TRAIN)
            assert len(thing_classes(cfg.DATASETS.TRAIN[0])) == num_classes
    assert runs.dataset_overrides(None) == []


def test_overhead(monkeypatch, capsys):
    arguments = "overhead --rounds 2 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 64"
    arguments += " SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0"
    monkeypatch.setattr("sys.argv", arguments.split())
    import_module("overhead").main()
    (ratio,) = re.findall(r"2 rounds: .* ratio ([\d.]+);", capsys.readouterr().out)
    assert 0.1 < float(ratio) < 10


@pytest.fixture
def call(monkeypatch):
    """Returns a function that runs a tool, and returns the rows of its sheets."""

    def run(name, *arguments):
        tool, sheets = import_module(name), []

        def save(path, rows, legend=None):
            save_sheet(path, rows, legend)
            sheet = cv2.imread(str(path))
            assert sheet.shape[1] == PICTURE_WIDTH * max(len(row) for row in rows)
            sheets.append(rows)

        monkeypatch.setattr(tool, "save_sheet", save)
        monkeypatch.setattr("sys.argv", [name, *(str(argument) for argument in arguments)])
        tool.main()
        return sheets

    return run


@pytest.fixture
def runs(make_cfg, tmp_path):
    """A folder as of a plain run and one of step 2, untrained; the plain run wants RGB."""
    for name, overrides in (("baseline", ["INPUT.FORMAT", "RGB"]), ("labelenc_step2", [])):
        cfg = make_cfg(f"quick/retinanet_R_18_{name}.yaml", *overrides)
        (tmp_path / f"{name}.yaml").write_text(cfg.dump())
        model = build_model(cfg)
        checkpointer = DetectionCheckpointer(model, str(tmp_path))
        if name == "labelenc_step2":
            checkpointer.add_checkpointable("training_only", model.training_only)
            save_step1_file(model, str(tmp_path / "label_encoder.pth"))
        checkpointer.save(name)
    return tmp_path


def feature_arguments(runs):
    return [
        *("--config-file", runs / "labelenc_step2.yaml", "--weights"),
        f"baseline={runs}/baseline.yaml:{runs}/baseline.pth",
        f"ours={runs}/labelenc_step2.pth",
        *("--output", runs / "sheets"),
    ]


def test_visualize_features(runs, make_cfg, call):
    """A row for each level; each checkpoint with its config and its weights."""
    sheets = call("visualize_features", "--level", "p3", "p5", *feature_arguments(runs))
    assert len(sheets) == 2  # one of the three images has no annotations
    titles = [[title for title, _ in row] for row in sheets[0]]
    names = ["baseline", "ours", "label encoding h(y)"]
    assert titles == [
        ["image", "label map", *(f"{name}, {level}" for name in names)] for level in ("p3", "p5")
    ]

    bgr = cv2.imread(DatasetCatalog.get("tiny_val")[0]["file_name"])
    pictures = [picture for _, picture in sheets[0][0]]
    assert (pictures[0] == bgr[..., ::-1]).all()
    for column, name, image in ((2, "baseline", bgr[..., ::-1]), (3, "labelenc_step2", bgr)):
        model = build_model(make_cfg("quick/retinanet_R_18_baseline.yaml")).eval()
        state = torch.load(runs / f"{name}.pth", weights_only=False)["model"]
        model.load_state_dict(state)
        tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
        with torch.no_grad():
            feature = model.backbone(model.preprocess_image([{"image": tensor}]).tensor)["p3"][0]
        intensity = feature.square().sum(dim=0).sqrt()[:8, :10].numpy()
        expected = 255 * (intensity - intensity.min()) / (intensity.max() - intensity.min())
        np.testing.assert_allclose(pictures[column][::8, ::8, 0], expected, atol=0.6)


def test_visualize_features_of_chosen_images(runs, call):
    """By id, and image files, which have no ground truth; the step-1 file gives the same encoding
    as the checkpoint it came with."""
    arguments = feature_arguments(runs)
    (by_id,) = call("visualize_features", "--image-ids", "1", *arguments)
    (by_number, *_) = call(
        "visualize_features", "--label-encoder", runs / "label_encoder.pth", *arguments
    )
    for row, other in zip(by_id, by_number):
        for (title, picture), (other_title, other_picture) in zip(row, other):
            assert title == other_title
            assert (picture == other_picture).all()

    file = DatasetCatalog.get("tiny_val")[0]["file_name"]
    ((row,),) = call("visualize_features", "--images", file, *arguments)
    assert [title for title, _ in row] == ["image", "baseline, p4", "ours, p4"]
    assert (row[1][1] == by_id[0][2][1]).all()
    assert (runs / "sheets" / "0_1.png").exists()


def test_visualize_features_of_deformable_detr(make_cfg, call, tmp_path):
    """The levels behind its input projections, named by their strides."""
    pytest.importorskip("transformers")
    cfg = make_cfg("quick/deformable_detr_R_18_labelenc_step1.yaml")
    (tmp_path / "step1.yaml").write_text(cfg.dump())
    task = build_task(cfg)
    torch.save({"model": task.state_dict()}, tmp_path / "detector.pth")
    save_step1_file(task, str(tmp_path / "label_encoder.pth"))
    sheets = call(
        *("visualize_features", "--config-file", tmp_path / "step1.yaml", "--level", "p3", "p6"),
        *("--weights", f"ours={tmp_path}/detector.pth", "--output", tmp_path / "sheets"),
        *("--label-encoder", tmp_path / "label_encoder.pth"),
    )
    assert [[title for title, _ in row][2:] for row in sheets[0]] == [
        [f"ours, {level}", f"label encoding h(y), {level}"] for level in ("p3", "p6")
    ]


def test_visualize_distillation(runs, call, tmp_path):
    """A row for each image, and in it the detections of each checkpoint as drawn from its own
    inference; image files have no ground truth."""
    arguments = feature_arguments(runs)[:-1] + [runs / "sheets" / "sheet.png"]
    low = ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.005"]
    options = ["--score-threshold", "0.0", *arguments, *low]
    ((*rows,),) = call("visualize_distillation", *options)
    assert len(rows) == 2
    assert all([t for t, _ in row] == ["ground truth", "baseline", "ours"] for row in rows)

    cfg = read_config(runs / "baseline.yaml", low)
    cfg.MODEL.WEIGHTS = str(runs / "baseline.pth")
    file = DatasetCatalog.get("tiny_val")[0]["file_name"]
    bgr = cv2.imread(file)
    instances = DefaultPredictor(cfg)(bgr)["instances"]
    assert len(instances) > 0
    colors = ClassColors(["red", "green", "blue"])
    for annotation in DatasetCatalog.get("tiny_val")[0]["annotations"]:  # drawn first
        colors(annotation["category_id"])
    expected = detections_picture(bgr[..., ::-1], instances, colors)
    assert (rows[0][1][1] == expected).all()

    (((image, *pictures),),) = call("visualize_distillation", "--images", file, *options)
    assert image[0] == "image"
    assert (image[1] == bgr[..., ::-1]).all()
    colors = ClassColors(["red", "green", "blue"])
    assert (pictures[0][1] == detections_picture(bgr[..., ::-1], instances, colors)).all()


def test_ground_truth_with_masks_that_are_no_polygons():
    dataset_dict = DatasetCatalog.get("shapes_val")[0]
    ((title, picture),) = import_module("visualize_distillation").draw_row(
        dataset_dict, [], ClassColors(SHAPES_CLASSES), None
    )
    assert title == "ground truth"
    assert picture.shape[1] == PICTURE_WIDTH


@pytest.mark.parametrize("tool", ["visualize_features", "visualize_label_maps"])
def test_pictures_without_a_test_set(runs, call, tool):
    """As a step 1 of the reconstruction alone has none."""
    arguments = feature_arguments(runs)
    if tool == "visualize_label_maps":
        arguments = [*arguments[:2], *arguments[-2:]]
    with pytest.raises(ValueError, match=r"TEST of .*step2.yaml is empty: expected --dataset NAME"):
        call(tool, *arguments, "DATASETS.TEST", "()")
    assert call(tool, "--dataset", "tiny_val", *arguments, "DATASETS.TEST", "()")


def test_visualize_features_errors(runs, call, capsys):
    arguments = feature_arguments(runs)
    state = torch.load(runs / "baseline.pth", weights_only=False)
    del state["model"]["head.bbox_pred.bias"]
    torch.save(state, runs / "part.pth")
    file = str(runs / "part.pth")
    for option, error, message in (
        (["--level", "p9"], ValueError, "no level p9: the levels are p3, p4"),
        (["--weights", f"a={runs}/none.pth"], FileNotFoundError, "none.pth does not exist"),
        (["--weights", f"a={file}"], ValueError, "part.pth .* lacks head.bbox_pred.bias"),
        (
            ["--weights", f"a={runs}/label_encoder.pth"],
            ValueError,
            "encoder.pth does not fit",
        ),
        (["--label-encoder", f"{runs}/none.pth"], FileNotFoundError, "none.pth does not exist"),
        (["--label-encoder", file], ValueError, r"part.pth has no label encoder, only \['"),
        (["--image-ids", "1", "7"], ValueError, "tiny_val has no image with the id 7"),
        (["--images", "none.png"], RuntimeError, "none.png"),
    ):
        with pytest.raises(error, match=message):
            call("visualize_features", *arguments, *option)
    shape = r"baseline.pth .* it has head.cls_score.weight \(27, 64, 3, 3\) instead of \(36, "
    with pytest.raises(ValueError, match=shape):
        call("visualize_features", *arguments, "MODEL.RETINANET.NUM_CLASSES", 4)
    with pytest.raises(SystemExit):
        call("visualize_features", *arguments, "--weights", "model.pth")
    assert "'model.pth' is not NAME=[CONFIG.yaml:]WEIGHTS" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_visualize_label_maps(make_cfg, tmp_path, call, kind):
    """A panel for each class, which shows the boxes of that class alone."""
    cfg = make_cfg("quick/retinanet_R_18_labelenc_step1.yaml")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = ["--config-file", tmp_path / "config.yaml", "--output", tmp_path / "sheets"]
    options = ["MODEL.LABELENC.LABEL_MAP", kind, "MODEL.MASK_ON", kind == "masks"]
    sheets = call("visualize_label_maps", *arguments, *options)
    dataset_dict = DatasetCatalog.get("tiny_val")[0]
    image = cv2.imread(dataset_dict["file_name"])[..., ::-1]
    classes = sorted({a["category_id"] for a in dataset_dict["annotations"]})
    (truth, everything, *panels) = (panel for row in sheets[0] for panel in row)
    assert (truth[0], everything[0]) == (kind, "label map, all classes")
    assert [title for title, _ in panels] == [["red", "green", "blue"][c] for c in classes]
    for category, (_, picture) in zip(classes, panels):
        inside = np.zeros(image.shape[:2], dtype=bool)
        for annotation in dataset_dict["annotations"]:
            x, y, width, height = (int(value) for value in annotation["bbox"])
            if annotation["category_id"] == category:
                inside[y : y + height, x : x + width] = True
        changed = (picture != image).any(axis=2)
        assert not changed[~inside].any()
        assert changed[inside].mean() > 0.9
    crowd = [title for row in sheets[1] for title, _ in row]
    assert crowd == [kind, "label map, all classes"]

    (augmented,) = call("visualize_label_maps", "--augment", "--images", 1, *arguments, "SEED", 3)
    assert (augmented[0][1][1] != everything[1]).any()


TOOLS = ["demo", "demo_crosskd", "benchmark", "visualize_distillation", "visualize_features"]
TOOLS += ["visualize_label_maps", "benchmark_crosskd"]


@pytest.mark.parametrize("tool", TOOLS)
def test_help(tool, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [tool, "--help"])
    with pytest.raises(SystemExit) as stop:
        import_module(tool).main()
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out
