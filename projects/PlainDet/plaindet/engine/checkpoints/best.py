"""The checkpoint with the best metric."""

from __future__ import annotations

from detectron2.engine import hooks


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, which keeps `model_best.pth`. A resumed run knows the best metric, if
    the hook is registered before `resume_or_load`."""

    def state_dict(self):
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state):
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]
