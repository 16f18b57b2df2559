"""What each recipe trains: a model for `fit`, what it reads, and the whole model afterwards."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from tfprivacy_ft import batch_norm
from tfprivacy_ft.augmentation import augmented_rows
from tfprivacy_ft.errors import UnsupportedModelError
from tfprivacy_ft.finetune import backbones, centering, features, lora, recipes, trainable
from tfprivacy_ft.finetune.backbones import Classifier
from tfprivacy_ft.finetune.inputs import Examples
from tfprivacy_ft.plan import PrivacyPlan


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One stage, ready to be trained.

    Args:
      model: what is trained; its trainable variables are what the stage moves.
      rows: makes inputs and labels for `model` of the private examples.
      batches: makes what `fit` reads, of the stage's plan and these rows.
      inputs: makes what `model` reads of inputs of the whole model, for validation.
      finish: gives the whole model, once trained.
    """

    model: Any
    rows: Callable[[Examples], Examples]
    batches: Callable[[PrivacyPlan, Examples], Any]
    inputs: Callable[[Any], Any]
    finish: Callable[[], Classifier]


def prepare(recipe: recipes.Recipe, classifier: Classifier) -> Stage:
    """The stage of a recipe.

    Args:
      recipe: what to train.
      classifier: the whole model, whose layers are used and made trainable or not; `finish` undoes the latter.

    Raises:
      UnsupportedModelError: nothing would be trained, or a BatchNormalization would.
    """
    stage = _MAKERS[type(recipe)](recipe, classifier)
    batch_norm.refuse_trainable(stage.model)
    if not stage.model.trainable_variables:
        raise UnsupportedModelError(
            f"the recipe {recipe.name!r} finds nothing to train in the model {classifier.model.name!r}: set layers trainable, or "
            "choose another recipe."
        )
    return stage


def _head(recipe: Any, classifier: Classifier) -> Stage:
    for layer in classifier.head.layers:
        layer.trainable = True

    def rows(examples: Examples) -> Examples:
        x, y = examples.x, examples.y
        if recipe.augment is not None:
            x, y = augmented_rows(
                x, y, recipe.augment, recipe.augmentations, seed=0
            )  # one seed: the cache is found again
        return Examples(features.compute(classifier.features, x, cache=recipe.cache), y)

    def inputs(x: Any) -> Any:
        return features.compute(classifier.features, x)

    return Stage(classifier.head, rows, _batches, inputs, lambda: classifier)


def centered(stage: Stage, rows: Examples, mean: np.ndarray) -> Stage:
    """A stage of a head that learns from rows without this mean of theirs, and ends as a head that reads them as they are.

    Args:
      stage: of `Head`.
      rows: what it gave; they are centered where they stand, if they are in memory, and else batch by batch.
      mean: what `centering.release_mean` gave of them.
    """
    center = centering.center_of(mean)
    centering.adapt(stage.model, center)

    def finish() -> Classifier:
        centering.restore(stage.model, center)
        return stage.finish()

    if not rows.x.flags.writeable:
        return dataclasses.replace(stage, model=centering.centering_model(stage.model, center), finish=finish)
    centering.center_rows(rows.x, center)
    return dataclasses.replace(stage, inputs=lambda x: centering.center_rows(stage.inputs(x), center), finish=finish)


def _full(recipe: Any, classifier: Classifier) -> Stage:
    return _in_place(recipe, classifier, lambda model: model)


def _bias(recipe: Any, classifier: Classifier) -> Stage:
    return _in_place(recipe, classifier, trainable.train_only_biases)


def _last_layers(recipe: Any, classifier: Classifier) -> Stage:
    return _in_place(recipe, classifier, lambda model: trainable.train_last_layers(model, recipe.count))


def _lora(recipe: Any, classifier: Classifier) -> Stage:
    flags = backbones.trainable_flags(classifier.model)
    adapted = lora.add_lora(classifier.model, recipe.rank, recipe.layers)

    def finish() -> Classifier:
        merged = lora.merge_lora(adapted)
        backbones.set_trainable_flags(merged, flags)
        return Classifier(merged, classifier.head_layers)

    return Stage(adapted, _same, _whole_batches(recipe), _same, finish)


def _in_place(recipe: Any, classifier: Classifier, choose: Callable[[Any], Any]) -> Stage:
    """A stage that trains some of the layers of the whole model; `choose` returns what Keras is to train."""
    flags = backbones.trainable_flags(classifier.model)
    model = choose(classifier.model)

    def finish() -> Classifier:
        backbones.set_trainable_flags(classifier.model, flags)
        return classifier

    return Stage(model, _same, _whole_batches(recipe), _same, finish)


def _same(x: Any) -> Any:
    return x


def _batches(plan: PrivacyPlan, rows: Examples) -> Any:
    return plan.batches(rows.x, rows.y)


def _whole_batches(recipe: Any) -> Callable[[PrivacyPlan, Examples], Any]:
    if recipe.augment is None:
        return _batches
    return lambda plan, rows: plan.batches(rows.x, rows.y, augment=recipe.augment)


_MAKERS: dict[type, Callable[[Any, Classifier], Stage]] = {
    recipes.Head: _head,
    recipes.Bias: _bias,
    recipes.LoRA: _lora,
    recipes.LastLayers: _last_layers,
    recipes.Full: _full,
}
