"""The ledger counts exports to each reader, and how they ended. It shows a leak before memory does.

Every export ends in exactly one way: with a close or with a revocation. `outstanding` counts exports that have not
ended. After a push it is 0 for every reader, and anything else is a leak with a name.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["Account", "Ledger"]

Count = Annotated[int, Meta(ge=0, le=2**60)]


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """One reader's counts since the bridge started, as plain data for status and metrics."""

    reader: str
    exports: Count = 0  # tickets made for it
    opens: Count = 0  # tickets it opened
    closes: Count = 0  # leases it released
    confirmed: Count = 0  # … of which it read the bucket back, and found what was exported
    revoked: Count = 0  # exports given up because the reader was lost

    @property
    def outstanding(self) -> int:
        """Exports that have not ended."""
        return self.exports - self.closes - self.revoked


class Ledger:
    """Counts by reader. Not locked: the sender that keeps it holds its own lock."""

    def __init__(self) -> None:
        self._exports: Counter[str] = Counter()
        self._opens: Counter[str] = Counter()
        self._closes: Counter[str] = Counter()
        self._confirmed: Counter[str] = Counter()
        self._revoked: Counter[str] = Counter()

    def exported(self, reader: str) -> None:
        """Count a ticket that was made for `reader`."""
        self._exports[reader] += 1

    def opened(self, reader: str) -> None:
        """Count a ticket that `reader` opened."""
        self._opens[reader] += 1

    def closed(self, reader: str, *, confirmed: bool = False) -> None:
        """Count a lease that `reader` released; `confirmed` if it read the bucket back and found what was exported."""
        self._closes[reader] += 1
        self._confirmed[reader] += confirmed

    def revoked(self, reader: str) -> None:
        """Count an export that was given up because `reader` was lost."""
        self._revoked[reader] += 1

    @property
    def outstanding(self) -> int:
        """Exports, of all readers, that have not ended."""
        return self._exports.total() - self._closes.total() - self._revoked.total()

    def accounts(self) -> tuple[Account, ...]:
        """Every reader's counts, by name."""
        return tuple(
            Account(
                reader=reader,
                exports=self._exports[reader],
                opens=self._opens[reader],
                closes=self._closes[reader],
                confirmed=self._confirmed[reader],
                revoked=self._revoked[reader],
            )
            for reader in sorted(self._exports)
        )
