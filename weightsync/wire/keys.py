"""The key of a cluster. Only its holders can join the daemons' links over TCP, or listen in.

One file for all nodes, made by `weightsync keygen`: a CURVE key pair in ZeroMQ's own form
(https://rfc.zeromq.org/spec/26). Every daemon proves that it has the key, whether it listens or calls.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils import z85

from weightsync.errors import ConfigError

__all__ = ["ClusterKey", "make_key_file", "read_key_file"]

_LINES = """# A key of weightsync: whoever has this file may push weights into the engines of every node that has it.
# Give it to weightsyncd alone (mode 0600), the same to every node: [cluster] key_file = "…".
metadata
curve
    public-key = "{public}"
    secret-key = "{secret}"
"""


@dataclass(frozen=True)
class ClusterKey:
    """Both halves of a key pair, 40 characters of Z85 each."""

    public: bytes
    secret: bytes = field(repr=False)


def make_key_file(path: str | os.PathLike[str]) -> ClusterKey:
    """Write a new key to a new file of mode 0600. Raises `ConfigError` if the file exists."""
    key = ClusterKey(*zmq.curve_keypair())
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(_LINES.format(public=key.public.decode(), secret=key.secret.decode()))
    except FileExistsError:
        raise ConfigError(f"{path} is there already", hint="name another file, or remove it first") from None
    except OSError as error:
        raise ConfigError(f"cannot write the key to {path}: {error.strerror}") from error
    return key


def read_key_file(path: str | os.PathLike[str]) -> ClusterKey:
    """Return the key in a file. Raises `ConfigError` if it holds none, or if others than its owner may read it."""
    try:
        found = Path(path).stat()
        public, secret = zmq.auth.load_certificate(path)
    except OSError as error:
        raise ConfigError(
            f"cannot read the key file {path}: {error.strerror or error}", hint="make one: weightsync keygen FILE"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} holds no key", hint="make one: weightsync keygen FILE") from error
    if stat.S_IMODE(found.st_mode) & 0o077 or found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"others may read the key file {path}", hint=f"it must be weightsyncd's alone: chmod 600 {path}"
        )
    if secret is None or not _is_key(public) or not _is_key(secret) or zmq.curve_public(secret) != public:
        raise ConfigError(f"{path} holds no whole key", hint="make one: weightsync keygen FILE")
    return ClusterKey(public, secret)


def _is_key(text: bytes) -> bool:
    try:
        return len(text) == 40 and len(z85.decode(text)) == 32
    except (KeyError, ValueError):
        return False
