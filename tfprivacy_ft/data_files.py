"""Inputs and labels from files and folders, by a schema: what the user says of them.

Promises: what shapes inputs and labels stands in the schema and is never taken from the rows, since that would be a
release: the classes, the bounds that numbers are scaled by, the categories, the size of images. So the schema that a run
leaves beside its model reads later rows in the same way.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfprivacy_ft import images, tables
from tfprivacy_ft.encoding import Encoding
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError
from tfprivacy_ft.tokens import Tokens

__all__ = ["Rows", "Schema", "as_inputs", "parse_size", "read", "read_inputs", "read_json"]

# Names under which files keep inputs and labels to train on, and to test on.
_ARRAYS = (("x", "y"), ("x_train", "y_train"), ("train_images", "train_labels"))
_TEST_ARRAYS = (("x_test", "y_test"), ("test_images", "test_labels"))
_ENCODING = tuple(field.name for field in dataclasses.fields(Encoding))


@dataclasses.dataclass(frozen=True)
class Schema:
    """What is said of data.

    Args:
        label: Name of the column of labels; for tables.
        classes: How many labels there are, for whole numbers from 0, or their names in order; for folders, names of the
            sub-folders, where None takes those that are there, sorted.
        features: Names of the columns to learn from; None for all others.
        image_column: Name of the column that holds paths of images, relative to the table, in place of features.
        image_size: (height, width) to which images are scaled; None where all have one size.
        channels: 1 or 3, of images; None for what all of them have.
        encoding: What is known of the columns.
        tokens: The column of text to learn from, and how it becomes tokens, in place of features.
        pixels: How pixels were scaled, in words, for who reads later images; reading does not use it.

    Raises:
        InvalidArgumentError: An argument is outside its range, or does not go with another.

    Example:
        >>> Schema(label="ill", classes=2).to_json()["label"]
        'ill'
    """

    label: str | None = None
    classes: int | Sequence[str] | None = None
    features: Sequence[str] | None = None
    image_column: str | None = None
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    encoding: Encoding = dataclasses.field(default_factory=Encoding)
    tokens: Tokens | None = None
    pixels: str | None = None

    def __post_init__(self) -> None:
        if self.classes is not None and self.num_classes < 2:
            raise InvalidArgumentError(
                f"classes={self.classes} is not allowed: give how many there are, 2 or more, or all of them by name."
            )
        if self.features is not None and self.image_column is not None:
            raise InvalidArgumentError(
                f"image_column={self.image_column!r} stands for all features: leave out --features."
            )
        others = (self.features, self.image_column, self.image_size, self.channels)
        if self.tokens is not None and (any(each is not None for each in others) or self.encoding != Encoding()):
            raise InvalidArgumentError(
                f"tokens={self.tokens.column!r} stands for all features: leave out --features, --text, --bounds, --categories "
                "and what is said of images."
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are, 0 where that is not said."""
        return self.classes if isinstance(self.classes, int) else len(self.classes or ())

    def to_json(self) -> dict[str, Any]:
        """What is said, as values that JSON has."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "encoding"]
        values = {name: getattr(self, name) for name in names}
        known = self.encoding.to_json() if self.encoding != Encoding() else {}
        if self.image_size is not None:
            values["image_size"] = f"{self.image_size[0]}x{self.image_size[1]}"
        values["tokens"] = None if self.tokens is None else self.tokens.to_json()
        for name in ("classes", "features"):
            values[name] = list(values[name]) if isinstance(values[name], tuple) else values[name]
        return {name: value for name, value in values.items() if value is not None} | known

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Schema":
        """What `to_json` returned; what is left out is as by default.

        Raises:
            InvalidArgumentError: It is something else.

        Example:
            >>> Schema.from_json({"label": "ill", "classes": ["no", "yes"], "bounds": {"age": [0, 120]}}).num_classes
            2
        """
        own = {name: value for name, value in values.items() if name not in _ENCODING}
        for name, value in own.items():
            if name not in _KINDS or not isinstance(value, _KINDS[name]) or isinstance(value, bool):
                raise InvalidArgumentError(
                    f"{name}={value!r} is not allowed in a schema: it has {', '.join([*_KINDS, *_ENCODING])}."
                )
        if "image_size" in own:
            own["image_size"] = parse_size(own["image_size"])
        if "tokens" in own:
            own["tokens"] = Tokens.from_json(own["tokens"])
        own |= {name: tuple(own[name]) for name in ("classes", "features") if isinstance(own.get(name), list)}
        return cls(**own, encoding=Encoding.from_json({name: values[name] for name in values if name in _ENCODING}))

    def refuse_unfit(self, data: str | os.PathLike[str]) -> None:
        """Refuses a schema that lacks what these data need, or says what they do not have.

        Raises:
            InvalidArgumentError: There is something to add or to leave out.
            DatasetError: The file ends in something that is not read.
        """
        path = pathlib.Path(data)
        if path.is_dir():
            if isinstance(self.classes, int) or self.label or self.features or self.image_column or self.tokens:
                raise InvalidArgumentError(
                    f"data={str(path)!r} is a folder of images, whose sub-folders are the classes: leave out --label, "
                    "--features, --tokens and --image-column, and give --classes by name or not at all."
                )
            return
        tables.check_suffix(path)
        if self.label is None and path.suffix != ".npz":
            raise InvalidArgumentError(f"data={str(path)!r} is a table: give --label, too.")
        if self.classes is None:
            raise InvalidArgumentError(
                f"data={str(path)!r} is a file: give --classes, too, how many there are or all of them by name."
            )


_KINDS: dict[str, Any] = {
    "label": str,
    "classes": int | list,
    "features": list,
    "image_column": str,
    "image_size": str,
    "channels": int,
    "tokens": dict,
    "pixels": str,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Inputs and labels.

    Args:
        x: float32 or whole numbers (n, ...); the pixels of images are uint8 (n, height, width, channels).
        y: int32 (n,), in 0 .. num_classes - 1.
        num_classes: How many classes there are.
        test: Rows to measure on, like x and y; None for none.
        schema: With what these rows were read, all defaults put in.
        public: Inputs like x, of public data that the model has learned from; None for none.
    """

    x: np.ndarray = dataclasses.field(repr=False)
    y: np.ndarray = dataclasses.field(repr=False)
    num_classes: int
    test: tuple[np.ndarray, np.ndarray] | None = dataclasses.field(default=None, repr=False)
    schema: Schema = dataclasses.field(default_factory=Schema)
    public: np.ndarray | None = dataclasses.field(default=None, repr=False)

    @property
    def are_pixels(self) -> bool:
        """Whether x are images whose pixels are not scaled yet."""
        return self.x.dtype == np.uint8

    def with_inputs(self, change: Callable[[np.ndarray], np.ndarray]) -> "Rows":
        """The same with other inputs, of the test rows and the public ones, too."""
        test = None if self.test is None else (change(self.test[0]), self.test[1])
        public = None if self.public is None else change(self.public)
        return dataclasses.replace(self, x=change(self.x), test=test, public=public)

    def hold_out(self, share: float) -> "Rows":
        """The same with a share of the rows to measure on in place of training: the same ones at each call.

        Args:
            share: In (0, 1).

        Raises:
            InvalidArgumentError: There are test rows already, or too few rows.
        """
        if self.test is not None:
            raise InvalidArgumentError(
                f"held_out={share} is not allowed where the data have test rows of their own: leave it out."
            )
        order = np.random.RandomState(0).permutation(len(self.x))  # its stream is frozen
        test, train = np.split(order, [round(share * len(order))])
        if not len(test) or len(np.unique(self.y[train])) < 2:
            raise InvalidArgumentError(
                f"held_out={share} of {len(order)} rows leaves too few of them: give another share."
            )
        return dataclasses.replace(self, x=self.x[train], y=self.y[train], test=(self.x[test], self.y[test]))


def read(data: str | os.PathLike[str], schema: Schema, *, progress: Callable[[int, int], None] | None = None) -> Rows:
    """Reads a file or a folder.

    Args:
        data: A file of columns (see `tables.read_table`); a .npz file of arrays x and y, or x_train and y_train, maybe with
            x_test and y_test; a folder of images with a sub-folder for each class.
        schema: What is said of it.
        progress: Called with how many of how many images are read.

    Raises:
        InvalidArgumentError: The schema does not fit.
        DatasetError: It cannot be read, or holds something else than the schema says.
        MissingDependencyError: What reads the file is not installed.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "table.npz"
        >>> np.savez(path, age=[30, 60], ill=[0, 1])
        >>> read(path, Schema(label="ill", classes=2, encoding=Encoding(bounds={"age": (0, 120)}))).x.tolist()
        [[-0.5], [0.0]]
    """
    path = pathlib.Path(data)
    schema.refuse_unfit(path)
    if path.is_dir():
        names = None if schema.classes is None or isinstance(schema.classes, int) else schema.classes
        files, y, classes = images.class_folders(path, names)
        return _of_images(files, y, dataclasses.replace(schema, classes=classes), progress)
    table = tables.read_table(path)
    if schema.label is None:
        return _from_arrays(path, table, schema)
    y = tables.class_labels(table, schema.label, _classes_of(schema))
    if schema.image_column is not None:
        return _of_images(_image_files(path, table, schema.image_column), y, schema, progress)
    return _from_columns(table, y, schema)


def read_inputs(
    data: str | os.PathLike[str], schema: Schema, *, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """The inputs alone, as `read` reads them, whatever the labels are, if there are any.

    Args:
        data: As of `read`.
        schema: What `read` returned with other rows.
        progress: As of `read`.

    Raises:
        DatasetError: It cannot be read, or holds something else than the schema says.
        InvalidArgumentError: The schema does not fit.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "table.npz"
        >>> np.savez(path, age=[30, 60])
        >>> read_inputs(path, Schema(label="ill", classes=2, features=("age",))).tolist()
        [[30.0], [60.0]]
    """
    path = pathlib.Path(data)
    if path.is_dir():
        return _pixels(images.class_folders(path)[0], schema, progress)
    table = tables.read_table(path)
    if schema.image_column is not None:
        return _pixels(_image_files(path, table, schema.image_column), schema, progress)
    features = schema.features
    if features is None and schema.tokens is None:
        features = [_arrays_in(path, table)[0]]
    return _inputs(table, features or (), schema)


def as_inputs(x: np.ndarray, schema: Schema) -> np.ndarray:
    """Images of bytes with an axis of channels and the size that is said; other numbers as float32, whole ones as they are.

    Raises:
        InvalidArgumentError: They are no images, and a size or channels are said.
    """
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        pixels = x[..., np.newaxis] if x.ndim == 3 else x
        return images.fitted(pixels, size=schema.image_size, channels=schema.channels)
    if schema.image_size is not None or schema.channels is not None:
        raise InvalidArgumentError("image_size=HEIGHTxWIDTH and channels are for images: leave them out.")
    return x.astype(np.float32) if x.dtype.kind in "fb" or x.dtype == np.uint8 else x


def parse_size(text: str) -> tuple[int, int]:
    """`"HEIGHTxWIDTH"` as two numbers.

    Raises:
        InvalidArgumentError: It is something else.

    Example:
        >>> parse_size("96x128")
        (96, 128)
    """
    sides = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if sides is None:
        raise InvalidArgumentError(f"image_size={text!r} is not allowed: give HEIGHTxWIDTH in pixels, such as 96x96.")
    return int(sides[1]), int(sides[2])


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a schema file.

    Raises:
        DatasetError: It cannot be read, or is no JSON object.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"schema={str(path)!r} cannot be read ({error.strerror}): give a file that can.") from error
    except ValueError as error:
        raise DatasetError(f"schema={str(path)!r} is no JSON ({error}): correct it.") from error
    if not isinstance(values, dict):
        raise DatasetError(f'schema={str(path)!r} is no JSON object: give one, such as {{"label": "ill"}}.')
    return values


def _classes_of(schema: Schema) -> int | Sequence[str]:
    assert schema.classes is not None, "what refuse_unfit refuses"
    return schema.classes


def _image_files(path: pathlib.Path, table: Mapping[Any, Any], name: str) -> list[pathlib.Path]:
    return [path.parent / each for each in tables.texts(table, name)]


def _of_images(
    files: Sequence[pathlib.Path], y: np.ndarray, schema: Schema, progress: Callable[[int, int], None] | None
) -> Rows:
    x = _pixels(files, schema, progress)
    seen = dataclasses.replace(schema, image_size=(x.shape[1], x.shape[2]), channels=x.shape[3])
    return Rows(x, y, schema.num_classes, schema=seen)


def _pixels(files: Sequence[pathlib.Path], schema: Schema, progress: Callable[[int, int], None] | None) -> np.ndarray:
    return images.read_images(files, size=schema.image_size, channels=schema.channels, progress=progress)


def _from_columns(table: Mapping[Any, Any], y: np.ndarray, schema: Schema) -> Rows:
    used = [name for name in tables.names(table) if name != schema.label]
    if schema.tokens is not None:
        used = [schema.tokens.column]
    elif schema.features is not None:
        used = list(schema.features)
    if schema.label in used:
        raise DatasetError(f"column {schema.label!r} is the label and cannot be a feature: take it out of features.")
    x = _inputs(table, used, schema)
    schema.encoding.refuse_unused_categories(table)
    _refuse_other_lengths(x, y)
    features = None if schema.tokens is not None else tuple(used)
    return Rows(x, y, schema.num_classes, schema=dataclasses.replace(schema, features=features))


def _inputs(table: Mapping[Any, Any], features: Sequence[Any], schema: Schema) -> np.ndarray:
    if schema.tokens is not None:
        return schema.tokens.encode(tables.texts(table, schema.tokens.column))
    return as_inputs(schema.encoding.encode(table, features), schema)


def _from_arrays(path: pathlib.Path, table: Mapping[Any, Any], schema: Schema) -> Rows:
    """Rows of a file that keeps arrays under the usual names."""

    def pair(x_name: str, y_name: str) -> tuple[np.ndarray, np.ndarray]:
        y = tables.class_labels(table, y_name, _classes_of(schema))
        x = _inputs(table, [x_name], schema)
        _refuse_other_lengths(x, y)
        return x, y

    found = _arrays_in(path, table)
    test = next((names for names in _TEST_ARRAYS if set(names) <= set(table)), None)
    return Rows(*pair(*found), schema.num_classes, None if test is None else pair(*test), schema)


def _arrays_in(path: pathlib.Path, table: Mapping[Any, Any]) -> tuple[str, str]:
    """The names of inputs and labels."""
    found = next((names for names in _ARRAYS if set(names) <= set(table)), None)
    if found is None:
        raise DatasetError(
            f"data={str(path)!r} has the arrays {', '.join(map(str, table))}, and not x and y: name the labels by --label."
        )
    return found


def _refuse_other_lengths(x: np.ndarray, y: np.ndarray) -> None:
    if len(x) != len(y):
        raise DatasetError(f"there are {len(x)} rows of features and {len(y)} labels: give one label per row.")
