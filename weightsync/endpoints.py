"""Endpoints and URLs at which processes listen and call: which are valid, and the user's own sockets."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weightsync.errors import ConfigError

__all__ = [
    "KEY_HINT",
    "check_endpoint",
    "default_endpoint",
    "is_here",
    "is_loopback",
    "private_directory",
    "runtime_dir",
    "url_problems",
]

KEY_HINT = "give every node the same [cluster] key_file, made by: weightsync keygen FILE"
_SOCKET_PATH = 100  # characters; the kernel allows 107


def runtime_dir() -> Path:
    """Return the user's private directory for sockets.

    This is $XDG_RUNTIME_DIR/weightsync, else weightsync-UID in the temporary directory.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "weightsync" if base else Path(tempfile.gettempdir()) / f"weightsync-{os.getuid()}"


def default_endpoint(node: str = "node0") -> str:
    """Return the endpoint at which a node listens by default."""
    return f"ipc://{runtime_dir() / node}.sock"


def url_problems(url: str) -> list[str]:
    """Return the problems of an engine's URL, each as the end of a sentence."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # urlsplit parses the port only on access
    except ValueError as error:
        return [f"not a URL: {error}"]
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [f"{url!r} is not an http(s) URL such as http://127.0.0.1:8000"]
    if parts.username or parts.password:
        return ["holds a secret; put it into a variable and name that in api_key_env"]
    return []


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself: a loopback address, or `localhost`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def is_here(host: str) -> bool:
    """Whether a host, by name or address, is this machine. Resolves the name."""
    if is_loopback(host):
        return True
    addresses: set[Any] = set()
    with suppress(OSError):
        addresses = {found[4][0] for found in socket.getaddrinfo(host, None)}
    for address in addresses:
        family = socket.AF_INET6 if ":" in str(address) else socket.AF_INET
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))  # only an address of this machine can be bound
            return True
    return False


def check_endpoint(endpoint: str, key: str, *, keys: bool = False) -> None:
    """Raise `ConfigError` naming `key` unless the endpoint is an ipc socket or TCP: on loopback, or with `keys`."""
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigError(f"{key} = {endpoint!r} is no endpoint: {error}") from error
    if parts.scheme == "ipc":
        if not parts.path.startswith("/"):
            raise ConfigError(f"{key} = {endpoint!r} is no absolute path", hint="ipc:///run/weightsync.sock")
        if len(parts.path) > _SOCKET_PATH:
            hint = f"{_SOCKET_PATH} characters at most"
            raise ConfigError(f"{key} = {endpoint!r} is longer than a socket path may be", hint=hint)
    elif parts.scheme == "tcp":
        if endpoint != f"tcp://{parts.netloc}" or "@" in parts.netloc or not host:
            raise ConfigError(
                f"{key} = {endpoint!r} is more or less than a host and a port", hint="tcp://127.0.0.1:29600"
            )
        if not is_loopback(host) and not keys:
            here = key in ("node.listen", "daemon")
            hint = "ipc://… or tcp://127.0.0.1:PORT; other nodes are let in at [cluster] listen" if here else KEY_HINT
            raise ConfigError(f"{key} = {endpoint!r} reaches beyond this machine", hint=hint)
        if not port:
            raise ConfigError(f"{key} = {endpoint!r} has no port", hint="tcp://127.0.0.1:29600")
    else:
        raise ConfigError(
            f"{key} = {endpoint!r} is neither ipc:// nor tcp://", hint="ipc:///path or tcp://127.0.0.1:PORT"
        )


def private_directory(path: Path) -> Path:
    """Make the directory, or check that it is private to this user. Raises `ConfigError` if it is not."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{path} is not a directory of yours alone, so others could stand in for weightsyncd",
            hint=f"remove it, or: chmod 700 {path}; or set XDG_RUNTIME_DIR to a private directory",
        )
    return path
