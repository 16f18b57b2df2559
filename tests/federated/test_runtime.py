import contextlib
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import federated
from federated.worker import WorkerProcess
from tfprivacy_ft.errors import (
    InvalidArgumentError,
    UnsupportedSystemError,
    WorkerLostError,
    WorkerUnreachableError,
)

ROOT = pathlib.Path(federated.__file__).parents[1]
PROGRAM = pathlib.Path(__file__).with_name("_two_rounds.py")
psutil = pytest.importorskip("psutil", reason="needs requirements/federated.txt")


def start(ending):
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM), ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    word, pid, *noise = program.stdout.readline().split() or ["nothing", 0]
    assert word == "ready", program.communicate()[1]
    return program, int(pid), noise


def interrupted(program):
    """What a program had written when Ctrl-C ended it: in a destructor Python drops it, so whoever sits there presses again."""
    for _ in range(20):
        with contextlib.suppress(subprocess.TimeoutExpired):
            time.sleep(1.0)
            program.send_signal(signal.SIGINT)
            return program.communicate(timeout=30)
    program.kill()
    return program.communicate()


def is_gone(pid, seconds=120.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_no_worker_outlives_its_program(tff):
    noises = {}
    for ending in ("exit", "kill", "interrupt"):
        program, worker, noises[ending] = start(ending)
        output, errors = interrupted(program) if ending == "interrupt" else program.communicate(timeout=600)
        assert is_gone(worker), ending
        if ending == "exit":
            assert program.returncode == 0 and output == errors == ""  # no start-up messages either
        if ending == "interrupt":
            assert "KeyboardInterrupt" in errors
    # Keras's seed was the same in each of them.
    assert len({tuple(noise) for noise in noises.values()}) == 3


def test_a_stopped_worker_is_gone_and_the_next_round_starts_another(noisy):
    from federated import runtime

    state = noisy.initialize()
    worker = runtime._worker.pid
    runtime.stop_worker()
    assert is_gone(worker)
    assert noisy.next(state, []).state is not None
    assert runtime._worker.pid != worker


def test_importing_federated_loads_neither_tensorflow_nor_tff():
    check = "import sys, federated; federated.ClientData; sys.exit('tensorflow' in str(sorted(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_context_of_the_users_own_stays(tff):
    from federated import runtime

    own = tff.framework.SyncExecutionContext(
        executor_fn=tff.framework.ResourceManagingExecutorFactory(executor_stack_fn=lambda cardinalities: None)
    )
    with tff.framework.get_context_stack().install(own):
        runtime.ensure_context()
        assert tff.framework.get_context_stack().current is own
        runtime.local()
        assert tff.framework.get_context_stack().current is own


@pytest.fixture(scope="module")
def two_workers(tff):
    import portpicker

    try:
        workers = [WorkerProcess("127.0.0.1", portpicker.pick_unused_port()) for _ in range(2)]
    except UnsupportedSystemError as error:
        pytest.skip(str(error))
    yield workers
    for worker in workers:
        worker.stop()


def flat_weights(process, state):
    return np.concatenate([np.ravel(each) for each in process.get_model_weights(state).trainable])


def largest_difference(process, one, other):
    return np.abs(flat_weights(process, one) - flat_weights(process, other)).max()


@pytest.mark.slow
def test_two_workers_give_what_one_gives(make_process, draw_clients, two_workers):
    from federated import runtime

    process = make_process(shards=4, batch_size=100)
    clients = draw_clients([5, 9, 3, 7, 4])
    start = process.initialize()
    here = process.next(start, clients).state
    assert largest_difference(process, start, here) > 1e-3
    for workers in (two_workers[:1], two_workers):
        before = [psutil.Process(worker.pid).cpu_times().user for worker in workers]
        with runtime.remote([worker.target for worker in workers]):
            there = process.next(start, clients).state
            assert largest_difference(process, here, there) < 1e-5
            assert runtime._worker is None
        # Every one of them had its share.
        assert all(psutil.Process(w.pid).cpu_times().user > b for w, b in zip(workers, before, strict=True))
    assert largest_difference(process, here, process.next(start, clients).state) < 1e-5
    assert runtime._worker.alive


@pytest.mark.slow
def test_two_workers_add_noise_once(noisy, two_workers):
    """The mean square of 498 normal values is 0.6 or 1.5 times its expectation once in 10^9 at most (chi-square)."""
    from federated import runtime

    start = noisy.initialize()
    before = flat_weights(noisy, start)
    with runtime.remote([worker.target for worker in two_workers]):
        noise = [flat_weights(noisy, noisy.next(start, []).state) - before for _ in range(6)]
    values = np.concatenate(noise)
    facts = noisy.facts
    stddev = facts.l2_norm_clip * facts.noise_multiplier / facts.expected_clients_per_round
    assert len(values) == 498
    assert 0.6 < np.mean(values**2) / stddev**2 < 1.5
    assert len(np.unique(values)) == 498


class Killing(list):
    """A cohort that kills a worker while it computes: what stands still cannot answer before."""

    def __init__(self, clients, pid):
        super().__init__(clients)
        self._pid = pid

    def __iter__(self):
        pid, self._pid = self._pid, None
        if pid is not None:
            os.kill(pid, signal.SIGSTOP)
            threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        return super().__iter__()


def test_a_round_that_loses_its_worker_is_not_run_again_in_silence(noisy, draw_clients):
    from federated import runtime

    clients = draw_clients([5, 3])
    state = noisy.initialize()
    worker = runtime._worker.pid
    with pytest.raises(WorkerLostError, match="the TFF worker of this machine went away during a computation"):
        noisy.next(state, Killing(clients, worker))
    assert is_gone(worker)
    # The same state is good for another try, which starts a worker and draws other noise.
    once, twice = (noisy.next(state, clients).state for _ in range(2))
    assert runtime._worker.pid != worker
    assert largest_difference(noisy, once, twice) > 0


def test_a_worker_that_died_while_nothing_ran_is_replaced(noisy):
    from federated import runtime

    state = noisy.initialize()
    worker = runtime._worker
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert noisy.next(state, []).state is not None
    assert runtime._worker.pid != worker.pid


def test_a_remote_worker_that_is_lost_may_come_back(noisy, draw_clients, free_port):
    from federated import runtime

    def start():
        try:
            return WorkerProcess("127.0.0.1", free_port)
        except UnsupportedSystemError as error:
            pytest.skip(str(error))

    clients = draw_clients([5, 3])
    worker = start()
    with runtime.remote([worker.target], connect_seconds=2.0):
        state = noisy.initialize()
        with pytest.raises(WorkerLostError, match=f"the TFF worker at 127.0.0.1:{free_port} went away"):
            noisy.next(state, Killing(clients, worker.pid))
        with pytest.raises(WorkerUnreachableError, match=f"127.0.0.1:{free_port} did not answer within 2 seconds"):
            noisy.next(state, clients)
        worker.wait()
        worker = start()
        state = noisy.next(state, clients).state
        # Between two rounds, unseen: the new one knows nothing of what the old one was told.
        worker.stop()
        worker = start()
        with pytest.raises(WorkerLostError):
            noisy.next(state, clients)
        assert noisy.next(state, clients).state is not None
        worker.stop()


def test_targets_that_cannot_be_are_refused(tff, free_port):
    from federated import runtime

    place = runtime._place
    for targets in ([], "localhost:1", ["localhost"], ["localhost:0"], [":1"], [1]):
        with pytest.raises(InvalidArgumentError, match="give a list of one or more"):
            runtime.remote(targets)
    with pytest.raises(WorkerUnreachableError, match=f"localhost:{free_port} did not answer within 0.5 seconds"):
        runtime.remote([f"localhost:{free_port}"], connect_seconds=0.5)
    assert runtime._place == place


def test_remote_holds_in_every_thread_until_local(noiseless, two_workers):
    from federated import runtime

    process = noiseless
    runtime.remote([two_workers[0].target])
    state = process.initialize()
    thread = threading.Thread(target=process.next, args=(state, []))
    thread.start()
    thread.join()
    assert runtime._worker is None
    runtime.local()
    process.next(state, [])
    assert runtime._worker.alive


def test_where_the_system_refuses_namespaces_a_warning_says_so(noisy, monkeypatch, caplog):
    from federated import runtime

    def refusing(*place):
        if not place:
            raise UnsupportedSystemError("not here")
        return WorkerProcess(*place)

    monkeypatch.setattr(runtime, "WorkerProcess", refusing)
    runtime.stop_worker()
    with caplog.at_level(logging.WARNING):
        assert noisy.next(noisy.initialize(), []).state is not None
    assert "listens on every network interface of this machine" in caplog.text
    assert runtime._worker.target.startswith("localhost:")
    runtime.stop_worker()


@pytest.mark.slow
def test_cohorts_of_many_sizes_leave_no_threads_and_little_memory_behind(noisy, draw_clients):
    from federated import runtime

    clients = draw_clients([5] * 20)
    state = noisy.initialize()
    sizes = np.random.default_rng(0).permutation(20)
    threads, megabytes = [], []
    for _ in range(4):
        for size in sizes:
            state = noisy.next(state, clients[:size]).state
        worker = psutil.Process(runtime._worker.pid)
        threads.append(worker.num_threads())
        megabytes.append(worker.memory_info().rss / 1e6)
    assert threads[1] == threads[3]  # TFF's own way of running cohorts adds 24 for each new size
    assert megabytes[3] - megabytes[1] < 20  # and 18 MB
