"""The ledger: an append-only, crash-safe record of every release that a run made.

A release is written down before it happens. `Ledger.reserve` returns when the record is on the disk, so a crash, a
kill -9 or a full disk can make the ledger count a release that never ran, and never miss one that did. `settle` then
says what really ran, and `events` is what epsilon is computed from.

Two files lie in the run's folder. `ledger.jsonl` holds one JSON record per line, each with the SHA-256 of the line
before it. `ledger.head.json` holds the number of records and the SHA-256 of the last; it is replaced in one step, and
is on the disk before `reserve` returns. With n the number in the head:

- fewer than n whole records: the tail was cut, the ledger is damaged;
- record n + 1 is whole: the writer died between record and head. It counts: at worst a block too many;
- what follows the last whole record is not one: the writer died while writing it. It is dropped, which is safe only
  because `reserve` had not returned, so its block never ran. Had the block run, the head would say n + 1;
- anything more after record n, or a hash that does not match: damaged.

Accidents and casual edits are found; an owner who rewrites both files, or deletes both, is not. The ledger holds
public facts, and figures such as accuracy, each kind of which it lists as a release. It knows neither TensorFlow nor
epsilon.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import pathlib
import platform
import threading
from collections.abc import Mapping, Sequence
from importlib import metadata
from numbers import Integral, Real
from typing import Any

from tfprivacy_ft import _check, _own_files
from tfprivacy_ft.errors import InvalidArgumentError, LedgerDamagedError, LedgerError, LedgerLockedError
from tfprivacy_ft.events import Event, merge

FILE_NAME = "ledger.jsonl"
HEAD_NAME = "ledger.head.json"
FORMAT_VERSION = 2  # of what is written
_READABLE = (1, 2)  # 1 had no records on figures, gradient norms and what was trained, and no mechanism in its events

TEST_SEED = "test seed"  # the kind of note that says that a seed made the noise

_GENESIS = "0" * 64  # what the first record names as the hash of the record before it

__all__ = [
    "EVALUATION",
    "FILE_NAME",
    "FORMAT_VERSION",
    "GRADIENT_NORMS",
    "HEAD_NAME",
    "TEST_SEED",
    "GradientNorms",
    "Ledger",
    "LedgerContents",
    "Moment",
    "Note",
    "Position",
    "Trained",
    "holds",
    "read",
]


@dataclasses.dataclass(frozen=True)
class Note:
    """A release without noise: what kind, and one sentence on what it shows. `TEST_SEED` marks noise that can be subtracted."""

    kind: str
    text: str


EVALUATION = Note(
    "evaluation", "figures on models of this run were computed without noise; on public data they cost nothing."
)
GRADIENT_NORMS = Note(
    "gradient norms",
    "a histogram of the examples' gradient norms and the share that was clipped were kept without noise.",
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What some steps of a run trained.

    Args:
      variables: names of the trainable variables.
      parameters: how many numbers they hold together.
    """

    variables: tuple[str, ...]
    parameters: int


@dataclasses.dataclass(frozen=True)
class GradientNorms:
    """How long the gradients of some steps were before the clip: a release without noise, kept only where it was asked for.

    Args:
      edges: of the histogram's bins, increasing, in the unit of the gradients.
      counts: examples in each bin, one fewer than edges; the first and the last bin also hold what lies beyond.
      clipped: how many examples were longer than the clip.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    clipped: int

    @property
    def examples(self) -> int:
        """How many gradients were looked at."""
        return sum(self.counts)


@dataclasses.dataclass(frozen=True)
class Moment:
    """How far a run was when it settled what it had released, or looked at its model.

    Args:
      time: of the record, ISO 8601, UTC.
      events: released up to here, as in `LedgerContents`.
      figures: computed of the model as it was here, such as `{"val_accuracy": 0.93}`.
      gradient_norms: of the steps since the last such moment; None where nobody asked for them.
    """

    time: str
    events: tuple[Event, ...]
    figures: dict[str, float]
    gradient_norms: GradientNorms | None = None


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a ledger is.

    Args:
      records: how many records it holds.
      last_hash: SHA-256 of the last of them.
    """

    records: int = 0
    last_hash: str = _GENESIS


@dataclasses.dataclass(frozen=True)
class LedgerContents:
    """What a ledger says, read without writing to it.

    Args:
      path: the ledger file.
      delta: the delta chosen for the run; None if none was.
      facts: public facts on the run, such as its model and data set.
      events: what was released: settled events, and reservations never settled in full; equal ones merged.
      notes: releases without noise.
      unsettled: how many reservations were never settled.
      openings: how often the ledger was opened for writing.
      records: how many records it holds.
      started: time of the first of them, as in `Moment`; None where there are none.
      written: time of the last.
      software: versions of what wrote it last, by name.
      trained: what was trained, in the order in which it changed.
      history: the run's way, oldest first.
    """

    path: pathlib.Path
    delta: float | None
    facts: dict[str, Any]
    events: tuple[Event, ...]
    notes: tuple[Note, ...]
    unsettled: int
    openings: int
    records: int
    started: str | None
    written: str | None
    software: dict[str, str]
    trained: tuple[Trained, ...]
    history: tuple[Moment, ...]


def read(path: str | os.PathLike[str]) -> LedgerContents:
    """Reads and verifies a ledger, also while a run is writing it.

    Args:
      path: the run's folder, or the ledger file in it.

    Returns:
      What it says.

    Raises:
      LedgerDamagedError: a record or the head is missing, cut, changed or not readable; the text says which.
      LedgerError: there is no ledger, or it cannot be opened.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> with Ledger.open(folder, delta=1e-5) as ledger:
      ...     reservation = ledger.reserve(Event.unknown(count=10, noise_multiplier=1.0))
      >>> read(folder).events[0].count
      10
    """
    file = pathlib.Path(path)
    if not file.is_file() and file.name != FILE_NAME:
        file = file / FILE_NAME
    state = _verified_snapshot(file)
    return LedgerContents(
        path=file,
        delta=state.delta,
        facts=dict(state.facts),
        events=tuple(state.events()),
        notes=tuple(state.notes),
        unsettled=len(state.outstanding),
        openings=state.openings,
        records=state.records,
        started=state.started,
        written=state.written,
        software=dict(state.software),
        trained=tuple(state.trained),
        history=tuple(state.history),
    )


def holds(path: str | os.PathLike[str], position: Position) -> bool:
    """Whether a ledger once was at `position`: a run may go on from there only if what it released by then is counted.

    Looks at that one record; `read` and `Ledger.open` verify all of them.

    Args:
      path: the run's folder.
      position: what `Ledger.position` said.

    Raises:
      LedgerError: the ledger cannot be opened.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> with Ledger.open(folder) as ledger:
      ...     before = ledger.position()
      >>> holds(folder, before), holds(folder, Position(before.records + 1, before.last_hash))
      (True, False)
    """
    lines = (_read_bytes(pathlib.Path(path) / FILE_NAME) or b"").splitlines(keepends=True)
    if position.records == 0:
        return True
    return position.records <= len(lines) and _hash(lines[position.records - 1]) == position.last_hash


class Ledger:
    """One run's record of what it released: reserve, run, settle.

    Made by `Ledger.open` (on disk) or `Ledger.in_memory` (same interface, no promise across a crash). May be used
    from several threads. After a failed write it refuses to go on; what is on the disk then counts in full.
    """

    def __init__(self, state: "_State", journal: "_Journal | None"):
        self._state = state
        self._journal = journal
        self._lock = threading.RLock()
        self._next_sequence = state.records + 1
        self._refusal: str | None = None
        self._in_memory: list[
            tuple[str, dict[str, Any]]
        ] = []  # what was recorded since the opening, where no disk has it

    @classmethod
    def open(
        cls,
        path_dir: str | os.PathLike[str],
        *,
        delta: float | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> "Ledger":
        """Creates the ledger of a run, or continues it; until it is closed nobody else can write it.

        Args:
          path_dir: the run's folder; made if it is not there.
          delta: in (0, 1); None keeps the recorded one.
          facts: public facts on the run that JSON can hold; added to the recorded ones.

        Returns:
          The open ledger: a context manager.

        Raises:
          InvalidArgumentError: delta is outside its range, or the facts are not JSON.
          LedgerLockedError: somebody else is writing this ledger.
          LedgerDamagedError: the ledger that is there cannot be trusted.
          LedgerError: the files cannot be created or written.
        """
        opening = _opening(delta, facts)
        journal = _Journal(pathlib.Path(path_dir))
        try:
            ledger = cls(journal.state, journal)
            ledger._append("open", {**opening, "dropped_bytes": journal.dropped_bytes})
        except BaseException:
            journal.close()
            raise
        return ledger

    @classmethod
    def in_memory(cls, *, delta: float | None = None, facts: Mapping[str, Any] | None = None) -> "Ledger":
        """A ledger that lives and dies with this process.

        Example:
          >>> ledger = Ledger.in_memory(delta=1e-5)
          >>> reservation = ledger.reserve(Event.unknown(count=10, noise_multiplier=1.0))
          >>> ledger.settle([reservation], Event.unknown(count=7, noise_multiplier=1.0))
          >>> ledger.events()[0].count
          7
        """
        ledger = cls(_State(), None)
        ledger._append("open", _opening(delta, facts))
        return ledger

    def moved_to(self, path_dir: str | os.PathLike[str]) -> "Ledger":
        """Closes this ledger, which is in memory, and records all of it in a folder's, which is created or continued.

        Raises:
          LedgerError: as in `open`, or this ledger is on the disk already; it then stays open. What was written of it by
            then counts, and again if it is moved once more.
        """
        if self._journal is not None:
            raise LedgerError(f"{self._journal.file} is on the disk already: open a ledger in the other folder.")
        with self._lock:
            moved = Ledger.open(path_dir, delta=self.delta, facts=self.facts)
            try:
                self._copy_to(moved)
            except BaseException:
                moved.close()
                raise
            self.close()
        return moved

    def _copy_to(self, other: "Ledger") -> None:
        numbers: dict[int, int] = {}
        for number, (kind, body) in enumerate(self._in_memory, start=2):  # the first record is the opening
            if kind == "note":
                other.note(body["note"], body["text"])
            elif kind == "trained":
                other.trained(Trained(**body))
            elif kind == "settle":
                other._append(kind, body | {"reservations": [numbers[reserved] for reserved in body["reservations"]]})
            else:
                numbers[number] = other._append(kind, body)

    def reserve(self, event: Event) -> int:
        """Writes down releases before they happen; they may run as soon as this returns.

        Args:
          event: the block about to run.

        Returns:
          The number of the reservation, for `settle`.

        Raises:
          LedgerError: the record could not be made durable; the block must not run.
          InvalidArgumentError: `event` is not an event.
        """
        _check_event(event)
        return self._append("reserve", {"event": event.to_dict()})

    def settle(self, reservations: Sequence[int], event: Event | None) -> None:
        """Says what really ran in place of these reservations.

        Args:
          reservations: numbers that `reserve` returned, each open and named once.
          event: what ran: of the unit that was reserved, no more releases or participations than were reserved
            together, no more noise than any of them, and no amplification by sampling that was not reserved. None:
            nothing ran.

        Raises:
          InvalidArgumentError: a reservation is not open, or the event claims what was not reserved.
          LedgerError: the record could not be written; the reservations then count in full.
        """
        with self._lock:
            numbers = self._check_reservations(reservations)
            if event is not None:
                self._check_settlement([self._state.outstanding[number] for number in numbers], event)
            self._append("settle", {"reservations": numbers, "event": None if event is None else event.to_dict()})

    def note(self, kind: str, text: str) -> None:
        """Records a release without noise, such as training metrics; a note already there is not repeated.

        Args:
          kind: what it is, in a word or two; `TEST_SEED` where it is the noise itself that is known.
          text: one sentence on what it shows.

        Raises:
          LedgerError: the record could not be written.
        """
        with self._lock:
            if Note(kind, text) not in self._state.notes:
                self._append("note", {"note": kind, "text": text})

    def figures(self, figures: Mapping[str, float]) -> None:
        """Records figures on the model as it is now, and, once, `EVALUATION` as a release without noise.

        Args:
          figures: by name, such as `{"val_accuracy": 0.93}`; what is no finite number is left out.

        Raises:
          InvalidArgumentError: a value is no number.
          LedgerError: the record could not be written.
        """
        for name, value in figures.items():
            if not isinstance(value, Real):
                raise InvalidArgumentError(f"figures[{name!r}]={value!r} is not allowed: give a number.")
        finite = {str(name): float(value) for name, value in figures.items() if math.isfinite(value)}
        self.note(EVALUATION.kind, EVALUATION.text)
        self._append("figures", {"figures": finite})

    def gradient_norms(self, norms: GradientNorms) -> None:
        """Records how long gradients were, and, once, `GRADIENT_NORMS` as a release without noise.

        Raises:
          LedgerError: the record could not be written.
        """
        self.note(GRADIENT_NORMS.kind, GRADIENT_NORMS.text)
        self._append("gradient norms", dataclasses.asdict(norms))

    def trained(self, what: Trained) -> None:
        """Records which variables the steps up to the next such record train; the same once more is not repeated.

        Raises:
          LedgerError: the record could not be written.
        """
        with self._lock:
            if self._state.trained[-1:] != [what]:
                self._append("trained", dataclasses.asdict(what))

    def events(self) -> list[Event]:
        """What was released: settled events, and open reservations in full; equal events are merged."""
        with self._lock:
            return self._state.events()

    def notes(self) -> list[Note]:
        """The releases without noise, each once, in the order they were noted."""
        with self._lock:
            return list(self._state.notes)

    def position(self) -> Position:
        """How far this ledger is, for `holds`."""
        with self._lock:
            return Position(self._state.records, self._state.last_hash)

    @property
    def delta(self) -> float | None:
        """The delta chosen for the run; None if none was."""
        return self._state.delta

    @property
    def facts(self) -> dict[str, Any]:
        """Public facts on the run."""
        return dict(self._state.facts)

    @property
    def path(self) -> pathlib.Path | None:
        """The ledger file; None in memory."""
        return self._journal.file if self._journal else None

    def close(self) -> None:
        """Gives the ledger free for other writers; closing twice is allowed."""
        with self._lock:
            self._refusal = self._refusal or "it is closed: open it again"
            if self._journal is not None:
                self._journal.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check_reservations(self, reservations: Sequence[int]) -> list[int]:
        numbers = [int(number) for number in reservations if isinstance(number, Integral)]
        is_open = all(number in self._state.outstanding for number in numbers)
        if not numbers or not is_open or len(set(numbers)) < len(reservations):
            raise InvalidArgumentError(
                f"reservations={list(reservations)} is not allowed: give numbers that `reserve` returned and that are "
                "not settled yet, each once."
            )
        return numbers

    def _check_settlement(self, reserved: list[Event], event: Event) -> None:
        """Afterwards a run may own up to less privacy per release, never claim more than it reserved."""
        _check_event(event)
        if any((one.unit, one.examples_per_user) != (event.unit, event.examples_per_user) for one in reserved):
            raise InvalidArgumentError(
                f"unit={event.unit!r} with examples_per_user={event.examples_per_user} was not reserved: settle with the unit "
                "of the reservation."
            )
        if any(one.is_local != event.is_local for one in reserved):
            raise InvalidArgumentError(
                f"sampler={event.sampler!r} was not reserved: what clients release themselves is settled as local, and nothing "
                "else is."
            )
        if event.sampler in ("poisson", "fixed") and any(_sampling(one) != _sampling(event) for one in reserved):
            raise InvalidArgumentError(
                f"sampler={event.sampler!r} was not reserved like this: amplification by sampling has to be reserved "
                "with the same sampler and the same rate."
            )
        if any((one.mechanism, one.leaves_per_tree) != (event.mechanism, event.leaves_per_tree) for one in reserved):
            raise InvalidArgumentError(
                f"mechanism={event.mechanism!r} with leaves_per_tree={event.leaves_per_tree} was not reserved: settle with the "
                "mechanism of the reservation."
            )
        _check.at_most("reserved", sum(one.count for one in reserved), count=event.count)
        participations = sum(one.participations for one in reserved)
        _check.at_most("reserved", participations, participations=event.participations)
        noise = min(one.noise_multiplier for one in reserved)
        _check.at_most("reserved", noise, noise_multiplier=event.noise_multiplier)

    def _append(self, kind: str, body: dict[str, Any]) -> int:
        """Writes one record, then believes it; the number of the record."""
        with self._lock:
            if self._refusal is not None:
                raise LedgerError(f"the ledger takes no more records because {self._refusal}.")
            record = {
                "format": FORMAT_VERSION,
                "sequence": self._next_sequence,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                "kind": kind,
                **body,
                "previous": self._state.last_hash,
            }
            line = _to_line(record)
            if self._journal is not None:
                try:
                    self._journal.append(line)
                except BaseException as error:
                    # Whatever reached the disk, this process no longer knows where the file ends.
                    self._refusal = (
                        f"writing {self._journal.file} failed ({error!r}): close it, see that the disk has room, and "
                        "open it again"
                    )
                    if isinstance(error, OSError):
                        raise LedgerError(f"the ledger takes no more records because {self._refusal}.") from error
                    raise
            self._state.apply(record, line)
            if self._journal is None and kind != "open":
                self._in_memory.append((kind, body))
            self._next_sequence += 1
            return record["sequence"]


# What the records say.


class _State:
    """The sum of the records so far; the same for a ledger on disk, in memory, and one only read."""

    def __init__(self) -> None:
        self.records = 0
        self.last_hash = _GENESIS
        self.delta: float | None = None
        self.facts: dict[str, Any] = {}
        self.notes: list[Note] = []
        self.outstanding: dict[int, Event] = {}
        self.openings = 0
        self.started: str | None = None
        self.written: str | None = None
        self.software: dict[str, str] = {}
        self.trained: list[Trained] = []
        self.history: list[Moment] = []
        self._settled: tuple[Event, ...] = ()
        self._events: list[Event] | None = None  # kept between records, since a progress bar asks after every step

    def apply(self, record: Mapping[str, Any], line: bytes) -> None:
        """Takes in one record. KeyError, TypeError or ValueError mean that it makes no sense here."""
        kind, figures, norms = record["kind"], {}, None
        if kind == "open":
            self._open(record)
        elif kind == "reserve":
            self.outstanding[record["sequence"]] = Event(**record["event"])
        elif kind == "settle":
            event = None if record["event"] is None else Event(**record["event"])
            for number in record["reservations"]:
                del self.outstanding[number]
            if event is not None and event.count > 0:
                self._settled = merge([*self._settled, event])
        elif kind == "note":
            self.notes.append(Note(record["note"], record["text"]))
        elif kind == "trained":
            self.trained.append(Trained(tuple(record["variables"]), int(record["parameters"])))
        elif kind == "figures":
            figures = {str(name): float(value) for name, value in record["figures"].items()}
        elif kind == "gradient norms":
            norms = GradientNorms(tuple(record["edges"]), tuple(record["counts"]), int(record["clipped"]))
        else:
            raise ValueError(f"kind {kind!r} is unknown")
        self.records += 1
        self.started, self.written = self.started or record["time"], record["time"]
        self.last_hash = _hash(line)
        self._events = None
        if kind in ("settle", "figures", "gradient norms"):
            self.history.append(Moment(record["time"], tuple(self.events()), figures, norms))

    def _open(self, record: Mapping[str, Any]) -> None:
        self.openings += 1
        if record["delta"] is not None:
            _check.open_unit_interval(delta=record["delta"])
            self.delta = record["delta"]
        self.facts.update(record["facts"])
        self.software = {str(name): str(version) for name, version in record["software"].items()}

    def events(self) -> list[Event]:
        if self._events is None:
            everything = merge([*self._settled, *self.outstanding.values()])
            self._events = [event for event in everything if event.count > 0]
        return list(self._events)


def _opening(delta: float | None, facts: Mapping[str, Any] | None) -> dict[str, Any]:
    if delta is not None:
        _check.open_unit_interval(delta=delta)
    try:
        plain = json.loads(_to_json(dict(facts or {})))
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"facts={facts!r} is not allowed: give a dictionary of text, finite numbers, lists and dictionaries."
        ) from error
    return {"delta": delta, "facts": plain, "software": software()}


def software() -> dict[str, str]:
    """Versions worth recording, asked of the package metadata: importing TensorFlow takes seconds."""
    versions = {"python": platform.python_version()}
    for package in ("tfprivacy-ft", "tensorflow", "keras", "dp-accounting"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if "tfprivacy-ft" not in versions:
        from tfprivacy_ft import __version__  # running from a source tree

        versions["tfprivacy-ft"] = __version__
    return versions


def _sampling(event: Event) -> tuple[Any, ...]:
    """What amplification rests on."""
    if event.sampler == "fixed":
        return event.sampler, event.cohort_size, event.population
    return event.sampler, event.sampling_probability


def _check_event(event: Any) -> None:
    if not isinstance(event, Event):
        raise InvalidArgumentError(f"event={event!r} is not allowed: give an `Event`.")


# Bytes.


def _plain(value: Any) -> Any:
    """Numbers of NumPy as numbers of Python."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{value!r} is not JSON")


def _to_json(value: Any) -> str:
    return json.dumps(value, default=_plain, allow_nan=False)


def _to_line(record: Mapping[str, Any]) -> bytes:
    return _to_json(record).encode() + b"\n"


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _parse_head(data: bytes, file: pathlib.Path) -> Position:
    try:
        fields = json.loads(data)
        head = Position(fields["records"], fields["hash"])
        if fields["format"] not in _READABLE or not isinstance(head.records, int):
            raise ValueError(f"format {fields['format']!r} is not one of {_READABLE}")
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerDamagedError(
            f"{file.with_name(HEAD_NAME)} cannot be read ({error!r}), so nobody can tell whether records of {file} are "
            "missing: restore both from a backup, or start a new run folder."
        ) from error
    return head


def _parse_record(line: bytes, state: _State, file: pathlib.Path) -> dict[str, Any]:
    """The next record of `state`, not applied yet."""
    number = state.records + 1
    try:
        record = json.loads(line)
        if record["format"] not in _READABLE:
            raise ValueError(f"its format is {record['format']!r}, and this version reads {_READABLE}")
        if record["sequence"] != number:
            raise ValueError(f"it calls itself record {record['sequence']!r}")
        if record["previous"] != state.last_hash:
            raise ValueError("it does not carry the hash of the record before it")
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, number, str(error)) from error
    return record


def _damaged(file: pathlib.Path, number: int, what: str) -> LedgerDamagedError:
    return LedgerDamagedError(
        f"{file} is damaged at record {number}: {what}; restore the folder from a backup, or start a new one and count "
        "this run as spent."
    )


def _verify(data: bytes, head: Position, file: pathlib.Path) -> tuple[_State, int]:
    """The state that the bytes of a ledger describe, and how many of them are whole records.

    See the top of this module for what is damage, what counts, and what is dropped.
    """
    state = _State()
    *lines, tail = data.split(b"\n")
    whole = [line + b"\n" for line in lines]
    if len(whole) < head.records:
        raise _damaged(
            file, len(whole) + 1, f"it is missing or cut, and {HEAD_NAME} says that there were {head.records} records"
        )
    extra = len(whole) - head.records
    if extra > 1 or (extra == 1 and tail):
        raise _damaged(file, head.records + 2, f"{HEAD_NAME} says that there were only {head.records} records")
    length = 0
    for line in whole:
        try:
            record = _parse_record(line, state, file)
            state.apply(record, line)
        except LedgerDamagedError:
            if state.records == head.records:
                break  # the record that was being written: its block never ran
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(file, state.records + 1, f"it makes no sense ({error!r})") from error
        length += len(line)
        if state.records == head.records and state.last_hash != head.last_hash:
            raise _damaged(file, state.records, f"its hash is not the one in {HEAD_NAME}")
    return state, length


def _verified_snapshot(file: pathlib.Path) -> _State:
    """Head, then ledger, without a lock: a writer may come in between, so a bad fit is looked at again."""
    head_file = file.with_name(HEAD_NAME)
    for _ in range(50):
        head_bytes = _read_bytes(head_file)
        data = _read_bytes(file)
        if data is None and head_bytes is None:
            raise LedgerError(f"there is no ledger at {file}: give the folder of a run.")
        try:
            return _verify_pair(data, head_bytes, file)[0]
        except LedgerDamagedError:
            if _read_bytes(head_file) == head_bytes:
                raise
    raise LedgerError(f"{file} is being written faster than it can be read: try again later.")


def _verify_pair(data: bytes | None, head_bytes: bytes | None, file: pathlib.Path) -> tuple[_State, int]:
    """`_verify` for files that may be missing (None)."""
    if head_bytes is None:
        if not data:
            return _State(), 0  # nothing was ever recorded
        raise LedgerDamagedError(
            f"{file.with_name(HEAD_NAME)} is missing, so nobody can tell whether records of {file} were cut off: "
            "restore it from a backup, or start a new run folder."
        )
    _refuse_newer(data or b"", head_bytes, file)
    return _verify(data or b"", _parse_head(head_bytes, file), file)


def _refuse_newer(data: bytes, head_bytes: bytes, file: pathlib.Path) -> None:
    """Refuses what a later version wrote: head and last record say so both, as no accident to one of them does."""
    try:
        formats = [json.loads(text)["format"] for text in (head_bytes, data.rstrip(b"\n").rpartition(b"\n")[2])]
        newer = all(isinstance(number, int) and number > FORMAT_VERSION for number in formats)
    except (KeyError, TypeError, ValueError):
        return
    if newer:
        raise LedgerError(
            f"{file} was written by a newer version of this package (format {max(formats)}, and this one reads up to "
            f"{FORMAT_VERSION}): read it with that version."
        )


def _read_bytes(file: pathlib.Path) -> bytes | None:
    """The whole file; None if it is not there."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(f"{file} cannot be read: {error}.") from error


class _Journal:
    """The two files and the lock: bytes in, bytes durable. Knows what a record is only while it opens."""

    def __init__(self, folder: pathlib.Path):
        self.file = folder / FILE_NAME
        self._head_file = folder / HEAD_NAME
        self._process = os.getpid()
        self._descriptor: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _own_files.sync_folder(folder.parent)
            self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            _lock(self._descriptor, self.file)
            self._recover()
        except OSError as error:
            self.close()
            raise LedgerError(f"{self.file} cannot be opened for writing: {error}.") from error
        except BaseException:
            self.close()
            raise

    def _recover(self) -> None:
        assert self._descriptor is not None
        data = _read_bytes(self.file) or b""
        head_bytes = _read_bytes(self._head_file)
        self.state, length = _verify_pair(data, head_bytes, self.file)
        self.dropped_bytes = len(data) - length
        if self.dropped_bytes:
            os.ftruncate(self._descriptor, length)
        self._records, self._length = self.state.records, length
        # The first head is there before the first record: a ledger without a head has always lost it.
        self._write_head(Position(self.state.records, self.state.last_hash))

    def append(self, line: bytes) -> None:
        """Returns when the record and the head that counts it are both on the disk."""
        if self._descriptor is None:
            raise OSError("the file is closed")
        if os.getpid() != self._process:
            raise OSError("this is a fork of the process that opened it")
        try:
            _write_all(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):  # not needed: an uncounted tail is dropped when the ledger is continued
                os.ftruncate(self._descriptor, self._length)
            raise
        self._records, self._length = self._records + 1, self._length + len(line)
        self._write_head(Position(self._records, _hash(line)))

    def _write_head(self, head: Position) -> None:
        """Old head or new head, never half of one: write aside, then rename; each step on the disk before the next."""
        aside = self._head_file.with_name(HEAD_NAME + ".new")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            fields = {"format": FORMAT_VERSION, "records": head.records, "hash": head.last_hash}
            _write_all(descriptor, _to_json(fields).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(aside, self._head_file)
        _own_files.sync_folder(self._head_file.parent)

    def close(self) -> None:
        if self._descriptor is not None and os.getpid() == self._process:
            _unlock(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _lock(descriptor: int, file: pathlib.Path) -> None:
    import fcntl  # not on every system, and reading a ledger works without

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LedgerLockedError(
            f"{file} is being written by another run: wait for it to end, or use another run folder."
        ) from error


def _unlock(descriptor: int) -> None:
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # now, even if a forked child still holds the file open
