"""The last few of what was worked out and may serve again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RECENT", "Recent"]

RECENT = 8  # kept: models, and parts of them, that alternate in one trainer

T = TypeVar("T")


class Recent(Generic[T]):
    """The last `RECENT` of something, the newest first. Any thread may use it: of two that add at the same moment one
    may be lost, and is then worked out again.
    """

    def __init__(self) -> None:
        self._items: tuple[T, ...] = ()

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: T) -> None:
        """Make `item` the newest, whether it is there or not; the oldest goes when there are too many."""
        self._items = (item, *(other for other in self._items if other is not item))[:RECENT]
