"""Chooses the engines of a push, on this node and on its peers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsync.errors import PushRefused
from weightsyncd.repeats import engines_everywhere, late_engines

if TYPE_CHECKING:
    from weightsync.wire import messages as msg
    from weightsyncd.push import Services

__all__ = ["engines_for", "engines_of", "models_of"]


def engines_of(services: Services, model: str) -> dict[str, str]:
    """Return name → node of every engine, on any node, that takes pushes to the model."""
    engines = dict.fromkeys(services.executor.engines.of_model(model), services.config.node.name)
    for name, peer in services.peers.items():
        engines.update({e.name: name for e in peer.engines if e.model == model and not e.frozen})
    return engines


def models_of(services: Services) -> list[str]:
    """Return the models of all engines. A model with frozen engines only is marked as such."""
    found = {(e.model, e.frozen) for e in _everywhere(services)}
    taken = {model for model, frozen in found if not frozen}
    return sorted(taken | {f"{model} (frozen)" for model, _ in found if model not in taken})


def engines_for(services: Services, message: msg.Open, newest: int | None) -> dict[str, str]:
    """Return name → node of the engines that this call is for. Raises `PushRefused` if there are none."""
    engines = engines_of(services, message.model)
    if message.engines:
        if gone := sorted(set(message.engines) - engines.keys()):
            raise PushRefused(f"model {message.model!r} has no engine called {', '.join(gone)}")
        engines = _still_late(services, message, engines, newest)
        if not engines:
            raise PushRefused(f"no engine is behind version {message.version} any more")
    if not engines:
        models = ", ".join(models_of(services)) or "none; add [[engines]] to the node config"
        raise PushRefused(f"no engine serves model {message.model!r}", hint=f"models known here: {models}")
    return engines


def _still_late(services: Services, message: msg.Open, engines: dict[str, str], newest: int | None) -> dict[str, str]:
    """Return the engines of a repeat that still lack its version, since the call may have waited.

    There are none if a newer version has been committed, as `newest` says.
    """
    if newest is not None and newest > message.version:
        return {}
    late = late_engines(_everywhere(services), message.model, message.version)
    return {name: engines[name] for name in message.engines if name in late}


def _everywhere(services: Services) -> list[msg.EngineStatus]:
    return engines_everywhere(services.config.node.name, services.executor.engines, services.peers.values())
