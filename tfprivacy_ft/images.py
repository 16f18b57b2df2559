"""Folders of images as arrays of pixels.

Promises: an image's pixels depend on its own file and on what the user gives, never on other images; images of several
sizes are refused unless a size is given. PNG, JPEG, BMP and GIF (first frame) are decoded by TensorFlow, which is imported
when the first image is read.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tfprivacy_ft.errors import DatasetError, InvalidArgumentError

__all__ = ["class_folders", "fitted", "read_images"]

# What red, green and blue give to grey, as in ITU-R BT.601, which JPEG and TensorFlow use, too.
_LUMA = np.array([[0.299], [0.587], [0.114]], np.float32)
_AT_ONCE = 256
_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png")


def class_folders(
    folder: str | os.PathLike[str], classes: Sequence[str] | None = None
) -> tuple[list[pathlib.Path], np.ndarray, tuple[str, ...]]:
    """The images of a folder that has a sub-folder for each class.

    Args:
        folder: The folder. What lies beside the sub-folders, and hidden files, are passed over.
        classes: Names of the sub-folders in the order of the classes; None takes those that are there, sorted. Their names
            are taken as public: a folder says which classes there may be, and an empty one still is a class.

    Returns:
        Paths, sorted within each class; the class of each, int32 (n,); the names of the classes.

    Raises:
        DatasetError: The folder is not there, it has other sub-folders than those, or no images, or one sub-folder only.

    Example:
        >>> import tempfile
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        ...     (root / name).parent.mkdir(exist_ok=True)
        ...     (root / name).touch()
        >>> class_folders(root)[1:]
        (array([0, 0, 1], dtype=int32), ('cat', 'dog'))
    """
    root = pathlib.Path(folder)
    try:
        found = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"data={str(root)!r} cannot be read ({error.strerror}): give a folder that can.") from error
    names = tuple(found if classes is None else classes)
    if set(names) != set(found) or len(names) < 2:
        wanted = "two or more" if classes is None else ", ".join(names)
        raise DatasetError(
            f"data={str(root)!r} has the sub-folders {', '.join(found) or 'none'}: give it one for each class, {wanted}, or "
            "a table of file names and labels."
        )
    paths, y = [], []
    for number, name in enumerate(names):
        inside = sorted(path for path in (root / name).rglob("*") if path.is_file() and not path.name.startswith("."))
        paths += inside
        y += [number] * len(inside)
    if len(set(y)) < 2:
        raise DatasetError(f"data={str(root)!r} holds images of {len(set(y))} classes: give images of two or more.")
    return paths, np.array(y, np.int32), names


def read_images(
    paths: Sequence[str | os.PathLike[str]],
    *,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Pixels of images.

    Args:
        paths: Their files.
        size: (height, width) to which each is scaled, without keeping its proportions; None keeps the size that all have.
        channels: 1 (grey) or 3 (red, green, blue); None keeps what all have. Transparency is dropped.
        progress: Called with how many of how many are done.

    Returns:
        uint8 (n, height, width, channels), in the order of the paths.

    Raises:
        DatasetError: A file cannot be read or is no image, or images have several sizes, or numbers of channels, and none
            is given.
        InvalidArgumentError: A size or a number of channels is not allowed.
    """
    _check_target(size, channels)
    images: np.ndarray | None = None
    for done, path in enumerate(paths):
        image = _decode(pathlib.Path(path), channels)
        if size is not None and image.shape[:2] != tuple(size):
            image = _resize(image, size)
        if images is None:
            images = np.empty((len(paths), *image.shape), np.uint8)
        elif image.shape != images.shape[1:]:
            raise DatasetError(_differs(image.shape, images.shape[1:]))
        images[done] = image
        if progress is not None:
            progress(done + 1, len(paths))
    if images is None:
        raise DatasetError("there are no images: give a folder or a table that has some.")
    return images


def fitted(pixels: np.ndarray, *, size: tuple[int, int] | None = None, channels: int | None = None) -> np.ndarray:
    """Images in another size, or with another number of channels.

    Args:
        pixels: uint8 (n, height, width, channels).
        size: (height, width); None keeps it.
        channels: 1 or 3; None keeps it.

    Returns:
        uint8 (n, height, width, channels).

    Raises:
        InvalidArgumentError: A size or a number of channels is not allowed.

    Example:
        >>> fitted(np.zeros([2, 4, 4, 1], np.uint8), channels=3).shape
        (2, 4, 4, 3)
    """
    _check_target(size, channels)
    if size is not None and pixels.shape[1:3] != tuple(size):
        parts = [_resize(pixels[row : row + _AT_ONCE], size) for row in range(0, len(pixels), _AT_ONCE)]
        pixels = np.concatenate(parts) if parts else np.empty((0, *size, pixels.shape[3]), np.uint8)
    if channels == 1 and pixels.shape[3] == 3:
        pixels = np.rint(pixels @ _LUMA).astype(np.uint8)
    if channels == 3 and pixels.shape[3] == 1:
        pixels = np.repeat(pixels, 3, axis=3)
    return pixels


def _check_target(size: tuple[int, int] | None, channels: int | None) -> None:
    if size is not None and not (len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise InvalidArgumentError(f"image_size={size!r} is not allowed: give height and width in pixels.")
    if channels not in (None, 1, 3):
        raise InvalidArgumentError(f"channels={channels} is not allowed: give 1 (grey) or 3 (colours).")


def _differs(shape: Sequence[int], first: Sequence[int]) -> str:
    if shape[:2] != first[:2]:
        sizes = f"{first[0]}x{first[1]} and {shape[0]}x{shape[1]}"
        return f"images have several sizes, such as {sizes}: give image_size=HEIGHTxWIDTH, to which all are scaled."
    return f"images have {first[2]} and {shape[2]} channels: give channels=1 (grey) or channels=3 (colours) for all."


def _decode(path: pathlib.Path, channels: int | None) -> np.ndarray:
    import tensorflow as tf

    if path.suffix.lower() not in _ENDINGS:
        raise DatasetError(f"image {str(path)!r} does not end in {', '.join(_ENDINGS)}: convert it, or leave it out.")
    try:
        image: Any = tf.io.decode_image(path.read_bytes(), channels=channels or 0, expand_animations=False).numpy()
    except OSError as error:
        raise DatasetError(f"image {str(path)!r} cannot be read ({error.strerror}): make it readable.") from error
    except tf.errors.InvalidArgumentError as error:
        raise DatasetError(f"image {str(path)!r} is damaged: replace it, or leave it out.") from error
    return image[..., : 3 if image.shape[-1] >= 3 else 1]  # the rest is transparency


def _resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """One image, or several of one size."""
    import tensorflow as tf

    scaled = tf.image.resize(image, size, method="bilinear", antialias=True).numpy()
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
