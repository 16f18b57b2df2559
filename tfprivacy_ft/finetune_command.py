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
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tfprivacy_ft import _check, data_files, datasets, images, models, run_folder, tables
from tfprivacy_ft.data_files import Rows, Schema
from tfprivacy_ft.encoding import Encoding, parse_categories
from tfprivacy_ft.errors import CheckpointError, DatasetError, InvalidArgumentError
from tfprivacy_ft.finetune import recipes
from tfprivacy_ft.groups import Groups
from tfprivacy_ft.tokens import read_vocabulary

if TYPE_CHECKING:
    from tfprivacy_ft.finetune import FineTuned

__all__ = ["FinetuneSettings", "run_finetune"]

_OF_TOKENS = ("text", "transformer")  # models by name that read nothing else; "lstm" reads measurements, too
_PRETRAINED = ("squeezenet",)  # architectures that `build_model` knows, too, and that come with weights here
_SQUEEZENET_LAYERS = {"fire2_squeeze1x1", "fire9_expand3x3"}
_RATE_OF_TOKENS = 0.5  # vectors of words start near zero: docs/starting_values.md
_CENTRED = "pixels / 127.5 - 1"
_FOLDERS = "runs/finetune"
_KERAS_NAMES = re.compile(r"(functional|model|sequential)(_[0-9]+)?")  # what Keras calls a model without a name


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
        public_data: A file, a folder or a bundled data set like `data` that the model has learned from, whose labels are not
            read: recorded, not accounted; a warning says how many private rows are in it.
        keep_head: Whether the model at the path is a classifier of these classes, whose last layer is kept as its head.
        run_dir: Folder of the run; None for a numbered one in runs/finetune.
        resume: Whether to go on with the run in `run_dir`.
        stages: How many stages of a staged recipe to run now; None for all.
        fix_batchnorm: None, `"freeze"` or `"groupnorm"`.
        examples_per_user: The most rows of one person; None protects single rows.
        epochs, batch_size, learning_rate, l2_norm_clip: As in a recipe, for each of its stages; None for its own, and for a rate
            of 0.5 where a new model reads tokens.

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
    public_data: str | None = None
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
        self._check_tokens()

    @classmethod
    def from_options(
        cls,
        *,
        schema: str | None = None,
        classes: Sequence[str] | None = None,
        bounds: Sequence[str] | None = None,
        categories: Sequence[str] | None = None,
        tokens: str | None = None,
        max_tokens: int | None = None,
        token_buckets: int | None = None,
        vocabulary: str | None = None,
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
            "tokens": _tokens(tokens, max_tokens, token_buckets, vocabulary),
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
        if self.from_scratch and self.schema.tokens is not None:
            changes.setdefault("learning_rate", _RATE_OF_TOKENS)
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

    def _check_tokens(self) -> None:
        of_text = self.model == "lstm" and self.schema.encoding.text
        if (self.model in _OF_TOKENS or of_text) and self.schema.tokens is None:
            raise InvalidArgumentError(
                f"model={self.model!r} reads tokens: give --tokens, the column of text that becomes these, and no --text."
            )
        if self.schema.tokens is not None and self.from_scratch and self.model not in (*_OF_TOKENS, "lstm"):
            raise InvalidArgumentError(
                f"tokens={self.schema.tokens.column!r} is not allowed with model={self.model!r}, which reads no tokens: give "
                f"--text in place of it, or one of {', '.join(_OF_TOKENS)} and lstm."
            )


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
        _named(model, settings.model),
        rows.x,
        rows.y,
        recipe=recipe,
        target_epsilon=settings.target_epsilon,
        delta=delta,
        num_classes=None if settings.from_scratch or settings.keep_head else rows.num_classes,
        validation_data=rows.test,
        public_data=None if rows.public is None else {settings.public_data: (rows.public, None)},
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
    unit = "numbers" if rows.schema.tokens is None else "tokens"
    start = " from random weights" if settings.from_scratch else ""
    return (
        f"{settings.data}: {len(rows.x):,} rows of {shape} {unit}, {rows.num_classes} classes\n"
        f"{settings.model}{start}: {recipe}, within epsilon {settings.target_epsilon:g} at delta {delta:g}"
    )


def _leave(result: "FineTuned", rows: Rows, path: pathlib.Path) -> None:
    """Writes what the run gave into its folder, and says it."""
    groups = _figures_by_class(result, rows)
    with _refused_in_one_sentence(path):
        result.save(path / result.file_name)
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


def _figures_by_class(result: "FineTuned", rows: Rows) -> Groups | None:
    """On the rows to test on, by the names of the classes where these are known; None without such rows."""
    groups, names = result.by_class, rows.schema.classes
    if groups is None or names is None or isinstance(names, int):
        return groups
    return dataclasses.replace(groups, classes={str(names[int(i)]): found for i, found in groups.classes.items()})


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
    with _bar("reading images") as progress:
        rows = (
            _bundled(settings)
            if settings.is_bundled
            else data_files.read(settings.data, settings.schema, progress=progress)
        )
        if settings.test_data is not None:
            test = data_files.read(settings.test_data, rows.schema, progress=progress)
            rows = dataclasses.replace(rows, test=(test.x, test.y))
        if settings.public_data is not None:
            rows = dataclasses.replace(rows, public=_public(settings.public_data, rows, progress))
    return rows.hold_out(settings.held_out) if settings.held_out else rows


def _bundled(settings: FinetuneSettings) -> Rows:
    data = datasets.load(settings.data)
    rows = Rows(data.x_train, data.y_train, data.num_classes, (data.x_test, data.y_test))
    asked = settings.schema.image_size is not None or settings.schema.channels is not None
    if rows.x.ndim == 4 and (asked or settings.is_named):
        rows = rows.with_inputs(_as_pixels)
    return rows.with_inputs(lambda x: data_files.as_inputs(x, settings.schema))


def _public(name: str, rows: Rows, progress: Callable[[int, int], None]) -> np.ndarray:
    """Inputs of public data, as those of the private rows are."""
    if name not in datasets.names():
        try:
            x = data_files.read_inputs(name, rows.schema, progress=progress)
        except DatasetError as error:  # what reads files calls each of them data
            raise DatasetError(str(error).replace("data=", "public_data=", 1)) from error
    else:
        x = datasets.load(name).x_train
        if rows.are_pixels and x.ndim == 4:
            x = images.fitted(_as_pixels(x), size=(rows.x.shape[1], rows.x.shape[2]), channels=rows.x.shape[3])
    if x.shape[1:] != rows.x.shape[1:]:
        raise DatasetError(
            f"public_data={name!r} has rows of shape {x.shape[1:]}, and those of the private data have {rows.x.shape[1:]}: give "
            "public data of the same kind."
        )
    return x


def _as_pixels(x: np.ndarray) -> np.ndarray:
    """Bundled images, which are in -1 .. 1, in 0 .. 255."""
    return np.rint((x + 1) * 127.5).astype(np.uint8)


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
    tokens = rows.schema.tokens
    options = {} if tokens is None else {"vocabulary_size": tokens.vocabulary_size, "mask_zero": True}
    model = models.build_model(settings.model, rows.x.shape[1:], outputs, **options)
    with _refused_in_one_sentence(folder):
        model.save(start)
    return model, rows


def _pretrained(settings: FinetuneSettings, rows: Rows) -> tuple[Any, Rows]:
    """A model with weights, and the rows as it reads them."""
    from tfprivacy_ft import weights

    shape = rows.x.shape[1:]
    if not rows.are_pixels:
        model = weights.load_backbone(settings.model, input_shape=shape)
        _refuse_another_head(settings, model, rows)
        _refuse_other_tokens(rows, model)
        return model, rows
    # Those by name take colours; what is at a path says itself what it takes.
    model = weights.load_backbone(settings.model, input_shape=(*shape[:2], 3) if settings.is_named else None)
    _refuse_another_head(settings, model, rows)
    if len(model.input_shape) != 4 or model.input_shape[-1] not in (1, 3):
        raise InvalidArgumentError(
            f"model={settings.model!r} takes {model.input_shape[1:]}, and the data are images: give a model that takes images "
            "of 1 or 3 channels."
        )
    rows = rows.with_inputs(lambda pixels: images.fitted(pixels, channels=model.input_shape[-1]))
    return model, _scaled(rows, *_scaling_of(settings.model, model))


def _named(model: Any, given: str) -> Any:
    """The model by the name it was saved with; where that is Keras's own, by the one it was asked for, for card and file."""
    import tensorflow as tf

    name = re.sub(r"[^A-Za-z0-9]+", "_", pathlib.Path(given).stem).strip("_")
    if not name or not getattr(model, "inputs", None) or not _KERAS_NAMES.fullmatch(model.name):
        return model
    one = isinstance(model, tf.keras.Sequential)  # which knows lists of one on Keras 3
    ends = (model.inputs[0], model.outputs[0]) if one else (model.input, model.output)
    return tf.keras.Model(*ends, name=name)


def _refuse_another_head(settings: FinetuneSettings, model: Any, rows: Rows) -> None:
    """Refuses to keep a head of other classes than these."""
    outputs = model.output_shape[-1]
    if settings.keep_head and outputs != rows.num_classes and (outputs, rows.num_classes) != (1, 2):
        raise InvalidArgumentError(
            f"model={settings.model!r} gives {outputs} values for an example, and there are {rows.num_classes} classes: leave "
            "--keep-head out, for a new head, or give a classifier of these."
        )


def _refuse_other_tokens(rows: Rows, model: Any) -> None:
    """Refuses a network whose table of words is too short for these tokens."""
    tokens = rows.schema.tokens
    known = [layer.input_dim for layer in model.layers if hasattr(layer, "input_dim") and layer.input is model.input]
    if tokens is not None and known and min(known) < tokens.vocabulary_size:
        raise InvalidArgumentError(
            f"tokens={tokens.column!r} become {tokens.vocabulary_size} numbers, and the model knows {min(known)}: give the "
            "--token-buckets or the --vocabulary that it was trained with."
        )


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


def _tokens(
    column: str | None, length: int | None, buckets: int | None, vocabulary: str | None
) -> dict[str, Any] | None:
    """What is said of tokens, as in a schema."""
    given = {"length": length, "buckets": buckets, "vocabulary": vocabulary}
    said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if column is None and said:
        raise InvalidArgumentError(
            "--max-tokens, --token-buckets and --vocabulary are for --tokens COLUMN: give it, too."
        )
    if buckets is not None and vocabulary is not None:
        raise InvalidArgumentError(
            f"token_buckets={buckets} is not allowed with vocabulary={vocabulary!r}, which numbers its words: give one of them."
        )
    if vocabulary is not None:
        said["vocabulary"] = list(read_vocabulary(vocabulary))
    return None if column is None else {"column": column, **said}


def _as_options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
