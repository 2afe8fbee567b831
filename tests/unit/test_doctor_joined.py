"""What the doctor says of NCCL between nodes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from weightsync.config import parse_node_config
from weightsync.doctor import joined
from weightsync.doctor.joined import examine_joined

PEERS = '[cluster.peers]\nn1 = "tcp://127.0.0.1:9"\n'


@pytest.fixture
def installed(monkeypatch):
    def these(**versions):
        found = [SimpleNamespace(name=name.replace("_", "-"), version=v) for name, v in versions.items()]
        monkeypatch.setattr(joined, "distributions", lambda: found)

    return these


def findings(text, **environment):
    return examine_joined(parse_node_config(text), environment)


def test_a_node_on_its_own_needs_none(installed):
    installed()
    assert findings('[node]\nname = "n0"\n') == []


@pytest.mark.parametrize("text", [PEERS, '[cluster]\nlisten = "tcp://127.0.0.1:29600"\n'])
def test_what_must_be_alike_is_told(installed, text):
    installed(nvidia_nccl_cu13="2.28.9", numpy="2.0")
    (found,) = findings(text, NCCL_NVLS_ENABLE="0")
    assert found.level == "ok"
    assert "version 2.28.9, NCCL_CUMEM_ENABLE unset, NCCL_NVLS_ENABLE 0" in found.what


def test_an_interface_that_cannot_be_told_is_a_warning(installed, monkeypatch):
    installed(nvidia_nccl_cu12="2.27.3")
    monkeypatch.setattr(joined, "interface_of", lambda address: None)
    (found,) = findings(PEERS)
    assert (found.level, "none has 127.0.0.1" in found.what) == ("warn", True)
    (found,) = findings(PEERS, NCCL_SOCKET_IFNAME="ib0")
    assert (found.level, "over ib0" in found.what) == ("ok", True)


def test_none_and_several(installed):
    installed()
    assert [found.level for found in findings(PEERS)] == ["warn"]
    installed(nvidia_nccl_cu12="2.27.3", nvidia_nccl_cu13="2.28.9")
    (found,) = findings(PEERS)
    assert (found.level, "2.27.3, 2.28.9" in found.what) == ("fail", True)
