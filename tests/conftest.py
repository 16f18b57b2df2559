"""Settings of all tests: random cases are the same in every run, and no test depends on how fast the machine is."""

import os

from hypothesis import HealthCheck, settings

# JAX, which comes with TensorFlow Federated, sets a level at which TensorFlow writes lines at its start, and programs that
# tests start would inherit it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
