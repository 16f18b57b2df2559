"""What a private fine-tuning gave: the model, its epsilon, its figures."""

import dataclasses
import os
import pathlib
from typing import Any

from tfprivacy_ft.compute_epsilon import Report
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.finetune.card import write_card
from tfprivacy_ft.finetune.recipes import AnyRecipe
from tfprivacy_ft.groups import Groups, figures_by_group
from tfprivacy_ft.keras_compat import is_saved_model, layers_inside, write_saved_model


@dataclasses.dataclass(frozen=True, eq=False)
class FineTuned:
    """The result of `finetune`.

    Args:
      model: a plain Keras model from inputs to probabilities, not compiled, that loads without this library.
      report: the epsilon of what ran, by the ledger; of all stages, also those that ran in another process.
      history: one dictionary for each epoch: `stage`, `recipe`, `epoch`, `epsilon`, and what Keras showed.
      figures: of the model on `validation_data`, such as `accuracy` and, for two classes, `auc`; empty without them.
      recipe: what was asked for.
      facts: public facts on the run: shapes, sizes, the noise of each stage, names of public data, versions.
      finished: False where stages of the recipe, or what the budget could not pay for, did not run.
      run_dir: the run's folder, or None.
      by_class: figures of the model on each class of `validation_data`, where noise shows first; None without classes.
    """

    model: Any = dataclasses.field(repr=False)
    report: Report
    history: list[dict[str, Any]] = dataclasses.field(repr=False)
    figures: dict[str, float]
    recipe: AnyRecipe
    facts: dict[str, Any] = dataclasses.field(repr=False)
    finished: bool = True
    run_dir: pathlib.Path | None = None
    by_class: Groups | None = dataclasses.field(default=None, repr=False)

    @property
    def epsilon(self) -> float:
        """The epsilon of the report; 0 where no private step ran."""
        return self.report.epsilon

    @property
    def file_name(self) -> str:
        """A name to save the model by: `model.keras`, or `model`, a folder, where the backbone is a SavedModel on Keras 3."""
        return "model" if self._has_saved_model else "model.keras"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model, as one that loads without this library.

        Args:
          path: ends in .keras or .h5, for `tf.keras.models.load_model`; or has no ending: a folder, which becomes a SavedModel
            for `tf.saved_model.load` and for what serves such.

        Raises:
          InvalidArgumentError: it ends in something else.
          UnsupportedModelError: the model has a SavedModel inside, which is in no .keras or .h5 file.
        """
        suffix = pathlib.Path(path).suffix
        if not suffix:
            write_saved_model(self.model, os.fspath(path))
            return
        if suffix not in (".keras", ".h5"):
            raise InvalidArgumentError(
                f"path={os.fspath(path)!r} is not allowed: give a name that ends in .keras or .h5, or one without an ending for "
                "a SavedModel folder."
            )
        if self._has_saved_model:
            raise UnsupportedModelError(
                f"the model has a SavedModel inside, of which a {suffix} file would hold the path alone: give save a path "
                "without an ending, where a SavedModel folder with everything is written."
            )
        self.model.save(os.fspath(path))

    def by_group(self, x: Any, y: Any, groups: Any = None) -> Groups:
        """Figures of the model on each class and group of some examples, which carry no noise.

        Args:
          x, y, groups: as in `tfprivacy_ft.groups.figures_by_group`, such as groups={"sex": ...}.
        """
        return figures_by_group(self.model, x, y, groups)

    @property
    def _has_saved_model(self) -> bool:
        return any(map(is_saved_model, layers_inside(self.model)))

    def write_card(
        self, folder: str | os.PathLike[str], *, groups: Groups | None = None
    ) -> tuple[pathlib.Path, pathlib.Path]:
        """Writes the model's card, Markdown and JSON: data, recipe, epsilon, figures, and what these leave out.

        Args:
          folder: where `card.md` and `card.json` go.
          groups: figures by class and group, from `by_group`; None for `by_class`.

        Returns:
          The paths of both.
        """
        return write_card(
            folder,
            report=self.report,
            recipe=self.facts["stages"] or self.recipe.name,
            data=self.facts["data"],
            figures=self.figures,
            model=self.model,
            public_data=self.facts["public_data"] or None,
            groups=groups or self.by_class,
            model_file=self.file_name,
        )
