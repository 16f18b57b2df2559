"""The report on one or several runs: one HTML page for people, and the same content as JSON for programs.

Promises: every figure comes from a ledger that was verified, and is computed as `compute_epsilon` computes it; epsilons of
different runs, units or relations stand side by side and are never added; a ledger that is damaged is shown as such, and
gets no epsilon. The page (`report_page`) loads nothing and runs no script. Needs no TensorFlow.
"""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tfprivacy_ft
from tfprivacy_ft import _own_files, accounting, ledger, statement
from tfprivacy_ft.compute_epsilon import Report, compute_epsilon
from tfprivacy_ft.errors import InvalidArgumentError, LedgerDamagedError
from tfprivacy_ft.events import Event

__all__ = ["FILE_NAME", "GENERATOR", "DamagedRun", "Line", "Point", "Run", "RunsReport", "gather", "write_report"]

FILE_NAME = "privacy_report.html"  # the JSON beside it has the same name and another ending
GENERATOR = "tfprivacy-ft report"  # both files carry it, so that a file of somebody else's is never overwritten

_MOST_POINTS = 24  # of a run's way, each of which costs an account of 0.1 s or more

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Point:
    """What was spent by some moment of a run.

    Args:
      time: ISO 8601, UTC.
      releases: noised releases (steps, rounds) by then.
      epsilon: of these, at the report's delta.
      figure: the run's held-out figure then; None where it was not looked at.
    """

    time: str
    releases: int
    epsilon: float
    figure: float | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """A run's way under one unit of privacy and one neighbouring relation, oldest point first."""

    unit: str
    relation: str
    points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run whose ledger is intact.

    Args:
      name: what it is called in the report.
      report: what was spent.
      contents: what its ledger says.
      warnings: what has to be known before the figures are read, one sentence each.
      figure: name of the held-out figure that is drawn against epsilon; None where the run has none.
      last_figures: the last held-out figures, by name.
      lines: epsilon on the way, one for each unit and relation; they do not add up.
    """

    name: str
    report: Report
    contents: ledger.LedgerContents
    warnings: tuple[str, ...]
    figure: str | None
    last_figures: dict[str, float]
    lines: tuple[Line, ...]

    @property
    def path(self) -> pathlib.Path:
        """The ledger file."""
        return self.contents.path

    @property
    def target_epsilon(self) -> float | None:
        """The run's budget, if it recorded one."""
        target = self.contents.facts.get("target_epsilon")
        if not isinstance(target, int | float) or isinstance(target, bool) or not 0 < target < math.inf:
            return None
        return float(target)


@dataclasses.dataclass(frozen=True)
class DamagedRun:
    """One run whose ledger cannot be trusted, so that it has no epsilon.

    Args:
      name: what it is called in the report.
      path: its folder or ledger file, as it was given.
      damage: one sentence on what is wrong, and what to do.
    """

    name: str
    path: pathlib.Path
    damage: str


@dataclasses.dataclass(frozen=True)
class RunsReport:
    """What several runs spent, each by itself.

    Args:
      runs: in the order in which they were named.
      made: when the ledgers were read, ISO 8601, UTC.
    """

    runs: tuple[Run | DamagedRun, ...]
    made: str

    @property
    def intact(self) -> list[Run]:
        """The runs whose ledgers are intact."""
        return [run for run in self.runs if isinstance(run, Run)]

    @property
    def damaged(self) -> list[DamagedRun]:
        """The others."""
        return [run for run in self.runs if isinstance(run, DamagedRun)]

    def to_dict(self) -> dict[str, Any]:
        """Everything on the page, as plain values that strict JSON can hold; what is infinite is the text "Infinity"."""
        runs = [_run_to_dict(run) if isinstance(run, Run) else _damaged_to_dict(run) for run in self.runs]
        return _plain(
            {"generator": GENERATOR, "version": tfprivacy_ft.__version__, "made": self.made, "runs": runs},
        )

    def to_json(self) -> str:
        """`to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """The page."""
        from tfprivacy_ft.report_page import render  # matplotlib and jinja2 are not needed before

        return render(self)


def gather(
    run_dirs: Iterable[str | os.PathLike[str]],
    *,
    delta: float | None = None,
    figure: str | None = None,
    progress: Progress | None = None,
) -> RunsReport:
    """Reads the ledgers of some runs, and accounts for their ways and their ends.

    Args:
      run_dirs: folders or ledger files of runs, each named once.
      delta: in (0, 1), for every run; None takes the one that each recorded.
      figure: the held-out figure to set against epsilon; None takes each run's first whose name contains "accuracy".
      progress: called with how many accounts are made, and of how many, as it goes on.

    Returns:
      The report. Damaged ledgers are in it, without figures.

    Raises:
      InvalidArgumentError: no run is named or one is twice, delta is outside its range or neither given nor recorded, or
        no run has that figure.
      LedgerError: there is no ledger where one is named.

    Example:
      >>> import tempfile
      >>> with ledger.Ledger.open(tempfile.mkdtemp(), delta=1e-5) as book:
      ...     _ = book.reserve(Event.unknown(count=1, noise_multiplier=1.0))
      >>> round(gather([book.path]).intact[0].report.epsilon, 6)
      4.377178
    """
    paths = [pathlib.Path(path) for path in run_dirs]
    read = [_read(path) for path in paths]
    names = _names(paths)
    contents = [one for one in read if isinstance(one, ledger.LedgerContents)]
    if figure is not None:
        _check_figure(figure, contents)
    states = {id(one): _thinned(_states(one, _figure_of(one, figure))) for one in contents}
    total = sum(map(len, states.values()))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    runs: list[Run | DamagedRun] = []
    for name, path, one in zip(names, paths, read, strict=True):
        if isinstance(one, LedgerDamagedError):
            runs.append(DamagedRun(name, path, str(one)))
        else:
            runs.append(_run(name, one, delta, _figure_of(one, figure), states[id(one)], tick))
    return RunsReport(tuple(runs), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))


def write_report(
    run_dirs: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    delta: float | None = None,
    figure: str | None = None,
    progress: Progress | None = None,
) -> pathlib.Path:
    """Writes the page, and beside it the JSON with the ending `.json`.

    Args:
      run_dirs, delta, figure, progress: as in `gather`.
      output: the page, a name that ends in `.html`; None for `privacy_report.html` in the run's folder, or in the current
        one where there are several runs. An older report is replaced, any other file is not.

    Returns:
      The page's path.

    Raises:
      InvalidArgumentError: as in `gather`, or `output` cannot be written or is a file that is no report.
      LedgerDamagedError: a ledger is damaged. Both files are written all the same, and show which.
      LedgerError: as in `gather`; nothing is written.
    """
    paths = [pathlib.Path(path) for path in run_dirs]
    page = pathlib.Path(output) if output is not None else _default_output(paths)
    if page.suffix.lower() not in (".html", ".htm"):
        raise InvalidArgumentError(f"output={str(page)!r} is not allowed: give a name that ends in .html.")
    data = page.with_suffix(".json")
    for file in (page, data):
        _refuse_foreign(file)
    report = gather(paths, delta=delta, figure=figure, progress=progress)
    _write(page, report.to_html())
    _write(data, report.to_json() + "\n")
    if report.damaged:
        sentences = " ".join(run.damage for run in report.damaged)
        raise LedgerDamagedError(
            f"{len(report.damaged)} of {len(report.runs)} ledgers cannot be trusted, and {page} shows no epsilon for "
            f"{'it' if len(report.damaged) == 1 else 'them'}: {sentences}"
        )
    return page


# Reading.


def _read(path: pathlib.Path) -> ledger.LedgerContents | LedgerDamagedError:
    try:
        return ledger.read(path)
    except LedgerDamagedError as error:
        return error


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Each run's folder, with as much of the way to it as it takes to tell the runs apart."""
    if not paths:
        raise InvalidArgumentError("run_dirs is empty: name at least one run.")
    folders = [(path.parent if path.is_file() else path).resolve() for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise InvalidArgumentError(f"{folder} is named {folders.count(folder)} times: name every run once.")
    longest = max(len(folder.parts) for folder in folders)
    for length in range(1, longest + 1):
        names = [os.path.join(*folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _check_figure(figure: str, contents: Iterable[ledger.LedgerContents]) -> None:
    there = dict.fromkeys(name for one in contents for moment in one.history for name in moment.figures)
    if figure not in there:
        has = f"they have {', '.join(there)}" if there else "they have none"
        raise InvalidArgumentError(f"figure={figure!r} is in none of the ledgers, and {has}: give one that is there.")


def _figure_of(contents: ledger.LedgerContents, wanted: str | None) -> str | None:
    names = dict.fromkeys(name for moment in contents.history for name in moment.figures)
    if wanted is not None:
        return wanted if wanted in names else None
    return next((name for name in names if "accuracy" in name), None)


@dataclasses.dataclass(frozen=True)
class _State:
    """What had been released when, and the figure then."""

    time: str
    events: tuple[Event, ...]
    figure: float | None


def _states(contents: ledger.LedgerContents, figure: str | None) -> list[_State]:
    """The run's way, moments after the same releases joined into one; the last is where the ledger ends."""
    states: list[_State] = []
    for moment in contents.history:
        value = moment.figures.get(figure) if figure is not None else None
        if states and states[-1].events == moment.events:
            before = states.pop()
            value = before.figure if value is None else value
        states.append(_State(moment.time, moment.events, value))
    if contents.events and (not states or states[-1].events != contents.events):
        states.append(_State(contents.written or "", contents.events, None))
    return [state for state in states if state.events]


def _thinned(states: list[_State]) -> list[_State]:
    """At most `_MOST_POINTS` of them, spread over the run, those with a figure first; the ends are always there."""
    if not states:
        return []
    with_figure = [i for i, state in enumerate(states) if state.figure is not None]
    kept = set(_spread(with_figure, _MOST_POINTS - 2)) | {0, len(states) - 1}
    kept |= set(_spread(range(len(states)), max(_MOST_POINTS - len(kept), 2)))
    return [states[i] for i in sorted(kept)]


def _spread(items: Sequence[int], most: int) -> list[int]:
    """Some of these, evenly, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _run(
    name: str,
    contents: ledger.LedgerContents,
    delta: float | None,
    figure: str | None,
    states: Sequence[_State],
    tick: Callable[[], None],
) -> Run:
    report = compute_epsilon(contents, delta=delta)
    return Run(
        name=name,
        report=report,
        contents=contents,
        warnings=(*statement.warnings(report), *_doubts_about_delta(report)),
        figure=figure,
        last_figures={key: value for moment in contents.history for key, value in moment.figures.items()},
        lines=_lines(contents, states, report.delta, tick),
    )


def _doubts_about_delta(report: Report) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report.check_delta()
    return [str(one.message) for one in caught]


def _lines(
    contents: ledger.LedgerContents, states: Sequence[_State], delta: float, tick: Callable[[], None]
) -> tuple[Line, ...]:
    points: dict[tuple[str, str], list[Point]] = {}
    for state in states:
        for account in accounting.accounts(state.events, delta):
            key = account.unit, account.relation
            if key not in points:
                # Before the first release on a unit nothing was spent. What was spent for adding or removing one holds for
                # zeroing out, too, so a line for zero-out goes on where that one ended; others begin where they do.
                is_first = all(unit != account.unit for unit, _ in points)
                start = [Point(contents.started or "", 0, 0.0)] if is_first else []
                before = points.get((account.unit, "add_or_remove_one"), [])[-1:]
                goes_on = [dataclasses.replace(point, figure=None) for point in before]
                points[key] = goes_on if goes_on and account.relation == "zero_out" else start
            points[key].append(Point(state.time, account.releases, account.epsilon, state.figure))
        tick()
    return tuple(Line(unit, relation, tuple(line)) for (unit, relation), line in points.items())


# JSON.


def _plain(value: Any) -> Any:
    """The same with numbers that strict JSON cannot hold as text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _run_to_dict(run: Run) -> dict[str, Any]:
    contents = run.contents
    return {
        "name": run.name,
        "path": str(run.path),
        "intact": True,
        "warnings": run.warnings,
        "report": run.report.to_dict(),
        "target_epsilon": run.target_epsilon,
        "figure": run.figure,
        "last_figures": run.last_figures,
        "lines": [dataclasses.asdict(line) for line in run.lines],
        "trained": [dataclasses.asdict(one) for one in contents.trained],
        "gradient_norms": [
            {"time": moment.time, **dataclasses.asdict(moment.gradient_norms)}
            for moment in contents.history
            if moment.gradient_norms is not None
        ],
        "ledger": {
            name: getattr(contents, name)
            for name in ("records", "openings", "unsettled", "started", "written", "software")
        },
    }


def _damaged_to_dict(run: DamagedRun) -> dict[str, Any]:
    return {"name": run.name, "path": str(run.path), "intact": False, "damage": run.damage}


# Files.


def _default_output(run_dirs: Sequence[pathlib.Path]) -> pathlib.Path:
    if len(run_dirs) != 1:
        return pathlib.Path(FILE_NAME)
    (path,) = run_dirs
    return (path.parent if path.is_file() else path) / FILE_NAME


def _refuse_foreign(file: pathlib.Path) -> None:
    """Refuses to overwrite what no earlier report wrote."""
    try:
        ours = _own_files.may_be_replaced(file, GENERATOR)
    except OSError as error:
        raise _unwritable(file, error) from error
    if not ours:
        raise InvalidArgumentError(
            f"output={str(file)!r} is a file that no report wrote, and would be lost: give another name, or remove it."
        )


def _write(file: pathlib.Path, text: str) -> None:
    try:
        _own_files.replace_text(file, text)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: pathlib.Path, error: OSError) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"output={str(file)!r} cannot be written ({error.strerror}): give a file in a folder that is there and can be "
        "written."
    )
