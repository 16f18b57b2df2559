"""What the workers of `peers.py` share: their settings, the batch, and the turns. Needs numpy and no framework."""

import json
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np

LONGEST = 20  # seconds after which a contender gets no further turn


class Settings(NamedTuple):
    """What `peers.py` asks of a worker, in one JSON object on its command line."""

    model: str  # "mlp" or "cnn"
    batch_size: int
    rounds: int
    steps: int
    l2_norm_clip: float
    noise_multiplier: float
    learning_rate: float


def settings():
    return Settings(**json.loads(sys.argv[1]))


def batch(chosen):
    """Images, with their channels last, and labels."""
    random = np.random.default_rng(0)
    shape = (784,) if chosen.model == "mlp" else (28, 28, 1)
    x = random.uniform(-1, 1, (chosen.batch_size, *shape)).astype(np.float32)
    return x, random.integers(0, 10, chosen.batch_size).astype(np.int32)


def timed(step):
    """A contender out of a function that takes one step: given a number of steps, it returns their seconds."""

    def run(steps):
        found = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
        return found

    return run


def report(contenders, chosen):
    """Lets contenders take turns, and prints name -> (median milliseconds, steps timed)."""
    for run in contenders.values():
        run(3)  # traces, and warms up
    seconds = {name: [] for name in contenders}
    for _ in range(chosen.rounds):
        for name, run in contenders.items():
            if sum(seconds[name]) < LONGEST:
                seconds[name] += run(chosen.steps)
    print(json.dumps({name: (1e3 * statistics.median(found), len(found)) for name, found in seconds.items()}))
