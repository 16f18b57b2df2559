"""The program that keeps one worker of TensorFlow Federated (TFF), reached through a single address.

TFF's worker listens on every network interface, without encryption or password, and has no option for it. So it runs
in a network namespace of its own, in which there is no interface but loopback, and this program, which listens outside,
relays what arrives at the one address that was asked for. The worker dies with this program, and this program with the
thread that started it, however either ends.

Run by `federated.worker` as `python -I -S _worker_process.py OWNER BINARY ADDRESS`, with nothing but the standard
library, so that it starts at once and in one thread, as a new user namespace demands. ADDRESS is `unix:PATH`,
`tcp:HOST:PORT`, or `all:PORT` for a worker as TFF starts it. It writes one line: `ready`, `refused REASON` where the
system allows no namespace, or `failed REASON`.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import NoReturn

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_PR_SET_PDEATHSIG = 1
_INNER_PORT = 10000  # any: nothing else listens in the namespace
_START_SECONDS = 60.0
_CHUNK = 1 << 18


def main(owner: int, binary: str, address: str) -> int:
    kind, _, rest = address.partition(":")
    listener = None
    try:
        if kind == "all":
            port = int(rest)
            # TFF's worker shares a port that is taken without a word.
            socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
        else:
            port = _INNER_PORT
            listener = _listen(kind, rest)  # outside: a socket stays in the namespace that it was made in
    except OSError as error:
        return _say(f"failed {error.strerror or error}")
    try:
        if listener is not None:
            _enter_namespace()
    except OSError as error:
        return _say(f"refused {error.strerror or error}")
    _die_with_parent(signal.SIGTERM, owner)  # after the namespace, as new rights take this back
    return _keep(binary, port, listener)


def _listen(kind: str, rest: str) -> socket.socket:
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(rest)
        listener.listen()
        return listener
    host, _, port = rest.rpartition(":")
    family, *_, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    return socket.create_server(where[:2], family=family)


def _enter_namespace() -> None:
    """Moves this process to a network namespace with loopback alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        raise OSError("there are no network namespaces on this system")
    # Without the rights of an administrator it takes a user namespace in which one has them.
    if libc.unshare(_CLONE_NEWNET) and libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def _keep(binary: str, port: int, listener: socket.socket | None) -> int:
    """Runs the worker until it ends or this program is told to."""
    # Waited for, not handled: Python's handlers run in the main thread, which a signal to another does not wake.
    ends = {signal.SIGTERM, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    own = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
        _die_with_parent(signal.SIGKILL, own)

    worker = None
    try:
        worker = subprocess.Popen(
            [binary, f"--port={port}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # With a heap for every thread, glibc keeps what cohorts of many sizes left behind in each of them.
            env={"MALLOC_ARENA_MAX": "2", **os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            preexec_fn=prepare,
        )
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(port):
            ended = worker.poll() is not None or signal.SIGTERM in signal.sigpending()
            if ended or time.monotonic() > deadline:
                return _say("failed the worker ended at its start, or did not answer")
            time.sleep(0.02)
        if listener is not None:
            threading.Thread(target=_relay, args=(listener, port), daemon=True).start()
        _say(f"ready {worker.pid}")
        while signal.sigwait(ends) == signal.SIGCHLD and worker.poll() is None:
            pass  # it was stopped for a while, or goes on
        return 0
    except OSError as error:
        return _say(f"failed {error.strerror or error}")
    finally:
        if worker is not None:
            worker.kill()
            worker.wait()
        if listener is not None and listener.family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                os.unlink(listener.getsockname())
                os.rmdir(os.path.dirname(listener.getsockname()))


def _die_with_parent(number: int, parent: int) -> None:
    """Has the kernel send this process a signal when the thread that started it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)  # only Linux has it
    if os.getppid() != parent:
        os._exit(1)


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port))


def _answers(port: int) -> bool:
    try:
        _connect(port).close()
    except OSError:
        return False
    return True


def _relay(listener: socket.socket, port: int) -> NoReturn:
    while True:
        outer, _ = listener.accept()
        try:
            inner = _connect(port)
        except OSError:
            outer.close()
            continue
        for end in (outer, inner):
            if end.family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink in ((outer, inner), (inner, outer)):
            threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    chunk = memoryview(bytearray(_CHUNK))
    with contextlib.suppress(OSError):
        while size := source.recv_into(chunk):
            sink.sendall(chunk[:size])
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # wakes the thread of the other direction


def _say(line: str) -> int:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
