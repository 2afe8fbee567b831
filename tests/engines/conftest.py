"""Tests against real engines: skipped by name where `make engines` has not run, in order of what they need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.engines.kit import ENGINES, installed
from tests.engines.yard import Need, Node, Yard

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a server run one after the other; all others stay where they are."""
    places = [i for i, item in enumerate(items) if _need(item) is not None]
    ours = sorted((items[i] for i in places), key=_place)
    for i, item in zip(places, ours, strict=True):
        items[i] = item


def _place(item: pytest.Item) -> tuple[str, str]:
    need = _need(item)
    return ("", "") if need is None else (str(need.server), need.path)


def _need(item: pytest.Item) -> Need | None:
    call = getattr(item, "callspec", None)
    need = call.params.get("node") if call is not None else None
    return need if isinstance(need, Need) else None


@pytest.fixture(scope="session")
def _yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    yard = Yard(tmp_path_factory.mktemp("engines"))
    yield yard
    yard.close()


@pytest.fixture
def node(_yard: Yard, request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node whose engine serves, on the weights that the test before left; and leaves nothing behind."""
    need: Need = request.param
    if not installed(need.kind):
        pytest.fail(f"{need.kind} is not in {ENGINES}: run `make engines`")
    node = _yard.node(need)
    yield node
    if node.engine.child is None:
        _yard.close()
    else:
        node.check_nothing_left()
