"""The cluster's key: its file, and links that only those who have it can use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import time

import pytest
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from weightsync.config import parse_node_config
from weightsync.errors import ConfigError, DaemonLost
from weightsync.wire import messages as msg
from weightsync.wire.daemon_links import ControlServer, PeerLink
from weightsync.wire.keys import ClusterKey, make_key_file, read_key_file


def free_endpoint(host: str = "127.0.0.1") -> str:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> list[ClusterKey]:
    folder = tmp_path_factory.mktemp("keys")
    return [make_key_file(folder / name) for name in ("ours", "theirs")]


class TestTheFile:
    def test_is_its_owners_alone_and_read_again(self, tmp_path):
        made = make_key_file(tmp_path / "key")
        assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
        assert read_key_file(tmp_path / "key") == made
        assert make_key_file(tmp_path / "other") != made

    def test_is_never_overwritten(self, tmp_path):
        made = make_key_file(tmp_path / "key")
        with pytest.raises(ConfigError, match="is there already"):
            make_key_file(tmp_path / "key")
        assert read_key_file(tmp_path / "key") == made

    def test_its_secret_is_not_shown(self, tmp_path):
        made = make_key_file(tmp_path / "key")
        assert made.secret.decode() not in repr(made)

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
    def test_that_others_may_read_is_refused(self, tmp_path, mode):
        make_key_file(tmp_path / "key")
        (tmp_path / "key").chmod(mode)
        with pytest.raises(ConfigError, match="others may read") as refused:
            read_key_file(tmp_path / "key")
        assert "chmod 600" in (refused.value.hint or "")

    def test_that_holds_something_else_is_refused(self, tmp_path, keys):
        ours, theirs = keys
        halves = f'public-key = "{ours.public.decode()}"\nsecret-key = "{theirs.secret.decode()}"\n'
        contents = {
            "": "no key",
            "hello": "no key",
            f'public-key = "{ours.public.decode()}"': "no whole key",
            'public-key = "short"\nsecret-key = "short"': "no whole key",
            halves: "no whole key",
        }
        for text, words in contents.items():
            path = tmp_path / "bad"
            path.write_text(text)
            path.chmod(0o600)
            with pytest.raises(ConfigError, match=words) as refused:
                read_key_file(path)
            assert theirs.secret.decode() not in str(refused.value)

    def test_that_is_not_there(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot read the key file") as refused:
            read_key_file(tmp_path / "none")
        assert "keygen" in (refused.value.hint or "")


class TestTheConfig:
    FAR = '[cluster]\nlisten = "tcp://10.0.0.1:29600"\naddress = "10.0.0.1"\n{key}\n[cluster.peers]\nn1 = "tcp://10.0.0.2:29600"\n'

    def test_reaches_beyond_this_machine_with_a_key_only(self, tmp_path):
        with pytest.raises(ConfigError) as refused:
            parse_node_config(self.FAR.format(key=""))
        for name in ("cluster.listen", "cluster.address", "cluster.peers.n1"):
            assert f"{name} = " in str(refused.value)
        assert str(refused.value).count("weightsync keygen") == 3
        make_key_file(tmp_path / "key")
        config = parse_node_config(self.FAR.format(key=f'key_file = "{tmp_path / "key"}"'))
        assert config.cluster.peers == {"n1": "tcp://10.0.0.2:29600"}

    def test_trainers_stay_on_their_node_all_the_same(self, tmp_path):
        make_key_file(tmp_path / "key")
        text = f'[node]\nlisten = "tcp://10.0.0.1:1"\n[cluster]\nkey_file = "{tmp_path / "key"}"\n'
        with pytest.raises(ConfigError, match=r"other nodes are let in at \[cluster\] listen"):
            parse_node_config(text)

    def test_a_bad_key_file_is_a_mistake_of_the_config(self, tmp_path):
        with pytest.raises(ConfigError, match=r"cluster.key_file: cannot read"):
            parse_node_config(f'[cluster]\nkey_file = "{tmp_path / "none"}"\n')

    @pytest.mark.parametrize(
        "endpoint",
        [
            "",
            "tcp://127.0.0.1:1/",
            "tcp://a@127.0.0.1:1",
            "tcp://127.0.0.1:1?x",
            "tcp://*:1",
            "tcp://0.0.0.0:1",
            "tcp://:1",
        ],
    )
    def test_a_peer_that_cannot_be_called_is_a_mistake(self, tmp_path, endpoint):
        """ZeroMQ would take it or not as it likes, when the daemon runs already."""
        make_key_file(tmp_path / "key")
        text = f'[cluster]\nkey_file = "{tmp_path / "key"}"\n[cluster.peers]\nn1 = "{endpoint}"\n'
        with pytest.raises(ConfigError, match=r"cluster\.peers\.n1"):
            parse_node_config(text)

    def test_an_engines_key_does_not_go_over_the_network_in_the_clear(self, monkeypatch):
        monkeypatch.setenv("KEY", "secret")
        text = '[[engines]]\nname = "e0"\nkind = "vllm"\nurl = "{}"\napi_key_env = "KEY"\n'
        with pytest.raises(ConfigError, match="in the clear"):
            parse_node_config(text.format("http://10.0.0.1:8000"))
        parse_node_config(text.format("https://10.0.0.1:8000"))
        parse_node_config(text.format("http://127.0.0.1:8000"))

    def test_a_cluster_does_not_listen_at_a_file(self):
        with pytest.raises(ConfigError, match="write it as tcp://"):
            parse_node_config('[cluster]\nlisten = "ipc:///tmp/x.sock"\n')


async def ask(
    server_key: ClusterKey | None, caller_key: ClusterKey | None, *, seconds: float, host: str = "127.0.0.1"
) -> msg.Message:
    """What a caller with one key is answered by a server with another."""
    server = ControlServer(free_endpoint(host), "cluster.listen", key=server_key, tag=b"far")
    server.bind()
    link = PeerLink(server.endpoint, patience=seconds, key=caller_key)

    async def serve() -> None:
        async for identity, message in server.frames(refused=lambda: None):
            assert identity.startswith(b"far")
            server.send(identity, msg.Executed(id=message.id, event={}))

    serving = asyncio.create_task(serve())
    try:
        return await link.ask(msg.Attach(node="n1"), deadline=time.monotonic() + seconds)
    finally:
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
        await link.close()
        server.close()


async def called_by_a_stranger(key: ClusterKey, *, own: ClusterKey) -> int:
    """What becomes of a caller with a key pair of its own that has learned the public half of the server's."""
    server = ControlServer(free_endpoint(), "cluster.listen", key=key)
    server.bind()
    context = zmq.asyncio.Context()
    line = context.socket(zmq.DEALER)
    line.curve_publickey, line.curve_secretkey, line.curve_serverkey = own.public, own.secret, key.public
    ends = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED
    monitor = line.get_monitor_socket(ends)
    line.connect(server.endpoint)
    try:
        async with asyncio.timeout(20):
            event: int = parse_monitor_message(await monitor.recv_multipart())["event"]
        return event
    finally:
        context.destroy(linger=0)
        server.close()


class TestALink:
    def test_of_two_that_have_the_key(self, keys, no_leaks):
        assert isinstance(asyncio.run(ask(keys[0], keys[0], seconds=20)), msg.Executed)

    def test_over_ipv6(self, keys, no_leaks):
        try:
            free_endpoint("::1")
        except OSError:
            pytest.skip("no IPv6 here")
        assert isinstance(asyncio.run(ask(keys[0], keys[0], seconds=20, host="::1")), msg.Executed)

    def test_to_an_endpoint_that_is_none(self, keys, no_leaks):
        async def call() -> None:
            PeerLink("tcp://127.0.0.1:1/", patience=1, key=keys[0])

        with pytest.raises(DaemonLost, match="cannot be called"):
            asyncio.run(call())

    def test_of_two_with_different_keys_says_what_to_do(self, keys, no_leaks):
        with pytest.raises(DaemonLost, match="does not have this node's key") as refused:
            asyncio.run(ask(keys[0], keys[1], seconds=1.0))
        assert "the same on every node" in (refused.value.hint or "")

    def test_whoever_knows_the_public_half_alone_is_not_heard(self, keys, no_leaks):
        """CURVE lets anybody call who has the server's public key; here the caller's own is looked at too."""
        ours, theirs = keys
        refused = asyncio.run(called_by_a_stranger(ours, own=theirs))
        assert refused == zmq.EVENT_HANDSHAKE_FAILED_AUTH

    @pytest.mark.parametrize("which", ["server", "caller"])
    def test_where_one_has_none(self, keys, no_leaks, which):
        with pytest.raises(DaemonLost):
            asyncio.run(
                ask(keys[0] if which == "server" else None, keys[0] if which == "caller" else None, seconds=1.0)
            )


def test_root_owned_key_files_are_read(tmp_path, monkeypatch):
    """As a container's secrets are."""
    made = make_key_file(tmp_path / "key")
    owner = (tmp_path / "key").stat().st_uid
    if owner != 0:
        pytest.skip("needs root")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert read_key_file(tmp_path / "key") == made
