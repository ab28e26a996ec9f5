"""An iteration of training, and what its losses reach."""

from detectron2.utils.events import EventStorage


def losses_of(trainer):
    with EventStorage():
        return trainer.model(next(iter(trainer.data_loader)))


def with_gradient(model, losses):
    """The parameters that the losses reach."""
    model.zero_grad()
    sum(losses).backward(retain_graph=True)
    return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
