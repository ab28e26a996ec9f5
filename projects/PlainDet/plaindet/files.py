"""Writing files."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO


def write_atomically(path: str, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file that at every moment, also after a kill or a power cut, is either the whole new
    one or what was there before. After an error, as on a full disk, nothing else is left.

    Args:
        path: of the file.
        write: is called with the open file.
    """
    unfinished = path + ".unfinished"  # in the same folder, since a rename cannot cross disks
    try:
        with open(unfinished, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.remove(unfinished)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
