"""What `tfprivacy-ft finetune` runs: private fine-tuning on a file, a folder of images or a bundled data set.

Promises: what shapes the model and the inputs is given and never taken from the rows, since that would be a release: the
classes, the bounds that numbers are scaled by, the categories, the size of images; how rows became numbers is written beside
the model, so that later rows can; every run has a folder of its own, which says what happened, also when it went wrong.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tfprivacy_ft import _check, datasets, images, models, run_folder, tables
from tfprivacy_ft.encoding import Encoding, parse_categories
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError
from tfprivacy_ft.finetune import recipes

if TYPE_CHECKING:
    from tfprivacy_ft.finetune import FineTuned

__all__ = ["FinetuneSettings", "run_finetune"]

_PRETRAINED = ("squeezenet",)
_CENTRED = "pixels / 127.5 - 1"
_FOLDERS = "runs/finetune"
_SCHEMA = (
    *("label", "classes", "features", "image_column", "image_size", "channels"),
    *("bounds", "categories", "text", "text_features"),
)
_PIXELS = "pixels"  # stands in a schema beside these, to be read by people
# Names under which files keep inputs and labels to train on, and to test on.
_ARRAYS = (("x", "y"), ("x_train", "y_train"), ("train_images", "train_labels"))
_TEST_ARRAYS = (("x_test", "y_test"), ("test_images", "test_labels"))


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """What can be chosen.

    Args:
        data: A file of columns (see `tables.read_table`), a .npz file of arrays x and y (and x_test and y_test), a folder of
            images with a sub-folder for each class, or the name of a bundled data set.
        model: Name of a pretrained backbone, such as `"squeezenet"`; a path of a Keras model; or a name that
            `models.build_model` knows, which starts from random weights.
        target_epsilon: Of one example, or of one person with `examples_per_user`; > 0.
        delta: In (0, 1), well below 1 / rows; None for the smaller of 1e-5 and a tenth of 1 / rows.
        recipe: A name that `finetune.recipes.find` knows; None for `"head"`, with random weights for `"full"`.
        label: Name of the column of labels; for tables.
        classes: How many labels there are, for whole numbers from 0, or their names in order; for files. None for folders
            takes the names of the sub-folders, sorted.
        features: Names of the columns to learn from; None for all others.
        image_column: Name of the column that holds paths of images, relative to the table, in place of features.
        encoding: What is known of the columns.
        image_size: (height, width) to which images are scaled; None where all have one size.
        channels: 1 or 3, of images; None for what all of them have.
        held_out: Share of the rows to measure on and not to train on, in [0, 1); their figures are releases without noise.
        test_data: A file or folder like `data` to measure on.
        keep_head: Whether the model at the path is a classifier of these classes, whose last layer is kept as its head.
        run_dir: Folder of the run; None for a numbered one in runs/finetune.
        resume: Whether to go on with the run in `run_dir`.
        stages: How many stages of a staged recipe to run now; None for all.
        fix_batchnorm: None, `"freeze"` or `"groupnorm"`.
        examples_per_user: The most rows of one person; None protects single rows.
        epochs, batch_size, learning_rate, l2_norm_clip: As in a recipe, for each of its stages; None for its own.

    Raises:
        InvalidArgumentError: An argument is outside its range, missing, or does not go with the others.
        DatasetError: `data` is neither a file, a folder nor a name that is known.
    """

    data: str
    model: str
    target_epsilon: float
    delta: float | None = None
    recipe: str | None = None
    label: str | None = None
    classes: int | Sequence[str] | None = None
    features: Sequence[str] | None = None
    image_column: str | None = None
    encoding: Encoding = dataclasses.field(default_factory=Encoding)
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    held_out: float = 0.0
    test_data: str | None = None
    keep_head: bool = False
    run_dir: str | os.PathLike[str] | None = None
    resume: bool = False
    stages: int | None = None
    fix_batchnorm: str | None = None
    examples_per_user: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    l2_norm_clip: float | None = None

    def __post_init__(self) -> None:
        _check.positive(target_epsilon=self.target_epsilon)
        if self.delta is not None:
            _check.open_unit_interval(delta=self.delta)
        if self.held_out:
            _check.open_unit_interval(held_out=self.held_out)
        if self.stages is not None:
            _check.positive_integer(stages=self.stages)
        if self.resume and self.run_dir is None:
            raise InvalidArgumentError(
                "resume=True is not allowed without run_dir: give the folder of the run to go on with."
            )
        if self.held_out and self.test_data is not None:
            raise InvalidArgumentError(
                f"held_out={self.held_out} is not allowed with test_data={self.test_data!r}: give one of them."
            )
        self.chosen_recipe()
        self._check_data()

    @classmethod
    def from_options(
        cls,
        *,
        schema: str | None = None,
        classes: Sequence[str] | None = None,
        bounds: Sequence[str] | None = None,
        categories: Sequence[str] | None = None,
        text: Sequence[str] | None = None,
        text_features: int | None = None,
        image_size: str | None = None,
        **options: Any,
    ) -> "FinetuneSettings":
        """Settings from the options of the command, some of which may stand in a schema file.

        Raises:
            InvalidArgumentError: An option is not of its form, or is given in the schema file, too.
            DatasetError: The schema file cannot be read.
        """
        given = {
            **options,
            "classes": _classes(classes),
            "bounds": None if bounds is None else {n or "*": list(p) for n, p in tables.parse_bounds(bounds).items()},
            "categories": None if categories is None else parse_categories(categories),
            "text": text,
            "text_features": text_features,
            "image_size": image_size,
        }
        listed = {} if schema is None else _read_schema(schema)
        if twice := [name for name in listed if given.get(name) is not None]:
            raise InvalidArgumentError(f"{_as_options(twice)} stand in schema={schema!r}, too: give each in one place.")
        given = {name: value for name, value in {**given, **listed}.items() if value is not None}
        if "image_size" in given:
            given["image_size"] = _size(given["image_size"])
        known = {name: given.pop(name) for name in ("bounds", "categories", "text", "text_features") if name in given}
        return cls(**given, encoding=Encoding.from_json(known))

    def chosen_recipe(self) -> Any:
        """The recipe, with what was chosen for its stages."""
        recipe = recipes.find(self.recipe or ("full" if self.from_scratch else "head"))
        names = ("epochs", "batch_size", "learning_rate", "l2_norm_clip")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if isinstance(recipe, recipes.ZeroShot):
            if changes:
                raise InvalidArgumentError(f"{_as_options(list(changes))} are for training, and zero_shot has none.")
            return recipe
        if isinstance(recipe, recipes.Staged):
            return recipes.Staged(tuple(dataclasses.replace(stage, **changes) for stage in recipe.stages))
        if self.from_scratch and not isinstance(recipe, recipes.Full):
            raise InvalidArgumentError(
                f"recipe={self.recipe!r} is not allowed with model={self.model!r}, which starts from random weights: give "
                "recipe=full, or a pretrained model."
            )
        return dataclasses.replace(recipe, **changes)

    @property
    def from_scratch(self) -> bool:
        """Whether the model starts from random weights."""
        return self.model in models.model_names() and self.model not in _PRETRAINED

    @property
    def is_named(self) -> bool:
        """Whether the model is a pretrained one by name, and no path."""
        return not self.from_scratch and not pathlib.Path(self.model).exists()

    @property
    def is_bundled(self) -> bool:
        """Whether `data` is the name of a bundled data set."""
        return self.data in datasets.names()

    def _check_data(self) -> None:
        path = pathlib.Path(self.data)
        about_rows = [
            name for name in ("label", "classes", "features", "image_column", "image_size") if getattr(self, name)
        ]
        if self.is_bundled:
            if about_rows or self.encoding != Encoding():
                extra = _as_options(about_rows) or "--bounds, --categories and --text"
                raise InvalidArgumentError(f"data={self.data!r} is a bundled data set: leave out {extra}.")
            if self.held_out or self.test_data:
                raise InvalidArgumentError(
                    f"data={self.data!r} has rows to test on: leave out --held-out and --test-data."
                )
            return
        if path.is_dir():
            if isinstance(self.classes, int) or self.label or self.features or self.image_column:
                raise InvalidArgumentError(
                    f"data={self.data!r} is a folder of images, whose sub-folders are the classes: leave out --label, --features "
                    "and --image-column, and give --classes by name or not at all."
                )
            return
        tables.check_suffix(path)
        if self.label is None and path.suffix != ".npz":
            raise InvalidArgumentError(f"data={self.data!r} is a table: give --label, too.")
        if self.classes is None or (isinstance(self.classes, int) and self.classes < 2):
            raise InvalidArgumentError(
                f"classes={self.classes} is not allowed: give how many there are, 2 or more, or all of them by name."
            )
        if self.features is not None and self.image_column is not None:
            raise InvalidArgumentError(
                f"image_column={self.image_column!r} stands for all features: leave out --features."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """Inputs and labels; pixels are still those of the images, 0 .. 255."""

    x: np.ndarray
    y: np.ndarray
    num_classes: int
    test: tuple[np.ndarray, np.ndarray] | None = None
    schema: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def are_pixels(self) -> bool:
        return self.x.dtype == np.uint8

    def with_inputs(self, change: Callable[[np.ndarray], np.ndarray]) -> "_Rows":
        test = None if self.test is None else (change(self.test[0]), self.test[1])
        return dataclasses.replace(self, x=change(self.x), test=test)


def run_finetune(settings: FinetuneSettings) -> "FineTuned":
    """Trains, prints the report, and leaves ledger, report, card and model in the run's folder.

    Args:
        settings: What was chosen.

    Returns:
        What `finetune` returned.

    Raises:
        InvalidArgumentError: The folder holds a run already, or none to go on with, or no noise reaches the target.
        DatasetError: The data cannot be read, or cannot be trained on.
        MissingDependencyError: What reads the file is not installed.
        UnsupportedModelError: The model cannot be trained so.
        CheckpointError: What is gone on with is another run.
    """
    import tensorflow as tf

    from tfprivacy_ft.finetune import finetune
    from tfprivacy_ft.finetune.checkpoints import RunFolder

    tf.get_logger().setLevel("ERROR")  # Keras warns where a step is so short that a callback takes longer
    path = run_folder.numbered(_FOLDERS) if settings.run_dir is None else pathlib.Path(settings.run_dir)
    folder = RunFolder(path, resume=settings.resume)
    with folder.recording():  # what goes wrong before the training; from there on `finetune` records it
        rows = _read(settings)
        model, rows = _from_scratch(settings, rows, path) if settings.from_scratch else _pretrained(settings, rows)
    recipe, delta = settings.chosen_recipe(), min(1e-5, 0.1 / len(rows.x)) if settings.delta is None else settings.delta
    sys.stdout.write(f"{_announced(settings, rows, recipe.name, delta)}\nEverything goes to {path}\n\n")
    result = finetune(
        model,
        rows.x,
        rows.y,
        recipe=recipe,
        target_epsilon=settings.target_epsilon,
        delta=delta,
        num_classes=None if settings.from_scratch or settings.keep_head else rows.num_classes,
        validation_data=rows.test,
        run_dir=path,
        resume=settings.resume,
        stages=settings.stages,
        fix_batchnorm=settings.fix_batchnorm,
        examples_per_user=settings.examples_per_user,
        verbose=1 if sys.stdout.isatty() else 2,
    )
    _leave(result, rows.schema, path)
    return result


def _announced(settings: FinetuneSettings, rows: _Rows, recipe: str, delta: float) -> str:
    shape = "x".join(map(str, rows.x.shape[1:]))
    start = " from random weights" if settings.from_scratch else ""
    return (
        f"{settings.data}: {len(rows.x):,} rows of {shape} numbers, {rows.num_classes} classes\n"
        f"{settings.model}{start}: {recipe}, within epsilon {settings.target_epsilon:g} at delta {delta:g}"
    )


def _leave(result: "FineTuned", schema: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes what the run gave into its folder, and says it."""
    result.save(path / "model.keras")
    # result.write_card(path)
    if schema:
        (path / "schema.json").write_text(f"{json.dumps(schema, indent=1)}\n", encoding="utf-8")
    (path / "report.txt").write_text(f"{result.report}\n", encoding="utf-8")
    (path / "report.json").write_text(f"{result.report.to_json()}\n", encoding="utf-8")
    sys.stdout.write(f"\n{result.report}\n")
    if result.figures:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
        sys.stdout.write(f"\nHeld out, without noise: {shown}\n")
    if not result.finished:
        sys.stdout.write(f"\nStages are left: go on with --resume --run-dir {path}, here or where you copy it to.\n")
    sys.stdout.write(f"\nLedger, report, card and model are in {path}\n")


def _read(settings: FinetuneSettings) -> _Rows:
    if settings.is_bundled:
        data = datasets.load(settings.data)
        rows = _Rows(data.x_train, data.y_train, data.num_classes, (data.x_test, data.y_test))
        needs_pixels = settings.is_named or settings.image_size is not None or settings.channels is not None
        if rows.x.ndim == 4 and needs_pixels:
            return rows.with_inputs(lambda x: _as_inputs(settings, np.rint((x + 1) * 127.5).astype(np.uint8)))
        return rows.with_inputs(functools.partial(_as_inputs, settings))
    rows = _read_path(settings, pathlib.Path(settings.data))
    if settings.test_data is not None:
        test = _read_path(settings, pathlib.Path(settings.test_data))
        return dataclasses.replace(rows, test=(test.x, test.y))
    return _held_out(rows, settings.held_out) if settings.held_out else rows


def _held_out(rows: _Rows, share: float) -> _Rows:
    if rows.test is not None:
        raise InvalidArgumentError(
            f"held_out={share} is not allowed where the data have test rows of their own: leave it out."
        )
    order = np.random.RandomState(0).permutation(len(rows.x))  # the same rows when a run is gone on with
    test, train = np.split(order, [round(share * len(order))])
    if not len(test) or len(np.unique(rows.y[train])) < 2:
        raise InvalidArgumentError(f"held_out={share} of {len(order)} rows leaves too few of them: give another share.")
    return dataclasses.replace(rows, x=rows.x[train], y=rows.y[train], test=(rows.x[test], rows.y[test]))


def _read_path(settings: FinetuneSettings, path: pathlib.Path) -> _Rows:
    if path.is_dir():
        wanted = settings.classes if settings.classes is None or not isinstance(settings.classes, int) else None
        paths, y, names = images.class_folders(path, wanted)
        x = _pixels(settings, paths)
        return _Rows(x, y, len(names), schema={"classes": list(names), **_about(x)})
    table = tables.read_table(path)
    classes = settings.classes
    assert classes is not None
    count = classes if isinstance(classes, int) else len(classes)
    if settings.label is None:
        return _from_arrays(settings, table, classes, count)
    y = tables.class_labels(table, settings.label, classes)
    schema = {"label": settings.label, "classes": classes if isinstance(classes, int) else list(classes)}
    if settings.image_column is not None:
        paths = [path.parent / name for name in tables.texts(table, settings.image_column)]
        x = _pixels(settings, paths)
        return _Rows(x, y, count, schema={**schema, "image_column": settings.image_column, **_about(x)})
    features = [name for name in tables.names(table) if name != settings.label]
    if settings.features is not None:
        features = list(settings.features)
        if settings.label in features:
            raise DatasetError(
                f"column {settings.label!r} is the label and cannot be a feature: take it out of features."
            )
    x = _as_inputs(settings, settings.encoding.encode(table, features))
    settings.encoding.refuse_unused_categories(table)
    _same_length(x, y)
    return _Rows(x, y, count, schema={**schema, "features": features, **settings.encoding.to_json()})


def _from_arrays(
    settings: FinetuneSettings, table: Mapping[Any, Any], classes: int | Sequence[str], count: int
) -> _Rows:
    """Rows of a file that keeps arrays under the usual names."""

    def read(x_name: str, y_name: str) -> tuple[np.ndarray, np.ndarray]:
        y = tables.class_labels(table, y_name, classes)
        x = _as_inputs(settings, settings.encoding.encode(table, [x_name]))
        _same_length(x, y)
        return x, y

    found = next((pair for pair in _ARRAYS if set(pair) <= set(table)), None)
    if found is None:
        raise DatasetError(
            f"data={settings.data!r} has the arrays {', '.join(map(str, table))}, and not x and y: name the labels by --label."
        )
    test = next((pair for pair in _TEST_ARRAYS if set(pair) <= set(table)), None)
    return _Rows(*read(*found), count, None if test is None else read(*test))


def _as_inputs(settings: FinetuneSettings, x: np.ndarray) -> np.ndarray:
    """Images of bytes with an axis of channels and the size asked for; other numbers as float32, whole ones as they are."""
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        grey = x[..., np.newaxis] if x.ndim == 3 else x
        return images.fitted(grey, size=settings.image_size, channels=settings.channels)
    if settings.image_size is not None or settings.channels is not None:
        raise InvalidArgumentError("image_size=HEIGHTxWIDTH and channels are for images: leave them out.")
    return x.astype(np.float32) if x.dtype.kind in "fb" or x.dtype == np.uint8 else x


def _same_length(x: np.ndarray, y: np.ndarray) -> None:
    if len(x) != len(y):
        raise DatasetError(f"there are {len(x)} rows of features and {len(y)} labels: give one label per row.")


def _about(pixels: np.ndarray) -> dict[str, Any]:
    return {"image_size": f"{pixels.shape[1]}x{pixels.shape[2]}", "channels": pixels.shape[3]}


def _pixels(settings: FinetuneSettings, paths: Sequence[pathlib.Path]) -> np.ndarray:
    with _bar("reading images") as progress:
        return images.read_images(paths, size=settings.image_size, channels=settings.channels, progress=progress)


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _from_scratch(settings: FinetuneSettings, rows: _Rows, folder: pathlib.Path) -> tuple[Any, _Rows]:
    """A new model, or the one that the run began with."""
    import tensorflow as tf

    if rows.are_pixels:
        rows = dataclasses.replace(rows.with_inputs(_centred), schema={**rows.schema, _PIXELS: _CENTRED})
    start = folder / "start.keras"
    if settings.resume:
        if not start.exists():
            raise InvalidArgumentError(
                f"run_dir={str(folder)!r} lacks {start.name}, the model it began with: restore it."
            )
        return tf.keras.models.load_model(start, compile=False), rows
    outputs = 1 if rows.num_classes == 2 else rows.num_classes
    model = models.build_model(settings.model, rows.x.shape[1:], outputs)
    model.save(start)
    return model, rows


def _pretrained(settings: FinetuneSettings, rows: _Rows) -> tuple[Any, _Rows]:
    """A model with weights, and the rows as it reads them."""
    from tfprivacy_ft import weights

    if not rows.are_pixels:
        return weights.load_backbone(settings.model, input_shape=rows.x.shape[1:]), rows
    colours = (*rows.x.shape[1:3], 3) if settings.is_named else rows.x.shape[1:]  # those by name know no other images
    model = weights.load_backbone(settings.model, input_shape=colours)
    channels = model.input_shape[-1]
    rows = rows.with_inputs(lambda pixels: images.fitted(pixels, channels=channels))
    scale, said = _scaling_of(settings.model) if settings.is_named else (_centred, _CENTRED)
    return model, dataclasses.replace(rows.with_inputs(scale), schema={**rows.schema, _PIXELS: said})


def _scaling_of(name: str) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """What a pretrained network reads of pixels 0 .. 255, and that in words."""
    from tfprivacy_ft.keras_compat import keras

    if name == "squeezenet":
        caffe = functools.partial(keras.applications.imagenet_utils.preprocess_input, mode="caffe")
        return caffe, "keras.applications.imagenet_utils.preprocess_input(pixels, mode='caffe')"
    for module_name in dir(keras.applications):
        module = getattr(keras.applications, module_name)
        if hasattr(module, name) and hasattr(module, "preprocess_input"):
            return module.preprocess_input, f"keras.applications.{module_name}.preprocess_input(pixels)"
    return _centred, _CENTRED


def _centred(pixels: np.ndarray) -> np.ndarray:
    """0 .. 255 to -1 .. 1, in float32 throughout."""
    return pixels / np.float32(127.5) - np.float32(1)


def _classes(words: Sequence[str] | None) -> int | tuple[str, ...] | None:
    if words is None or len(words) > 1:
        return None if words is None else tuple(words)
    if not words[0].isdecimal():
        raise InvalidArgumentError(
            f"classes={words[0]!r} is not allowed: give how many there are, or all of them by name."
        )
    return int(words[0])


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise InvalidArgumentError(f"image_size={text!r} is not allowed: give HEIGHTxWIDTH in pixels, such as 96x96.")
    return int(height), int(width)


def _read_schema(path: str) -> dict[str, Any]:
    try:
        listed = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"schema={path!r} cannot be read ({error.strerror}): give a file that can.") from error
    except ValueError as error:
        raise DatasetError(f"schema={path!r} is no JSON ({error}): correct it.") from error
    kinds = {
        "label": str,
        "classes": int | list,
        "features": list,
        "image_column": str,
        "image_size": str,
        "channels": int,
    }
    if isinstance(listed, dict):
        listed.pop(_PIXELS, None)
    if not isinstance(listed, dict) or not set(listed) <= set(_SCHEMA):
        raise InvalidArgumentError(
            f"schema={path!r} is not allowed: give a JSON object with any of {', '.join(_SCHEMA)}."
        )
    for name, kind in kinds.items():
        if name in listed and not isinstance(listed[name], kind):
            raise InvalidArgumentError(f"{name}={listed[name]!r} in schema={path!r} is not allowed: correct its kind.")
    return listed


def _as_options(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
