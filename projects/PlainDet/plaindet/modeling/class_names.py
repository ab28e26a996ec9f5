"""The names of the classes that weights were trained for."""

from __future__ import annotations

from collections.abc import Sequence

# The entry of a checkpoint, and of a step-1 file, with the names of the classes in their order.
ENTRY = "thing_classes"


def check_class_names(
    what: str, found: Sequence[str] | None, dataset: str, expected: Sequence[str] | None
) -> None:
    """Compares the classes that weights were trained for with those of a data set.

    Args:
        what: the weights, for messages.
        found: their classes; None: unknown, as of files from elsewhere.
        dataset: the name of the data set.
        expected: its classes.

    Raises:
        ValueError: they differ; names both.
    """
    if found is not None and expected is not None and list(found) != list(expected):
        raise ValueError(
            f"{what} was trained for the classes {list(found)}, but {dataset} has "
            f"{list(expected)}: the same classes in the same order are needed"
        )
