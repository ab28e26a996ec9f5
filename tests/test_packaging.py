"""What an installation has, besides what `make dist` tries."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

import train_net
from plaindet import find_config, get_config_file, read_config

REPOSITORY = Path(train_net.__file__).parent
SETUP = configparser.ConfigParser()
SETUP.read(REPOSITORY / "setup.cfg")
PACKAGES = SETUP["options"]["packages"].split()
OWN = {"crosskd", "labelenc", "plaindet"}
# The name on the index, where it is another one.
DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless", "yaml": "pyyaml"}


def imported_packages():
    """What the packages of this project import, anywhere in their files."""
    for path in [*REPOSITORY.glob("projects/*/*/**/*.py"), REPOSITORY / "train_net.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module.split(".")[0]


def test_what_is_imported_is_declared():
    """But for Detectron2, which is on no index under its own name."""
    extras = SETUP["options.extras_require"]
    needed = [SETUP["options"]["install_requires"], *(extras[x] for x in ("detr", "timm"))]
    declared = set(re.findall(r"^[\w-]+", "\n".join(needed), re.MULTILINE))
    imported = set(imported_packages()) - sys.stdlib_module_names - OWN - {"detectron2"}
    assert {"torch", "yaml", "timm", "transformers"} < imported
    assert {DISTRIBUTIONS.get(name, name) for name in imported} <= declared


def test_the_oldest_versions_are_tested():
    """With the oldest Python, see constraints.txt."""
    extras = SETUP["options.extras_require"]
    needed = [SETUP["options"]["install_requires"], *extras.values()]
    oldest = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(needed), re.MULTILINE))
    constraints = (REPOSITORY / "constraints.txt").read_text()
    python = SETUP["options"]["python_requires"].removeprefix(">=3.")
    marker = rf'; python_version < "3.{int(python) + 1}"'
    tested = dict(re.findall(rf"^([\w-]+)==([\d.]+){marker}", constraints, re.MULTILINE))
    assert oldest.keys() == tested.keys()
    for name, version in oldest.items():
        assert f"{tested[name]}.".startswith(f"{version}."), name


def test_all_packages_are_declared():
    """A folder that setup.cfg does not name is in no wheel."""
    projects = REPOSITORY / "projects"
    folders = {path.parent for path in projects.glob("*/*/**/*.py")}
    found = {".".join(path.relative_to(projects).parts[1:]) for path in folders}
    assert found == {name for name in PACKAGES if (name.split(".")[0] in OWN)} - {
        "plaindet.configs"
    }
    # Nor is a file of configs/ that no pattern takes.
    configs, data = REPOSITORY / "configs", SETUP["options.package_data"]
    patterns = data["plaindet.configs"].split(", ")
    packaged = {path for pattern in patterns for path in configs.glob(pattern)}
    files = {x for x in configs.rglob("*") if x.is_file() and "__pycache__" not in x.parts}
    assert packaged == files
    assert data["*"] == "py.typed"
    assert all(list(projects.glob(f"*/{name}/py.typed")) for name in OWN)


def test_configs_by_name(tmp_path, monkeypatch):
    """From any folder, with the bases that a config names by relative paths."""
    monkeypatch.chdir(tmp_path)
    name = "LabelEnc/retinanet_R_50_FPN_step1.yaml"
    path = get_config_file(name)
    assert path == str(REPOSITORY / "configs" / name)
    assert read_config(path).SOLVER.MAX_ITER == 120000
    for known in (name, f"configs/{name}"):
        assert find_config(known) == path
    # A file of the user's goes first, and what is neither stays as it is, for the message.
    Path("LabelEnc").mkdir()
    Path(name).touch()
    assert find_config(name) == name
    assert find_config("my.yaml") == "my.yaml"
    assert find_config("") == ""
    with pytest.raises(FileNotFoundError, match="look at .*retinanet_R_50_FPN_step1.yaml"):
        get_config_file("LabelEnc/retinanet_R50_FPN_step1.yaml")


def test_command(monkeypatch):
    """The command of an installation is train_net.py, and takes configs by their names."""
    (command,) = SETUP["options.entry_points"]["console_scripts"].split("\n")[1:]
    assert command == "boosters-train = detectron2_boosters.train_net:command"
    assert "detectron2_boosters" in PACKAGES
    assert "detectron2_boosters = ." in SETUP["options"]["package_dir"].split("\n")
    launched = []
    monkeypatch.setattr(train_net, "launch", lambda main, *_, args, **__: launched.extend(args))
    name = "quick/retinanet_R_18_baseline.yaml"
    monkeypatch.setattr(sys, "argv", ["boosters-train", "--config-file", name, "SEED", "1"])
    train_net.command()
    (args,) = launched
    assert args.config_file == get_config_file(name)
    assert args.opts == ["SEED", "1"]
