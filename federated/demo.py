"""What `make demo` runs: one model on bundled data, without privacy, with it, and federated with it.

It lives here and not in `tfprivacy_ft`, because it needs both packages and imports go one way. Where TensorFlow
Federated is not installed, the federated run is left out, and that is said.

Promises: every demo gets a numbered folder of its own, so no ledger is continued by accident; each private run keeps
within the target, by its ledger; the table shows epsilon with its delta, unit and sampler, and never without them.
"""

import contextlib
import csv
import dataclasses
import functools
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tfprivacy_ft import _check, accounting, datasets, models, plots, run_folder
from tfprivacy_ft.compute_epsilon import Report
from tfprivacy_ft.errors import MissingDependencyError
from tfprivacy_ft.events import Event

if TYPE_CHECKING:
    import tensorflow as tf
    from rich.console import Console
    from rich.table import Table

    from tfprivacy_ft.plan import PrivacyPlan

__all__ = ["DemoSettings", "Result", "run_demo"]

_PUBLIC_DIGITS = (
    7  # the public third knows only the digits 0 .. 6, so there is something to learn from the private rest
)
_BATCH_SIZE = 192
_LEARNING_RATE = 0.5
_NUM_CLIENTS = 160
_CLIENTS_PER_ROUND = 80
_CLIP = 1.0


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What can be chosen.

    Args:
        run_dir: Folder in which the demo makes a numbered one for itself.
        target_epsilon: Budget of each private run, > 0.
        delta: Of every epsilon, in (0, 1), well below 1 / 160, the number of clients.
        epochs: Of fine-tuning, >= 1.
        rounds: Of federated averaging, >= 1.
        pretraining_epochs: On the public third, >= 1.

    Raises:
        InvalidArgumentError: An argument is outside its range.
    """

    run_dir: str | os.PathLike[str] = "runs/demo"
    target_epsilon: float = 3.0
    delta: float = 1e-4
    epochs: int = 20
    rounds: int = 15
    pretraining_epochs: int = 40

    def __post_init__(self) -> None:
        _check.positive(target_epsilon=self.target_epsilon)
        _check.positive_integer(epochs=self.epochs, rounds=self.rounds, pretraining_epochs=self.pretraining_epochs)
        accounting.check_delta(self.delta, _NUM_CLIENTS)

    @classmethod
    def from_options(
        cls, *, small: bool, epochs: int | None = None, rounds: int | None = None, **options: Any
    ) -> "DemoSettings":
        """Settings from the options of the command, of which None stands for the usual number or the small one."""
        length = {"epochs": 2, "rounds": 2, "pretraining_epochs": 5} if small else {}
        given = {name: value for name, value in (("epochs", epochs), ("rounds", rounds)) if value is not None}
        return cls(**{**length, **given, **options})


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table: a run and what it spent.

    Args:
        name: Of the run.
        accuracy: On the test images, in [0, 1].
        report: The privacy spent, by the run's ledger; None for a run without privacy.
        curve: Accuracy and epsilon on the way, for the plot.
        saw_private: Whether it trained on private images at all.
    """

    name: str
    accuracy: float
    report: Report | None = None
    curve: plots.Curve | None = None
    saw_private: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class _Data:
    """Images and labels: a third to pretrain on in the open, the private rest, and the test set."""

    public: tuple[np.ndarray, np.ndarray]
    private: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def run_demo(settings: DemoSettings) -> list[Result]:
    """Trains, prints a table, and leaves ledgers, histories, models and a plot in a new folder.

    Args:
        settings: What was chosen.

    Returns:
        The lines of the table.

    Raises:
        InvalidArgumentError: No noise reaches the target, or the folder cannot be made.
    """
    import tensorflow as tf
    from rich.console import Console

    tf.get_logger().setLevel("ERROR")  # Keras warns where a step is so short that a callback takes longer
    data = _load()
    plan, noise = _plan(settings, len(data.private[0])), _noise_for_rounds(settings)
    folder = run_folder.numbered(settings.run_dir)
    console = Console(highlight=False)
    _say_what_is_what(console, data)
    console.print("\n[bold]Pretraining[/] on the public images, without privacy.")
    start = _pretrain(settings, data)
    results = [Result("public only", _accuracy(start, data), saw_private=False)]
    _save(start, folder / "public_only")
    console.print("[bold]Fine-tuning[/] on the private images, [bold]without privacy[/], to compare with.")
    results.append(_fine_tune_in_the_open(settings, data, start, folder / "not_private"))
    console.print("[bold]Fine-tuning[/] on the private images [bold]with privacy[/] for each image.")
    results.append(_fine_tune_privately(plan, data, start, folder / "private"))
    try:
        results.append(_fine_tune_federated(settings, noise, data, start, folder / "federated", console))
    except MissingDependencyError as error:
        console.print(f"[bold]Left out:[/] {error}", soft_wrap=True)
    _plot(results, settings).savefig(folder / "training.png", dpi=120)
    console.print(_table(results))
    _say_what_it_means(console, folder)
    return results


def _load() -> _Data:
    data = datasets.load("digits")
    # The stream of RandomState is frozen; which third is public is no secret.
    order = np.random.RandomState(0).permutation(len(data.x_train))
    public = order[data.y_train[order] < _PUBLIC_DIGITS][: len(order) // 3]
    private = np.setdiff1d(order, public)
    return _Data(
        public=(data.x_train[public], data.y_train[public]),
        private=(data.x_train[private], data.y_train[private]),
        test=(data.x_test, data.y_test),
    )


def _build() -> "tf.keras.Model":
    return models.build_model("mlp", input_shape=(8, 8, 1), num_outputs=10, hidden_units=(64,))


def _copy(start: "tf.keras.Model") -> "tf.keras.Model":
    model = _build()
    model.set_weights(start.get_weights())
    return model


def _compile(model: "tf.keras.Model", optimizer: Any) -> None:
    model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])


def _accuracy(model: "tf.keras.Model", data: _Data) -> float:
    return float(np.mean(np.argmax(model.predict(data.test[0], verbose=0), axis=-1) == data.test[1]))


def _pretrain(settings: DemoSettings, data: _Data) -> "tf.keras.Model":
    import tensorflow as tf

    tf.keras.utils.set_random_seed(0)  # of the public part; no seed reaches the noise
    model = _build()
    _compile(model, "adam")
    model.fit(*data.public, batch_size=32, epochs=settings.pretraining_epochs, verbose=0)
    return model


def _fine_tune_in_the_open(
    settings: DemoSettings, data: _Data, start: "tf.keras.Model", folder: pathlib.Path
) -> Result:
    import tensorflow as tf

    model = _copy(start)
    _compile(model, tf.keras.optimizers.SGD(_LEARNING_RATE))
    history = model.fit(
        *data.private, batch_size=_BATCH_SIZE, epochs=settings.epochs, validation_data=data.test, verbose=0
    )
    _save(model, folder)
    _write_history(folder, [{"epoch": e + 1, **_at(history.history, e)} for e in history.epoch])
    return Result("not private", _accuracy(model, data))


def _fine_tune_privately(plan: "PrivacyPlan", data: _Data, start: "tf.keras.Model", folder: pathlib.Path) -> Result:
    from tfprivacy_ft import DPKerasSGDOptimizer

    model = _copy(start)
    _compile(model, plan.optimizer(DPKerasSGDOptimizer, l2_norm_clip=_CLIP, learning_rate=_LEARNING_RATE))
    with contextlib.closing(plan):
        history = model.fit(
            plan.batches(*data.private),
            epochs=plan.epochs,
            validation_data=data.test,
            callbacks=plan.callbacks(folder),
            verbose=1 if sys.stdout.isatty() else 2,
        )
        report = plan.report()
    _save(model, folder)
    _write_history(folder, [{"epoch": e + 1, **_at(history.history, e)} for e in history.epoch])
    _write_report(folder, report)
    return Result("private", _accuracy(model, data), report, plots.Curve.of_history(history, "private"))


def _fine_tune_federated(
    settings: DemoSettings,
    noise_multiplier: float,
    data: _Data,
    start: "tf.keras.Model",
    folder: pathlib.Path,
    console: "Console",
) -> Result:
    from federated import averaging, clients, runtime, simulation

    runtime.require_tff()
    console.print(
        f"[bold]Federated averaging[/] with privacy for each of {_NUM_CLIENTS} clients, who hold the private images."
    )
    members = clients.split_evenly(*data.private, num_clients=_NUM_CLIENTS, seed=0)
    process = averaging.build_averaging(
        _build,
        client_learning_rate=_LEARNING_RATE,
        batch_size=8,
        local_epochs=2,
        l2_norm_clip=_CLIP,
        noise_multiplier=noise_multiplier,
        expected_clients_per_round=_CLIENTS_PER_ROUND,
    )
    result = simulation.simulate(
        process,
        members,
        rounds=settings.rounds,
        delta=settings.delta,
        run_dir=folder,
        state=process.start_from(start),
        evaluate=data.test,
        evaluate_every=1,
    )
    model = result.model()
    _save(model, folder)
    _write_report(folder, result.report)
    curve = plots.Curve("federated, private", "round", *_columns(result.history, "round", "accuracy", "epsilon"))
    return Result(curve.title, _accuracy(model, data), result.report, curve)


def _plan(settings: DemoSettings, num_examples: int) -> "PrivacyPlan":
    from tfprivacy_ft import PrivacyPlan

    return PrivacyPlan.solve(
        target_epsilon=settings.target_epsilon,
        delta=settings.delta,
        num_examples=num_examples,
        batch_size=_BATCH_SIZE,
        epochs=settings.epochs,
    )


def _noise_for_rounds(settings: DemoSettings) -> float:
    """The least noise multiplier that keeps all rounds together within the target."""

    def events(noise_multiplier: float) -> Event:
        return Event.poisson(
            count=settings.rounds,
            unit="client",
            noise_multiplier=noise_multiplier,
            sampling_probability=_CLIENTS_PER_ROUND / _NUM_CLIENTS,
        )

    return accounting.solve_noise_multiplier(
        target_epsilon=settings.target_epsilon, delta=settings.delta, events_for=events
    )


# Files.


def _save(model: "tf.keras.Model", folder: pathlib.Path) -> None:
    """Saves architecture and weights alone: without the DP optimizer, plain Keras loads it."""
    folder.mkdir(exist_ok=True)
    _copy(model).save(folder / "model.keras")


def _at(history: Mapping[str, Sequence[float]], i: int) -> dict[str, float]:
    return {name: float(values[i]) for name, values in history.items()}


def _columns(rows: Sequence[Mapping[str, float]], *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]


def _write_history(folder: pathlib.Path, rows: Sequence[Mapping[str, float]]) -> None:
    with open(folder / "history.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_report(folder: pathlib.Path, report: Report) -> None:
    (folder / "report.txt").write_text(f"{report}\n", encoding="utf-8")
    (folder / "report.json").write_text(f"{report.to_json()}\n", encoding="utf-8")


# What is shown.


def _say_what_is_what(console: "Console", data: _Data) -> None:
    console.print(
        f"8x8 images of handwritten digits. [bold]Public:[/] {len(data.public[0])}, of the digits 0 to "
        f"{_PUBLIC_DIGITS - 1} only. [bold]Private:[/] {len(data.private[0])}, of all ten digits. [bold]Test:[/] "
        f"{len(data.test[0])}, taken to be public."
    )


def _plot(results: Sequence[Result], settings: DemoSettings) -> Any:
    curves = [result.curve for result in results if result.curve is not None]
    references = {result.name: result.accuracy for result in results if result.report is None}
    return plots.plot_runs(curves, target_epsilon=settings.target_epsilon, references=references)


def _table(results: Sequence[Result]) -> "Table":
    from rich import box
    from rich.table import Table

    title = "Test accuracy, and the privacy spent on the private images"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("run", "accuracy", "epsilon", "delta", "unit", "sampler", "epsilon if\nunamplified"):
        is_number = name in ("accuracy", "delta") or "epsilon" in name
        table.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    for result in results:
        table.add_row(result.name, f"{result.accuracy:.3f}", *_privacy(result))
    return table


def _privacy(result: Result) -> list[str]:
    if result.report is None:
        return ["infinite" if result.saw_private else "0", "-", "-", "-", "-"]
    parts = [
        (
            _round_up(a.epsilon),
            f"{a.delta:.2g}",
            a.unit,
            " and ".join(a.samplers),
            _round_up(a.epsilon_without_amplification),
        )
        for a in result.report.accounts
    ]
    return ["\n".join(column) for column in zip(*parts, strict=True)]


def _round_up(epsilon: float) -> str:
    """Three decimals, never less than what was spent."""
    return "infinite" if math.isinf(epsilon) else f"{math.ceil(epsilon * 1000 - 1e-9) / 1000:.3f}"


def _say_what_it_means(console: "Console", folder: pathlib.Path) -> None:
    say = functools.partial(console.print, soft_wrap=True)
    say("Each epsilon is that of its run alone: whoever publishes two models of the same data spends both.")
    say("The settings were tuned on this data set, which is public; on private data, the search spends epsilon too.")
    say(f"\nLedgers, reports, histories, models and the plot training.png are in [bold]{folder}[/].")
    say(f"The full statement: compute-epsilon run {folder / 'private'}")
