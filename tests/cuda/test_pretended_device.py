"""The double finds what would go wrong on a GPU, or make its host wait."""

import warnings

import pytest
import torch
from devices import GPU, PretendedGPU, to_cpu

PRETENDED = PretendedGPU()


def test_a_tensor_left_on_the_cpu():
    with PRETENDED.in_use():
        a, b = torch.ones(3, device=PRETENDED.device), torch.ones(3)
        with pytest.raises(RuntimeError, match="Expected all tensors on one device"):
            a + b
        with pytest.raises(RuntimeError, match="Expected all tensors on one device"):
            torch.cat([a, b])
        with pytest.raises((TypeError, RuntimeError), match="convert|not supported"):
            a.numpy()
        assert to_cpu(a + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number may be on the CPU


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.index_put_((x > 0,), x.sum()), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: torch.ones(3).to(x.device), 1),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), 1),
        (lambda x: x.new_tensor([1.0, 2.0]), 1),
        (lambda x: x[torch.tensor([0, 1])], 1),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True), 0),
        (lambda x: torch.full((), 2.0, device=x.device), 0),
        (lambda x: x.where(x > 0, x.new_zeros(())), 0),
        (lambda x: x.masked_fill(x > 0, 0.0), 0),
        (lambda x: x.sort().values[x.argsort()], 0),
    ],
)
def test_waits(operation, waits):
    with PRETENDED.in_use() as found:
        x = torch.arange(3.0).to(PRETENDED.device)
        found.clear()
        operation(x)
    assert sum(found.values()) == waits
    assert all(place.endswith(": <lambda>") for place in found)


def test_numbers_and_gradients_are_those_of_the_cpu():
    linear, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    expected = linear(x).square().sum()
    expected.backward()
    expected_gradient, linear.weight.grad = linear.weight.grad, None
    PRETENDED.move(linear)
    with PRETENDED.in_use():
        found = linear(x.to(PRETENDED.device)).square().sum()
        found.backward()
    torch.testing.assert_close(to_cpu(found), expected.detach())
    torch.testing.assert_close(to_cpu(linear.weight.grad), expected_gradient)


def test_waits_of_a_real_gpu(monkeypatch):
    """PyTorch warns of each; other warnings do not count, and later ones are as before."""
    modes = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    with GPU().in_use() as waits:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert waits == {f"{__name__}: test_waits_of_a_real_gpu": 2}
    assert modes == ["warn", "default"]
    with pytest.warns(UserWarning, match="a later one"):
        warnings.warn("a later one", stacklevel=1)
