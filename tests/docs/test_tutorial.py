"""The cells of the tutorial, run as one script."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "docs" / "tutorial.ipynb"


def cells(kind):
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(x["source"]) for x in notebook["cells"] if x["cell_type"] == kind]


def test_links():
    for link in re.findall(r"\]\(([^)\s:#]+)", "\n".join(cells("markdown"))):
        assert (NOTEBOOK.parent / link).exists(), link


@pytest.mark.long
def test_tutorial(tmp_path):
    """The numbers are far apart as its text says, and the export of the best one is there."""
    for name in ("configs", "tools", "train_net.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "tutorial.py").write_text("\n\n".join(cells("code")))
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "ignore", "tutorial.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"^(.+?), (\d+) iterations +([\d.]+) AP$", done.stdout, re.MULTILINE)
    ap = {(name, int(iterations)): float(value) for name, iterations, value in found}
    assert ap["student with CrossKD", 200] > ap["student", 200] + 2
    assert ap["student", 600] > ap["student", 200] + 2
    assert (tmp_path / "output" / "tutorial" / "detector.onnx").is_file()
