"""What a seed knows of the nodes, and what the config says of seeds and of keys that are set on the command line."""

from __future__ import annotations

import pytest

from weightsync.config import load_node_config, parse_node_config
from weightsync.errors import ConfigError, RemoteProtocolError
from weightsync.wire import messages as msg
from weightsyncd import seed

LIVENESS = 2.0
HERE = '[cluster]\nlisten = "tcp://127.0.0.1:29600"\n'


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("weightsyncd.seed.time.monotonic", lambda: now[0])
    return now


def register(name, port=1, **more):
    return msg.Register(node=name, endpoint=f"tcp://127.0.0.1:{port}", **more)


def test_nodes_are_told_of_each_other_and_forgotten_when_they_are_silent(clock):
    registry = seed.Registry(LIVENESS)
    assert registry.register(register("a")) == msg.Registered(nodes={"a": "tcp://127.0.0.1:1"}, complete=False)
    assert set(registry.register(register("b", 2)).nodes) == {"a", "b"}
    clock[0] += 6 * LIVENESS + 0.1
    answer = registry.register(register("a"))
    assert (set(answer.nodes), answer.complete) == ({"a"}, True)


def test_a_node_that_leaves_is_gone_at_once(clock):
    registry = seed.Registry(LIVENESS)
    registry.register(register("a"))
    assert registry.register(register("b", 2, leaving=True)).nodes == {"a": "tcp://127.0.0.1:1"}
    registry.register(register("a", 3, leaving=True))  # another that was refused under this name
    assert registry.register(register("b", 2)).nodes.keys() == {"a", "b"}
    assert registry.register(register("a", leaving=True)).nodes.keys() == {"b"}


def test_two_nodes_of_one_name_are_one_too_many(clock):
    registry = seed.Registry(LIVENESS)
    registry.register(register("a"))
    with pytest.raises(RemoteProtocolError, match=r"a node at tcp://127\.0\.0\.1:1 is called 'a' already"):
        registry.register(register("a", 2))
    clock[0] += 6 * LIVENESS + 0.1
    assert registry.register(register("a", 2)).nodes == {"a": "tcp://127.0.0.1:2"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[cluster]\nseed = "tcp://127.0.0.1:29600"', "cluster.seed: needs a cluster.listen"),
        (HERE + 'seed = "127.0.0.1:29600"', "cluster.seed = '127.0.0.1:29600'"),
        (HERE + 'seed = "tcp://10.0.0.1:29600"', "cluster.seed = 'tcp://10.0.0.1:29600' reaches beyond this machine"),
    ],
)
def test_a_seed_that_cannot_be(text, words):
    with pytest.raises(ConfigError, match="mistake") as refused:
        parse_node_config(text)
    assert words in str(refused.value)


def test_keys_that_are_set_on_the_command_line(tmp_path):
    file = tmp_path / "node.toml"
    file.write_text('[node]\nname = "n0"\n[arena]\nslots = 3\n')
    changes = ["node.name=n7", "arena.slots=5", 'arena.slot_bytes="64MiB"', "cluster.listen=tcp://127.0.0.1:29600"]
    config = load_node_config(file, changes)
    assert (config.node.name, config.arena.slots, config.arena.slot_bytes) == ("n7", 5, 64 * 2**20)
    assert config.cluster.listen == "tcp://127.0.0.1:29600"
    for change in ("node.name", "name=n7", "=n7", "engines.name=x"):
        with pytest.raises(ConfigError, match=r"SECTION\.KEY=VALUE"):
            load_node_config(file, [change])
    with pytest.raises(ConfigError, match=r"node\.nam: unknown key; did you mean name"):
        load_node_config(file, ["node.nam=n7"])
