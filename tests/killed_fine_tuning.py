"""A staged run with checkpoints, used by test_training.py; as a program it dies in the second epoch of its second stage."""

import os
import pathlib
import sys

import numpy as np

from tfprivacy_ft import datasets, models
from tfprivacy_ft.finetune import Full, Head, Staged, finetune
from tfprivacy_ft.keras_compat import keras

RECIPE = Staged((Head(epochs=2), Full(epochs=3, batch_size=91, learning_rate=0.05, average_weights=0.9)))
TOTAL = 2 + 3 * 5  # steps


def model():
    """The same weights in every process."""
    made = models.build_model("mlp", (30,), 2, hidden_units=(6,))
    random = np.random.default_rng(5)
    made.set_weights([random.normal(scale=0.3, size=weight.shape) for weight in made.get_weights()])
    return made


def run(folder, **arguments):
    data = datasets.load("breast_cancer")
    settings = {"recipe": RECIPE, "target_epsilon": 2.0, "delta": 1e-4, "run_dir": folder, "verbose": 0}
    return finetune(model(), data.x_train, data.y_train, **{**settings, **arguments})


class Dying(keras.callbacks.Callback):
    """Dies as by kill -9 in step 3 of epoch 2 of a fit of three epochs."""

    epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.params["epochs"] == 3 and self.epoch == 1 and batch == 2:
            os._exit(9)


if __name__ == "__main__":
    fit = keras.Model.fit

    def dying_fit(self, *args, callbacks, **kwargs):
        return fit(self, *args, callbacks=[*callbacks, Dying()], **kwargs)

    keras.Model.fit = dying_fit
    run(pathlib.Path(sys.argv[1]))
