"""Checkpoints of a federated run: what another process needs to go on where this one was cut short.

Promises: a checkpoint is whole or not there, and on the disk when `save` returns; it holds the model, the server's
optimizer, how far the cohorts and the ledger were, and the looks so far: public facts, and never a key of the noise;
one of another model or of other settings is refused. Knows nothing of how a round is run or accounted for.

Each is a `tff.program.FileProgramStateManager` state: a plain list of a JSON text and the arrays of the server's state. A
list, because TensorFlow 2.14 cannot save the dictionaries of an optimizer's state where typing_extensions is newer than 4.5.
Where TFF is not installed, the same list is an .npz file.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from federated import runtime
from tfprivacy_ft.errors import CheckpointError, MissingDependencyError
from tfprivacy_ft.ledger import Position

__all__ = ["FOLDER_NAME", "Checkpoint", "Checkpoints", "run_coroutine"]

FOLDER_NAME = "checkpoints"

_PREFIX = "round_"
_SETTINGS = "settings.json"
_KEEP = 3  # the newest is on the disk before older ones go, and what cannot be read has two before it

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A run after some round.

    Args:
        round: The last round that is in `state`, >= 1, counted from the start of the run.
        state: The server's state.
        cohorts: What `Cohorts.position` said.
        ledger: What `Ledger.position` said.
        released: Releases in the ledger by then: of clients' own noise, and others.
        history: The looks so far, as in `SimulationResult.history`.
    """

    round: int
    state: Any
    cohorts: dict[str, Any]
    ledger: Position
    released: tuple[int, int]
    history: list[dict[str, float]]


class Checkpoints:
    """The checkpoints of one run in a folder, the newest three of them.

    Args:
        folder: Made by the first `save`.
        settings: What a run must not change between two checkpoints, JSON by name.
        like: A state of the process; its containers, shapes and dtypes are those of every checkpoint.

    Raises:
        CheckpointError: The checkpoints in the folder are of other settings, or of a state of another shape.
    """

    def __init__(self, folder: str | os.PathLike[str], *, settings: Mapping[str, Any], like: Any):
        import tensorflow as tf

        self._folder = pathlib.Path(folder)
        self._pack = lambda leaves: tf.nest.pack_sequence_as(like, leaves)
        self._flatten = lambda state: [np.asarray(leaf) for leaf in tf.nest.flatten(state)]
        self._like = self._flatten(like)
        shapes = [[str(leaf.dtype), *leaf.shape] for leaf in self._like]
        self._kind_of_files = _tff_files() or _ArrayFiles
        saved_by = "numpy" if self._kind_of_files is _ArrayFiles else "tff"
        self._settings = json.loads(json.dumps({**settings, "saved by": saved_by, "state": shapes}, default=str))
        self._refuse_other_settings()

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that can be read; None if there is none.

        Raises:
            CheckpointError: There are checkpoints, and none of them can be read.
        """
        versions = self._versions()
        for version in reversed(versions):
            try:
                return self._load(version)
            except Exception as error:  # TensorFlow raises an error of every kind for a damaged file
                _log.warning("the checkpoint %s cannot be read, and is left aside: %s", self._path(version), error)
        if versions:
            raise CheckpointError(
                f"none of the checkpoints in {self._folder} can be read: restore the folder from a backup, or delete it "
                "to run all rounds again, which then count once more."
            )
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Returns when the checkpoint is on the disk; by TFF that takes about half a second for a small model.

        Raises:
            CheckpointError: It could not be written.
        """
        import tensorflow as tf

        about = dataclasses.asdict(dataclasses.replace(checkpoint, state=None))
        leaves = self._flatten(checkpoint.state)
        try:
            if not self._folder.is_dir():
                self._folder.mkdir(parents=True)
                _sync(self._folder.parent)
            self._write_settings()
            self._clear(checkpoint.round)
            run_coroutine(self._files().save([json.dumps(about), *leaves], checkpoint.round))
            path = self._path(checkpoint.round)
            for each in (*path.rglob("*"), path, self._folder):
                _sync(each)
        except (OSError, tf.errors.OpError) as error:
            raise CheckpointError(
                f"the checkpoint {self._path(checkpoint.round)} cannot be written ({error}): see that the disk has room, and "
                "run again, which goes on from the checkpoint before."
            ) from error

    def _files(self) -> Any:
        return self._kind_of_files(os.fspath(self._folder))  # TFF's makes the folder, so not before it is needed

    def _versions(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return run_coroutine(self._files().get_versions()) or []

    def _path(self, version: int) -> pathlib.Path:
        return self._folder / f"{_PREFIX}{version}"

    def _load(self, version: int) -> Checkpoint:
        text, *leaves = run_coroutine(self._files().load(version, ["", *self._like]))
        about = json.loads(text)
        about["ledger"] = Position(**about["ledger"])
        about["released"] = tuple(about["released"])
        return Checkpoint(**{**about, "state": self._pack(leaves)})

    def _clear(self, version: int) -> None:
        """Removes what a save that was cut short left behind, and what could not be read of this round."""
        for leftover in (*self._folder.glob(f"{_PREFIX}*_temp*"), self._path(version)):
            shutil.rmtree(leftover, ignore_errors=True)

    def _write_settings(self) -> None:
        file = self._folder / _SETTINGS
        if file.exists():
            return
        aside = file.with_suffix(".new")
        with open(aside, "w", encoding="utf-8") as writer:
            json.dump(self._settings, writer, indent=1)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(aside, file)

    def _refuse_other_settings(self) -> None:
        if not self._versions():
            return
        try:
            found = json.loads((self._folder / _SETTINGS).read_bytes())
            different = _differences(found, self._settings)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self._folder / _SETTINGS} cannot be read ({error}), so nobody can tell whose checkpoints these are: "
                "restore it from a backup, or delete the folder to run all rounds again, which then count once more."
            ) from error
        if different:
            raise CheckpointError(
                f"the checkpoints in {self._folder} are of another run ({'; '.join(different)}): give the process, the clients "
                "and the cohorts they were made with, or another run_dir."
            )


class _ArrayFiles:
    """What is needed here of a `tff.program.FileProgramStateManager`, where there is no TFF."""

    def __init__(self, folder: str):
        self._folder = pathlib.Path(folder)

    async def get_versions(self) -> list[int]:
        numbers = (path.name.removeprefix(_PREFIX) for path in self._folder.glob(f"{_PREFIX}*"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    async def load(self, version: int, structure: Sequence[Any]) -> list[Any]:
        with np.load(self._path(version) / "state.npz", allow_pickle=False) as arrays:
            text, *leaves = (arrays[f"arr_{i}"] for i in range(len(structure)))
        return [text.item(), *leaves]

    async def save(self, program_state: Sequence[Any], version: int) -> None:
        aside = self._folder / f"{_PREFIX}{version}_temp"
        aside.mkdir()
        np.savez(aside / "state.npz", *program_state)
        aside.rename(self._path(version))
        for old in (await self.get_versions())[:-_KEEP]:
            shutil.rmtree(self._path(old))

    def _path(self, version: int) -> pathlib.Path:
        return self._folder / f"{_PREFIX}{version}"


def _tff_files() -> Callable[[str], Any] | None:
    """Makes TFF's manager of files for a folder; None without TFF."""
    try:
        program = runtime.require_tff().program
    except MissingDependencyError:
        return None
    return functools.partial(program.FileProgramStateManager, prefix=_PREFIX, keep_total=_KEEP, keep_first=False)


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns; also inside a notebook, whose thread has an event loop that is running already."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs, in words."""
    words = []
    for name in dict.fromkeys([*there, *here]):
        old, new = there.get(name), here.get(name)
        if old == new:
            continue
        if name == "state":
            words.append(f"the model's weights are {_shapes(old)} there and {_shapes(new)} here")
        else:
            words.append(f"{name} is {old} there and {new} here")
    return words


def _shapes(state: Sequence[Any] | None) -> str:
    return ", ".join("x".join(str(size) for size in shape) or "1" for _, *shape in state or [])


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no fsync for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
