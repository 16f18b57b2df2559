"""Files that this library writes: replaced whole, on the disk when the call returns, and never over somebody else's."""

import contextlib
import os
import pathlib
from collections.abc import Callable
from typing import Any, BinaryIO


def may_be_replaced(file: pathlib.Path, generator: str) -> bool:
    """Whether the file is not there, or begins with the name of what wrote it.

    Raises:
        OSError: It cannot be read.
    """
    try:
        with open(file, "rb") as there:
            return generator.encode() in there.read(2000)
    except FileNotFoundError:
        return True


def replace(file: pathlib.Path, write: Callable[[BinaryIO], Any], *, aside: pathlib.Path | None = None) -> None:
    """The old file or the new one, never half of it; what cannot be finished, as on a full disk, takes no room.

    Args:
        file: What is replaced, or made.
        write: Writes the contents.
        aside: Where they go first, in the same folder; None for the file's name with `.new`. Processes that may write the
            same file at the same time need one each.

    Raises:
        OSError: It cannot be written.
    """
    aside = aside or file.with_name(file.name + ".new")
    try:
        with open(aside, "wb") as writer:
            write(writer)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(aside, file)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync_folder(file.parent)


def replace_text(file: pathlib.Path, text: str) -> None:
    """`replace` for text. A name in it that is no text is shown with its bytes.

    Raises:
        OSError: It cannot be written.
    """
    replace(file, lambda writer: writer.write(text.encode("utf-8", errors="backslashreplace")))


def sync_folder(folder: pathlib.Path) -> None:
    """Returns when the names of the files in a folder are on the disk.

    Raises:
        OSError: They cannot be written.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
