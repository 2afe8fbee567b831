"""A cache of the last few results that may be used again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECENT", "Recent"]

RECENT = 8  # kept: enough for models, and parts of them, that alternate in one trainer

T = TypeVar("T")


class Recent(Generic[T]):
    """The last `RECENT` items, the newest first.

    Any thread may use it. If two threads add at the same moment, one item may be lost, and is then worked out again.
    """

    def __init__(self) -> None:
        self._items: tuple[T, ...] = ()

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: T) -> None:
        """Make `item` the newest, whether or not it is kept already. The oldest goes if there are too many."""
        self._items = (item, *(other for other in self._items if other is not item))[:RECENT]
