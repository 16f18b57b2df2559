"""Folders of runs.

Promises: each run has a folder of its own, so that no ledger is continued by accident.
"""

import contextlib
import os
import pathlib

from tfprivacy_ft import ledger
from tfprivacy_ft.errors import InvalidArgumentError

__all__ = ["made", "new", "numbered"]


def made(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """The folder, made with its parents where it is not there.

    Raises:
        InvalidArgumentError: It cannot be made.
    """
    folder = pathlib.Path(run_dir)
    with _refused_in_one_sentence(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def new(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """The folder, made where it is not there, if it holds no run yet.

    Args:
        run_dir: The folder, whose parents are made, too.

    Raises:
        InvalidArgumentError: It cannot be made, or holds a ledger.

    Example:
        >>> import tempfile
        >>> new(os.path.join(tempfile.mkdtemp(), "runs", "first")).name
        'first'
    """
    folder = made(run_dir)
    if (folder / ledger.FILE_NAME).exists():
        raise InvalidArgumentError(f"run_dir={str(folder)!r} holds a run already: give each run a folder of its own.")
    return folder


def numbered(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """A numbered folder in this one that nobody had before: two runs never share a ledger.

    Args:
        run_dir: The folder that holds the numbered ones; made where it is not there.

    Raises:
        InvalidArgumentError: It cannot be made or written.

    Example:
        >>> import tempfile
        >>> parent = tempfile.mkdtemp()
        >>> numbered(parent).name, numbered(parent).name
        ('001', '002')
    """
    parent = pathlib.Path(run_dir)
    with _refused_in_one_sentence(parent):
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
        while True:
            with contextlib.suppress(FileExistsError):
                folder = parent / f"{number:03d}"
                folder.mkdir()
                return folder
            number += 1


@contextlib.contextmanager
def _refused_in_one_sentence(folder: pathlib.Path):
    try:
        yield
    except OSError as error:
        raise InvalidArgumentError(
            f"run_dir={str(folder)!r} cannot be used ({error.strerror}): give a folder that can be made and written."
        ) from error
