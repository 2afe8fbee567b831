"""`push_weights` and its variants, as users call them. `rank` does a rank's work in a push."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from weightsync.endpoints import default_endpoint
from weightsync.errors import ConfigError, PushTimeout, SourceError
from weightsync.trainer.arguments import checked_model, checked_timeout, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from weightsync.adapters.base import PauseMode
    from weightsync.report import PushReport
    from weightsync.sources.base import Source
    from weightsync.sources.fp8 import Fp8
    from weightsync.sources.selected import Only, Rename
    from weightsync.trainer.rank import RankPush

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

    Call it on every trainer rank that takes part, with what that rank holds. All ranks get the same report, or the
    same error. No collective is used unless you ask for one (`Fp8(all_reduce=True)`, `LoraSource(gather=True)`), so
    ranks need not call at the same point of their program.

    weights: an `nn.Module`, a mapping or iterable of (checkpoint name, tensor), or an object of `weightsync.sources`.
        Names are those of the Hugging Face checkpoint. Of an FSDP1 or FSDP2 module each rank sends its own shards;
        wrappers such as DDP and torch.compile do not show in names. Nothing is gathered and no weight is changed.
        Parameters that FSDP2 has gathered and kept are freed first. An iterable is read to its end before anything
        is sent.
    version: must be higher than every version that an engine of the model serves.
    model: which engines, by the `model` key of `[[engines]]` in the node config.
    daemon: endpoint of the node's weightsyncd. Default: `$WEIGHTSYNC_DAEMON`, else the user's own socket.
    process_group: the ranks that take part. Default: all of `torch.distributed`, or only this process without it.
    pause: what happens to requests in flight: "keep" continues them on the new weights, "wait" lets them end first,
        "abort" ends them, "none" keeps them and the keys and values that they have computed (docs/tuning.md).
    timeout: seconds for the whole push.
    dtype: type in which floating-point weights are sent: a torch.dtype or its name ("bfloat16"). Default: the type
        they have. Integers and float8 are never converted.
    only: which tensors are sent: a name or shell pattern ("model.layers.*"), several of them, or a function of a name
        that says whether. Names are the weights' own, before `rename`. Default: all tensors.
    rename: a mapping {own name: checkpoint name} (names not listed are kept), or a function from one to the other.
    buffers: also send persistent buffers (those in `state_dict`). If several ranks hold one, one of them sends it.
    quantise: for engines that serve an fp8 checkpoint: its directory, or a `weightsync.sources.Fp8` that says which
        matrices become float8 with scales (docs/trainers-quantise.md). Applied after `only`, `rename` and `dtype`.
    in_place: let engines read the weights directly from this rank's memory, without slots, once they have learnt the
        layout (docs/tuning.md). On other nodes, bridges write them straight into the engines' parameters. The weights
        must not change until every engine has read them, not merely until slots are full. Engines and bridges keep
        this memory mapped until a push of other memory, a push without `in_place`, or the end of this process, so
        weights freed in between still occupy the GPU.

    `only`, `rename` and `quantise` must be the same on every rank. An engine that fails is left out and the others
    carry on: look at `report.complete` and `report.engines`.

    Raises:
        `SourceError`: the weights cannot be described, `only` matches nothing, or `rename` maps two tensors to one
            name. With several ranks, every rank gets `PushAborted` naming the rank and cause instead. Also for an
            argument that is wrong in itself.
        `ConfigError`: `daemon` is no endpoint.
        `PushRefused`: the request is invalid, or another trainer is pushing; no engine was touched.
        `PushAborted`, `PushTimeout`: the push failed as a whole; the error names the engines left torn.
        `DaemonLost`: weightsyncd cannot be reached, or stopped answering.
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
    """Start `push_weights` in a thread and return a handle at once, so that the trainer can go on.

    The weights must not change until `handle.wait_filled()` returns. After that they may, while engines still load.
    Wrong arguments are raised here, and so is `SourceError` where one rank pushes alone. Everything else is raised by
    the handle.
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
    only: Only = None,
    rename: Rename = None,
    quantise: Fp8 | str | os.PathLike[str] | None = None,
    in_place: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> PushReport:
    """Do as `push_weights`, and call `on_progress` in this thread after each bucket.

    on_progress: gets the bytes that this rank has written so far, and all that it will write. It writes fewer than it
        holds if other ranks hold the same shards.
    """
    what = _Weights(source, dtype, only, rename, quantise=quantise)
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
        """Return when this rank's weights have been read and may change. Raises the push's error if it failed."""
        limit = self._limit(timeout)
        if not self._push.filled.wait(limit):
            raise PushTimeout(f"this rank's weights were not read within {limit:.1f} s", version=self._push.version)
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Whether the push has ended, successfully or not."""
        return not self._thread.is_alive()

    def result(self, timeout: float | None = None) -> PushReport:
        """Wait for the push to end. Returns its report, or raises what `push_weights` would raise."""
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
    """The weights of one push, and the options that say which of them are sent and how."""

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
    from weightsync.trainer.place import trainer_place
    from weightsync.trainer.rank import RankPush
    from weightsync.trainer.rank_memory import memory

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
        partial=weights.only is not None,
    )


def _described(weights: _Weights, process_group: Any, *, alone: bool) -> Source:
    """Describe this rank's weights as a source.

    An error is raised here only if the rank is `alone`. Otherwise the push raises it on all ranks, because the others
    would wait for this one.
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
