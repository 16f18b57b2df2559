"""Keras callbacks: epsilon in the progress bar and History, steps reserved ahead, a stop before the budget breaks."""

import logging
from typing import TYPE_CHECKING, Any

from tfprivacy_ft.keras_compat import fit_arguments, keras, steps_per_execution
from tfprivacy_ft.ledger import EVALUATION
from tfprivacy_ft.sampling import UNKNOWN

if TYPE_CHECKING:
    from tfprivacy_ft.plan import PrivacyPlan

_log = logging.getLogger(__name__)


def _choosing(callbacks: list[Any]) -> list[str]:
    """Names of Keras's callbacks that stop, keep or slow down a training by what its metrics say."""
    found = []
    for callback in callbacks:
        keeps_best = isinstance(callback, keras.callbacks.ModelCheckpoint) and callback.save_best_only
        if keeps_best or isinstance(callback, keras.callbacks.EarlyStopping | keras.callbacks.ReduceLROnPlateau):
            found.append(type(callback).__name__)
    return sorted(set(found))


class EpsilonCallback(keras.callbacks.Callback):
    """Keeps a plan's ledger during `fit`, and shows the epsilon of what ran.

    Adds `epsilon` to the logs of every epoch, for the progress bar, History, TensorBoard and CSV loggers: before the last
    epoch a quick bound on it, seldom more than half a percent above what the report of that moment would say. Stops training
    where the plan's target would be passed; the model then is the one of the last allowed step.

    Args:
      plan: the plan whose optimizer the model was compiled with.
    """

    def __init__(self, plan: "PrivacyPlan"):
        super().__init__()
        self._plan = plan

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds out how batches are drawn, and that the budget has room for one."""
        arguments = fit_arguments(self.model)
        self._recorder = self._plan.recorder(self.model.optimizer)
        self._recorder.use(self._plan.sampling_of(arguments))
        self._plan.ledger.note(
            "training metrics", "loss and metrics of the training data were shown without noise while training."
        )
        for name in _choosing((arguments or {}).get("callbacks", [])):
            self._plan.ledger.note(
                "a choice by metrics",
                f"{name} chose by metrics without noise: a release, where they are those of private data.",
            )

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Drops what an interrupted pass left of a logical batch."""
        self._recorder.start_pass()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Lists what comes as a release."""
        self._plan.ledger.note(EVALUATION.kind, EVALUATION.text)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Has the coming steps reserved before they run."""
        self._recorder.announce(steps_per_execution(self.model))

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Stops once not one more step fits into the budget."""
        if not self._recorder.finished():
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Settles the epoch and shows its epsilon."""
        planned = (self.params or {}).get("epochs") or 0
        is_last = self.model.stop_training or epoch + 1 >= planned
        epsilon = self._plan.epsilon() if is_last else self._plan.quick_epsilon()
        histogram = self.model.optimizer.mechanism.norms
        norms = None if histogram is None else histogram.take()
        if norms is not None:
            self._plan.ledger.gradient_norms(norms)
        held_out = {name: value for name, value in (logs or {}).items() if name.startswith("val_")}
        if held_out:
            self._plan.record_figures(held_out)
        if logs is not None:
            logs["epsilon"] = epsilon
        if self.model.stop_training and epoch + 1 < planned:
            _log.warning(
                "training stopped after epoch %d of %d: epsilon %.4g is spent, and the target %s leaves no room for a step.",
                epoch + 1, planned, epsilon, self._plan.target_epsilon,
            )  # fmt: skip

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """What comes after `fit` is accounted as unknown batches, until another `fit` says otherwise."""
        self._recorder.use(UNKNOWN)
