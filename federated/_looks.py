"""A look at a federated run: figures of the model as it is, and who is told of them.

Promises: what goes out is the round, epsilon and the figures of `evaluate`; no metric of the training ever does.
"""

import csv
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from federated.checkpoints import run_coroutine
from federated.process import AveragingProcess
from tfprivacy_ft.errors import InvalidArgumentError

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["Evaluate", "Release", "as_figures", "evaluator", "releaser"]

Evaluate = Callable[["tf.keras.Model"], Mapping[str, float]] | tuple[Any, Any]
Release = Callable[[Mapping[str, float]], None]

_OWN = ("round", "epsilon", "clip")


def evaluator(evaluate: Evaluate | None, process: AveragingProcess) -> Callable[[Any], dict[str, float]] | None:
    """What computes the figures of a state; None where nobody asked for any.

    Raises:
        InvalidArgumentError: `evaluate` is neither a pair (x, y) nor a function.
    """
    if evaluate is None:
        return None
    model = process.model(None)
    if isinstance(evaluate, tuple) and len(evaluate) == 2:
        x, y = evaluate
        model.compile(loss=process.loss, metrics=["accuracy"] if "crossentropy" in process.loss_name else [])

        def on_held_out(model: "tf.keras.Model") -> Mapping[str, float]:
            return model.evaluate(x, y, verbose=0, batch_size=256, return_dict=True)

        compute: Callable[[tf.keras.Model], Mapping[str, float]] = on_held_out
    elif callable(evaluate):
        compute = evaluate
    else:
        raise InvalidArgumentError(
            f"evaluate is a {type(evaluate).__name__}: give (x, y), or a function from a Keras model to a dictionary."
        )

    def figures(state: Any) -> dict[str, float]:
        process.assign(state, model)
        found = as_figures(compute(model))
        taken = [name for name in _OWN if name in found]
        if taken:
            raise InvalidArgumentError(
                f"evaluate returned a figure called {taken[0]!r}, which the history has of its own: give it another name."
            )
        return found

    return figures


def as_figures(found: Any) -> dict[str, float]:
    """What a function of the user's returned for a look.

    Raises:
        InvalidArgumentError: It is no dictionary.
    """
    if not isinstance(found, Mapping):
        raise InvalidArgumentError(
            f"evaluate returned a {type(found).__name__}: return a dictionary of figures, like {{'accuracy': 0.9}}."
        )
    return {name: float(value) for name, value in found.items()}


def releaser(run_dir: str | os.PathLike[str] | None, release_managers: Sequence[Any]) -> Release:
    """What tells everybody of a look: `history.csv` in `run_dir`, and `tff.program.ReleaseManager` objects.

    Raises:
        InvalidArgumentError: An entry of `release_managers` is no release manager.
    """
    if isinstance(release_managers, str) or not isinstance(release_managers, Iterable):
        raise InvalidArgumentError(
            f"release_managers is a {type(release_managers).__name__}: give a list of tff.program.ReleaseManager objects."
        )
    managers = list(release_managers)
    for manager in managers:
        if isinstance(manager, type) or not callable(getattr(manager, "release", None)):
            raise InvalidArgumentError(
                f"release_managers holds a {type(manager).__name__}: give objects like "
                "tff.program.CSVFileReleaseManager('figures.csv', key_fieldname='round')."
            )
    file = None if run_dir is None else pathlib.Path(run_dir) / "history.csv"

    def release(entry: Mapping[str, float]) -> None:
        if file is not None:
            append_row(file, entry)
        figures = {name: value for name, value in entry.items() if name != "round"}
        for manager in managers:
            run_coroutine(manager.release(figures, key=int(entry["round"])))

    return release


def append_row(file: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Adds a line to a CSV file with a header; columns that it does not have yet are added to all lines.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "history.csv"
        >>> append_row(file, {"round": 1, "epsilon": 0.5})
        >>> append_row(file, {"round": 2, "epsilon": 0.7, "accuracy": 0.9})
        >>> file.read_text().split()
        ['round,epsilon,accuracy', '1,0.5,', '2,0.7,0.9']
    """
    header: list[str] = []
    lines: list[dict[str, Any]] = []
    if file.exists():
        with open(file, newline="", encoding="utf-8") as reader:
            table = csv.DictReader(reader)
            header, lines = list(table.fieldnames or []), list(table)
    if header and set(row) <= set(header):
        with open(file, "a", newline="", encoding="utf-8") as writer:
            csv.DictWriter(writer, header).writerow(row)
        return
    aside = file.with_suffix(".new")
    with open(aside, "w", newline="", encoding="utf-8") as writer:
        table_writer = csv.DictWriter(writer, list(dict.fromkeys([*header, *row])))
        table_writer.writeheader()
        table_writer.writerows([*lines, dict(row)])
    os.replace(aside, file)
