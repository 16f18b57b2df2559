"""The progress bar of a federated run."""

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

__all__ = ["progress_bar"]

Show = Callable[[int, Sequence[Mapping[str, float]]], None]


@contextmanager
def progress_bar(rounds: int, *, done: int, visible: bool) -> Iterator[Show]:
    """Shows the round, the figures of the last look and the time left.

    Args:
        rounds: Of the whole run.
        done: How many of them were run before.
        visible: Whether to show anything.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[time]}"),
    )
    # In a notebook without ipywidgets rich warns and shows nothing; drawn as in a terminal, the line works there too.
    console = Console(force_jupyter=None if importlib.util.find_spec("ipywidgets") else False)
    with Progress(*columns, console=console, disable=not visible) as progress:
        task = progress.add_task("", total=rounds, completed=done, time="left")

        def show(done: int, history: Sequence[Mapping[str, float]]) -> None:
            figures = history[-1] if history else {}
            text = "  ".join(_figure(name, value) for name, value in figures.items() if name != "round")
            progress.update(task, completed=done, description=text, time="left" if done < rounds else "in all")

        yield show


def _figure(name: str, value: float) -> str:
    if name == "epsilon" and math.isfinite(value):
        value = math.ceil(value * 1000) / 1000  # never less than what was spent
        return f"{name} {value:.3f}"
    return f"{name} {value:.3g}"
