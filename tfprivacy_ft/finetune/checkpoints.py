"""The folder of a run: what it is, how far it is, and what another process needs to go on with it.

Promises: every file is whole or not there, and on the disk when the call returns; a checkpoint is used only with a
ledger that holds what was released by then; one of another run is refused. `run.json` says in words what happened. The
weights that the run did not change are in none of these files: who goes on gives the same model again.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from tfprivacy_ft import _own_files, run_folder
from tfprivacy_ft.errors import CheckpointError, InvalidArgumentError
from tfprivacy_ft.ledger import FILE_NAME as LEDGER_NAME
from tfprivacy_ft.ledger import Ledger, Position, holds

RUN_NAME = "run.json"
CHECKPOINT_NAME = "checkpoint.npz"

RUNNING, PAUSED, FINISHED, FAILED = "running", "paused", "finished", "failed"


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A run after an epoch of a stage.

    Args:
      stage: its number, from 0.
      epoch: epochs of it that are done.
      history: of all epochs so far.
      ledger: how far the ledger was.
      weights: the variables that the stage trains.
      optimizer: the variables of its optimizer.
      average: state of the average of the weights, by name; empty where there is none.
      mean: of the rows that a centered head reads, as it was released; None for other stages.
      moving_clip: where the clip is, if it moves; it follows from noised counts, and costs nothing to keep.
    """

    stage: int
    epoch: int
    history: list[dict[str, Any]]
    ledger: Position
    weights: list[np.ndarray]
    optimizer: list[np.ndarray]
    average: dict[str, np.ndarray]
    mean: np.ndarray | None = None
    moving_clip: float | None = None


class RunFolder:
    """One run in a folder, or, where that is None, in memory only.

    Args:
      folder: made if it is not there.
      resume: True goes on with the run that the folder holds; False starts one, in a folder that holds none.

    Raises:
      InvalidArgumentError: there is a run and it is not to be resumed, or there is none, or the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, *, resume: bool):
        self.path = None if folder is None else pathlib.Path(folder)
        self._facts: dict[str, Any] = {}
        self._is_ours = not resume  # until it is sure that this call goes on with the run, it must not be called failed
        if self.path is None:
            if resume:
                raise InvalidArgumentError("resume=True without a run_dir: give the folder of the run to go on with.")
            return
        has_ledger = (self.path / LEDGER_NAME).exists()
        if resume and not has_ledger:
            raise InvalidArgumentError(f"run_dir={str(self.path)!r} holds no run to go on with: leave resume=True out.")
        if has_ledger and not resume:
            raise InvalidArgumentError(
                f"run_dir={str(self.path)!r} holds a run already: give resume=True to go on with it, or another folder."
            )
        if resume:
            # The ledger comes first: a run that was killed between the two has a ledger alone, and is begun anew in it.
            self._facts = self._read_facts() if (self.path / RUN_NAME).exists() else {}
            return
        run_folder.made(self.path)

    @property
    def facts(self) -> dict[str, Any]:
        """What `run.json` holds."""
        return self._facts

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Writes down how the run failed, if the block raises; not where it never went on with the run of the folder."""
        try:
            yield
        except BaseException as error:
            if self._is_ours:
                with contextlib.suppress(CheckpointError):  # the first error is the one to be seen
                    self.write(state=FAILED, sentence=str(error) or type(error).__name__)
            raise

    def write(self, **facts: Any) -> None:
        """Adds facts to `run.json`: plain values by name, `state` among them."""
        self._is_ours = True
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._facts = {**self._facts, "started": self._facts.get("started", now), "written": now, **facts}
        if self.path is not None:
            text = json.dumps(self._facts, indent=1, default=_plain)
            _replace(self.path / RUN_NAME, lambda file: file.write(text.encode()))

    def ledger(self, *, delta: float, facts: Mapping[str, Any]) -> Ledger:
        """The run's ledger, open; until it is closed, no other process can go on with this run."""
        if self.path is None:
            return Ledger.in_memory(delta=delta, facts=facts)
        return Ledger.open(self.path, delta=delta, facts=facts)

    def refuse_another(self, settings: Mapping[str, Any]) -> None:
        """Refuses to go on with a run of other settings than these.

        Raises:
          CheckpointError: a setting is not what the run began with; the text names it.
        """
        before, now = self._facts.get("settings") or {}, json.loads(json.dumps(settings, default=_plain))
        for name in now:
            if before.get(name) != now[name]:
                raise CheckpointError(
                    f"the run in {str(self.path)!r} has another {name.replace('_', ' ')} ({_short(before.get(name))}, and now "
                    f"{_short(now[name])}): give the model, the data and the settings that it began with, or another run_dir."
                )

    def save(self, checkpoint: Checkpoint) -> None:
        """Replaces the checkpoint of this run.

        Raises:
          CheckpointError: it could not be written.
        """
        if self.path is None:
            return
        about = {name: getattr(checkpoint, name) for name in ("stage", "epoch", "history", "moving_clip")}
        about["ledger"] = dataclasses.asdict(checkpoint.ledger)
        arrays = {"about": np.asarray(json.dumps(about, default=_plain))}
        arrays |= {f"weight_{i}": array for i, array in enumerate(checkpoint.weights)}
        arrays |= {f"optimizer_{i}": array for i, array in enumerate(checkpoint.optimizer)}
        arrays |= {f"average_{name}": array for name, array in checkpoint.average.items()}
        arrays |= {} if checkpoint.mean is None else {"mean": checkpoint.mean}
        _replace(self.path / CHECKPOINT_NAME, lambda file: file.write(_archive(arrays)))

    def newest(self) -> Checkpoint | None:
        """The checkpoint that was saved last; None if there is none.

        Raises:
          CheckpointError: it cannot be read, or the ledger beside it is older than it.
        """
        if self.path is None or not (self.path / CHECKPOINT_NAME).exists():
            return None
        arrays = _load(self.path / CHECKPOINT_NAME)
        about = json.loads(arrays["about"].item())
        position = Position(**about["ledger"])
        if not holds(self.path, position):
            raise CheckpointError(
                f"the ledger in {str(self.path)!r} lacks what its checkpoint had released: copy both of the same moment."
            )
        return Checkpoint(
            **{**about, "ledger": position},
            weights=_numbered(arrays, "weight_"),
            optimizer=_numbered(arrays, "optimizer_"),
            average={name[8:]: array for name, array in arrays.items() if name.startswith("average_")},
            mean=arrays.get("mean"),
        )

    def save_stage(self, stage: int, model: Any, untouched: Sequence[str]) -> None:
        """Keeps the weights of the whole model after a stage, but for those that are still what they were.

        Args:
          stage: its number, from 0.
          model: the whole model.
          untouched: digests of the weights before the run, in the order of the weights; the head's have none.
        """
        if self.path is None:
            return
        weights = model.get_weights()
        changed = {
            f"weight_{i}": array
            for i, array in enumerate(weights)
            if i >= len(untouched) or digest(array) != untouched[i]
        }
        _replace(self._stage_file(stage), lambda file: file.write(_archive(changed)))

    def load_stage(self, stage: int, model: Any) -> None:
        """Puts the weights that `save_stage` kept into a model of the same architecture.

        Raises:
          CheckpointError: there are none, they cannot be read, or they are of another architecture.
        """
        weights = model.get_weights()
        for name, array in _load(self._stage_file(stage)).items():
            number = int(name.removeprefix("weight_"))
            if number >= len(weights) or weights[number].shape != array.shape:
                raise CheckpointError(
                    f"{self._stage_file(stage)} holds weights of another architecture: give the model that the run began with."
                )
            weights[number] = array
        model.set_weights(weights)

    def stages_done(self) -> int:
        """How many stages are complete."""
        done = 0
        while self.path is not None and self._stage_file(done).exists():
            done += 1
        return done

    def _stage_file(self, stage: int) -> pathlib.Path:
        assert self.path is not None
        return self.path / f"stage_{stage + 1}.npz"

    def _read_facts(self) -> dict[str, Any]:
        assert self.path is not None
        try:
            facts = json.loads((self.path / RUN_NAME).read_bytes())
            if isinstance(facts, dict):
                return facts
            raise ValueError("no JSON object")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path / RUN_NAME} cannot be read ({error}): restore the folder from a backup, or give another run_dir."
            ) from error


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's dtype, shape and bytes.

    Example:
      >>> digest(np.zeros(2)) == digest(np.zeros(2)), digest(np.zeros(2)) == digest(np.zeros([2, 1]))
      (True, False)
    """
    made = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    made.update(np.ascontiguousarray(array).data)
    return made.hexdigest()


def _numbered(arrays: Mapping[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    return [arrays[f"{prefix}{i}"] for i in range(sum(name.startswith(prefix) for name in arrays))]


def _load(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): restore the folder from a backup, or start anew in another run_dir."
        ) from error


def _archive(arrays: Mapping[str, np.ndarray]) -> memoryview:
    """The bytes of a .npz file, made before the disk is asked for room: a half-written archive complains when it is dropped."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getbuffer()


def _replace(file: pathlib.Path, write: Callable[[BinaryIO], Any]) -> None:
    try:
        _own_files.replace(file, write)
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be written ({error}): see that the disk has room, and go on with resume=True."
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
