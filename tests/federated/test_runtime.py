import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

import federated

ROOT = pathlib.Path(federated.__file__).parents[1]
PROGRAM = pathlib.Path(__file__).with_name("_two_rounds.py")


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
        if ending == "interrupt":
            time.sleep(1.0)
            program.send_signal(signal.SIGINT)
        output, errors = program.communicate(timeout=600)
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
    worker = runtime._worker._process.pid
    runtime.stop_worker()
    assert is_gone(worker)
    assert noisy.next(state, []).state is not None
    assert runtime._worker._process.pid != worker


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
