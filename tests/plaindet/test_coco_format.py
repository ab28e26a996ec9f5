import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from plaindet.data import find_coco_folder, register_coco_format
from plaindet.engine.checks import thing_classes


def test_registered_data(tiny_data):
    """As Detectron2's own registration: contiguous class ids, boxes, evaluator type."""
    metadata = MetadataCatalog.get("tiny_train")
    assert metadata.evaluator_type == "coco"
    dataset_dicts = DatasetCatalog.get("tiny_train")
    assert metadata.thing_classes == ["red", "green", "blue"]
    assert len(dataset_dicts) == 6
    assert {a["category_id"] for d in dataset_dicts for a in d["annotations"]} <= {0, 1, 2}
    register_coco_format(tiny_data)  # a second time is fine


def make_folder(path, json_files, folders):
    (path / "annotations").mkdir(parents=True)
    for name in json_files:
        (path / "annotations" / name).write_text("{}")
    for name in folders:
        (path / name).mkdir()
    return str(path)


@pytest.mark.parametrize(
    ("json_files", "folders"),
    [
        (["train.json", "val.json"], ["train", "val"]),
        (["instances_train2017.json", "instances_val2017.json"], ["train2017", "val2017"]),
    ],
)
def test_find_coco_folder(tmp_path, json_files, folders):
    folder = make_folder(tmp_path / "cells", json_files, folders)
    assert find_coco_folder(folder + "/") == tuple(
        (f"cells_{split}", f"{folder}/annotations/{json_file}", f"{folder}/{images}")
        for split, json_file, images in zip(("train", "val"), json_files, folders)
    )


@pytest.mark.parametrize(
    ("json_files", "folders", "message"),
    [
        (["train.json"], ["train", "val"], r"one annotations/val\*.json .*found \['train.json'\]"),
        (["train.json", "val.json"], ["val"], r"the images of .*train.json in .*/train, found"),
        (
            ["train.json", "train2.json", "val.json"],
            ["train", "val"],
            r"one annotations/train\*.json .*found \[.*train.json', .*train2.json'\]",
        ),
    ],
)
def test_folder_of_another_layout(tmp_path, json_files, folders, message):
    with pytest.raises(FileNotFoundError, match=message):
        find_coco_folder(make_folder(tmp_path / "cells", json_files, folders))


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        find_coco_folder(str(tmp_path / "nothing"))


def test_missing_files(tiny_data):
    """They are missed when the data set is read: an evaluation needs no training images."""
    _, json_file, images = tiny_data[0]
    register_coco_format([["no_json", "nowhere.json", images], ["no_images", json_file, "nowhere"]])
    for name, path in (("no_json", "nowhere.json"), ("no_images", "nowhere")):
        with pytest.raises(FileNotFoundError, match=f"{path} of the data set {name} does not ex"):
            thing_classes(name)
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_other_kinds_of_data_sets(tmp_path):
    """LVIS's json has keys of its own, which are not looked at, and needs a package."""

    def read():
        raise ModuleNotFoundError("No module named 'lvis'", name="lvis")

    (tmp_path / "lvis.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    DatasetCatalog.register("lvis_train", read)
    MetadataCatalog.get("lvis_train").set(
        json_file=str(tmp_path / "lvis.json"), evaluator_type="lvis"
    )
    try:
        with pytest.raises(ModuleNotFoundError, match="No module named 'lvis'"):
            thing_classes("lvis_train")
    finally:
        DatasetCatalog.remove("lvis_train")
        MetadataCatalog.remove("lvis_train")


def test_bad_entries(tiny_data):
    _, json_file, images = tiny_data[0]
    with pytest.raises(ValueError, match=r"found \['a', 'b'\], expected \[name, json file, image"):
        register_coco_format([["a", "b"]])
    with pytest.raises(ValueError, match="the name shapes_val is taken by another data set"):
        register_coco_format([["shapes_val", json_file, images]])
