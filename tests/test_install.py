"""tools/install.sh with a folder of wheels, and tools/wheels.sh, which fills it, with a Python that
only notes what it is asked for."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
FILES = ["install.sh", "wheels.sh", "requirements.py", "constraints.py", "requirements.txt"]
FILES = [*(f"tools/{name}" for name in FILES), "constraints.txt", "setup.cfg"]
WHEEL = "sal_detectron2-0.7.2-cp310-none-any.whl"
# The script expects the hash of the real wheel.
CONTENT = b"a wheel"
EXPECTED = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
# It has PyTorch if TORCH is "yes", and no Detectron2 before pip installs one.
PYTHON = f"""#!{sys.executable}
import os, subprocess, sys
arguments = sys.argv[1:]
with open("calls", "a") as calls:
    print(*arguments, file=calls)
if arguments[0] == "-":
    code = sys.stdin.read().replace({EXPECTED!r}, os.environ["HASH"])
    sys.exit(subprocess.run([sys.executable, *arguments], input=code, text=True).returncode)
elif arguments[0].endswith(".py"):
    sys.exit(subprocess.run([sys.executable, *arguments]).returncode)
elif arguments == ["-c", "import torch, torchvision"]:
    sys.exit(os.environ["TORCH"] != "yes")
elif arguments == ["-c", "import detectron2"]:
    sys.exit(1)
elif "find_spec" in arguments[1]:
    print(os.path.abspath("detectron2/__init__.py"))
"""


@pytest.fixture
def install(tmp_path):
    """Returns a function that calls a copy of a script, and returns its output and the calls of
    pip."""
    (tmp_path / "tools").mkdir()
    for name in FILES:
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / WHEEL).write_bytes(CONTENT)
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "_C.cpython-310.so").touch()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def call(succeeds, *arguments, script="install", **environment):
        defaults = {"PYTHON": str(tmp_path / "python"), "DETECTRON2": "", "WHEELS": "wheels"}
        defaults.update(TORCH="yes", HASH=hashlib.sha256(CONTENT).hexdigest())
        result = subprocess.run(
            ["bash", f"tools/{script}.sh", *arguments],
            cwd=tmp_path,
            env={**os.environ, **defaults, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert (result.returncode == 0) == succeeds, result.stdout
        calls = tmp_path / "calls"
        calls = calls.read_text().splitlines() if calls.exists() else []
        return result.stdout, [line.split()[2:] for line in calls if line.startswith("-m pip")]

    return call


def test_wheels(install, tmp_path):
    """Everything comes from the folder, and nothing asks for PyTorch."""
    _, calls = install(True)
    requirements, detectron2, project = calls
    for call in calls:
        assert call[0] == "install"
        index = call.index("--find-links")
        assert call[index - 1 : index + 2] == ["--no-index", "--find-links", f"{tmp_path}/wheels"]
        assert "-c" not in call
        assert not [name for name in call if name.startswith("torch")]
    assert {"pytest", "scipy", "transformers>=5.9,<6"} <= set(requirements)
    assert "--no-deps" in detectron2
    assert detectron2[-1].endswith("/sal_detectron2-0.7.2-py3-none-any.whl")
    assert "--no-deps" in project
    assert project[-2:] == ["-e", "."]
    assert not list((tmp_path / "detectron2").iterdir())  # the extension is gone


def test_another_detectron2(install):
    _, calls = install(True, DETECTRON2="../my/detectron2")
    assert [call for call in calls if call[-1] == "../my/detectron2" and "--no-index" in call]
    assert not [call for call in calls if "sal_detectron2" in call[-1]]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TORCH": "no"}, "cannot import torch and torchvision"),
        ({"WHEELS": "nowhere"}, "there is no folder nowhere"),
        ({"WHEELS": "tools"}, "tools has no wheel of sal-detectron2 0.7.2: see tools/wheels.sh"),
        ({"HASH": EXPECTED}, f"expected {EXPECTED}: not installed"),
    ],
)
def test_what_is_missing(install, environment, message):
    output, calls = install(False, **environment)
    assert message in output
    assert len(calls) == (1 if "sal" in message or "HASH" in environment else 0)


def test_filling_the_folder(install, tmp_path):
    """For another Python, without PyTorch and what the other machine has."""
    has = ["numpy==2.0", "PyYAML==6.0", "hydra-core", "setuptools==84.0", "torch==2.9"]
    wheels = [f"{name}-1.0-py3-none-any.whl" for name in ("numpy", "numpy_more", "pyyaml")]
    wheels += [f"{name}-1.0-py3-none-any.whl" for name in ("hydra_core", "setuptools")]
    for name in wheels:
        (tmp_path / "wheels" / name).touch()
    (tmp_path / "tmp").mkdir()
    options = {"script": "wheels", "TMPDIR": str(tmp_path / "tmp")}
    output, calls = install(True, "wheels", "3.12", *has, **options)
    left = {path.name for path in (tmp_path / "wheels").iterdir()}
    assert left == {wheels[1], wheels[4], WHEEL}
    assert output.startswith("3 wheels for Python 3.12")
    download = calls[1]
    assert download[0] == "download"
    assert download[download.index("--python-version") + 1] == "3.12"
    assert {"scipy", "tools/requirements.txt"} <= set(download)
    assert Path(download[download.index("-c") + 1]).parent == tmp_path / "tmp"
    assert not [name for call in calls for name in call if name.startswith("torch")]


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.10", {"torch==2.6.0", "numpy==1.26.4"}), ("3.13", {"torch==2.14.1", "numpy==2.2.6"})],
)
def test_constraints_of_another_python(version, expected):
    command = [sys.executable, str(REPOSITORY / "tools" / "constraints.py"), version]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    assert {x for x in lines if x.startswith(("torch=", "numpy="))} == expected
    assert "iopath<0.1.10" in lines
