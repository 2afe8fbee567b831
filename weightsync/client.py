"""`push_weights`: the trainer's side, as its users see it. What a rank does during a push is in `weightsync.rank`."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from weightsync.arguments import checked_model, checked_timeout, whole_number
from weightsync.endpoints import default_endpoint
from weightsync.errors import ConfigError, PushTimeout, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.adapters.base import PauseMode
    from weightsync.rank import RankPush
    from weightsync.report import PushReport
    from weightsync.sources.base import Source
    from weightsync.sources.fp8 import Fp8
    from weightsync.sources.selected import Only, Rename

__all__ = ["PushHandle", "push_source", "push_weights", "push_weights_async"]

_PAUSE_MODES = ("keep", "wait", "abort", "none")


def push_weights(
    weights: Any,
    *,
    version: int,
    model: str = "default",
    daemon: str | None = None,
    process_group: Any = None,
    pause: PauseMode = "keep",
    timeout: float = 600.0,
    dtype: Any = None,
    only: Only = None,
    rename: Rename = None,
    buffers: bool = False,
    quantise: Fp8 | str | os.PathLike[str] | None = None,
    in_place: bool = False,
) -> PushReport:
    """Hand `weights` to every engine of `model`, and return when they serve them.

    Call it on every trainer rank that takes part, with what that rank holds; each gets the same report, or the same
    error. No collective is used, so it may be called where ranks are at slightly different places.

    weights: an `nn.Module` (plain, or of FSDP2 or FSDP1, of which each rank writes its own shards; wrappers such as
        DDP's and those of torch.compile do not show in names), a mapping or iterable of (checkpoint name, tensor), or
        an object of `weightsync.sources`. Names are those of the Hugging Face checkpoint. An iterable is read to its
        end before anything is sent. Nothing is gathered and no weight is changed; what FSDP2 has gathered and kept is
        freed first.
    version: must be above every version that an engine of the model serves.
    model: which engines; the `model` key of `[[engines]]` in the node config.
    daemon: endpoint of the node's weightsyncd; default `$WEIGHTSYNC_DAEMON`, else the user's own socket.
    process_group: the ranks that take part; default all of `torch.distributed`, or just this process without it.
    pause: what happens to requests in flight: "keep" them and go on with them on the new weights, "wait" for them to
        end, "abort" them, or "none": do not even pause (in-flight update).
    timeout: seconds for the whole push.
    dtype: as what floating-point weights are sent, a torch.dtype or its name ("bfloat16"); default as they are held.
        Integers and float8 always stay as they are.
    only: which tensors are sent: names and shell patterns ("model.layers.*"; one, or several), or a function that is
        given a name. Names are the weights' own, before `rename`. Default: all.
    rename: under which names: {own name: checkpoint name}, in which others stay as they are, or a function that makes
        one of the other.
    buffers: also send a module's persistent buffers, those in its `state_dict`; of ranks that all have them, one sends.
    quantise: for engines that serve an fp8 checkpoint: its directory, or a `weightsync.sources.Fp8` that says which
        matrices become float8 with scales beside them (docs/trainers-quantise.md). After `only`, `rename` and `dtype`.
    in_place: engines of this node may read the weights where they lie, without slots, once they have learnt how
        (docs/tuning.md). They keep that memory mapped until the next push of other memory or without `in_place`, or
        until this process ends: weights that are freed or offloaded in between stay on their GPU until then.

    `only`, `rename` and `quantise` must say the same on every rank. One engine that fails is evicted and the others go
    on: look at `report.complete` and `report.engines`.
    Raises `SourceError` for weights that cannot be described, for what `only` names and is not there, and for two
    tensors that `rename` gives one name (of several ranks all raise `PushAborted` then, which names the one and says
    why); `PushRefused` before anything was touched,
    `PushAborted` or `PushTimeout` when the push failed as a whole (the error names engines left torn), and
    `DaemonLost`.
    """
    what = _Weights(weights, dtype, only, rename, buffers, quantise)
    return _rank_push(what, version, model, daemon, process_group, pause, timeout, in_place=in_place).run()


def push_weights_async(
    weights: Any,
    *,
    version: int,
    model: str = "default",
    daemon: str | None = None,
    process_group: Any = None,
    pause: PauseMode = "keep",
    timeout: float = 600.0,
    dtype: Any = None,
    only: Only = None,
    rename: Rename = None,
    buffers: bool = False,
    quantise: Fp8 | str | os.PathLike[str] | None = None,
    in_place: bool = False,
) -> PushHandle:
    """As `push_weights`, in a thread: returns at once a handle, so that the trainer goes on meanwhile.

    The weights must not change until `handle.wait_filled()` returns; after that they may, while engines still load.
    What `push_weights` would raise the handle does, but for arguments, and weights of a lone rank, that are wrong.
    """
    what = _Weights(weights, dtype, only, rename, buffers, quantise)
    return PushHandle(_rank_push(what, version, model, daemon, process_group, pause, timeout, in_place=in_place))


def push_source(
    source: Any,
    *,
    version: int,
    model: str = "default",
    daemon: str | None = None,
    process_group: Any = None,
    pause: str = "keep",
    timeout: float = 600.0,
    dtype: Any = None,
    quantise: Fp8 | str | os.PathLike[str] | None = None,
    in_place: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> PushReport:
    """As `push_weights`; `on_progress(bytes written by this rank so far)` is called after each bucket, in this
    thread.
    """
    what = _Weights(source, dtype, quantise=quantise)
    push = _rank_push(what, version, model, daemon, process_group, pause, timeout, in_place=in_place)
    push.on_progress = on_progress
    return push.run()


class PushHandle:
    """A push under way in a thread of this process."""

    def __init__(self, push: RankPush) -> None:
        self._push = push
        self._report: PushReport | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"weightsync-push-{push.version}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._report = self._push.run()
        except BaseException as error:  # noqa: BLE001 - carried over to result(), in the thread that asks for it
            self._error = error
        finally:
            self._push.filled.set()

    def wait_filled(self, timeout: float | None = None) -> None:
        """Return when this rank's weights have been read and may change. Raises what the push failed with."""
        limit = self._limit(timeout)
        if not self._push.filled.wait(limit):
            raise PushTimeout(f"this rank's weights were not read within {limit:.1f} s", version=self._push.version)
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """The push has ended, well or not."""
        return not self._thread.is_alive()

    def result(self, timeout: float | None = None) -> PushReport:
        """Wait for the end. Returns the report, or raises what `push_weights` would raise."""
        limit = self._limit(timeout)
        self._thread.join(limit)
        if self._thread.is_alive():
            raise PushTimeout(f"the push is still under way after {limit:.1f} s", version=self._push.version)
        if self._error is not None:
            raise self._error
        assert self._report is not None, "a push ends with a report or an error"
        return self._report

    def _limit(self, timeout: float | None) -> float:
        return timeout if timeout is not None else max(0.0, self._push.deadline - time.monotonic()) + 60.0


class _Weights(NamedTuple):
    """What is pushed, and how."""

    given: Any
    dtype: Any
    only: Only = None
    rename: Rename = None
    buffers: bool = False
    quantise: Fp8 | str | os.PathLike[str] | None = None


def _rank_push(
    weights: _Weights,
    version: int,
    model: str,
    daemon: str | None,
    process_group: Any,
    pause: str,
    timeout: float,
    *,
    in_place: bool,
) -> RankPush:
    """Check the arguments and describe the weights."""
    version, seconds = whole_number("version", version), checked_timeout(timeout)
    model = checked_model(model)
    if pause not in _PAUSE_MODES:
        raise SourceError(f"pause = {pause!r} is unknown", hint=f"one of {', '.join(_PAUSE_MODES)}")
    endpoint = daemon or os.environ.get("WEIGHTSYNC_DAEMON") or default_endpoint()
    if "://" not in endpoint:
        raise ConfigError(f"daemon = {endpoint!r} is no endpoint", hint="ipc:///path/to.sock or tcp://127.0.0.1:PORT")
    from weightsync.rank import RankPush
    from weightsync.rank_memory import memory
    from weightsync.trainer_place import trainer_place

    started = time.monotonic()
    place = trainer_place(process_group)
    memory().announce(endpoint, model)
    return RankPush(
        _described(weights, process_group, alone=place.world == 1),
        place=place,
        version=version,
        model=model,
        endpoint=endpoint,
        pause=pause,
        started=started,
        deadline=started + seconds,
        in_place=in_place,
    )


def _described(weights: _Weights, process_group: Any, *, alone: bool) -> Source:
    """The source of what this rank pushes. Raises what is wrong with that if the rank is `alone`; else the push does so
    on all ranks, since the others would wait for this one.
    """
    from weightsync.sources import source_of

    try:
        source = source_of(
            weights.given, weights.dtype, only=weights.only, rename=weights.rename, buffers=weights.buffers
        )
        if weights.quantise is not None:
            from weightsync.sources.quantised import quantised

            source = quantised(source, weights.quantise, process_group)
        source.layout()
    except Exception as error:
        if alone:
            raise
        from weightsync.sources.undescribed import Undescribed

        return Undescribed(error, process_group, reduces=bool(getattr(weights.quantise, "all_reduce", False)))
    return source
