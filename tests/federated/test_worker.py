import importlib.util
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest

import federated
from federated.worker import WorkerProcess
from tfprivacy_ft import cli
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedSystemError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_federated") is None, reason="needs requirements/federated.txt"
)

psutil = pytest.importorskip("psutil", reason="needs requirements/federated.txt")
ROOT = pathlib.Path(federated.__file__).parents[1]
COMMAND = [sys.executable, "-m", "federated.worker"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def start(*place):
    try:
        return WorkerProcess(*place)
    except UnsupportedSystemError as error:
        pytest.skip(str(error))


def answers(host, port):
    try:
        socket.create_connection((host, port), timeout=10).close()
    except ConnectionRefusedError:
        return False
    return True


def is_gone(pid):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_worker_listens_at_one_address_only(free_port):
    worker = start("127.0.0.1", free_port)
    try:
        assert worker.target == f"127.0.0.1:{free_port}"
        assert answers("127.0.0.1", free_port)
        # TFF's own socket would answer at every address.
        assert not answers("127.0.0.2", free_port)
        assert not answers("::1", free_port)
    finally:
        worker.stop()
    assert is_gone(worker.pid) and not worker.alive


def test_everywhere_is_everywhere(free_port):
    worker = WorkerProcess("0.0.0.0", free_port)
    try:
        assert answers("127.0.0.1", free_port) and answers("127.0.0.2", free_port)
    finally:
        worker.stop()


def test_the_socket_is_for_this_user_and_goes_with_the_worker():
    worker = start()
    folder = pathlib.Path(worker.target.removeprefix("unix:")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    worker.stop()
    assert not folder.exists()


def test_a_port_that_is_taken_is_refused(free_port):
    for host in ("127.0.0.1", "0.0.0.0"):
        with socket.create_server(("127.0.0.1", free_port)), pytest.raises(InvalidArgumentError, match="in use"):
            WorkerProcess(host, free_port)


def test_a_host_or_port_that_cannot_be_is_refused(capsys):
    assert cli.main(["worker", "--port", "70000"]) == 2
    assert "--port 70000 is not allowed: give a number from 1 to 65535" in capsys.readouterr().err
    # Reserved for documentation, by RFC 5737: no machine has this address.
    assert cli.main(["worker", "--host", "192.0.2.1", "--port", "8765"]) == 2
    assert "no worker can listen at --host '192.0.2.1'" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_ends_with_its_worker(free_port, ending):
    command = subprocess.Popen([*COMMAND, "--port", str(free_port)], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True)
    line = command.stdout.readline()
    if not line:
        pytest.skip("no network namespaces here")
    assert line.startswith(f"A TFF worker listens on 127.0.0.1, port {free_port}, without encryption or password")
    children = [child.pid for child in psutil.Process(command.pid).children(recursive=True)]
    assert len(children) == 2 and answers("127.0.0.1", free_port)
    command.send_signal(ending)
    command.communicate(timeout=120)
    assert command.returncode == (0 if ending == signal.SIGINT else -ending)
    assert all(map(is_gone, children))


def test_without_namespaces_the_command_refuses(free_port):
    """In a user namespace that may have no network namespaces in it, as systems with hardened kernels have it."""
    forbid = "echo 0 > /proc/sys/user/max_net_namespaces && exec "
    enter = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    try:
        subprocess.run([*enter, forbid + "true"], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no user namespaces here")
    words = " ".join([*COMMAND, "--port", str(free_port)])
    ran = subprocess.run([*enter, forbid + words], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert "listens on every network interface" in ran.stderr and '--host "0.0.0.0"' in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
