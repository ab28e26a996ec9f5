import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.long
def test_a_few_kills():
    """The short form of `make soak`."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "tools/soak.py", "--kills", "3", "--iterations", "6"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if "kills" in line]
    assert [line.split(":")[0] for line in lines] == [
        "LabelEnc step 1",
        "LabelEnc step 2",
        "CrossKD",
    ]
    assert all("1 kills" in line and "all runs end in the same bits" in line for line in lines)
