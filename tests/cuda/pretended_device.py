"""A device that is none: a test double for machines without a GPU.

Its tensors are computed on the CPU, but say that they are elsewhere, and are as strict as those of
a GPU: they cannot be used together with tensors on the CPU. It notices what makes the host of a GPU
wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

# PyTorch's own name for a device without memory. Others need a driver.
DEVICE = torch.device("meta")
aten = torch.ops.aten
# The shape or the value of their result is not known before the GPU has computed it.
WAITING = {
    aten._local_scalar_dense,  # .item(), bool(), float(), int()
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
WAITING_BY_NAME = {"torchvision::nms"}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended device, with the numbers in `on_cpu`."""

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            layout=on_cpu.layout,
            device=DEVICE,
        )

    def __init__(self, on_cpu: torch.Tensor):
        self.on_cpu = on_cpu

    def __repr__(self):
        return f"PretendedTensor({self.on_cpu})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {}, lambda: None)


class _Functions(TorchFunctionMode):
    """New tensors from numbers on the host, which PyTorch would leave without values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
        elif func is torch.Tensor.new_tensor:
            device = kwargs.pop("device", args[0].device)
            kwargs = {"dtype": args[0].dtype, **kwargs}
            func, args = torch.tensor, args[1:]
        else:
            return func(*args, **kwargs)
        tensor = func(*args, **kwargs)
        return tensor if device is None else tensor.to(device)


class _Operations(TorchDispatchMode):
    def __init__(self, on_wait: Callable[[], None]):
        super().__init__()
        self.on_wait = on_wait

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {}, self.on_wait)


@contextmanager
def pretended_device(on_wait: Callable[[], None]):
    """Inside, tensors can be on `DEVICE`.

    Args:
        on_wait: called where the host would wait for a GPU.
    """
    with _Functions(), _Operations(on_wait):
        yield


def move_to_pretended(module: torch.nn.Module) -> torch.nn.Module:
    """Moves the parameters and buffers of a module, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = PretendedTensor(parameter.detach())
                part._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = PretendedTensor(buffer.detach())
    return module


def _compute(func, args, kwargs, on_wait):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    device = kwargs.get("device")
    if not any(isinstance(x, PretendedTensor) for x in tensors) and (
        device is None or torch.device(device) != DEVICE
    ):
        return func(*args, **kwargs)
    copies = func.overloadpacket in (aten._to_copy, aten.copy_)
    target = torch.device(device) if device is not None else DEVICE
    if func.overloadpacket is aten.copy_:
        target = args[0].device
    if func.overloadpacket is aten._local_scalar_dense:
        target = torch.device("cpu")
    if copies:
        between_devices = any(x.device != target for x in tensors)
        if between_devices and not _is_non_blocking(args, kwargs):
            on_wait()
    else:
        _check_same_device(func, args, tensors)
        if _waits(func, args):
            on_wait()

    on_cpu = tree_map_only(PretendedTensor, lambda x: x.on_cpu, (args, kwargs))
    keywords = on_cpu[1] if device is None else {**on_cpu[1], "device": torch.device("cpu")}
    result = func(*on_cpu[0], **keywords)
    if target != DEVICE:
        return result
    result = tree_map_only(torch.Tensor, PretendedTensor, result)
    return return_and_correct_aliasing(func, args, kwargs, result)


def _is_non_blocking(args, kwargs) -> bool:
    return kwargs.get("non_blocking", args[2] if len(args) > 2 else False)


def _waits(func, args) -> bool:
    packet = func.overloadpacket
    if packet in INDEXING:
        return any(
            x is not None and (x.dtype in (torch.bool, torch.uint8) or x.device != DEVICE)
            for x in args[1]
        )
    if packet is aten.repeat_interleave:
        return func is aten.repeat_interleave.Tensor
    return packet in WAITING or packet._qualified_op_name in WAITING_BY_NAME


def _check_same_device(func, args, tensors) -> None:
    """As on a GPU: numbers (tensors without dimensions) and indices may be on the CPU."""
    indices = [x for x in args[1] if x is not None] if func.overloadpacket in INDEXING else []
    for tensor in tensors:
        on_device = isinstance(tensor, PretendedTensor) or tensor.dim() == 0
        if not on_device and not any(tensor is x for x in indices):
            shapes = [(tuple(x.shape), str(x.device)) for x in tensors]
            raise RuntimeError(f"Expected all tensors on one device for {func}, found {shapes}")
