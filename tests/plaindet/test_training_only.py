"""What exists for training only is in the checkpoints of any trainer that asks for it, and is not
lost without a word where it did not."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from labelenc import LabelEncTrainer
from plaindet import keep_training_only

STEP1 = "quick/retinanet_R_18_labelenc_step1.yaml"
LOST = r"goes on in iteration 2 with an untrained feature_adapter, label_encoder.*keep_training_"


@pytest.fixture
def make_trainer(make_cfg, tmp_path):
    """Returns a function that makes Detectron2's plain training loop and its checkpointer, as in
    its script for LazyConfig."""

    def make(keeps):
        cfg = make_cfg(STEP1)
        model = build_model(cfg).train()
        loader = LabelEncTrainer.build_train_loader(cfg)
        trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), 1e-4))
        checkpointer = DetectionCheckpointer(model, str(tmp_path / "run"), trainer=trainer)
        if keeps:
            keep_training_only(checkpointer)
        return trainer, checkpointer

    (tmp_path / "run").mkdir()
    return make


def train_two(trainer, checkpointer):
    trainer.train(0, 2)
    trainer.iter = 1
    checkpointer.save("model_0000001")


@pytest.mark.parametrize("keeps", [True, False])
def test_said_when_a_checkpoint_is_written(make_trainer, caplog, keeps):
    train_two(*make_trainer(keeps))
    message = "has the plain detector alone, without feature_adapter, label_encoder"
    assert caplog.text.count(message) == (not keeps)


def test_not_said_of_a_trained_detector(make_trainer, caplog):
    trainer, _ = make_trainer(keeps=False)
    trainer.model.eval().state_dict()
    assert "has the plain detector alone" not in caplog.text


@pytest.mark.parametrize(("saved", "resumed"), [(True, True), (False, True), (True, False)])
def test_resuming(make_trainer, saved, resumed):
    trainer, checkpointer = make_trainer(saved)
    train_two(trainer, checkpointer)
    expected = {k: v.clone() for k, v in trainer.model.training_only.state_dict().items()}

    trainer, checkpointer = make_trainer(resumed)
    checkpointer.resume_or_load("", resume=True)
    if not (saved and resumed):
        with pytest.raises(RuntimeError, match=LOST):
            trainer.train(trainer.iter + 1, 3)
        return
    found = trainer.model.training_only.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    trainer.train(trainer.iter + 1, 3)


def test_models_without_such_parts(make_cfg, tmp_path):
    checkpointer = DetectionCheckpointer(
        build_model(make_cfg("quick/retinanet_R_18_baseline.yaml")), str(tmp_path)
    )
    keep_training_only(checkpointer)
    checkpointer.save("model")
    assert torch.load(tmp_path / "model.pth").keys() == {"model"}


def test_inference_in_the_middle_of_a_storage(make_trainer):
    """Only training is refused."""
    trainer, _ = make_trainer(keeps=False)
    with EventStorage(2), torch.no_grad():
        trainer.model.eval()([{"image": torch.zeros(3, 64, 64)}])
