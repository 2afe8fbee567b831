from __future__ import annotations

import msgspec

from weightsync.ipc.ledger import Account, Ledger


def test_books_balance():
    ledger = Ledger()
    for _ in range(3):
        ledger.exported("a/0")
    ledger.exported("b/0")
    ledger.opened("a/0")
    ledger.closed("a/0")
    ledger.revoked("a/0")
    assert ledger.outstanding == 2
    assert ledger.accounts() == (
        Account(reader="a/0", exports=3, opens=1, closes=1, revoked=1),
        Account(reader="b/0", exports=1),
    )
    assert [account.outstanding for account in ledger.accounts()] == [1, 1]


def test_accounts_are_plain_data():
    account = Account(reader="a/0", exports=1, opens=1)
    assert msgspec.convert(msgspec.to_builtins(account), Account) == account
