"""An interrupted and resumed run ends as the uninterrupted one, bit for bit."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from resumed_runs import assert_equal, final_checkpoint, in_folder, start

from plaindet.data import register_coco_format
from plaindet.engine import BestCheckpointer, ExactResume, PlainTrainer, ending_process_group
from plaindet.seeding import seed_everything

CONFIG = "quick/retinanet_R_18_baseline.yaml"


@pytest.mark.parametrize(
    ("method", "detector", "more"),
    [
        # The loss normaliser of RetinaNet is a moving average.
        ("baseline", "retinanet", ["DATALOADER.NUM_WORKERS", "2"]),
        pytest.param(
            *("baseline", "fcos", ["MODEL.FCOS.LOSS_NORMALIZER", "moving_average"]),
            marks=pytest.mark.long,
        ),
        # Random samples of anchors and proposals.
        ("baseline", "faster_rcnn", []),
        # Random label maps, and a phase that starts at iteration 2.
        ("labelenc_step1", "retinanet", ["DATALOADER.NUM_WORKERS", "1"]),
        ("labelenc_step2", "retinanet", []),
        pytest.param("crosskd", "gfl", [], marks=pytest.mark.long),  # below, with LabelEnc
        ("labelenc_crosskd", "gfl", []),
    ],
)
def test_resumed_equals_uninterrupted(make_method_cfg, method, detector, more):
    cfg = make_method_cfg(method, detector, "SOLVER.CHECKPOINT_PERIOD", "2", "SEED", "5", *more)
    whole, resumed = in_folder(cfg, "whole"), in_folder(cfg, "resumed")
    start(whole)
    start(resumed, interrupt_at=2)  # iteration 2 is lost and done again
    assert start(resumed, resume=True).start_iter == 2
    assert_equal(final_checkpoint(resumed), final_checkpoint(whole))


def test_killed_before_the_final_checkpoint(make_cfg):
    """The last iteration has been saved, model_final.pth not: resuming writes it."""
    cfg = make_cfg(CONFIG, "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "4", "SEED", "5")
    whole, killed = in_folder(cfg, "whole"), in_folder(cfg, "killed")
    start(whole)
    start(killed)
    (Path(killed.OUTPUT_DIR) / "model_final.pth").unlink()
    (Path(killed.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000003.pth")
    assert start(killed, resume=True).start_iter == 4
    assert_equal(final_checkpoint(killed), final_checkpoint(whole))


def test_checkpoint_behind_the_end(make_cfg):
    cfg = make_cfg(CONFIG, "SOLVER.MAX_ITER", "4", "SEED", "5")
    start(cfg)
    cfg.SOLVER.MAX_ITER = 3
    with pytest.raises(ValueError, match=r"model_final.pth has 4 iter.* at most SOLVER.MAX_ITER 3"):
        start(cfg, resume=True)


def test_two_interruptions_without_a_seed(make_cfg):
    """A random seed is kept, too."""
    cfg = make_cfg(CONFIG, "SEED", "-1", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "5")
    resumed = in_folder(cfg, "resumed")
    first = start(resumed, interrupt_at=0)
    whole = in_folder(cfg, "whole")
    for name in ("model_0000000.pth", "last_checkpoint"):
        content = (Path(resumed.OUTPUT_DIR) / name).read_bytes()
        (Path(whole.OUTPUT_DIR) / name).write_bytes(content)
    start(whole, resume=True)
    assert start(resumed, interrupt_at=3, resume=True).cfg.SEED == first.cfg.SEED >= 0
    start(resumed, resume=True)
    assert_equal(final_checkpoint(resumed), final_checkpoint(whole))


def test_another_seed_in_a_trainer_of_ones_own(caplog):
    """One that cannot build its data loader anew: the random numbers are the interrupted run's."""
    trainer = SimpleNamespace(iter=3, data_loader=[], cfg=SimpleNamespace(SEED=-1))
    hook = ExactResume(torch.nn.Linear(1, 1), checkpoint_period=1)
    hook.trainer = trainer
    hook.load_state_dict({"seed": 7, "stream": {}, "loss_normalizers": []})
    assert "built with SEED -1: set SEED 7" in caplog.text
    hook.before_step()
    found = torch.rand(3)
    seed_everything(7, 3)
    assert torch.equal(found, torch.rand(3))
    assert hook.state_dict()["seed"] == 7


def test_best_metric(make_cfg):
    """Over an interruption in the evaluation, which is done again, and with a resume."""
    cfg = make_cfg(CONFIG, "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2")
    cfg.TEST.EVAL_PERIOD = 2
    evaluated = []

    def run(interrupt_at=None, resume=False):
        trainer = PlainTrainer(cfg)
        best = BestCheckpointer(2, trainer.checkpointer, "bbox/AP")
        trainer.register_hooks([best])
        trainer.resume_or_load(resume)

        def evaluate(*_):
            iteration = trainer.iter
            if iteration == interrupt_at:
                raise KeyboardInterrupt
            evaluated.append(iteration)
            return {"bbox": {"AP": {1: 10.0, 3: 30.0, 6: 20.0, 7: 20.0}[iteration]}}

        trainer.test = evaluate
        trainer.train()
        return best

    with pytest.raises(KeyboardInterrupt):
        run(interrupt_at=3)
    best = run(resume=True)
    assert evaluated == [1, 3, 6]
    assert (best.best_metric, best.best_iter) == (30.0, 3)
    folder = Path(cfg.OUTPUT_DIR)
    assert torch.load(folder / "model_best.pth", weights_only=True)["iteration"] == 3
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    # Complete, so nothing is trained; the best is remembered.
    assert run(resume=True).best_metric == 30.0


def test_number_of_workers_does_not_matter(make_cfg):
    cfgs = []
    for num_workers in ("0", "2"):
        cfg = make_cfg(CONFIG, "SOLVER.MAX_ITER", "3", "DATALOADER.NUM_WORKERS", num_workers)
        cfgs.append(in_folder(cfg, num_workers))
        start(cfgs[-1])
    assert_equal(*(final_checkpoint(cfg) for cfg in cfgs))


def test_other_batches_are_reported(make_cfg, caplog):
    cfg = make_cfg(CONFIG, "SOLVER.MAX_ITER", "1")
    start(cfg)
    cfg.SOLVER.IMS_PER_BATCH = 3
    PlainTrainer(cfg).resume_or_load(resume=True)
    assert "'images in a batch': 2" in caplog.text
    assert "'images in a batch': 3" in caplog.text


def test_other_data_loader_is_reported(make_cfg, caplog):
    class Trainer(PlainTrainer):
        @classmethod
        def build_train_loader(cls, cfg, mapper=None):
            return list(zip(range(4), super().build_train_loader(cfg, mapper)))

    cfg = make_cfg(CONFIG, "SOLVER.MAX_ITER", "1")
    start(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.before_train()
    assert "The data loader is a list, whose position in the data is not restored" in caplog.text


@ending_process_group()
def train_on_two_processes(cfg):
    torch.set_num_threads(1)
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    whole, resumed = in_folder(cfg, "whole"), in_folder(cfg, "resumed")
    start(whole)
    start(resumed, interrupt_at=2)
    trainer = start(resumed, resume=True)
    # Each process has images, and so a normaliser, of its own.
    normalizers = comm.all_gather(trainer.plain_model.loss_normalizer)
    assert normalizers[0] != normalizers[1]


@pytest.mark.usefixtures("alone")
def test_two_processes(make_cfg):
    cfg = make_cfg(CONFIG, "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "4")
    launch(train_on_two_processes, num_gpus_per_machine=2, dist_url="auto", args=(cfg,))
    finals = [final_checkpoint(in_folder(cfg, name)) for name in ("whole", "resumed")]
    assert_equal(*finals)
    assert len(finals[0]["trainer"]["hooks"]["ExactResume"]["loss_normalizers"]) == 2
