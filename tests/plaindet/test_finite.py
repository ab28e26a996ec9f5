"""A loss that is not finite never reaches the weights."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

import train_net
from plaindet.engine import PlainTrainer

CONFIG = "quick/retinanet_R_18_baseline.yaml"
STEP1 = "quick/retinanet_R_18_labelenc_step1.yaml"


def poison(trainer, iteration):
    """Gives the model an infinite pixel in one iteration."""

    def before_forward(_, inputs):
        if trainer.iter == iteration:
            inputs[0][0]["image"] = inputs[0][0]["image"].float()
            inputs[0][0]["image"][0, 10, 10] = float("inf")

    trainer.model.register_forward_pre_hook(before_forward)


@pytest.mark.parametrize(
    ("method", "detector", "write_metrics"),
    [
        ("baseline", "retinanet", "at once"),
        ("baseline", "retinanet", "asynchronously"),
        ("labelenc_step1", "fcos", "rarely"),
        ("crosskd", "retinanet", "rarely"),
    ],
)
def test_stops_before_the_step(make_method_cfg, method, detector, write_metrics):
    cfg = make_method_cfg(method, detector, "SOLVER.CHECKPOINT_PERIOD", "1")
    trainer = PlainTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer._trainer.async_write_metrics = write_metrics == "asynchronously"
    trainer._trainer.gather_metric_period = 100 if write_metrics == "rarely" else 1
    poison(trainer, 2)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()

    folder = Path(cfg.OUTPUT_DIR)
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    saved = torch.load(folder / "model_0000001.pth", weights_only=True)["model"]
    for name, parameter in trainer.plain_model.named_parameters():
        if name in saved:
            assert torch.equal(parameter, saved[name]), name

    path = folder / "nonfinite_0000002_process0.pth"
    replay = torch.load(path, weights_only=False)
    files = [image["file_name"] for image in replay["batch"]]
    message = str(error.value)
    assert "in iteration 2" in message
    assert re.search(r"'loss_\w+': nan", message)
    assert all(text in message for text in (str(path), *files, *replay["losses"]))
    assert path.stat().st_size < 2**20
    trainer.iter = -1
    with EventStorage():
        losses = trainer.plain_model(replay["batch"])
    assert not torch.isfinite(sum(losses.values()))


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn", "deformable_detr"])
def test_divergence_inside_the_model(make_method_cfg, detector):
    """A check in there comes before the losses; the report is the same."""
    cfg = make_method_cfg("baseline", detector)
    trainer = PlainTrainer(cfg)
    poison(trainer, 2)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    path = Path(cfg.OUTPUT_DIR) / "nonfinite_0000002_process0.pth"
    replay = torch.load(path, weights_only=False)
    message = str(error.value)
    assert "The training has diverged in iteration 2: Predicted boxes or scores" in message
    assert re.search(r"losses of the iteration before: {'loss_\w+': \d", message)
    assert all(text in message for text in (str(path), *[x["file_name"] for x in replay["batch"]]))
    assert "The weights are still those before it" in message


def test_weights_that_were_not_finite_before(make_cfg):
    """The batch is not to blame then."""
    trainer = train_net.PlainTrainer(make_cfg(CONFIG))
    with torch.no_grad():
        trainer.plain_model.head.cls_score.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="But weights are infinite or NaN, too: an earl"):
        trainer.train()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CONFIG, "head.cls_score.bias"),
        (
            "quick/retinanet_R_18_labelenc_step1.yaml",
            "training_only.LabelEnc.label_encoder.fpn_output3.bias",
        ),
        (CONFIG, "backbone.bottom_up.stem.conv1.norm.running_var"),
    ],
)
def test_weights_that_are_not_finite_are_not_written(make_cfg, config, name):
    """As after a gradient that is not finite, of losses that are."""
    cfg = make_cfg(config, "MODEL.FPN.NORM", "")
    trainer = PlainTrainer(cfg)
    trainer.checkpointer.save("model_0000000", iteration=0)
    folder = Path(cfg.OUTPUT_DIR)
    before = {path: path.read_bytes() for path in folder.glob("*.pth")}
    with torch.no_grad():
        task = trainer.task
        tensors = (*task.named_parameters(), *task.named_buffers())
        {key.removeprefix("detector."): tensor for key, tensor in tensors}[name][0] = float("nan")
    with pytest.raises(FloatingPointError, match=f"No checkpoint is written.*{name}"):
        trainer.checkpointer.save("model_0000001", iteration=1)
    assert {path: path.read_bytes() for path in folder.glob("*.pth*")} == before
    assert (folder / "last_checkpoint").read_text() == "model_0000000.pth"
