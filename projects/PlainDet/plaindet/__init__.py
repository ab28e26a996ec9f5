"""The plain parts that LabelEnc and CrossKD build on and that Detectron2 lacks."""

try:
    import detectron2
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        "This project extends Detectron2, which is not installed in this environment. Install it "
        "with `PYTHON=python tools/install.sh` (see the README), or as its own documentation says."
    ) from error

from . import modeling
from .config import add_plaindet_config, read_config, register_config
from .config_files import find_config, get_config_file
from .data import register_shapes
from .engine import keep_training_only

register_shapes()

__all__ = [
    "add_plaindet_config",
    "find_config",
    "get_config_file",
    "keep_training_only",
    "read_config",
    "register_config",
]
