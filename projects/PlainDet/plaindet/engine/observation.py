"""Looking at what a detector computes while it computes its own losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

# What PyTorch itself keeps in every module.
_PYTORCHS = vars(nn.Module()).keys()


class Call(NamedTuple):
    """A call of a module or method, with positional arguments."""

    arguments: tuple
    output: Any


class Observer(ExitStack):
    """Records calls inside of a detector for the time of a `with` block, behind which nothing is
    left of it, also after an exception."""

    def module(self, module: nn.Module) -> list[Call]:
        """The calls of a module from here on, which come into the list as they end."""
        calls = []
        handle = module.register_forward_hook(
            lambda _, arguments, output: calls.append(Call(arguments, output))
        )
        self.callback(handle.remove)
        return calls

    def method(self, owner: object, name: str) -> list[Call]:
        """The calls of a method that is no module: for this time the object has one of its own."""
        calls, original = [], getattr(owner, name)

        def recorded(*arguments, **keywords):
            output = original(*arguments, **keywords)
            calls.append(Call(arguments, output))
            return output

        self.enter_context(replaced_method(owner, name, recorded))
        return calls


def single(calls: list[Call], what: str) -> Call:
    """The only call of a part of a detector, see :func:`counted`."""
    return counted(calls, 1, what)[0]


def counted(calls: list[Call], number: int, what: str) -> list[Call]:
    """The calls of a part of a detector.

    Raises:
        RuntimeError: the detector calls it more or less often in an iteration.
    """
    if len(calls) != number:
        raise RuntimeError(
            f"{what} was called {len(calls)} times while the detector computed its losses, "
            f"expected {'once' if number == 1 else f'{number} times'}: a training method cannot "
            "tell which of the calls to look at"
        )
    return calls


@contextmanager
def given_features(detector: nn.Module, features: dict[str, torch.Tensor]) -> Iterator[None]:
    """For this time the detector's backbone returns these features, without computing anything."""
    backbone, stand_in = detector.backbone, _StandIn(detector.backbone, features)
    detector._modules["backbone"] = stand_in
    try:
        yield
        single(stand_in.calls, "The backbone")
    finally:
        detector._modules["backbone"] = backbone


def plain_state(detector: nn.Module) -> dict[str, Any]:
    """The attributes of a detector that are no modules, parameters or buffers, such as the moving
    average of Detectron2's dense detectors."""
    return {key: value for key, value in vars(detector).items() if key not in _PYTORCHS}


@contextmanager
def state_held_still(detector: nn.Module, start: dict[str, Any]) -> Iterator[None]:
    """Begins with the state that `start` says, and leaves the present one behind. Without pictures,
    which the detector has drawn already."""
    end = plain_state(detector)
    _set_state(detector, {**start, **({"vis_period": 0} if "vis_period" in start else {})})
    try:
        yield
    finally:
        _set_state(detector, end)


def _set_state(detector: nn.Module, state: dict[str, Any]) -> None:
    for key in plain_state(detector).keys() - state.keys():
        del vars(detector)[key]
    vars(detector).update(state)


class _StandIn(nn.Module):
    """Has all attributes of a backbone, and returns given features."""

    def __init__(self, backbone: nn.Module, features: dict[str, torch.Tensor]):
        super().__init__()
        vars(self).update(backbone=backbone, features=features, calls=[])

    def forward(self, *arguments):
        self.calls.append(Call(arguments, self.features))
        return self.features

    def __getattr__(self, name: str):
        return getattr(vars(self)["backbone"], name)


@contextmanager
def replaced_method(owner: object, name: str, function: Callable) -> Iterator[None]:
    """For this time an object has this function in place of a method."""
    own = vars(owner)
    earlier = {name: own[name]} if name in own else {}
    own[name] = function
    try:
        yield
    finally:
        del own[name]
        own.update(earlier)
