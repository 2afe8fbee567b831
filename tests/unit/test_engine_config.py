"""What [[engines]] of a node config may say about real engines."""

from __future__ import annotations

import pytest

from weightsync.config import parse_node_config
from weightsync.errors import ConfigError


def engine(extra: str = "", kind: str = "vllm", url: str = "http://127.0.0.1:8000", arena: str = "") -> str:
    return f'{arena}\n[[engines]]\nname = "e"\nkind = "{kind}"\nurl = "{url}"\n{extra}\n'


def test_defaults_are_the_best_that_the_engine_offers():
    (found,) = parse_node_config(engine()).engines
    assert (found.path, found.target, found.gpus, found.ca_file, found.api_key) == ("auto", "all", (), None, None)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_engine_of_this_machine_may_join_a_group_on_loopback(kind):
    assert parse_node_config(engine('path = "group"', kind=kind, url="http://127.0.0.2:80")).engines


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("url", ["https://[::1]:8443", "http://localhost:8000/", "https://engine.example:1"])
def test_urls(kind, url):
    assert parse_node_config(engine(kind=kind, url=url)).engines[0].url == url


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (engine('path = "tensor"'), "path = 'tensor': one of auto, plugin, extension, ipc"),
        (engine('path = "extension"', kind="sglang"), "one of auto, plugin, tensor, ipc"),
        (engine('path = "plugin"', kind="reference"), "one of auto"),
        (engine('target = "drafts"'), "target"),
        (engine('ca_file = "/no/such.pem"'), "ca_file = '/no/such.pem': no file that can be read"),
        (engine(url="http://me:secret@127.0.0.1:1"), "holds a secret"),
        (engine('api_key_env = "NOT_SET_ANYWHERE"'), "NOT_SET_ANYWHERE is not set"),
        (engine('path = "ipc"', arena="[arena]\nslots = 1"), "arena.slots of at least 2"),
        (engine('path = "group"', url="http://192.0.2.7:80"), "on 192.0.2.7 is to join a group at cluster.address"),
    ],
)
def test_mistakes_are_named_with_what_would_be_right(text, said):
    with pytest.raises(ConfigError) as caught:
        parse_node_config(text)
    assert said in str(caught.value)
    assert "secret@" not in str(caught.value)
