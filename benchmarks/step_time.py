"""Time of one training step in `model.fit`: plain Keras, this package, and tensorflow_privacy where it is installed.

All run in one process, turn by turn, on the same batch; the numbers are medians over steps. On a machine that other work
shares only the ratios of one run mean something. Targets: a private step costs at most 3 plain ones, and is at least 20
times faster than tensorflow_privacy's DPKerasSGDOptimizer on the CNN.
"""

import argparse
import os
import statistics
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

from tfprivacy_ft import PrivacyPlan
from tfprivacy_ft.models import build_model
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer

SHAPES = {"cnn": (28, 28, 1), "mlp": (784,)}
OPTIONS = {"cnn": {}, "mlp": {"hidden_units": (512, 512)}}
TITLES = {"cnn": "CNN", "mlp": "MLP 784-512-512-10"}
CLIP, NOISE, LEARNING_RATE = 1.0, 1.1, 0.1


class StepTimer(tf.keras.callbacks.Callback):
    """Wall seconds of every step."""

    def __init__(self):
        super().__init__()
        self.seconds: list[float] = []

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self._start)


class Contender:
    """A compiled model that can be asked to train for some steps."""

    def __init__(self, architecture, optimizer, batches, *, reduction="auto", callbacks=()):
        self.model = build_model(architecture, SHAPES[architecture], 10, **OPTIONS[architecture])
        self.model.compile(optimizer, tf.keras.losses.SparseCategoricalCrossentropy(reduction=reduction))
        self._batches, self._callbacks, self.seconds = batches, list(callbacks), []

    def run(self, steps, keep=True):
        timer = StepTimer()
        self.model.fit(self._batches, steps_per_epoch=steps, verbose=0, callbacks=[*self._callbacks, timer])
        if keep:
            self.seconds += timer.seconds

    @property
    def milliseconds(self):
        return 1e3 * statistics.median(self.seconds)


def peer_optimizer(batch_size):
    """tensorflow_privacy's optimizer with one example in a microbatch; None where the package is missing."""
    try:
        import tensorflow_privacy
    except ImportError:
        return None
    return tensorflow_privacy.DPKerasSGDOptimizer(CLIP, NOISE, num_microbatches=batch_size, learning_rate=LEARNING_RATE)


def measure(architecture, batch_size, rounds, steps, peer):
    """Rows (name, contender) of one table, measured."""
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, [batch_size, *SHAPES[architecture]]).astype(np.float32)
    y = random.integers(0, 10, batch_size).astype(np.int32)
    batches = tf.data.Dataset.from_tensors((x, y)).repeat()

    plan = PrivacyPlan(60_000, batch_size, epochs=60, delta=1e-5, noise_multiplier=NOISE)
    private = plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=CLIP, learning_rate=LEARNING_RATE)
    plain = tf.keras.optimizers.SGD(LEARNING_RATE)
    fast = {
        "plain Keras": Contender(architecture, plain, batches),
        "tfprivacy_ft": Contender(architecture, private, batches, callbacks=plan.callbacks()),
    }
    slow = {}
    if peer:
        optimizer = peer_optimizer(batch_size)
        if optimizer is None:
            print("tensorflow_privacy is not installed: its step was skipped.")
        else:
            slow["tensorflow_privacy"] = Contender(architecture, optimizer, batches, reduction="none")

    for contender in fast.values():
        contender.run(3, keep=False)  # traces, and warms up
    for contender in slow.values():
        contender.run(1, keep=False)
    for turn in range(rounds):
        for contender in fast.values():
            contender.run(steps)
        for contender in slow.values() if turn < 3 else ():
            contender.run(1)
    return {**fast, **slow}


def table(rows):
    plain, ours = rows["plain Keras"].milliseconds, rows["tfprivacy_ft"].milliseconds
    print(f"  {'':20} {'ms per step':>12} {'times plain':>12} {'times tfprivacy_ft':>19} {'steps timed':>12}")
    for name, contender in rows.items():
        ms = contender.milliseconds
        print(f"  {name:20} {ms:12.1f} {ms / plain:12.2f} {ms / ours:19.2f} {len(contender.seconds):12}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["cnn", "mlp"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[256], help="such as 256 1024")
    parser.add_argument("--rounds", type=int, default=12, help="turns that the contenders take")
    parser.add_argument("--steps", type=int, default=20, help="steps in a turn")
    parser.add_argument("--no-peer", action="store_true", help="leave tensorflow_privacy out, which takes minutes")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")

    for architecture in arguments.models:
        for batch_size in arguments.batch_sizes:
            rows = measure(architecture, batch_size, arguments.rounds, arguments.steps, not arguments.no_peer)
            parameters = rows["plain Keras"].model.count_params()
            print(f"{TITLES[architecture]}, {parameters:,} parameters, batch {batch_size}, {os.cpu_count()} cores")
            table(rows)
            print(flush=True)


if __name__ == "__main__":
    main()
