"""What each recipe trains: a model for `fit`, what it reads, and the whole model afterwards."""

import dataclasses
from collections.abc import Callable
from typing import Any

from tfprivacy_ft import batch_norm
from tfprivacy_ft.augmentation import augmented_rows
from tfprivacy_ft.errors import UnsupportedModelError
from tfprivacy_ft.finetune import backbones, features, lora, recipes, trainable
from tfprivacy_ft.finetune.backbones import Classifier
from tfprivacy_ft.finetune.inputs import Examples
from tfprivacy_ft.plan import PrivacyPlan


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One stage, ready to be trained.

    Args:
      model: what is trained; its trainable variables are what the stage moves.
      batches: makes what `fit` reads, of the stage's plan and the private examples.
      inputs: makes what `model` reads of inputs of the whole model, for validation.
      finish: gives the whole model, once trained.
    """

    model: Any
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

    def batches(plan: PrivacyPlan, examples: Examples) -> Any:
        x, y = examples.x, examples.y
        if recipe.augment is not None:
            x, y = augmented_rows(
                x, y, recipe.augment, recipe.augmentations, seed=0
            )  # one seed: the cache is found again
        return plan.batches(features.compute(classifier.features, x, cache=recipe.cache), y)

    def inputs(x: Any) -> Any:
        return features.compute(classifier.features, x)

    return Stage(classifier.head, batches, inputs, lambda: classifier)


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

    return Stage(adapted, _whole_batches(recipe), lambda x: x, finish)


def _in_place(recipe: Any, classifier: Classifier, choose: Callable[[Any], Any]) -> Stage:
    """A stage that trains some of the layers of the whole model; `choose` returns what Keras is to train."""
    flags = backbones.trainable_flags(classifier.model)
    model = choose(classifier.model)

    def finish() -> Classifier:
        backbones.set_trainable_flags(classifier.model, flags)
        return classifier

    return Stage(model, _whole_batches(recipe), lambda x: x, finish)


def _whole_batches(recipe: Any) -> Callable[[PrivacyPlan, Examples], Any]:
    def batches(plan: PrivacyPlan, examples: Examples) -> Any:
        if recipe.augment is None:
            return plan.batches(examples.x, examples.y)
        return plan.batches(examples.x, examples.y, augment=recipe.augment)

    return batches


_MAKERS: dict[type, Callable[[Any, Classifier], Stage]] = {
    recipes.Head: _head,
    recipes.Bias: _bias,
    recipes.LoRA: _lora,
    recipes.LastLayers: _last_layers,
    recipes.Full: _full,
}
