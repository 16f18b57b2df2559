"""Where federated computations run: one worker process of TensorFlow Federated (TFF) on this machine.

Promises: TFF is imported and the worker started when federated code first needs them; the worker dies with this
process, however that ends (normal exit, Ctrl-C, `kill -9`); a context that the user installed is left alone.
Knows nothing of models, clients or privacy.

The worker that TFF brings listens on every network interface without encryption or password: use it on a machine
and network you trust.
"""

import atexit
import functools
import os
import pathlib
import subprocess
import sys
import threading
from types import ModuleType
from typing import Any

from tfprivacy_ft.errors import MissingDependencyError, PrivacyError

__all__ = ["ensure_context", "require_tff", "stop_worker"]

_START_SECONDS = 60.0
_MOST_STARTS = 3
# Ask the kernel to kill the worker when the thread that started it ends, then become the worker. A program of its
# own, because Python code between fork and exec can hang in a process that has threads, as TensorFlow's has.
_LAUNCH = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; only Linux has it
except (OSError, AttributeError):
    pass
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


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
    """Makes this thread's TFF computations run in the worker of this module, starting nothing yet.

    A context that the user set (remote workers, another runtime) stays; only TFF's own default, whose worker outlives
    the interpreter, is replaced.
    """
    tff = require_tff()
    current = tff.framework.get_context_stack().current
    if current is not _context() and _is_tff_default(current):
        tff.framework.set_default_context(_context())
    _starts.clear()


def stop_worker() -> None:
    """Ends the worker, if one runs; the next computation starts another.

    Example:
        >>> stop_worker()
    """
    global _worker
    with _lock:
        worker, _worker = _worker, None
        _context.cache_clear()
    if worker is not None:
        worker.stop()


class _Worker:
    """One worker process, reachable at `target`."""

    def __init__(self) -> None:
        import portpicker

        binary = pathlib.Path(str(require_tff().__file__)).parent / "data" / "worker_binary"
        port = portpicker.pick_unused_port()
        self.target = f"localhost:{port}"
        self._owner = os.getpid()
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(self._owner), str(binary), f"--port={port}"]
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        started = threading.Event()

        def keep() -> None:
            # The kernel watches the thread that starts the worker, so that thread has to last as long as it does.
            try:
                self._process = subprocess.Popen(
                    launch,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
                    # Ctrl-C in the terminal is for this process, which then ends the worker.
                    start_new_session=True,
                )
            except OSError as error:
                self._error = error
            started.set()
            if self._process is not None:
                self._process.wait()

        self._keeper = threading.Thread(target=keep, name="tff-worker-keeper", daemon=True)
        self._keeper.start()
        started.wait()
        if self._error is not None:
            raise PrivacyError(f"the TFF worker {binary} did not start: {self._error}.")

    @property
    def alive(self) -> bool:
        return self._owner == os.getpid() and self._keeper.is_alive()

    def stop(self) -> None:
        if self.alive and self._process is not None:
            self._process.kill()
            self._keeper.join()


_lock = threading.RLock()
_worker: _Worker | None = None
_starts: list[None] = []  # one entry for each start since the last call of `ensure_context`


@functools.cache
def _context() -> Any:
    """A TFF context on the worker of this module; the worker starts at the first computation."""
    tff = require_tff()
    return tff.framework.SyncExecutionContext(
        executor_fn=tff.framework.ResourceManagingExecutorFactory(executor_stack_fn=_Stack()),
        compiler_fn=tff.backends.native.desugar_and_transform_to_native,
        transform_args=tff.tensorflow.transform_args,
        transform_result=tff.tensorflow.transform_result,
    )


class _Stack:
    """Makes an executor for a number of clients; TFF calls it again after the worker failed."""

    def __call__(self, cardinalities: dict[Any, int]) -> Any:
        tff = require_tff()
        cardinalities.setdefault(tff.CLIENTS, 0)
        executor = tff.framework.RemoteExecutor(self._stub())
        executor.set_cardinalities(cardinalities)
        return executor

    def _stub(self) -> Any:
        import grpc

        global _worker
        with _lock:
            while True:
                if _worker is None or not _worker.alive:
                    # TFF tries a broken call again for ever; a worker that dies again and again has to end that.
                    _starts.append(None)
                    if len(_starts) > _MOST_STARTS:
                        stop_worker()
                        raise PrivacyError(
                            f"the TFF worker died {_MOST_STARTS} times, most likely for lack of memory: use fewer "
                            "clients at once (clients_at_once), a smaller model or shorter clients."
                        )
                    _worker = _Worker()
                # The proxy of the environment is not for this machine's own ports.
                options = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
                channel = grpc.insecure_channel(_worker.target, [*options, ("grpc.enable_http_proxy", 0)])
                try:
                    _wait_ready(channel, _worker)
                except TimeoutError:
                    channel.close()
                    _worker.stop()
                    continue
                return require_tff().framework.RemoteExecutorGrpcStub(channel)


def _wait_ready(channel: Any, worker: _Worker) -> None:
    import grpc

    ready = grpc.channel_ready_future(channel)
    for _ in range(int(_START_SECONDS / 0.5)):
        try:
            return ready.result(timeout=0.5)
        except grpc.FutureTimeoutError:
            if not worker.alive:
                break
    ready.cancel()
    raise TimeoutError


def _is_tff_default(context: Any) -> bool:
    """Whether TFF would start a local worker of its own for this context, or there is no context at all."""
    if "RuntimeErrorContext" in type(context).__name__:
        return True
    stack = getattr(getattr(context, "executor_factory", None), "_executor_stack_fn", None)
    return isinstance(stack, _Stack) or getattr(stack, "__qualname__", "").startswith("local_cpp_executor_factory")


atexit.register(stop_worker)
