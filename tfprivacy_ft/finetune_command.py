"""What `tfprivacy-ft finetune` runs: private fine-tuning on a file, a folder of images or a bundled data set.

Promises: what shapes the model and the inputs is given and never taken from the rows, since that would be a release: the
classes, the bounds that numbers are scaled by, the categories, the size of images; how rows became numbers is written beside
the model, so that later rows can; every run has a folder of its own, which says what happened, also when it went wrong.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tfprivacy_ft import _check, data_files, datasets, images, models, run_folder, tables
from tfprivacy_ft.data_files import Rows, Schema
from tfprivacy_ft.encoding import Encoding, parse_categories
from tfprivacy_ft.errors import CheckpointError, InvalidArgumentError
from tfprivacy_ft.finetune import recipes
from tfprivacy_ft.groups import figures_by_group

if TYPE_CHECKING:
    from tfprivacy_ft.finetune import FineTuned

__all__ = ["FinetuneSettings", "run_finetune"]

_PRETRAINED = ("squeezenet",)  # architectures that `build_model` knows, too, and that come with weights here
_SQUEEZENET_LAYERS = {"fire2_squeeze1x1", "fire9_expand3x3"}
_CENTRED = "pixels / 127.5 - 1"
_FOLDERS = "runs/finetune"


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """What can be chosen.

    Args:
        data: A file of columns (see `tables.read_table`), a .npz file of arrays x and y (and x_test and y_test), a folder of
            images with a sub-folder for each class, or the name of a bundled data set.
        model: Name of a pretrained backbone, such as `"squeezenet"`; a path of a Keras model; or a name that
            `models.build_model` knows, which starts from random weights.
        target_epsilon: Of one example, or of one person with `examples_per_user`; > 0.
        delta: In (0, 1), well below 1 / rows; None for 1e-5, or the power of ten below a tenth of 1 / rows if that is less.
        recipe: A name that `finetune.recipes.find` knows; None for `"head"`, with random weights for `"full"`.
        schema: What is said of the data.
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
    schema: Schema = dataclasses.field(default_factory=Schema)
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
        if self.keep_head and (self.from_scratch or self.is_named):
            raise InvalidArgumentError(
                f"keep_head=True is not allowed with model={self.model!r}, which has no head of these classes: leave it out."
            )
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
        **options: Any,
    ) -> "FinetuneSettings":
        """Settings from the options of the command; what is said of the data may stand in a schema file, too.

        Raises:
            InvalidArgumentError: An option is not of its form, or is given in the schema file, too.
            DatasetError: The schema file cannot be read.
        """
        names = ("label", "features", "image_column", "image_size", "channels", "text", "text_features")
        said = {name: options.pop(name, None) for name in names} | {"classes": _classes(classes)}
        said |= {
            "bounds": None if bounds is None else Encoding(bounds=tables.parse_bounds(bounds)).to_json()["bounds"],
            "categories": None if categories is None else parse_categories(categories),
        }
        said = {name: value for name, value in said.items() if value is not None}
        listed = {} if schema is None else data_files.read_json(schema)
        if twice := sorted(set(said) & set(listed)):
            raise InvalidArgumentError(f"{_as_options(twice)} stand in schema={schema!r}, too: give each in one place.")
        return cls(**options, schema=Schema.from_json({**listed, **said}))

    def chosen_recipe(self) -> Any:
        """The recipe, with what was chosen for its stages."""
        recipe = recipes.find(self.recipe or ("full" if self.from_scratch else "head"))
        if self.from_scratch and not isinstance(recipe, recipes.Full):
            raise InvalidArgumentError(
                f"recipe={self.recipe!r} is not allowed with model={self.model!r}, which starts from random weights: give "
                "recipe=full, or a pretrained model."
            )
        names = ("epochs", "batch_size", "learning_rate", "l2_norm_clip")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if isinstance(recipe, recipes.ZeroShot):
            if changes or not self.keep_head:
                raise InvalidArgumentError(
                    f"recipe={self.recipe!r} trains nothing: give keep_head=True with a classifier of these classes, and "
                    f"leave out {_as_options(names)}."
                )
            return recipe
        if isinstance(recipe, recipes.Staged):
            return recipes.Staged(tuple(dataclasses.replace(stage, **changes) for stage in recipe.stages))
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
        if not self.is_bundled:
            self.schema.refuse_unfit(self.data)
            return
        if said := [name for name in self.schema.to_json() if name not in ("image_size", "channels")]:
            raise InvalidArgumentError(f"data={self.data!r} is a bundled data set: leave out {_as_options(said)}.")
        if self.held_out or self.test_data:
            raise InvalidArgumentError(f"data={self.data!r} has rows to test on: leave out --held-out and --test-data.")


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
    recipe, delta = settings.chosen_recipe(), settings.delta or _usual_delta(len(rows.x))
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
    folder = RunFolder(path, resume=True)
    folder.write()  # this call's run from here on: what goes wrong is written down
    with folder.recording():
        _leave(result, rows, path)
    return result


def _usual_delta(num_examples: int) -> float:
    """1e-5, or the power of ten below a tenth of 1 / rows if that is less."""
    return min(1e-5, 10.0 ** math.floor(math.log10(0.1 / num_examples)))


def _announced(settings: FinetuneSettings, rows: Rows, recipe: str, delta: float) -> str:
    shape = "x".join(map(str, rows.x.shape[1:]))
    start = " from random weights" if settings.from_scratch else ""
    return (
        f"{settings.data}: {len(rows.x):,} rows of {shape} numbers, {rows.num_classes} classes\n"
        f"{settings.model}{start}: {recipe}, within epsilon {settings.target_epsilon:g} at delta {delta:g}"
    )


def _leave(result: "FineTuned", rows: Rows, path: pathlib.Path) -> None:
    """Writes what the run gave into its folder, and says it."""
    groups = None if rows.test is None else figures_by_group(result.model, *rows.test)
    with _refused_in_one_sentence(path):
        result.save(path / "model.keras")
        result.write_card(path, groups=groups)
        if said := rows.schema.to_json():
            (path / "schema.json").write_text(f"{json.dumps(said, indent=1)}\n", encoding="utf-8")
        (path / "report.txt").write_text(f"{result.report}\n", encoding="utf-8")
        (path / "report.json").write_text(f"{result.report.to_json()}\n", encoding="utf-8")
    sys.stdout.write(f"\n{result.report}\n")
    if result.figures:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
        sys.stdout.write(f"\nHeld out, without noise: {shown}\n")
    if not result.finished:
        sys.stdout.write(f"\nStages are left: go on with --resume --run-dir {path}, here or where you copy it to.\n")
    sys.stdout.write(f"\nLedger, report, card and model are in {path}\n")


@contextmanager
def _refused_in_one_sentence(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"run_dir={str(path)!r} cannot be written ({error}): make room there, and give the same words again, with "
            "resume=True if training had begun; it trains nothing twice."
        ) from error


def _read(settings: FinetuneSettings) -> Rows:
    if settings.is_bundled:
        return _bundled(settings)
    with _bar("reading images") as progress:
        rows = data_files.read(settings.data, settings.schema, progress=progress)
        if settings.test_data is not None:
            test = data_files.read(settings.test_data, rows.schema, progress=progress)
            return dataclasses.replace(rows, test=(test.x, test.y))
    return rows.hold_out(settings.held_out) if settings.held_out else rows


def _bundled(settings: FinetuneSettings) -> Rows:
    data = datasets.load(settings.data)
    rows = Rows(data.x_train, data.y_train, data.num_classes, (data.x_test, data.y_test))
    asked = settings.schema.image_size is not None or settings.schema.channels is not None
    if rows.x.ndim == 4 and (asked or settings.is_named):
        rows = rows.with_inputs(lambda x: np.rint((x + 1) * 127.5).astype(np.uint8))
    return rows.with_inputs(lambda x: data_files.as_inputs(x, settings.schema))


@contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, which appears once there is progress."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def _from_scratch(settings: FinetuneSettings, rows: Rows, folder: pathlib.Path) -> tuple[Any, Rows]:
    """A new model, or the one that the run began with."""
    import tensorflow as tf

    if rows.are_pixels:
        rows = _scaled(rows, _centred, _CENTRED)
    start = folder / "start.keras"
    if settings.resume:
        if not start.exists():
            raise InvalidArgumentError(
                f"run_dir={str(folder)!r} lacks {start.name}, the model it began with: restore it."
            )
        return tf.keras.models.load_model(start, compile=False), rows
    outputs = 1 if rows.num_classes == 2 else rows.num_classes
    model = models.build_model(settings.model, rows.x.shape[1:], outputs)
    with _refused_in_one_sentence(folder):
        model.save(start)
    return model, rows


def _pretrained(settings: FinetuneSettings, rows: Rows) -> tuple[Any, Rows]:
    """A model with weights, and the rows as it reads them."""
    from tfprivacy_ft import weights

    shape = rows.x.shape[1:]
    if not rows.are_pixels:
        return weights.load_backbone(settings.model, input_shape=shape), rows
    # Those by name take colours; what is at a path says itself what it takes.
    model = weights.load_backbone(settings.model, input_shape=(*shape[:2], 3) if settings.is_named else None)
    rows = rows.with_inputs(lambda pixels: images.fitted(pixels, channels=model.input_shape[-1]))
    return model, _scaled(rows, *_scaling_of(settings.model, model))


def _scaling_of(name: str, model: Any) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """What a pretrained network reads of pixels 0 .. 255, and that in words."""
    from tfprivacy_ft.keras_compat import keras

    is_squeezenet = {layer.name for layer in model.layers} >= _SQUEEZENET_LAYERS  # by name, by its file, or fine-tuned
    if is_squeezenet:
        caffe = functools.partial(keras.applications.imagenet_utils.preprocess_input, mode="caffe")
        return caffe, "keras.applications.imagenet_utils.preprocess_input(pixels, mode='caffe')"
    for module_name in dir(keras.applications):
        module = getattr(keras.applications, module_name)
        if hasattr(module, name) and hasattr(module, "preprocess_input"):
            return module.preprocess_input, f"keras.applications.{module_name}.preprocess_input(pixels)"
    return _centred, _CENTRED


def _scaled(rows: Rows, scale: Callable[[np.ndarray], np.ndarray], said: str) -> Rows:
    return dataclasses.replace(rows.with_inputs(scale), schema=dataclasses.replace(rows.schema, pixels=said))


def _centred(pixels: np.ndarray) -> np.ndarray:
    """0 .. 255 to -1 .. 1, in float32 throughout."""
    return pixels / np.float32(127.5) - np.float32(1)


def _classes(words: Sequence[str] | None) -> int | list[str] | None:
    if words is None or len(words) > 1:
        return None if words is None else list(words)
    if not words[0].isdecimal():
        raise InvalidArgumentError(
            f"classes={words[0]!r} is not allowed: give how many there are, or all of them by name."
        )
    return int(words[0])


def _as_options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
