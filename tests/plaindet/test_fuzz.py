"""Random annotations through the checks, the mapper, the label map and the losses of both methods:
an error that names the annotation, or finite losses."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plaindet.data import check_records
from plaindet.engine import PlainTrainer

sides = st.floats(-1e3, 1e3) | st.floats() | st.sampled_from([0.0, 1e-5, 64.0, 80.0])
annotations = st.fixed_dictionaries(
    {
        "bbox": st.lists(sides, min_size=4, max_size=4),
        "bbox_mode": st.sampled_from([BoxMode.XYWH_ABS, BoxMode.XYXY_ABS]),
        "category_id": st.integers(0, 2) | st.integers(-2, 4),
        "iscrowd": st.sampled_from([0, 0, 0, 1]),
        "id": st.integers(0, 1000),
    }
)
# Boxes that are mostly good, so that they come as far as the losses.
good = st.tuples(*[st.floats(-20, 90)] * 2, *[st.floats(0, 90)] * 2).map(list)
good_annotations = st.fixed_dictionaries(
    {
        "bbox": good,
        "bbox_mode": st.just(BoxMode.XYWH_ABS),
        "category_id": st.integers(0, 2),
        "iscrowd": st.sampled_from([0, 0, 0, 1]),
    }
)
lists = st.lists(good_annotations, max_size=6) | st.lists(annotations, max_size=3)


@pytest.mark.parametrize(
    ("method", "detector"),
    [
        ("labelenc_step1", "retinanet"),
        ("labelenc_step2", "fcos"),
        ("labelenc_step1", "faster_rcnn"),
        ("crosskd", "gfl"),
        ("crosskd", "atss"),
    ],
)
def test_random_annotations(make_method_cfg, method, detector):
    cfg = make_method_cfg(method, detector)
    model = PlainTrainer.build_model(cfg).train()
    mapper = PlainTrainer.build_train_mapper(cfg)
    record = DatasetCatalog.get("tiny_train")[0]

    # Without randomness of its own, so that it fails for everybody or for nobody.
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(lists, min_size=1, max_size=2))
    def check(images):
        records = [{**record, "annotations": entries} for entries in images]
        try:
            check_records(records, num_classes=3)
        except ValueError as error:
            assert "1.png, annotation" in str(error)  # noqa: PT017
            return
        with EventStorage(), torch.no_grad():
            losses = model([mapper(entry) for entry in records])
        nonlocal trained
        trained += 1
        for name, loss in losses.items():
            assert torch.isfinite(loss), name

    trained = 0
    check()
    assert trained >= 10
