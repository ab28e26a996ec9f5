"""The configs of this project, which an installation has inside of the package."""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path


def _folder() -> Path:
    package = Path(str(resources.files("plaindet")))
    installed = package / "configs"
    # In a checkout they are at its top, where users look for them.
    return installed if installed.is_dir() else package.parents[2] / "configs"


def get_config_file(name: str) -> str:
    """The path of a config of this project.

    Args:
        name: as "LabelEnc/retinanet_R_50_FPN_step1.yaml".

    Raises:
        FileNotFoundError: there is none of this name; names similar ones.
    """
    folder = _folder()
    if not (folder / name).is_file():
        files = [path for path in folder.rglob("*") if path.suffix in (".yaml", ".py")]
        names = [path.relative_to(folder).as_posix() for path in files]
        similar = difflib.get_close_matches(name, names) or sorted({x.split("/")[0] for x in names})
        raise FileNotFoundError(f"This project has no config {name!r}: look at {similar}")
    return str(folder / name)


def find_config(config_file: str) -> str:
    """The path of a config that a command line names: the file itself or, where there is no such
    file, the config of this project with this name, which may begin with "configs/" as it does in a
    checkout."""
    packaged = _folder() / config_file.removeprefix("configs/")
    return str(packaged) if packaged.is_file() and not os.path.exists(config_file) else config_file
