"""One worker process of TensorFlow Federated (TFF): it trains the clients of a round, in C++.

Promises: a worker listens where it was told and nowhere else, by default on loopback; it dies with the process that
started it, however that ends (normal exit, Ctrl-C, `kill -9`). Knows nothing of models, clients or privacy, and does
not import TensorFlow: the command `python -m federated.worker --port 8765` answers at once.

Nothing encrypts what goes to a worker, and it asks for no password: who reaches its port can read and run everything.
"""

import importlib.util
import os
import pathlib
import selectors
import subprocess
import sys
import tempfile
import threading

from tfprivacy_ft.errors import InvalidArgumentError, MissingDependencyError, PrivacyError, UnsupportedSystemError

__all__ = ["WorkerProcess", "serve"]

_START_SECONDS = 90.0
_EVERYWHERE = ("", "0.0.0.0", "::")


class WorkerProcess:
    """A worker that this process started.

    Args:
        host: Name or address of the one interface to listen on; "0.0.0.0" or "::" for all of them; None for a socket in
            a folder of its own that no other user of this machine can open.
        port: 1 to 65535; without a meaning for a socket.

    Raises:
        InvalidArgumentError: The port is outside its range, or the address cannot be had.
        MissingDependencyError: TFF is not installed.
        PrivacyError: The worker did not start.
        UnsupportedSystemError: The system does not allow a network namespace, without which TFF's worker would listen on
            every interface.
    """

    target: str
    """Where gRPC reaches the worker."""
    pid: int
    """Of TFF's own process."""

    def __init__(self, host: str | None = None, port: int = 0) -> None:
        if host is None:
            path = pathlib.Path(tempfile.mkdtemp(prefix="tff-")) / "worker"
            self.target = address = f"unix:{path}"
        else:
            if not (isinstance(port, int) and 1 <= port <= 65535):
                raise InvalidArgumentError(f"port={port!r} is not allowed: give a number from 1 to 65535.")
            address = f"all:{port}" if host in _EVERYWHERE else f"tcp:{host}:{port}"
            self.target = f"{'localhost' if host in _EVERYWHERE else f'[{host}]' if ':' in host else host}:{port}"
        self._owner = os.getpid()
        program = pathlib.Path(__file__).with_name("_worker_process.py")
        # A program of its own, because Python code between fork and exec can hang in a process with threads.
        command = [sys.executable, "-I", "-S", str(program), str(self._owner), str(_binary()), address]
        started = threading.Event()

        def keep() -> None:
            # The kernel watches the thread that starts the program, so that thread has to last as long as it does.
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    # Ctrl-C in the terminal is for this process, which then ends the worker.
                    start_new_session=True,
                )
            finally:
                started.set()
            self._process.wait()

        self._keeper = threading.Thread(target=keep, name="tff-worker-keeper", daemon=True)
        self._keeper.start()
        started.wait()
        word, _, rest = self._first_line().partition(" ")
        if word == "ready":
            self.pid = int(rest)
            return
        self.stop()
        if word == "refused":
            raise UnsupportedSystemError(
                f"TFF's worker listens on every network interface, and the system refuses the network namespace that would "
                f'keep it from that ({rest}): give host="0.0.0.0" to allow it, behind a firewall.'
            )
        if host is None:
            raise PrivacyError(f"the TFF worker did not start: {rest or 'it did not answer'}.")
        raise InvalidArgumentError(
            f"no worker can listen at host={host!r}, port={port}: {rest or 'it did not answer'}."
        )

    def _first_line(self) -> str:
        pipe = self._process.stdout
        assert pipe is not None
        with pipe, selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            return pipe.readline().decode().strip() if selector.select(_START_SECONDS) else ""

    @property
    def alive(self) -> bool:
        """Whether the worker runs, and was started by this process and not by one that it was forked from."""
        return self._owner == os.getpid() and self._process.poll() is None

    def wait(self) -> None:
        """Returns when the worker has ended."""
        self._keeper.join()

    def stop(self) -> None:
        """Ends the worker, if it runs."""
        if self.alive:
            self._process.terminate()
            self._keeper.join()


def serve(*, host: str = "127.0.0.1", port: int) -> None:
    """Runs a worker until it is interrupted, for `federated.runtime.remote` of another process or machine.

    Args:
        host: Name or address of the one interface to listen on; "0.0.0.0" or "::" for all of them.
        port: 1 to 65535.

    Raises:
        PrivacyError: The worker ended by itself.
    """
    worker = WorkerProcess(host, port)
    try:
        where = "every network interface" if host in _EVERYWHERE else host
        sys.stdout.write(
            f"A TFF worker listens on {where}, port {port}, without encryption or password: who reaches it reads the data "
            "that it is sent. Ctrl-C ends it.\n"
        )
        sys.stdout.flush()
        worker.wait()
    except KeyboardInterrupt:
        return
    finally:
        worker.stop()
    raise PrivacyError("the worker ended by itself, most likely for lack of memory: start it again.")


def _binary() -> pathlib.Path:
    found = importlib.util.find_spec("tensorflow_federated")  # imports nothing
    if found is None or found.origin is None:
        raise MissingDependencyError(
            "a worker needs TensorFlow Federated, which is not installed: on Python 3.11 run "
            "`pip install --no-deps -r requirements/federated.txt`."
        )
    return pathlib.Path(found.origin).parent / "data" / "worker_binary"


if __name__ == "__main__":
    from tfprivacy_ft import cli

    sys.exit(cli.main(["worker", *sys.argv[1:]]))
