import importlib.util

import numpy as np
import pytest

DIM, CLASSES = 6, 3


@pytest.fixture(scope="session")
def tff():
    return pytest.importorskip("tensorflow_federated", reason="needs requirements/federated.txt")


@pytest.fixture
def free_port():
    import portpicker

    return portpicker.pick_unused_port()


@pytest.fixture(scope="session")
def make_process():
    """Builds a process on a small model, on TFF where it is installed; keyword arguments replace these options."""
    import federated
    from tfprivacy_ft import models

    def make(build=lambda: models.build_model("mlp", (DIM,), CLASSES, hidden_units=(8,)), **changes):
        options = {
            "client_learning_rate": 0.1,
            "l2_norm_clip": 0.5,
            "noise_multiplier": 0.0,
            "expected_clients_per_round": 4,
            "batch_size": 8,
            "engine": "tff" if importlib.util.find_spec("tensorflow_federated") else "tensorflow",
        }
        return federated.build_averaging(build, **{**options, **changes})

    return make


@pytest.fixture(scope="session")
def noiseless(make_process):
    return make_process()


@pytest.fixture(scope="session")
def noisy(make_process):
    return make_process(noise_multiplier=1.5)


@pytest.fixture(scope="session")
def draw_clients():
    def draw(sizes, seed=0, scale=1.0):
        rng = np.random.default_rng(seed)
        return [
            ((scale * rng.normal(size=(n, DIM))).astype(np.float32), rng.integers(0, CLASSES, n).astype(np.int32))
            for n in sizes
        ]

    return draw


@pytest.fixture
def wrap_next(monkeypatch):
    """Puts something between a process and who calls its `next`, until the end of the test or `monkeypatch.undo`."""

    def wrap(process, wrapper):
        name = "_next_fn" if hasattr(process, "_next_fn") else "next"  # TFF's own `next` is a property
        monkeypatch.setattr(process, name, wrapper(getattr(process, name)))

    return wrap
