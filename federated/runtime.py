"""Where federated computations run: workers of TensorFlow Federated (TFF), one on this machine or several elsewhere.

Promises: TFF is imported and the local worker started when federated code first needs them; the local worker can be
reached by this user alone, or, where the system allows no network namespace, a warning says who else can; it dies with this
process, however that ends (normal exit, Ctrl-C, `kill -9`); a context that the user installed is left alone; a computation
that loses its worker is never run again in silence, as each attempt at a round is a release of its own. Knows nothing of
models, clients or privacy.
"""

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from federated.worker import WorkerProcess
from tfprivacy_ft import _check
from tfprivacy_ft.errors import (
    InvalidArgumentError,
    MissingDependencyError,
    UnsupportedSystemError,
    WorkerLostError,
    WorkerUnreachableError,
)

__all__ = ["ensure_context", "local", "remote", "require_tff", "stop_worker"]

_LOCAL_SECONDS = 60.0
# A host that vanishes without a word is noticed after this time; TFF's worker hangs up on who asks more often.
_KEEPALIVE_SECONDS = 330

_log = logging.getLogger(__name__)


def require_tff() -> ModuleType:
    """Imports TensorFlow Federated without its start-up messages.

    Returns:
        The module `tensorflow_federated`.

    Raises:
        MissingDependencyError: TFF is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow_federated as tff
    except ImportError as error:
        raise MissingDependencyError(
            f"federated needs TensorFlow Federated, which cannot be imported ({error}): on Python 3.11 run "
            "`pip install --no-deps -r requirements/federated.txt`."
        ) from error
    return tff


def ensure_context() -> None:
    """Makes this thread's TFF computations run where `remote` or `local` said, starting nothing yet.

    A context that the user set stays; only TFF's own default, whose worker outlives the interpreter, and earlier ones of
    this module are replaced. A local worker that died while nothing ran is replaced, too.
    """
    tff = require_tff()
    current = tff.framework.get_context_stack().current
    with _lock:
        if _worker is not None and not _worker.alive:
            stop_worker()
        if current is not _context() and (current in _made or _is_tff_default(current)):
            tff.framework.set_default_context(_context())


def remote(targets: Sequence[str], *, connect_seconds: float = 15.0) -> contextlib.AbstractContextManager[Any]:
    """Makes TFF's computations run on these workers from now on, in every thread.

    One worker computes whole rounds. Several share the shards of a round: each sums its own, one of them merges the
    sums, adds the noise, once, and takes the server's step. Build the process with `shards` at least the number of
    workers, a multiple of it for equal shares. Results are those of one worker, to rounding.

    The workers see the clients' data, the weights and the key of the noise, so they have to be as trusted as this
    machine. Nothing is encrypted and no password asked for on the way: cross a network through `ssh -L` or a VPN only.

    Args:
        targets: One or more "host:port", at each of which `python -m federated.worker --port PORT` runs.
        connect_seconds: How long to wait for all of them together, > 0; also for one that was lost to come back.

    Returns:
        A context manager that takes it back at its end; leave it unused to stay with these workers, and call `local`
        to leave them.

    Raises:
        InvalidArgumentError: A target is not "host:port".
        WorkerUnreachableError: A worker does not answer; the text names it. Nothing has changed.
        MissingDependencyError: TFF is not installed.

    Example:
        >>> remote([])
        Traceback (most recent call last):
        tfprivacy_ft.errors.InvalidArgumentError: targets=[] is not allowed: give a list of one or more "host:port".
    """
    if isinstance(targets, str) or not targets or not all(map(_is_target, targets)):
        raise InvalidArgumentError(f'targets={targets!r} is not allowed: give a list of one or more "host:port".')
    _check.positive(connect_seconds=connect_seconds)
    require_tff()
    channels = [_channel(target) for target in targets]
    try:
        _await_ready(channels, targets, connect_seconds)
    finally:
        for channel in channels:
            channel.close()
    previous = _place
    _move((*targets,), connect_seconds)
    back = contextlib.ExitStack()
    back.callback(_move, *previous)
    return back


def local() -> None:
    """Makes TFF's computations run in a worker on this machine from now on, as they do at the start.

    Example:
        >>> local()
    """
    _move((), _LOCAL_SECONDS)


def stop_worker() -> None:
    """Ends the local worker, if one runs; the next computation starts another, or connects to remote ones anew.

    Example:
        >>> stop_worker()
    """
    global _worker
    with _lock:
        worker, _worker = _worker, None
        _context.cache_clear()
    if worker is not None:
        worker.stop()


_lock = threading.RLock()
_worker: WorkerProcess | None = None
_place: tuple[tuple[str, ...], float] = ((), _LOCAL_SECONDS)  # targets, none for the local worker; seconds to connect
_made: weakref.WeakSet[Any] = weakref.WeakSet()  # contexts of this module, in use or not


def _move(targets: tuple[str, ...], connect_seconds: float) -> None:
    global _place
    with _lock:
        _place = (targets, connect_seconds)
        stop_worker()
    if targets:
        ensure_context()


@functools.cache
def _context() -> Any:
    """A TFF context on the workers in use; connections are made, and a local worker starts, at the first computation."""
    tff = require_tff()
    targets, seconds = _place
    stacks = [_Stack(functools.partial(_connected_channel, target, seconds)) for target in targets]
    contexts = [
        tff.framework.SyncExecutionContext(
            executor_fn=tff.framework.ResourceManagingExecutorFactory(executor_stack_fn=stack),
            compiler_fn=tff.backends.native.desugar_and_transform_to_native,
            transform_args=tff.tensorflow.transform_args,
            transform_result=tff.tensorflow.transform_result,
        )
        for stack in stacks or [_Stack(_local_channel)]
    ]
    made = contexts[0] if len(contexts) == 1 else _sharing(contexts)
    _made.add(made)
    return made


def _sharing(contexts: Sequence[Any]) -> Any:
    """A context that shares the clients of a computation among contexts, side by side."""
    tff: Any = require_tff()

    class InThread(tff.framework.AsyncContext):
        """TFF waits for a worker inside its event loop, in which the workers would compute one after the other."""

        def __init__(self, inner: Any) -> None:
            self._inner = inner

        async def invoke(self, comp: Any, arg: Any) -> Any:
            arg = await arg if asyncio.iscoroutine(arg) else arg
            result: concurrent.futures.Future[Any] = concurrent.futures.Future()

            def compute() -> None:
                try:
                    result.set_result(self._inner.invoke(comp, arg))
                except BaseException as error:
                    result.set_exception(error)

            # A pool would make the end of the program wait for rounds that nobody waits for.
            threading.Thread(target=compute, name="tff-remote-round", daemon=True).start()
            return await asyncio.wrap_future(result)

    return tff.backends.native.create_mergeable_comp_execution_context([InThread(context) for context in contexts])


class _Stack:
    """Makes an executor for a number of clients, over one channel for all of them."""

    def __init__(self, make_channel: Callable[[], Any]) -> None:
        self._make_channel = make_channel

    def __call__(self, cardinalities: dict[Any, int]) -> Any:
        tff = require_tff()
        cardinalities.setdefault(tff.CLIENTS, 0)
        executor = tff.framework.RemoteExecutor(self._stub)
        executor.set_cardinalities(cardinalities)
        return executor

    @functools.cached_property
    def _stub(self) -> Any:
        return require_tff().framework.RemoteExecutorGrpcStub(self._make_channel())


def _local_channel() -> Any:
    """A channel to the local worker, which starts if none runs."""
    global _worker
    with _lock:
        if _worker is None or not _worker.alive:
            _worker = _start_local()
        return _connected_channel(_worker.target, _LOCAL_SECONDS)


def _start_local() -> WorkerProcess:
    try:
        return WorkerProcess()
    except UnsupportedSystemError:
        import portpicker

        _log.warning(
            "TFF's worker listens on every network interface of this machine, without encryption or password, while this "
            "process lasts, as the system refuses it a network namespace: use a network that you trust, or a firewall."
        )
        return WorkerProcess("0.0.0.0", portpicker.pick_unused_port())


def _connected_channel(target: str, seconds: float) -> Any:
    channel = _channel(target)
    _await_ready([channel], [target], seconds)
    return channel


def _channel(target: str) -> Any:
    import grpc

    options = {
        "grpc.max_send_message_length": -1,
        "grpc.max_receive_message_length": -1,
        # A worker that is started or comes back is found at once.
        "grpc.use_local_subchannel_pool": 1,
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.max_reconnect_backoff_ms": 1000,
        "grpc.enable_http_proxy": 0,  # the proxy of the environment is not for tunnels and this machine's own ports
    }
    if not target.startswith("unix:"):
        options |= {
            "grpc.keepalive_time_ms": 1000 * _KEEPALIVE_SECONDS,
            "grpc.keepalive_timeout_ms": 60_000,
            "grpc.http2.max_pings_without_data": 0,
        }
    return grpc.intercept_channel(grpc.insecure_channel(target, list(options.items())), _loss_reporter(target))


def _await_ready(channels: Sequence[Any], targets: Sequence[str], seconds: float) -> None:
    import grpc

    deadline = time.monotonic() + seconds
    futures = [grpc.channel_ready_future(channel) for channel in channels]
    try:
        for future, target in zip(futures, targets, strict=True):
            try:
                future.result(timeout=max(0.0, deadline - time.monotonic()))
            except grpc.FutureTimeoutError:
                raise WorkerUnreachableError(
                    f"the TFF worker {target} did not answer within {seconds:g} seconds: see that `python -m federated.worker "
                    f"--port {target.rpartition(':')[2]}` runs there, and that a firewall or tunnel lets it through."
                ) from None
    finally:
        for future in futures:
            future.cancel()


def _loss_reporter(target: str) -> Any:
    """Turns the errors that TFF would answer by the same round once more, for ever, into `WorkerLostError`."""
    import grpc

    lost = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION}

    class LossReporter(grpc.UnaryUnaryClientInterceptor):
        def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            call = continuation(details, request)
            # Nothing is left to be disposed of in a worker that is gone: TFF expects its own error there.
            if "/Dispose" not in details.method and call.code() in lost:
                _forget(target)
                where = "of this machine" if target.startswith("unix:") else f"at {target}"
                reason = (call.details() or "no reason given").splitlines()[0]
                raise WorkerLostError(
                    f"the TFF worker {where} went away during a computation ({reason}), most likely for lack of memory or a "
                    "broken connection: count a round that it cut short and run it again as a new one; if that happens "
                    "again, use fewer clients at once (clients_at_once), a smaller model or shorter clients."
                )
            return call

    return LossReporter()


def _forget(target: str) -> None:
    """Has the next computation start or connect anew; what other workers still compute comes to its end."""
    with _lock:
        if _worker is not None and _worker.target == target:
            stop_worker()
        _context.cache_clear()


def _is_target(target: Any) -> bool:
    host, _, port = target.rpartition(":") if isinstance(target, str) else ("", "", "")
    return bool(host) and port.isdecimal() and 1 <= int(port) <= 65535


def _is_tff_default(context: Any) -> bool:
    """Whether TFF would start a local worker of its own for this context, or there is no context at all."""
    if "RuntimeErrorContext" in type(context).__name__:
        return True
    stack = getattr(getattr(context, "executor_factory", None), "_executor_stack_fn", None)
    return getattr(stack, "__qualname__", "").startswith("local_cpp_executor_factory")


atexit.register(stop_worker)
