"""The embedded ``shapes`` set: exact, reproducible, and usable by Detectron2 as it is."""

import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager

from plaindet.data import shapes

# Of the annotations of image 17 of shapes_train, and of its pixels. Whoever changes the drawing
# on purpose changes the set, and with it every number that was measured on it.
ANNOTATIONS_SHA256 = "7ab664823a7f210681203e44d4cc5305c1b5df3ccb33b883e769a19d7316492e"
IMAGE_SHA256 = "c650c66a2526ff5c4a5ab8f2a77e5152390042962921890721c8cbb7ee59a67a"


_PRINT_DIGESTS = """
import hashlib, json, sys
sys.path[:0] = sys.argv[1:]
from plaindet.data.shapes import _dataset_dict, draw_shapes
annotations = json.dumps(_dataset_dict("train", 17), sort_keys=True).encode()
image = draw_shapes("train", 17)[0].tobytes()
print(*(hashlib.sha256(data).hexdigest() for data in (annotations, image)))
"""


@pytest.fixture(scope="module", autouse=True)
def fresh_process():
    """A process that prints the two checksums; it imports Detectron2 while other tests run."""
    command = [sys.executable, "-W", "ignore", "-c", _PRINT_DIGESTS, *filter(None, sys.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module", autouse=True)
def _registered():
    shapes.register_shapes()


@pytest.fixture(scope="module")
def train_dicts():
    return DatasetCatalog.get("shapes_train")


@pytest.fixture(scope="module")
def val_dicts():
    return DatasetCatalog.get("shapes_val")


def _digest(data):
    return hashlib.sha256(data).hexdigest()


def test_drawing_does_not_touch_the_global_random_state():
    before = np.random.get_state()[1:3]
    shapes.draw_shapes("val", 0)
    after = np.random.get_state()[1:3]
    assert np.array_equal(before[0], after[0])
    assert before[1] == after[1]


def test_sizes_ids_and_names(train_dicts, val_dicts):
    assert (len(train_dicts), len(val_dicts)) == (2000, 200)
    for split, records in (("train", train_dicts), ("val", val_dicts)):
        assert [r["image_id"] for r in records] == list(range(len(records)))
        assert records[3]["file_name"] == f"shapes://{split}/3.bmp"
        metadata = MetadataCatalog.get(f"shapes_{split}")
        assert metadata.thing_classes == list(shapes.SHAPES_CLASSES)
        assert metadata.evaluator_type == "coco"


def test_registering_twice_is_harmless(val_dicts):
    shapes.register_shapes()
    assert DatasetCatalog.get("shapes_val") == val_dicts


def test_train_and_val_share_no_image(train_dicts, val_dicts):
    def layouts(records):
        return {json.dumps(r["annotations"], sort_keys=True) for r in records}

    train, val = layouts(train_dicts), layouts(val_dicts)
    assert (len(train), len(val)) == (2000, 200)  # none twice within a split either
    assert not train & val


def test_boxes_and_rle_are_exactly_those_of_the_drawn_masks(val_dicts):
    for index, record in enumerate(val_dicts[:60]):
        image, classes, masks = shapes.draw_shapes("val", index)
        assert image.shape == (record["height"], record["width"], 3)
        assert image.dtype == np.uint8
        assert [a["category_id"] for a in record["annotations"]] == classes
        assert masks.sum(axis=0).max() == 1  # visible pixels belong to one object
        for annotation, mask in zip(record["annotations"], masks):
            rows, columns = np.nonzero(mask)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert annotation["bbox"] == tight
            assert np.array_equal(mask_util.decode(annotation["segmentation"]), mask)
            assert annotation["iscrowd"] == 0


def test_every_class_occurs_about_equally_often_and_images_hold_several_objects(val_dicts):
    annotations = [a for r in val_dicts for a in r["annotations"]]
    counts = Counter(a["category_id"] for a in annotations)
    assert sorted(counts) == list(range(len(shapes.SHAPES_CLASSES)))
    assert min(counts.values()) > 0.5 * len(annotations) / len(counts)
    assert {len(r["annotations"]) for r in val_dicts} >= set(range(1, 10))


def test_objects_have_the_promised_sizes(val_dicts):
    boxes = np.array([a["bbox"] for r in val_dicts for a in r["annotations"]])
    longest = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert 60 < longest.max() <= 72
    assert longest.min() < 20
    assert np.median(longest) < (20 + 70) / 2


def test_what_is_seen_of_an_object_is_enough_and_the_rest_is_not_there(monkeypatch):
    """Follow every object that is tried: only what shows enough of itself is in the image."""
    tried = []
    draw = shapes._draw_object

    def spy(rs, category):
        tried.append((category, *draw(rs, category)))
        return tried[-1][1:]

    monkeypatch.setattr(shapes, "_draw_object", spy)
    skipped, partly_hidden = 0, 0
    for index in range(60):
        tried.clear()
        _, classes, masks = shapes.draw_shapes("val", index)
        hidden = np.zeros(masks.shape[1:], bool)  # by the objects above
        expected = []
        for category, mask, area in tried:
            visible = (mask > 0) & ~hidden
            if visible.sum() < 40 or visible.sum() < 0.4 * area:
                skipped += 1
                continue
            partly_hidden += visible.sum() < 0.9 * mask.sum()
            expected.append((category, visible))
            hidden |= mask > 0
        assert [c for c, _ in expected] == classes
        assert np.array_equal([m for _, m in expected], masks)
    assert skipped > 5  # else the rule above was never at work
    assert partly_hidden > 5


def test_area_of_an_object_counts_what_the_border_cuts_off():
    rs = np.random.RandomState(0)
    disc = shapes.SHAPES_CLASSES.index("disc")
    cut = 0
    for _ in range(200):
        mask, area = shapes._draw_object(rs, disc)
        diameter = 2 * np.sqrt(area / np.pi)
        touches = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
        if not touches:
            assert mask.sum() == area
            rows = np.nonzero(mask.any(axis=1))[0]
            assert abs(rows[-1] + 1 - rows[0] - diameter) < 2
        cut += mask.sum() < area
    assert cut > 5


def test_objects_differ_from_what_surrounds_them():
    """The mean colour inside differs from the mean around, else nobody could find the object."""
    contrasts = []
    for index in range(60):
        image, _, masks = shapes.draw_shapes("val", index)
        for mask in masks:
            rows, columns = np.nonzero(mask)
            box = np.s_[
                max(0, rows.min() - 3) : rows.max() + 4,
                max(0, columns.min() - 3) : columns.max() + 4,
            ]
            inside, outside = image[box][mask[box]], image[box][~mask[box]]
            contrasts.append(np.abs(inside.mean(axis=0) - outside.mean(axis=0)).max())
    assert np.percentile(contrasts, 5) > 10
    assert np.mean(np.array(contrasts) < 60) > 0.05  # and a part of them only a little


@pytest.mark.parametrize("index", [0, 199])
def test_detectron2_reads_the_drawn_pixels(index):
    image, _, _ = shapes.draw_shapes("val", index)
    assert np.array_equal(read_image(f"shapes://val/{index}.bmp", "RGB"), image)
    assert np.array_equal(read_image(f"shapes://val/{index}.bmp", "BGR"), image[:, :, ::-1])


@pytest.mark.parametrize(
    "path",
    [
        "shapes://",
        "shapes://val",
        "shapes://val/200.bmp",
        "shapes://val/-1.bmp",
        "shapes://val/03.bmp",
        "shapes://val/3.png",
        "shapes://val/3.bmp.txt",
        "shapes://test/3.bmp",
        "shapes://val/x/3.bmp",
    ],
)
def test_wrong_path_says_what_was_found_and_expected(path):
    with pytest.raises(FileNotFoundError) as error:
        PathManager.open(path, "rb")
    assert repr(path) in str(error.value)
    assert "shapes://val/<0..199>.bmp" in str(error.value)


def test_images_cannot_be_written():
    with pytest.raises(ValueError, match="'wb'"):
        PathManager.open("shapes://val/3.bmp", "wb")


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("val", -1)])
def test_wrong_split_or_index(split, index):
    with pytest.raises(ValueError, match=f"{index} of split '{split}'"):
        shapes.draw_shapes(split, index)


def _cfg():
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TRAIN = (shapes.IMAGE_SIZE,)
    cfg.INPUT.MAX_SIZE_TRAIN = shapes.IMAGE_SIZE
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = shapes.IMAGE_SIZE
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.DATASETS.TEST = ("shapes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def test_detectron2_dataset_mapper_with_masks(val_dicts):
    mapper = DatasetMapper(_cfg(), is_train=True)
    records = get_detection_dataset_dicts("shapes_val")  # without images that hold no object
    assert len(records) == 200
    for index, record in enumerate(records[:10]):
        image, classes, masks = shapes.draw_shapes("val", index)
        mapped = mapper(record)
        assert np.array_equal(mapped["image"].numpy(), image[:, :, ::-1].transpose(2, 0, 1))
        instances = mapped["instances"]
        assert instances.gt_classes.tolist() == classes
        assert np.array_equal(instances.gt_masks.tensor.numpy(), masks)
        boxes = torch.tensor([a["bbox"] for a in val_dicts[index]["annotations"]])
        assert torch.equal(instances.gt_boxes.tensor, boxes)


def _ground_truth_as_output(record):
    annotations = record["annotations"]
    instances = Instances((record["height"], record["width"]))
    instances.pred_boxes = Boxes(torch.tensor([a["bbox"] for a in annotations]))
    instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
    masks = [mask_util.decode(a["segmentation"]) for a in annotations]
    instances.pred_masks = torch.from_numpy(np.stack(masks).astype(bool))
    instances.scores = torch.ones(len(annotations))
    return {"instances": instances}


@pytest.fixture
def evaluator(tmp_path):
    evaluator = COCOEvaluator("shapes_val", output_dir=str(tmp_path), distributed=False)
    yield evaluator
    # COCOEvaluator notes its json file, which will be deleted, for the rest of the process.
    del MetadataCatalog.get("shapes_val").json_file


def test_coco_evaluator_gives_ground_truth_100_percent(val_dicts, evaluator):
    loader = build_detection_test_loader(_cfg(), "shapes_val")
    evaluator.reset()
    for batch in loader:
        records = [val_dicts[inputs["image_id"]] for inputs in batch]
        evaluator.process(batch, [_ground_truth_as_output(r) for r in records])
    results = evaluator.evaluate()
    for task in ("bbox", "segm"):
        assert results[task]["AP"] == pytest.approx(100)
        for name in shapes.SHAPES_CLASSES:
            assert results[task][f"AP-{name}"] == pytest.approx(100)


def test_coco_evaluator_sees_wrong_classes(val_dicts, evaluator):
    evaluator.reset()
    for record in val_dicts:
        output = _ground_truth_as_output(record)
        output["instances"].pred_classes = (output["instances"].pred_classes + 1) % 8
        evaluator.process([record], [output])
    assert evaluator.evaluate()["bbox"]["AP"] < 5


def test_same_bytes_in_this_and_in_a_fresh_process(train_dicts, fresh_process):
    annotations = json.dumps(train_dicts[17], sort_keys=True).encode()
    image = shapes.draw_shapes("train", 17)[0].tobytes()
    here = [_digest(annotations), _digest(image)]
    assert here == [ANNOTATIONS_SHA256, IMAGE_SHA256]
    there, _ = fresh_process.communicate(timeout=120)
    assert there.split() == here
