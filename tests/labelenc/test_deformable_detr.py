"""LabelEnc for Deformable DETR, whose transformer is the head."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from labelenc import LabelEnc, inherit_step1_file, inherit_teacher, save_step1_file
from plaindet.engine import PlainTrainer, Teacher, TrainingTask, adapter_of, build_task

SMALL = ("MODEL.DEFORMABLE_DETR.HIDDEN_DIM", 32, "MODEL.DEFORMABLE_DETR.NUM_HEADS", 4)
PROJECTION = "transformer.model.input_proj."

pytest.importorskip("transformers")


@pytest.fixture
def read(make_cfg):
    def make(step, *overrides):
        run = f"labelenc_step{step}" if step else "baseline"
        return make_cfg(f"quick/deformable_detr_R_18_{run}.yaml", *SMALL, *overrides)

    return make


@pytest.fixture
def batch(read):
    # 64 x 80 px: the width is no multiple of 32.
    return next(iter(PlainTrainer.build_train_loader(read(1, "SOLVER.IMS_PER_BATCH", 2))))


def losses_of(model, batch):
    with EventStorage():
        return model.train()(batch)


def test_levels_are_those_behind_the_projections(read, batch):
    """And from its own levels the detector has its own losses."""
    detector = build_model(read(0)).train()
    adapter = adapter_of(detector)
    with EventStorage():
        seen = adapter.observe(batch)
        given = adapter.losses_on(seen.features, batch, seen)
    assert given == seen.losses
    assert {name: (x.shape[1], x.shape[-2:]) for name, x in seen.features.items()} == {
        "p3": (32, (8, 10)), "p4": (32, (4, 5)), "p5": (32, (2, 3)), "p6": (32, (1, 2)),
    }  # fmt: skip
    assert {name: x.stride for name, x in adapter.feature_shapes.items()} == {
        "p3": 8, "p4": 16, "p5": 32, "p6": 64,
    }  # fmt: skip
    projection = detector.transformer.model.input_proj[2]
    levels = adapter.levels(detector.backbone(seen.images.tensor))
    torch.testing.assert_close(levels["p5"], seen.features["p5"])
    res5 = detector.backbone(seen.images.tensor)["res5"]
    torch.testing.assert_close(projection(res5), seen.features["p5"])
    # Nothing is left of it.
    assert "project" not in vars(detector.transformer)
    assert losses_of(detector, batch).keys() == given.keys()


def test_losses_of_step1(read, batch):
    """L1 is of the detector's own losses, from levels as large as its own."""
    task = build_task(read(1)).train()
    losses = losses_of(task, batch)
    plain = {name.removeprefix("loss_") for name in losses if "reconstruction" not in name}
    found = {name.removeprefix("loss_reconstruction_") for name in losses if "_recon" in name}
    assert found == plain - {"distance"}
    with EventStorage():
        seen = task.adapter.observe(batch)
        encodings = task.training_only["LabelEnc"].encode(batch, seen.images)
    assert {k: x.shape for k, x in encodings.items()} == {
        k: x.shape for k, x in seen.features.items()
    }


def test_reconstruction_only(read, batch):
    """Without L2 and L3 neither backbone nor projections are trained."""
    task = build_task(read(1, "MODEL.LABELENC.LAMBDA1", 0.0, "MODEL.LABELENC.LAMBDA2", 0.0))
    sum(losses_of(task, batch).values()).backward()
    trained = {n for n, p in task.detector.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in task.detector.named_parameters() if p.requires_grad}
    assert trained
    assert not [n for n in trained if n.startswith(("backbone.", PROJECTION))]


def test_step2_inherits_the_transformer(read, tmp_path):
    """Without the projections, which step 2 keeps, as a backbone."""
    step1, step2 = (build_task(read(step)) for step in (1, 2))
    for parameter in step1.parameters():
        torch.nn.init.normal_(parameter)
    save_step1_file(step1, str(tmp_path / "file.pth"))
    before = {key: value.clone() for key, value in step2.state_dict().items()}
    inherit_step1_file(step2, str(tmp_path / "file.pth"))
    for key, value in step2.state_dict().items():
        source = before if key.startswith(("backbone.", PROJECTION)) else step1.state_dict()
        assert torch.equal(value, source[key]), key
    heads = ("MODEL.DEFORMABLE_DETR.NUM_HEADS", 2, "MODEL.DEFORMABLE_DETR.NUM_POINTS", 8)
    other = build_task(read(2, *heads))
    with pytest.raises(ValueError, match="num_heads is 4 in the file and 2 in the config"):
        inherit_step1_file(other, str(tmp_path / "file.pth"))


def test_step2_after_cut_off_is_plain(read, batch):
    task, plain = build_task(read(2)), build_model(read(0))
    plain.load_state_dict(task.state_dict(), strict=True)
    task.training_only["LabelEnc"].distance_enabled = False
    batch = [{k: v for k, v in x.items() if k != "label_map"} for x in batch]
    losses, expected = losses_of(task, batch), losses_of(plain, batch)
    assert losses.pop("loss_distance") == 0
    assert losses == expected


def test_vanilla_kd(read, batch):
    """A teacher supervises with its own projected levels."""
    cfg, teacher = read(0), build_model(read(0))
    task = TrainingTask(build_model(cfg), [LabelEnc(step=2, teacher=Teacher(teacher))])
    inherit_teacher(task, "teacher.yaml")
    for key, value in adapter_of(teacher).head_state.items():
        assert torch.equal(task.state_dict()[key], value), key
    with EventStorage():
        seen = task.adapter.observe(batch)
        found = task.training_only["LabelEnc"].encode(batch, seen.images)
    res3 = teacher.backbone(teacher.preprocess_image(batch).tensor)["res3"]
    torch.testing.assert_close(found["p3"], teacher.transformer.model.input_proj[0](res3))
    loss = losses_of(task, batch)["loss_distance"]
    loss.backward()
    assert 0 < loss < 4
    assert task.detector.transformer.model.input_proj[0][0].weight.grad.any()
