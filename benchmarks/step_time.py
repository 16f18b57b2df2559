"""Time and memory of one training step in `model.fit`: plain Keras, this package, tensorflow_privacy where it is there.

All take turns in one process on the same batch; times are medians over steps. On a machine that other work shares only the
ratios of one run mean something. `--secure` adds this package with `secure_noise=True`, `--memory` the peak of a process of
its own for each, `--growth` a second table of how both grow with batch, width and depth of a dense network. A picture of
what was measured goes to `step_time.png`.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from _models import WORKS, Work, images, mlp

from tfprivacy_ft import PrivacyPlan
from tfprivacy_ft.noise import DiscreteGaussianNoise, GaussianNoise
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer

CLIP, NOISE, LEARNING_RATE = 1.0, 1.1, 0.1
PLAIN, OURS, SECURE, PEER = "plain Keras", "tfprivacy_ft", "with secure noise", "tensorflow_privacy"
GROWTH = {"batch": (64, 256, 1024, 4096), "width": (128, 256, 512, 1024), "depth": (1, 2, 4, 8)}


def grown(axis, value):
    """A dense network, and the batch size, with `axis` at `value` and all else as it is elsewhere."""
    setting = {"batch": 256, "width": 512 if axis == "batch" else 256, "depth": 2, axis: value}
    return Work("", mlp(setting["width"], setting["depth"]), images(784), {}), setting["batch"]


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

    def __init__(self, work, batch_size, name):
        random = np.random.default_rng(0)
        x, y = work.inputs(random, batch_size), random.integers(0, 10, batch_size).astype(np.int32)
        self._batches, self._callbacks, self.seconds = tf.data.Dataset.from_tensors((x, y)).repeat(), [], []
        loss = "sparse_categorical_crossentropy"
        if name == PLAIN:
            optimizer = tf.keras.optimizers.SGD(LEARNING_RATE)
        elif name in (OURS, SECURE):
            plan = PrivacyPlan(60_000, batch_size, epochs=60, delta=1e-5, noise_multiplier=NOISE)
            optimizer = plan.optimizer(
                DPKerasSGDOptimizer, l2_norm_clip=CLIP, learning_rate=LEARNING_RATE, secure_noise=name == SECURE
            )
            self._callbacks = plan.callbacks()
        else:
            import tensorflow_privacy

            optimizer = tensorflow_privacy.DPKerasSGDOptimizer(CLIP, NOISE, batch_size, learning_rate=LEARNING_RATE)
            loss = tf.keras.losses.SparseCategoricalCrossentropy(reduction="none")
        self.model = work.build()
        self.model.compile(optimizer, loss)

    def run(self, steps, keep=True):
        timer = StepTimer()
        self.model.fit(self._batches, steps_per_epoch=steps, verbose=0, callbacks=[*self._callbacks, timer])
        if keep:
            self.seconds += timer.seconds

    @property
    def milliseconds(self):
        return 1e3 * statistics.median(self.seconds)


def contend(work, batch_size, rounds, steps, peer=False, secure=False):
    """Name -> contender, measured in turns."""
    names = (PLAIN, OURS, *([SECURE] if secure else []), *([PEER] if peer else []))
    found = {name: Contender(work, batch_size, name) for name in names}
    for name, contender in found.items():
        contender.run(1 if name == PEER else 3, keep=False)  # traces, and warms up
    for turn in range(rounds):
        for name, contender in found.items():
            if name != PEER:
                contender.run(steps)
            elif turn < 3:
                contender.run(1)
    return found


def noise_milliseconds(noise, model, steps):
    """Of drawing the noise for all trainable variables, and nothing else."""
    values = [tf.zeros(v.shape) for v in model.trainable_variables]
    draw = tf.function(lambda: noise.draw(values, CLIP, NOISE)(values))
    seconds = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[3:])


def peak_of(case, name):
    """MiB of a process that only takes some steps of what the arguments `case` name."""
    command = [sys.executable, __file__, *map(str, case), "--peak-of", name]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(ran.stdout.split()[-1])


def show_peak(work, batch_size, name):
    Contender(work, batch_size, name).run(10)
    # Linux's own word for it: getrusage also counts what the process that started this one had.
    status = pathlib.Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def table(found):
    plain, ours = found[PLAIN].milliseconds, found[OURS].milliseconds
    print(f"  {'':20} {'ms per step':>12} {'times plain':>12} {'times tfprivacy_ft':>19} {'steps timed':>12}")
    for name, contender in found.items():
        ms = contender.milliseconds
        print(f"  {name:20} {ms:12.1f} {ms / plain:12.2f} {ms / ours:19.2f} {len(contender.seconds):12}")


def growth(rounds, steps):
    """axis -> [(value, plain ms, private ms, plain MiB, private MiB)]."""
    found = {}
    for axis, values in GROWTH.items():
        print(
            f"  {axis:8} {'plain ms':>10} {'private ms':>12} {'ratio':>7} {'plain MiB':>11} {'private MiB':>12} {'ratio':>7}"
        )
        for value in values:
            times = contend(*grown(axis, value), rounds, steps)
            plain, ours = times[PLAIN].milliseconds, times[OURS].milliseconds
            peaks = [peak_of(["--grown", axis, value], name) for name in (PLAIN, OURS)]
            found.setdefault(axis, []).append((value, plain, ours, *peaks))
            print(
                f"  {value:8} {plain:10.1f} {ours:12.1f} {ours / plain:7.2f}"
                f" {peaks[0]:11.0f} {peaks[1]:12.0f} {peaks[1] / peaks[0]:7.2f}",
                flush=True,
            )
    return found


def picture(path, ratios, growths):
    """Ratios as bars beside their targets, and how time and memory grow as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 + 5 * bool(growths)), layout="constrained")
    rows = figure.subfigures(2 if growths else 1, 1, squeeze=False, height_ratios=[3.2, 5][: 1 + bool(growths)]).ravel()
    axes = rows[0].subplots()
    names = list(ratios)
    axes.bar(range(len(names)), [ratios[n][0] for n in names], color="#4477aa", label="measured")
    axes.plot(range(len(names)), [ratios[n][1] for n in names], "k_", markersize=18, label="target")
    axes.set_xticks(range(len(names)), names, fontsize=7)
    axes.set_ylabel("times a plain step")
    axes.legend()
    if growths:
        panels = rows[1].subplots(2, len(growths), sharex="col")
        for column, (axis, points) in enumerate(growths.items()):
            values, *lines = zip(*points, strict=True)
            for row, label in enumerate(("ms per step", "peak MiB")):
                panel = panels[row][column]
                panel.plot(values, lines[2 * row], "o-", color="#bbbbbb", label="plain")
                panel.plot(values, lines[2 * row + 1], "o-", color="#4477aa", label="private")
                panel.set(xscale="log", yscale="log" if row == 0 else "linear", ylim=(1 - row, None))
                panel.set_xticks(values, map(str, values), minor=False)
                panel.minorticks_off()
                panels[1][column].set_xlabel(axis)
                panels[row][0].set_ylabel(label)
        panels[0][0].legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(WORKS), default=list(WORKS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=6, help="turns that the contenders take")
    parser.add_argument("--steps", type=int, default=10, help="steps in a turn")
    parser.add_argument("--peer", action="store_true", help="tensorflow_privacy too, on MLP and CNN; takes minutes")
    parser.add_argument("--memory", action="store_true", help="peak memory, each in a process of its own (Linux)")
    parser.add_argument(
        "--growth", action="store_true", help="how time and memory grow with batch, width and depth (Linux)"
    )
    parser.add_argument("--secure", action="store_true", help="this package with secure_noise=True too")
    picture_file = pathlib.Path(__file__).with_suffix(".png")
    parser.add_argument("--png", default=picture_file, help="file for a picture of it all (default: step_time.png)")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--grown", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.peak_of:
        axis, value = arguments.grown or (None, None)
        case = grown(axis, int(value)) if axis else (WORKS[arguments.models[0]], arguments.batch_sizes[0])
        return show_peak(*case, arguments.peak_of)

    ratios = {}
    for model in arguments.models:
        work = WORKS[model]
        for size in arguments.batch_sizes:
            peer = arguments.peer and model in ("mlp", "cnn")
            found = contend(work, size, arguments.rounds, arguments.steps, peer, arguments.secure)
            target = work.targets.get(size, float("nan"))
            print(f"{work.title}, {found[PLAIN].model.count_params():,} parameters, batch {size}, target {target}")
            table(found)
            for label, noise in (("its noise alone", GaussianNoise), ("secure noise alone", DiscreteGaussianNoise)):
                if noise is GaussianNoise or arguments.secure:
                    alone = noise_milliseconds(noise(), found[OURS].model, arguments.rounds * arguments.steps)
                    print(f"  {label:20} {alone:12.1f} {alone / found[PLAIN].milliseconds:12.2f}")
            ratios[f"{model}\n{size}"] = (found[OURS].milliseconds / found[PLAIN].milliseconds, target)
            if arguments.memory:
                plain, ours = (peak_of(["--models", model, "--batch-sizes", size], name) for name in (PLAIN, OURS))
                print(f"  peak memory: plain {plain:.0f} MiB, private {ours:.0f} MiB, {ours / plain:.2f} times")
            print(flush=True)
            tf.keras.backend.clear_session()
    picture(arguments.png, ratios, growth(arguments.rounds, arguments.steps) if arguments.growth else {})


if __name__ == "__main__":
    main()
