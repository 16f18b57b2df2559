"""`finetune`: runs the stages of a recipe under one budget, in one ledger, so that another process can go on with them.

The private steps are those of `PrivacyPlan` and the DP optimizers, in Keras's `fit`, on Poisson batches. What is
released is in the ledger before it is computed; a checkpoint is written after each epoch, when the ledger has it. So
whatever is killed and run again counts twice, and nothing counts less than once.
"""

import logging
import os
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft import _check, batch_norm
from tfprivacy_ft.compute_epsilon import compute_epsilon
from tfprivacy_ft.errors import BudgetExceededError, CheckpointError, InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.finetune import backbones, budget, centering, checkpoints, inputs, recipes
from tfprivacy_ft.finetune import stages as stage_makers
from tfprivacy_ft.finetune.backbones import Classifier
from tfprivacy_ft.finetune.checkpoints import Checkpoint, RunFolder, digest
from tfprivacy_ft.finetune.inputs import Examples
from tfprivacy_ft.finetune.recipes import AnyRecipe, Recipe
from tfprivacy_ft.finetune.result import FineTuned
from tfprivacy_ft.groups import Groups, groups_of
from tfprivacy_ft.keras_compat import keras
from tfprivacy_ft.ledger import Ledger, software
from tfprivacy_ft.overlap import warn_of_shared_rows
from tfprivacy_ft.plan import PrivacyPlan
from tfprivacy_ft.weight_averaging import WeightAveraging

_log = logging.getLogger(__name__)

_MOST_CLASSES = 20  # whose accuracies stand in the ledger, and in reports; the card has those of more


def finetune(
    model: Any,
    x: Any,
    y: Any,
    *,
    recipe: str | AnyRecipe = "head",
    target_epsilon: float,
    delta: float,
    num_classes: int | None = None,
    loss: Any = None,
    validation_data: tuple[Any, Any] | None = None,
    public_data: Any = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    stages: int | None = None,
    fix_batchnorm: str | None = None,
    examples_per_user: int | None = None,
    verbose: str | int = "auto",
) -> FineTuned:
    """Fine-tunes a pretrained model with differential privacy.

    Guarantees that everything released of x and y is within `target_epsilon`, by the ledger; that the model given is not
    changed; and that weights which the recipe does not train are bit for bit those of the model given. The weights
    given are taken to be public: what they were trained on is not accounted for.

    Args:
      model: a functional or sequential Keras model: a backbone if `num_classes` is given, else a whole classifier.
      x: private inputs, an array [n, ...] of numbers, or a tuple or dictionary of them, as the model takes them.
      y: private labels, integers in 0 .. classes - 1, [n]; with `loss`, whatever that takes.
      recipe: "head", "bias", "lora", "last_layers", "full" (or "one_stage"), "staged", "light", "zero_shot", or a recipe
        object of `tfprivacy_ft.finetune` with settings of its own.
      target_epsilon: > 0, the budget of all stages together, for one example.
      delta: in (0, 1), well below 1/n.
      num_classes: >= 2, for a new head; None keeps the model's own.
      loss: None for the cross-entropy that fits the head; or a Keras loss, for a model with its own head.
      validation_data: public (x, y) to measure on after each epoch.
      public_data: (x, y), or a dictionary of such pairs by name, that the model was trained on: recorded, not accounted; y may
        be None. A warning says how many private rows are in it.
      run_dir: folder for ledger and checkpoints; None keeps all in memory.
      resume: whether to go on with the run in `run_dir`, with the same model, data and settings; also where it was copied
        from another machine. What ran and is in no checkpoint runs again, and counts again.
      stages: how many stages of a staged recipe to run now; None for all that are left.
      fix_batchnorm: "freeze" keeps the statistics of BatchNormalization layers, "groupnorm" replaces these.
      examples_per_user: the most examples of one person, who is then protected with all of them; None protects examples.
      verbose: as in `fit`.

    Returns:
      The model, its epsilon, its history and figures.

    Raises:
      InvalidArgumentError: an argument is outside its range, `run_dir` holds a run and `resume` is False, or the reverse.
      DatasetError: the arrays cannot be trained on: NaN, text, other shapes than the model's, one class only.
      UnsupportedModelError: the model cannot be taken apart, or has a BatchNormalization that would be trained.
      CheckpointError: what is resumed is of another model or of other settings, or cannot be read or written.
      LedgerError: the ledger cannot be written, is damaged, or another process writes it.

    Example:
      >>> from tfprivacy_ft import datasets, models
      >>> from tfprivacy_ft.finetune import Head, finetune
      >>> data = datasets.load("breast_cancer")
      >>> backbone = models.build_model("mlp", (30,), 8)
      >>> result = finetune(backbone, data.x_train, data.y_train, recipe=Head(epochs=2), num_classes=2,
      ...                   target_epsilon=1.0, delta=1e-4, verbose=0)
      >>> result.epsilon <= 1.0, result.model.output_shape
      (True, (None, 1))

    Source: Tramer & Boneh 2021, "Differentially Private Learning Needs Better Features", for heads; Abadi et al. 2016 for
      the private step.
    """
    found = recipes.find(recipe)
    _check.positive(target_epsilon=target_epsilon)
    _check.open_unit_interval(delta=delta)
    if stages is not None:
        _check.positive_integer(stages=stages)
    if num_classes is not None and (loss is not None or isinstance(found, recipes.ZeroShot)):
        raise InvalidArgumentError(
            f"num_classes={num_classes} is not allowed with a loss of your own or without training: give a model with its own "
            "head, and num_classes=None."
        )
    folder = RunFolder(run_dir, resume=resume)
    with folder.recording():
        classifier = _classifier(model, found, num_classes, loss, fix_batchnorm)
        _refuse_untrainable(found, classifier)
        private = _examples(x, y, classifier, loss, "x, y", several=not isinstance(found, recipes.ZeroShot))
        validation = None
        if validation_data is not None:
            validation = _examples(
                *_pair(validation_data, "validation_data"), classifier, loss, "validation_data", several=False
            )
        run = _Run(folder, found, classifier, private, validation, loss, verbose)
        run.begin(
            num_new_weights=len(classifier.head.get_weights()) if num_classes is not None else 0,
            target_epsilon=float(target_epsilon),
            delta=float(delta),
            examples_per_user=examples_per_user,
            public_data=_described(public_data, private),
        )
        return run.go(stages)


class _Run:
    """One call of `finetune`, from checked arguments to the result."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: AnyRecipe,
        classifier: Classifier,
        private: Examples,
        validation: Examples | None,
        loss: Any,
        verbose: str | int,
    ):
        self._folder, self._recipe, self._classifier = folder, recipe, classifier
        self._private, self._validation = private, validation
        self._loss, self._verbose = _loss(loss, classifier), verbose
        self._is_classifier = loss is None
        self._history: list[dict[str, Any]] = []

    def begin(
        self,
        *,
        num_new_weights: int,
        target_epsilon: float,
        delta: float,
        examples_per_user: int | None,
        public_data: dict[str, Any],
    ) -> None:
        """Solves for the noise of all stages, or finds it in the run that is gone on with, and writes down what will run."""
        weights = self._classifier.model.get_weights()
        self._untouched = [digest(array) for array in weights[: len(weights) - num_new_weights]]
        shared: dict[str, Any] = {"num_examples": len(self._private), "target_epsilon": target_epsilon, "delta": delta}
        shared["examples_per_user"] = examples_per_user
        settings: dict[str, Any] = {
            "architecture": digest(np.asarray(str([array.shape for array in weights]))),
            "pretrained_weights": digest(np.asarray("".join(self._untouched))),
            "recipe": recipes.describe(self._recipe),
            **shared,
            "shape_of_examples": [part["shape"][1:] for part in self._private.shapes["x"]],
        }
        stages = recipes.stages_of(self._recipe, num_examples=len(self._private))
        if not num_new_weights:
            stages = recipes.without_centering(stages)  # rows of unit length are before new heads only
        before = self._folder.facts
        if before.get("settings"):
            self._folder.refuse_another(settings)
            noise = [stage["noise_multiplier"] for stage in before["stages"]]
        else:
            noise = list(budget.solve(stages, **shared)) if stages else []
        rates: dict[str, Any] = {
            "num_examples": len(self._private),
            "target_epsilon": target_epsilon,
            "unit_rows": num_new_weights > 0,
        }
        self._stages = [
            recipes.with_learning_rate(stage, noise_multiplier=z, **rates)
            for stage, z in zip(stages, noise, strict=True)
        ]
        self._plans = [budget.plan(stage, z, **shared) for stage, z in zip(stages, noise, strict=True)]
        self._delta = delta
        self._facts: dict[str, Any] = {
            "recipe": self._recipe.name,
            "settings": settings,
            "data": self._private.shapes,
            "public_data": public_data,
            "stages": [_describe(*pair) for pair in zip(self._stages, self._plans, strict=True)],
            "software": software(),
        }

    def go(self, stages: int | None) -> FineTuned:
        """Runs so many stages, or all that are left."""
        names = ("num_examples", "target_epsilon", "examples_per_user")
        facts = {name: self._facts["settings"][name] for name in names} | {"recipe": self._recipe.name}
        unit = "example" if facts["examples_per_user"] is None else "user"
        with self._folder.ledger(delta=self._delta, facts={"unit": unit, **facts}) as ledger:
            self._folder.write(state=checkpoints.RUNNING, sentence=None, **self._facts)
            done = self._run_stages(ledger, stages)
            for plan in self._plans:
                plan.settle()
            whole = self._classifier.model
            model = keras.Model(whole.input, whole.output, name=whole.name)
            figures, by_class = self._figures(model)
            if figures:
                ledger.figures(figures | _accuracies(by_class))
            report = compute_epsilon(ledger, delta=self._delta)
        finished = done == len(self._stages)
        self._folder.write(
            state=checkpoints.FINISHED if finished else checkpoints.PAUSED,
            sentence=f"{done} of {len(self._stages)} stages ran.",
            stages_done=done,
            epsilon=report.epsilon,
            figures=figures,
            by_class=None if by_class is None else by_class.to_dict(),
            history=self._history,
        )
        return FineTuned(
            model,
            report,
            self._history,
            figures,
            self._recipe,
            self._folder.facts,
            finished,
            self._folder.path,
            by_class,
        )

    def _figures(self, model: Any) -> tuple[dict[str, float], Groups | None]:
        """What the model is worth on public examples, over all of them, and by class."""
        if self._validation is None:
            return {}, None
        examples, outputs = self._validation, model.predict(self._validation.x, verbose=0)
        targets = examples.y if outputs.ndim == examples.y.ndim or outputs.shape[-1] > 1 else examples.y[:, np.newaxis]
        figures = {"loss": float(tf.reduce_mean(keras.losses.get(self._loss)(targets, outputs)))}
        if not self._is_classifier:
            return figures, None
        by_class = groups_of(outputs, examples.y)
        auc = by_class.overall.auc
        return figures | {"accuracy": by_class.overall.accuracy} | ({} if auc is None else {"auc": auc}), by_class

    def _run_stages(self, ledger: Ledger, stages: int | None) -> int:
        """Runs the stages that are left, or as many of them; how many are done."""
        done, checkpoint = self._folder.stages_done(), self._folder.newest()
        if done:
            self._folder.load_stage(done - 1, self._classifier.model)
        if checkpoint is not None:
            self._history = checkpoint.history
        last = len(self._stages) if stages is None else min(len(self._stages), done + stages)
        while done < last:
            ran = self._run_stage(done, ledger, checkpoint if checkpoint and checkpoint.stage == done else None)
            if not ran:
                break
            self._folder.save_stage(done, self._classifier.model, self._untouched)
            done += 1
        return done

    def _run_stage(self, number: int, ledger: Ledger, checkpoint: Checkpoint | None) -> bool:
        """Trains one stage, from the checkpoint if there is one; False if the budget had no room for a step of it.

        Raises:
          BudgetExceededError: there was no room for the first step of all.
        """
        recipe, plan = self._stages[number], self._plans[number]
        plan.continue_ledger(ledger)
        stage = stage_makers.prepare(recipe, self._classifier)
        metrics = ["accuracy"] if self._is_classifier else []  # a loss of the user's own may be of anything
        decay = None if recipe.average_weights is True else recipe.average_weights
        average = WeightAveraging(decay) if recipe.average_weights else None
        epochs_done = 0 if checkpoint is None else checkpoint.epoch
        try:
            rows, mean = stage.rows(self._private), None
            if isinstance(recipe, recipes.Head) and recipe.center:
                mean = self._mean(rows, recipe, plan) if checkpoint is None else checkpoint.mean
                assert mean is not None, "a checkpoint of a centered head without its mean"
                stage = stage_makers.centered(stage, rows, mean)
            stage.model.compile(_optimizer(recipe, plan), loss=self._loss, metrics=metrics, jit_compile=False)
            if checkpoint is not None:
                _restore(stage.model, average, checkpoint)
            if epochs_done < plan.epochs:
                every_epoch = _EveryEpoch(self._folder, ledger, self._history, number, recipe, average, mean)
                self._fit(stage, rows, plan, epochs_done, [*([] if average is None else [average]), every_epoch])
            elif average is not None:  # killed between the last epoch and the end of the stage
                _assign_average(stage.model, checkpoint)
        except BudgetExceededError as error:
            if not self._history:
                raise
            _log.warning("stage %d of %d stopped: %s", number + 1, len(self._stages), error)
            if average is not None:
                _assign_average(stage.model, checkpoint)
            return epochs_done > 0
        finally:
            plan.settle()
            self._classifier = stage.finish()
        return True

    def _mean(self, rows: Examples, recipe: recipes.Head, plan: PrivacyPlan) -> np.ndarray:
        """The mean of a head's rows, released within the budget."""
        assert plan.target_epsilon is not None
        event = budget.event_of_mean(
            recipe, plan.noise_multiplier, num_examples=len(self._private), examples_per_user=plan.examples_per_user
        )
        budgeted: dict[str, Any] = {"ledger": plan.ledger, "target_epsilon": plan.target_epsilon, "delta": plan.delta}
        return centering.release_mean(rows.x, event, rows_per_example=plan.rows_per_example, **budgeted)

    def _fit(
        self,
        stage: stage_makers.Stage,
        rows: Examples,
        plan: PrivacyPlan,
        epochs_done: int,
        callbacks: list[Any],
    ) -> None:
        validation = self._validation
        stage.model.fit(
            stage.batches(plan, rows),
            epochs=plan.epochs,
            initial_epoch=epochs_done,
            validation_data=None if validation is None else (stage.inputs(validation.x), validation.y),
            callbacks=[*plan.callbacks(), *callbacks],
            shuffle=False,  # Poisson batches are drawn already
            verbose=self._verbose,
        )


class _EveryEpoch(keras.callbacks.Callback):
    """Keeps history and checkpoint; comes after the plan's callback, which has settled the epoch by then."""

    def __init__(
        self,
        folder: RunFolder,
        ledger: Ledger,
        history: list[dict[str, Any]],
        stage: int,
        recipe: Recipe,
        average: WeightAveraging | None,
        mean: np.ndarray | None,
    ):
        super().__init__()
        self._mean = mean
        self._folder, self._ledger, self._history = folder, ledger, history
        self._stage, self._recipe, self._average = stage, recipe, average

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Called by Keras."""
        figures = {name: float(value) for name, value in (logs or {}).items()}
        self._history.append({"stage": self._stage + 1, "recipe": self._recipe.name, "epoch": epoch + 1, **figures})
        if self._folder.path is None:
            return
        moving_clip = self.model.optimizer.mechanism.moving_clip
        self._folder.save(
            Checkpoint(
                stage=self._stage,
                epoch=epoch + 1,
                history=self._history,
                ledger=self._ledger.position(),
                weights=[np.asarray(variable) for variable in self.model.trainable_variables],
                optimizer=[np.asarray(variable) for variable in self.model.optimizer.variables],
                average={} if self._average is None else self._average.state(),
                mean=self._mean,
                moving_clip=None if moving_clip is None else float(moving_clip.value()),
            )
        )


def _restore(model: Any, average: WeightAveraging | None, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's values into a compiled model and its optimizer."""
    variables = list(model.trainable_variables)
    model.optimizer.build(variables)
    _assign(variables, checkpoint.weights)
    _assign(list(model.optimizer.variables), checkpoint.optimizer)
    if average is not None:
        average.load_state(checkpoint.average)
    if checkpoint.moving_clip is not None:
        model.optimizer.mechanism.moving_clip.go_on_from(checkpoint.moving_clip)


def _assign(variables: list[Any], values: list[np.ndarray]) -> None:
    if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
        raise CheckpointError(
            "the checkpoint holds weights of another architecture, or of another optimizer: give the model and the recipe "
            "that the run began with."
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _assign_average(model: Any, checkpoint: Checkpoint | None) -> None:
    """Gives the model the average of its weights, if there is one, as the end of a `fit` would have."""
    if checkpoint is not None:
        _assign(model.trainable_variables, [checkpoint.average[f"average_{i}"] for i in range(len(checkpoint.weights))])


def _refuse_untrainable(recipe: AnyRecipe, classifier: Classifier) -> None:
    """Finds out before the first step whether every stage can be trained: a later one would come too late to say no."""
    flags = backbones.trainable_flags(classifier.model)
    for stage in recipes.parts_of(recipe):
        _optimizer_class(stage)
        stage_makers.prepare(stage, classifier)
        backbones.set_trainable_flags(classifier.model, flags)


def _classifier(
    model: Any, recipe: AnyRecipe, num_classes: int | None, loss: Any, fix_batchnorm: str | None
) -> Classifier:
    if fix_batchnorm is not None:
        model = batch_norm.fix_batchnorm(model, fix_batchnorm)
    if num_classes is None:
        return backbones.with_own_head(model, probabilities=loss is None)
    heads = [part for part in recipes.parts_of(recipe) if isinstance(part, recipes.Head)]
    head = heads[0] if heads else recipes.Head()
    return backbones.with_new_head(model, num_classes, head.hidden_units, head.norm_groups)


def _examples(x: Any, y: Any, classifier: Classifier, loss: Any, name: str, *, several: bool) -> Examples:
    examples = inputs.checked(x, y, classifier.model, name=name)
    if loss is not None:
        return examples
    if classifier.outputs is None:
        raise UnsupportedModelError(
            f"the model gives {classifier.model.output_shape} for a batch, which is no row of classes for each example: give "
            "num_classes for a new head, or a loss of your own."
        )
    return inputs.labelled(examples, max(classifier.outputs, 2), several=several, name=name)


def _pair(data: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise InvalidArgumentError(f"{name} is not a pair of arrays: give (x, y).")
    return data[0], data[1]


def _loss(loss: Any, classifier: Classifier) -> Any:
    if loss is not None:
        return keras.losses.get(loss)
    return "binary_crossentropy" if classifier.outputs == 1 else "sparse_categorical_crossentropy"


def _optimizer(recipe: Recipe, plan: PrivacyPlan) -> Any:
    settings: dict[str, Any] = {"learning_rate": recipe.learning_rate, "clipping": recipe.clipping}
    if recipe.optimizer is None:
        settings["momentum"] = recipes.MOMENTUM
    return plan.optimizer(_optimizer_class(recipe), l2_norm_clip=recipe.l2_norm_clip, **settings)


def _optimizer_class(recipe: Recipe) -> type:
    given = recipe.optimizer or "SGD"
    made = getattr(keras.optimizers, given, None) if isinstance(given, str) else given
    if not (isinstance(made, type) and issubclass(made, keras.optimizers.Optimizer)):
        raise InvalidArgumentError(
            f"optimizer={given!r} is not allowed: give a Keras optimizer class, or its name, such as 'Adam'."
        )
    return made


def _accuracies(by_class: Groups | None) -> dict[str, float]:
    """The accuracy of each class as a figure for the ledger."""
    if by_class is None or len(by_class.classes) > _MOST_CLASSES:
        return {}
    return {f"accuracy of class {name}": figures.accuracy for name, figures in by_class.classes.items()}


def _describe(stage: Recipe, plan: PrivacyPlan) -> dict[str, Any]:
    return {**recipes.describe(stage), "noise_multiplier": plan.noise_multiplier, "steps": plan.steps}


def _described(public_data: Any, private: Examples) -> dict[str, Any]:
    """Shapes of the public data, by name; warns where the private rows are among them."""
    if public_data is None:
        return {}
    named = public_data if isinstance(public_data, dict) else {"public data": public_data}
    for name, pair in named.items():
        warn_of_shared_rows(name, _pair(pair, f"public_data[{name!r}]")[0], private.x)
    return {
        name: [[list(np.shape(part)) for part in tf.nest.flatten(array)] for array in pair if array is not None]
        for name, pair in named.items()
    }
