"""Recipes: what is trained of a pretrained model, and how; the one place where their defaults live.

A recipe holds public choices only. None stands for a sound default from the number of examples and the noise, which
`stages_of` and `with_learning_rate` put in; nothing here looks at data, and nothing needs TensorFlow.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one stage trains; the subclasses say what.

    Args:
      epochs: passes over the data, >= 1.
      batch_size: expected examples in a Poisson batch, >= 1; at most n, which larger values mean.
      l2_norm_clip: > 0, the bound on an example's gradient; None where `clipping` has a total of its own.
      clipping: a rule of `tfprivacy_ft.clipping`, such as `Automatic()`; None for `Flat()`.
      learning_rate: > 0, or a Keras schedule.
      optimizer: a Keras optimizer class, or its name, such as `"Adam"`; None for SGD with momentum 0.9.
      noise_ratio: > 0, this stage's noise beside that of the other stages: 2 for twice as much as one with 1.
      average_weights: decay in (0, 1) of an average of the weights over the steps, which becomes the model; True for one over
        about the last quarter of them; None for none.
      augment: an augmentation of `tfprivacy_ft.augmentation`, such as `RandomShift(2)`. It is made anew in every step, but
        for `Head`, whose features are computed once of `augmentations` versions of each example.
      augmentations: K >= 1; the gradients of K versions of an example are averaged before its clip.

    Raises:
      InvalidArgumentError: an argument is outside its range.
    """

    epochs: int | None = None
    batch_size: int | None = None
    l2_norm_clip: float | None = 1.0
    clipping: Any = None
    learning_rate: Any = None
    optimizer: type | str | None = None
    noise_ratio: float = 1.0
    average_weights: float | bool | None = None
    augment: Callable[[Any, Any], Any] | None = None
    augmentations: int = 1

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) is not None:
                _check.positive_integer(**{name: getattr(self, name)})
        if self.l2_norm_clip is not None:
            _check.positive(l2_norm_clip=self.l2_norm_clip)
        if isinstance(self.learning_rate, int | float):
            _check.positive(learning_rate=self.learning_rate)
        if not (self.average_weights is None or isinstance(self.average_weights, bool)):
            _check.open_unit_interval(average_weights=self.average_weights)
        _check.positive(noise_ratio=self.noise_ratio)
        _check.positive_integer(augmentations=self.augmentations)
        if self.augmentations > 1 and self.augment is None:
            raise InvalidArgumentError(
                f"augmentations={self.augmentations} without augment is not allowed: give the function that makes them."
            )

    @property
    def name(self) -> str:
        """What it is called in reports, such as `head`."""
        return _NAMES[type(self)]


@dataclasses.dataclass(frozen=True)
class Head(Recipe):
    """Trains the head alone, on features of the frozen backbone that are computed once.

    Args:
      hidden_units: sizes of tanh layers before the output, where the head is new; () for a linear head.
      norm_groups: how many groups of channels of the features get mean 0 and variance 1 within each example, where the head is
        new; a divisor of the channels. None for none.
      center: whether the mean of the features, released once at about a hundredth of the stage's budget, is taken off them
        while the head learns, where the head is new.
      cache: where the features go: `"memory"`, or a folder, for what memory does not hold. They are private data.
      l2_norm_clip: as in `Recipe`; a tenth of what others have, since gradients on rows of unit length are short.

    Example:
      >>> Head(hidden_units=(32,), epochs=20).epochs
      20
    """

    hidden_units: tuple[int, ...] = ()
    cache: str | os.PathLike[str] = "memory"
    norm_groups: int | None = dataclasses.field(default=None, kw_only=True)
    center: bool = dataclasses.field(default=True, kw_only=True)
    l2_norm_clip: float | None = dataclasses.field(default=0.1, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "hidden_units", tuple(self.hidden_units))
        for units in self.hidden_units:
            _check.positive_integer(hidden_units=units)
        if self.norm_groups is not None:
            _check.positive_integer(norm_groups=self.norm_groups)


@dataclasses.dataclass(frozen=True)
class Bias(Recipe):
    """Trains biases, offsets of normalisations, and the head (BiTFiT).

    Source: Bu et al. 2022, "Differentially Private Bias-Term Fine-tuning of Foundation Models".
    """


@dataclasses.dataclass(frozen=True)
class LoRA(Recipe):
    """Trains low-rank adapters and the head; the adapters are merged into the weights at the end.

    Args:
      rank: >= 1, of each adapter.
      layers: names of the layers that get one, or a function of a layer; None for all dense ones before the head.

    Source: Hu et al. 2021, "LoRA"; Yu et al. 2021, "Differentially Private Fine-tuning of Language Models".
    """

    rank: int = 4
    layers: Any = None

    def __post_init__(self):
        super().__post_init__()
        _check.positive_integer(rank=self.rank)


@dataclasses.dataclass(frozen=True)
class LastLayers(Recipe):
    """Trains the last `count` layers that have weights, the head among them."""

    count: int = 1

    def __post_init__(self):
        super().__post_init__()
        _check.positive_integer(count=self.count)


@dataclasses.dataclass(frozen=True)
class Full(Recipe):
    """Trains every layer that the model has not frozen."""


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Trains nothing: the model is taken as it is, and epsilon is 0."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return "zero_shot"


@dataclasses.dataclass(frozen=True)
class Staged:
    """Several recipes, one after the other, under one budget and in one ledger.

    Args:
      stages: the recipes in their order; their `noise_ratio` divides the budget.

    Raises:
      InvalidArgumentError: there is none, or one of them is not a single recipe.

    Example:
      >>> Staged((Head(), Full(noise_ratio=1.5))).name
      'head, full'
    """

    stages: tuple[Recipe, ...] = (Head(), LastLayers(2), Full())

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages or not all(isinstance(stage, Recipe) for stage in self.stages):
            raise InvalidArgumentError(
                f"stages={self.stages!r} is not allowed: give one or more of Head(), Bias(), LoRA(), LastLayers() and Full()."
            )

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return ", ".join(stage.name for stage in self.stages)


AnyRecipe = Recipe | Staged | ZeroShot

MOMENTUM = 0.9  # of SGD, where no optimizer is named

# The starting values of docs/starting_values.md.
_LARGEST_BATCH, _STEPS, _EPOCHS_OF_HEAD = 4096, 100, 40
_EPOCHS = 30
_NOISE_IN_LOGIT, _STEADY = 2.0, 50.0
_RATE, _RATE_ON_UNIT_ROWS, _RATE_OF_OTHERS = 0.025, 0.1, 0.01

_NAMES = {Head: "head", Bias: "bias", LoRA: "lora", LastLayers: "last_layers", Full: "full"}
_BY_NAME: dict[str, Callable[[], AnyRecipe]] = {
    "head": Head,
    "bias": Bias,
    "lora": LoRA,
    "last_layers": LastLayers,
    "full": Full,
    "one_stage": Full,
    "staged": Staged,
    "light": lambda: Staged((Head(), LastLayers(2))),
    "zero_shot": ZeroShot,
}


def names() -> list[str]:
    """Names that `find` knows.

    Example:
      >>> "head" in names()
      True
    """
    return sorted(_BY_NAME)


def find(recipe: str | AnyRecipe) -> AnyRecipe:
    """The recipe of this name, or the recipe itself.

    Raises:
      InvalidArgumentError: it is neither.

    Example:
      >>> find("light").name
      'head, last_layers'
    """
    if isinstance(recipe, AnyRecipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in _BY_NAME:
        raise InvalidArgumentError(
            f"recipe={recipe!r} is not allowed: give one of {', '.join(names())}, or a recipe such as Head()."
        )
    return _BY_NAME[recipe]()


def stages_of(recipe: AnyRecipe, *, num_examples: int) -> tuple[Recipe, ...]:
    """The stages of a recipe, with the defaults of batch size and epochs put in; none for `ZeroShot`.

    Args:
      num_examples: n, public.

    Example:
      >>> stages_of(Full(epochs=3), num_examples=10_000)[0].batch_size
      800
    """
    return tuple(_sized(stage, num_examples) for stage in parts_of(recipe))


def without_centering(stages: tuple[Recipe, ...]) -> tuple[Recipe, ...]:
    """The stages, in which no head is centered.

    Example:
      >>> without_centering((Head(),))[0].center
      False
    """
    return tuple(dataclasses.replace(stage, center=False) if isinstance(stage, Head) else stage for stage in stages)


def with_learning_rate(
    stage: Recipe, *, num_examples: int, noise_multiplier: float, target_epsilon: float, unit_rows: bool
) -> Recipe:
    """The stage with the default of its learning rate put in, where it has none.

    Args:
      stage: with batch size and epochs.
      num_examples: n, public.
      noise_multiplier: of this stage.
      target_epsilon: the budget of all stages together.
      unit_rows: whether the head is new, and reads rows of unit length.

    Example:
      >>> stage = Head(batch_size=1000, epochs=100)
      >>> facts = {"num_examples": 1000, "noise_multiplier": 10.0, "target_epsilon": 3.0}
      >>> round(with_learning_rate(stage, **facts, unit_rows=True).learning_rate, 3)
      20.0

    Source: docs/starting_values.md, measured on public data.
    """
    if stage.learning_rate is not None:
        return stage
    assert stage.batch_size is not None and stage.epochs is not None
    clip = stage.l2_norm_clip or 1.0
    if stage.optimizer is not None:
        rate = _RATE_OF_OTHERS
    elif unit_rows and isinstance(stage, Head) and not stage.hidden_units:
        steps = math.ceil(num_examples / stage.batch_size) * stage.epochs
        rate = rate_on_unit_rows(
            noise_multiplier=noise_multiplier, batch_size=stage.batch_size, steps=steps, l2_norm_clip=clip
        )
    else:
        # Smaller steps under more noise; the exponent goes through the rates measured at epsilon 1, 3 and 8.
        rate = (_RATE_ON_UNIT_ROWS if unit_rows else _RATE) * target_epsilon ** (2 / 3) / clip
    return dataclasses.replace(stage, learning_rate=rate)


def rate_on_unit_rows(*, noise_multiplier: float, batch_size: int, steps: int, l2_norm_clip: float) -> float:
    """The learning rate at which the noise of all steps adds 2 to the logit of a unit row, in standard deviation.

    The sum of the noise of all steps in one weight is rate / (1 - momentum) * clip * noise / batch size * sqrt(steps), and a
    logit of a row of norm 1 has as much of it, whatever the number of features. Beyond `50 / clip` training is not steady.
    """
    by_noise = _NOISE_IN_LOGIT * (1 - MOMENTUM) * batch_size / (noise_multiplier * math.sqrt(steps))
    return min(by_noise, _STEADY) / l2_norm_clip


def parts_of(recipe: AnyRecipe) -> tuple[Recipe, ...]:
    """The stages of a recipe as they were given; none for `ZeroShot`.

    Example:
      >>> parts_of(Head()) == (Head(),)
      True
    """
    if isinstance(recipe, ZeroShot):
        return ()
    return recipe.stages if isinstance(recipe, Staged) else (recipe,)


def describe(recipe: AnyRecipe) -> dict[str, Any]:
    """The recipe as plain values that JSON can hold, but for where features are kept, which is the machine's.

    Example:
      >>> describe(LastLayers(2))["count"]
      2
    """
    if isinstance(recipe, Staged):
        return {"name": recipe.name, "stages": [describe(stage) for stage in recipe.stages]}
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe) if field.name != "cache"}
    return {"name": recipe.name} | {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "get_config"):
        return {type(value).__name__: _plain(tuple(value.get_config().items()))}
    return getattr(value, "__name__", type(value).__name__)


def _sized(stage: Recipe, n: int) -> Recipe:
    if isinstance(stage, Head):  # at least a hundred steps, on everybody where memory allows
        batch_size = min(n, stage.batch_size or _LARGEST_BATCH)
        epochs = stage.epochs or max(_EPOCHS_OF_HEAD, math.ceil(_STEPS * batch_size / n))
    else:
        batch_size = min(n, stage.batch_size or round(8 * math.sqrt(n)))
        epochs = stage.epochs or _EPOCHS
    return dataclasses.replace(stage, batch_size=batch_size, epochs=epochs)
