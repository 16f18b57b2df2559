"""Settings of all tests: random cases are the same in every run, and no test depends on how fast the machine is."""

import gc
import os
import signal

from hypothesis import HealthCheck, settings

# JAX, which comes with TensorFlow Federated, sets a level at which TensorFlow writes lines at its start, and programs that
# tests start would inherit it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# A shell starts what runs in the background with Ctrl-C ignored, and programs that tests start would inherit that, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# Graphs are many objects that live long: looking through all of them as often as Python does took 7 % of the time and more.
gc.set_threshold(20_000, 10, 10)


def pytest_collection_finish():
    """What was imported is never garbage."""
    gc.collect()
    gc.freeze()
