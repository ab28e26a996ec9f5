"""Parts of error messages."""

from __future__ import annotations

from collections.abc import Collection


def some_of(items: Collection, limit: int = 5) -> str:
    """The first of some items, and how many more there are."""
    shown = ", ".join(map(str, list(items)[:limit]))
    return shown + (f" and {len(items) - limit} more" if len(items) > limit else "")
