"""What a private fine-tuning gave: the model, its epsilon, its figures."""

import dataclasses
import os
import pathlib
from typing import Any

from tfprivacy_ft.compute_epsilon import Report
from tfprivacy_ft.finetune.card import write_card
from tfprivacy_ft.finetune.recipes import AnyRecipe
from tfprivacy_ft.groups import Groups


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
    """

    model: Any = dataclasses.field(repr=False)
    report: Report
    history: list[dict[str, Any]] = dataclasses.field(repr=False)
    figures: dict[str, float]
    recipe: AnyRecipe
    facts: dict[str, Any] = dataclasses.field(repr=False)
    finished: bool = True
    run_dir: pathlib.Path | None = None

    @property
    def epsilon(self) -> float:
        """The epsilon of the report; 0 where no private step ran."""
        return self.report.epsilon

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model where `tf.keras.models.load_model` finds it: a .keras or .h5 file."""
        self.model.save(os.fspath(path))

    def write_card(
        self, folder: str | os.PathLike[str], *, groups: Groups | None = None
    ) -> tuple[pathlib.Path, pathlib.Path]:
        """Writes the model's card, Markdown and JSON: data, recipe, epsilon, figures, and what these leave out.

        Args:
          folder: where `card.md` and `card.json` go.
          groups: figures by class and group, from `tfprivacy_ft.groups.figures_by_group`.

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
            groups=groups,
        )
