"""The engine around an iteration, on a GPU."""

import pytest
from detectron2.utils.events import EventStorage

from plaindet.engine import PlainTrainer

pytestmark = pytest.mark.cuda

# To read the scale, just before the scaler itself waits for the gradients.
SCALE = "plaindet.engine.finite: _check_scale"


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "detector"),
    [("labelenc_step1", "retinanet"), ("labelenc_crosskd", "gfl"), ("crosskd", "faster_rcnn")],
)
def test_the_host_does_not_wait_for_the_hooks(method, detector, precision, gpu, make_method_cfg):
    """In whole iterations, with the optimizer's step."""
    options = ["MODEL.DEVICE", str(gpu.device), "SOLVER.MAX_ITER", "8"]
    if precision != "float32":
        options += ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", precision]
    cfg = make_method_cfg(method, detector, *options)
    trainer = PlainTrainer(cfg)
    trainer.start_iter, trainer.max_iter = 0, 8
    found = set()
    with EventStorage() as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(4):
            with gpu.in_use() as waits:
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
            found |= {x for x in waits if x.startswith(("plaindet.engine", "labelenc.hook"))}
    assert found == ({SCALE} if precision == "float16" else set())
