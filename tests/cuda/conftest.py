"""Checks of what depends on the device: on a GPU with `--device cuda`, and the same ones on the CPU
where they have a meaning.

`make test` runs a part of them, for which a detector of each kind stands for the others;
`pytest -m cuda` runs the whole table, on either device.
"""

import os

import pytest
import torch
from devices import GPU, PretendedGPU


@pytest.fixture(scope="session")
def device(request):
    """The GPU, or on the CPU a double that is as strict."""
    if request.config.getoption("--device") == "cpu":
        return PretendedGPU()
    # Float32 and not TF32, which has 10 bits; the workspace is for reproducible sums.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return GPU()


@pytest.fixture
def gpu(device):
    """For what has no meaning on the CPU."""
    if not isinstance(device, GPU):
        pytest.skip("means nothing on the CPU")
    return device
