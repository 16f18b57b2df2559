"""Files of others in a local folder, that are taken only if they are byte for byte the expected ones."""

import hashlib
import os
from pathlib import Path

from tfprivacy_ft.errors import PrivacyError

FOLDER_VARIABLE = "TFPRIVACY_FT_DATA"


def read_checked(what: str, place: str, sha256: tuple[str, ...], url: str, error: type[PrivacyError]) -> bytes:
    """Content of a file in the folder that the environment variable names.

    Args:
        what: What is read, to begin a sentence with.
        place: "folder/file" in that folder, where the file may also lie without the inner folder.
        sha256: Those of the files that are expected.
        url: Where the file can be had.
        error: What is raised where it is missing, unreadable, or another one.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    file_name = place.rpartition("/")[2]
    if not folder:
        raise error(
            f"{what} is read from a local folder: set the environment variable {FOLDER_VARIABLE} to the folder that holds "
            f"{place} (from {url})."
        )
    candidates = [Path(folder).expanduser() / place, Path(folder).expanduser() / file_name]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise error(
            f"There is no {place} and no {file_name} in the folder {folder!r} that {FOLDER_VARIABLE} names: put the file "
            f"from {url} there."
        )
    return read_file(path, sha256, url, error)


def read_file(path: Path, sha256: tuple[str, ...], url: str, error: type[PrivacyError]) -> bytes:
    """Content of the file at `path`; arguments as in `read_checked`."""
    try:
        content = path.read_bytes()
    except OSError as reason:
        raise error(f"File {str(path)!r} cannot be read ({reason.strerror}): make it readable.") from reason
    found = hashlib.sha256(content).hexdigest()
    if found not in sha256:
        raise error(
            f"File {str(path)!r} is damaged or another file, its sha256 is {found} where {sha256[0]} was expected: "
            f"replace it by the file from {url}."
        )
    return content
