"""Steps of JAX-Privacy's Keras API beside plain Keras on JAX: a worker of `peers.py`, started where both are installed.

Every contender trains in `model.fit`. A step has ended when its results are there: JAX returns from a step before that.
"""

import itertools
import os
import time

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")

import jax
import keras
from _peer import batch, report, settings
from jax_privacy import keras_api
from keras import layers

MICROBATCH = 8
TRAIN_STEPS, TRAIN_SIZE = 1000, 60_000  # the API refuses to take more steps than were announced


class StepTimer(keras.callbacks.Callback):
    """Wall seconds of every step."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        jax.block_until_ready(logs)
        self.seconds.append(time.perf_counter() - self._start)


def build(model):
    """The MLP or the CNN of `tfprivacy_ft.models.build_model`."""
    if model == "mlp":
        hidden = [layers.Input((784,)), layers.Dense(512, "tanh"), layers.Dense(512, "tanh")]
    else:
        hidden = [
            *(layers.Input((28, 28, 1)), layers.Conv2D(16, 8, strides=2, padding="same", activation="tanh")),
            *(layers.MaxPool2D(2, 1), layers.Conv2D(32, 4, strides=2, activation="tanh"), layers.MaxPool2D(2, 1)),
            *(layers.Flatten(), layers.Dense(32, "tanh")),
        ]
    return keras.Sequential([*hidden, layers.Dense(10, "softmax")])


def contender(chosen, x, y, private=True, microbatch_size=None):
    """Steps of plain Keras, or of JAX-Privacy with microbatches of a size (None, its default: of the whole batch)."""
    model = build(chosen.model)
    if private:
        config = keras_api.DPKerasConfig(
            epsilon=10.0,  # more than these steps spend: the noise multiplier below decides
            delta=1e-5,
            clipping_norm=chosen.l2_norm_clip,
            batch_size=chosen.batch_size,
            gradient_accumulation_steps=1,
            train_steps=TRAIN_STEPS,
            train_size=TRAIN_SIZE,
            noise_multiplier=chosen.noise_multiplier,
            microbatch_size=microbatch_size,
        )
        model = keras_api.make_private(model, config)
    model.compile(keras.optimizers.SGD(chosen.learning_rate), "sparse_categorical_crossentropy")

    def run(steps):
        timer = StepTimer()
        batches = ((x, y) for _ in itertools.count())
        model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=[timer])
        return timer.seconds

    return run


def main():
    keras.utils.set_random_seed(0)
    chosen = settings()
    x, y = batch(chosen)
    contenders = {"plain Keras on JAX": contender(chosen, x, y, private=False)}
    contenders["JAX-Privacy"] = contender(chosen, x, y)
    contenders[f"JAX-Privacy, microbatch {MICROBATCH}"] = contender(chosen, x, y, microbatch_size=MICROBATCH)
    report(contenders, chosen)


if __name__ == "__main__":
    main()
