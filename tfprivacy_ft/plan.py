"""`PrivacyPlan` makes sampler, noise, denominator, ledger and budget of a training agree.

The plan says how batches are to be drawn and how much noise that needs. What was spent is never read from the plan but
from the ledger of what ran: batches that the plan did not draw are accounted for without amplification.
"""

import dataclasses
import math
import os
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Literal

from tfprivacy_ft import _check, accounting
from tfprivacy_ft.arrays import number_of_examples
from tfprivacy_ft.augmentation import Augmentation
from tfprivacy_ft.compute_epsilon import Report, compute_epsilon
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError
from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import GRADIENT_NORMS, TEST_SEED, Ledger
from tfprivacy_ft.recorder import Recorder
from tfprivacy_ft.sampling import UNKNOWN, Sampling, poisson_batches, repeats_before_batching


@dataclasses.dataclass(eq=False)
class PrivacyPlan:
    """How a model is to be trained privately, and the record of what was.

    Guarantees that with a `target_epsilon` no step runs whose epsilon, by the ledger, would pass it.

    Args:
      num_examples: n, the examples that could take part; public.
      batch_size: expected examples in a batch, in [1, n].
      epochs: passes planned, each of `steps_per_epoch` steps.
      delta: in (0, 1), well below 1/n.
      noise_multiplier: >= 0, noise standard deviation divided by the clip; 0 gives no privacy.
      target_epsilon: the budget, > 0; None only records.
      steps_per_block: steps that the ledger reserves at once; None for about a second of work.
      accumulation_steps: k >= 1; each step's batch comes in k micro-batches, so that it need not fit into memory. Keras
        then shows k times as many batches; steps, here and in the ledger, are those of whole batches.
      rows_per_example: K >= 1; K consecutive rows of the data are one example, clipped, drawn and protected as one, such
        as the augmentations of an image. `num_examples` and `batch_size` count examples.
      examples_per_user: k >= 1, the most examples that belong to one person; then epsilon, and the budget, protect a person
        with all of them. None protects single examples, which is less than it sounds where records are not people.
      unit: `"example"` or `"user"`, who is protected, to have it said and checked; None goes by `examples_per_user`.

    Raises:
      InvalidArgumentError: an argument is outside its range.

    Example:
      >>> plan = PrivacyPlan(num_examples=60_000, batch_size=256, epochs=60, delta=1e-5, noise_multiplier=1.1)
      >>> plan.steps
      14100

    Source: Ponomareva et al. 2023, "How to DP-fy ML", for what has to be stated beside an epsilon.
    """

    num_examples: int
    batch_size: int
    epochs: int
    delta: float
    noise_multiplier: float
    target_epsilon: float | None = None
    steps_per_block: int | None = None
    accumulation_steps: int = 1
    rows_per_example: int = 1
    examples_per_user: int | None = None
    unit: Literal["example", "user"] | None = None

    def __post_init__(self):
        _check_sizes(self.num_examples, self.batch_size, self.epochs)
        _check.non_negative(noise_multiplier=self.noise_multiplier)
        _check.positive_integer(accumulation_steps=self.accumulation_steps, rows_per_example=self.rows_per_example)
        accounting.check_delta(self.delta, self.num_examples)
        if self.target_epsilon is not None:
            _check.positive(target_epsilon=self.target_epsilon)
        if self.steps_per_block is not None:
            _check.positive_integer(steps_per_block=self.steps_per_block)
        if self.examples_per_user is not None:
            _check.positive_integer(examples_per_user=self.examples_per_user)
        _unit(self.unit, self.examples_per_user)
        if self.noise_multiplier == 0:
            warnings.warn("noise_multiplier=0 adds no noise: epsilon is infinite, nothing is private.", stacklevel=3)
        self._ledger = Ledger.in_memory(delta=self.delta, facts=self._facts())
        self._recorders: weakref.WeakKeyDictionary[Any, Recorder] = weakref.WeakKeyDictionary()
        self._drawn: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def solve(
        cls,
        *,
        target_epsilon: float,
        delta: float,
        num_examples: int,
        batch_size: int,
        epochs: int,
        steps_per_block: int | None = None,
        accumulation_steps: int = 1,
        rows_per_example: int = 1,
        examples_per_user: int | None = None,
        unit: Literal["example", "user"] | None = None,
    ) -> "PrivacyPlan":
        """The plan with the least noise that keeps Poisson batches within `target_epsilon`; never less privacy.

        Args:
          target_epsilon: > 0, by the PLD accountant, for adding or removing one example, or one user.
          delta, num_examples, batch_size, epochs, steps_per_block, accumulation_steps, rows_per_example,
            examples_per_user, unit: as in the class.

        Raises:
          InvalidArgumentError: an argument is outside its range, or no noise reaches the target.

        Example:
          >>> plan = PrivacyPlan.solve(target_epsilon=1.0, delta=1e-5, num_examples=1000, batch_size=10, epochs=10)
          >>> round(plan.noise_multiplier, 3)
          1.415
        """
        _check_sizes(num_examples, batch_size, epochs)
        _check.positive(target_epsilon=target_epsilon)
        _check.open_unit_interval(delta=delta)
        if examples_per_user is not None:
            _check.positive_integer(examples_per_user=examples_per_user)
        _unit(unit, examples_per_user)
        steps = math.ceil(num_examples / batch_size) * epochs
        sampling = Sampling("poisson", num_examples, batch_size / num_examples)

        def events(noise_multiplier: float) -> Event:
            return sampling.event(
                steps, noise_multiplier=noise_multiplier, l2_norm_clip=None, examples_per_user=examples_per_user
            )

        noise = accounting.solve_noise_multiplier(target_epsilon=target_epsilon, delta=delta, events_for=events)
        return cls(
            num_examples,
            batch_size,
            epochs,
            delta,
            noise,
            target_epsilon,
            steps_per_block,
            accumulation_steps,
            rows_per_example,
            examples_per_user,
            unit,
        )

    @property
    def sampling_probability(self) -> float:
        """The probability with which each example takes part in a step."""
        return self.batch_size / self.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch of `fit` on `batches`, ceil(n / batch size); Keras shows `accumulation_steps` times as many."""
        return math.ceil(self.num_examples / self.batch_size)

    @property
    def steps(self) -> int:
        """Steps planned in all."""
        return self.steps_per_epoch * self.epochs

    def batches(
        self,
        x: Any,
        y: Any,
        *,
        sample_weight: Any = None,
        pad_to: int | None = None,
        user_ids: Any = None,
        augment: Augmentation | None = None,
    ) -> Any:
        """Poisson batches of these examples, for `model.fit`; see `poisson_batches`.

        Args:
          x, y, sample_weight, pad_to, augment: as there; with `augment`, `rows_per_example` rows are made of each example.
          user_ids: whose each example is, [num_examples], to check `examples_per_user` by; None takes it on trust.

        Raises:
          InvalidArgumentError: x or user_ids does not hold `num_examples` examples, or augment is none.
          DatasetError: x, y and sample_weight differ in length, or one user has too many examples.
        """
        held = self.rows_per_example if augment is None else 1
        size = number_of_examples(x, y, sample_weight, rows_per_example=held)
        if size != self.num_examples:
            raise InvalidArgumentError(
                f"x holds {size} examples and the plan was made for num_examples={self.num_examples}: make the plan for "
                "the data that is trained on."
            )
        if user_ids is not None:
            self._check_users(user_ids)
        batches = poisson_batches(
            x,
            y,
            batch_size=self.batch_size,
            sample_weight=sample_weight,
            pad_to=pad_to,
            accumulation_steps=self.accumulation_steps,
            rows_per_example=self.rows_per_example,
            augment=augment,
        )
        self._drawn.add(batches)
        return batches

    def _check_users(self, user_ids: Any) -> None:
        import numpy as np

        owners = np.asarray(user_ids).reshape(-1)
        if len(owners) != self.num_examples:
            raise InvalidArgumentError(
                f"user_ids names the owners of {len(owners)} examples and the plan has num_examples={self.num_examples}: "
                "name one for each example."
            )
        most = int(np.unique(owners, return_counts=True)[1].max())
        if most > (self.examples_per_user or 1):
            raise DatasetError(
                f"one user has {most} examples and the plan was made for examples_per_user={self.examples_per_user}: make it "
                f"for {most}, or drop what is beyond of each user's."
            )

    def optimizer(self, optimizer_class: type, *, l2_norm_clip: float | None, **arguments: Any) -> Any:
        """A DP optimizer with this plan's noise and expected batch size, whose steps this plan records.

        Args:
          optimizer_class: a DP optimizer class, or a Keras one, of which the DP version is made.
          l2_norm_clip: > 0, bound on each example's gradient norm; None where a rule in `clipping` has a total.
          **arguments: the optimizer's own arguments, such as `learning_rate` or `clipping`.
        """
        from tfprivacy_ft import optimizers

        if not issubclass(optimizer_class, optimizers.DPOptimizer):
            optimizer_class = optimizers.make_dp_optimizer_class(optimizer_class)
        optimizer = optimizer_class(
            l2_norm_clip=l2_norm_clip,
            noise_multiplier=self.noise_multiplier,
            expected_batch_size=self.batch_size,
            accumulation_steps=self.accumulation_steps,
            rows_per_example=self.rows_per_example,
            **arguments,
        )
        self.attach(optimizer)
        return optimizer

    def attach(self, optimizer: Any) -> None:
        """Records the steps of a DP optimizer that was made elsewhere, such as one of a loaded model.

        Raises:
          InvalidArgumentError: it is not a DP optimizer, or was made for another noise, or other micro-batches or examples,
            than the plan.
        """
        from tfprivacy_ft import optimizers

        if not isinstance(optimizer, optimizers.DPOptimizer):
            raise InvalidArgumentError(f"{type(optimizer).__name__} is not a DP optimizer: use plan.optimizer(...).")
        for name in ("noise_multiplier", "accumulation_steps", "rows_per_example"):
            theirs, ours = getattr(optimizer, name), getattr(self, name)
            if theirs != ours:
                raise InvalidArgumentError(
                    f"the optimizer has {name}={theirs} and the plan {name}={ours}: make the optimizer with "
                    "plan.optimizer(...)."
                )
        if optimizer.mechanism.has_plan and optimizer.mechanism not in self._recorders:
            raise InvalidArgumentError("the optimizer belongs to another plan: make one with plan.optimizer(...).")
        optimizer.expected_batch_size.assign(self.batch_size)
        mechanism, noise = optimizer.mechanism, optimizer.noise_multiplier
        clip = None if mechanism.moving_clip is not None else optimizer.l2_norm_clip
        mechanism.has_plan = True
        mechanism_or_none = weakref.ref(mechanism)  # the recorder lives as long as the mechanism, and must not keep it

        def event(sampling: Sampling, steps: int) -> Event:
            return sampling.event(
                steps,
                noise_multiplier=noise,
                l2_norm_clip=clip,
                accumulation_steps=self.accumulation_steps,
                examples_per_user=self.examples_per_user,
            )

        self._recorders[mechanism] = Recorder(
            mechanism.guard,
            lambda: self._ledger,
            event,
            target_epsilon=self.target_epsilon,
            delta=self.delta,
            steps_per_block=self.steps_per_block,
            accumulator=mechanism.accumulator,
            trained=lambda: getattr(mechanism_or_none(), "trained", None),
        )
        self._note_mechanisms()

    def recorder(self, optimizer: Any) -> Recorder:
        """The recorder of this optimizer's steps; attaches the optimizer if it was not.

        Raises:
          InvalidArgumentError: as in `attach`.
        """
        if getattr(optimizer, "mechanism", None) not in self._recorders:
            self.attach(optimizer)
        return self._recorders[optimizer.mechanism]

    def callbacks(self, run_dir: str | os.PathLike[str] | None = None) -> list[Any]:
        """Callbacks for `fit`: the ledger in `run_dir`, epsilon in the progress bar and History, a stop at the budget.

        Keras calls callbacks in their order, so what writes logs down comes after these:
        `callbacks=[*plan.callbacks("runs/one"), tf.keras.callbacks.TensorBoard("logs")]` shows epsilon, too.

        Args:
          run_dir: the run's folder; a ledger that is there is continued. None keeps the ledger in memory.

        Raises:
          LedgerError: the ledger cannot be written, is locked by another process, or is damaged.
        """
        from tfprivacy_ft.callbacks import EpsilonCallback

        if run_dir is not None:
            self.record_in(run_dir)
        return [EpsilonCallback(self)]

    def record_in(self, run_dir: str | os.PathLike[str]) -> None:
        """Writes the ledger to a folder from now on; what this plan released before goes there too."""
        folder = self._ledger.path.parent if self._ledger.path else None
        if folder is not None and folder.resolve() == type(folder)(run_dir).resolve():
            return
        self.settle()
        if folder is None:
            self._ledger = self._ledger.moved_to(run_dir)
            return
        new = Ledger.open(run_dir, delta=self.delta, facts=self._facts())
        self._ledger.close()
        self._ledger = new
        self._note_mechanisms()

    def continue_ledger(self, ledger: Ledger) -> None:
        """Records in an open ledger from now on, such as that of the stage before, whose releases count in the budget.

        Raises:
          InvalidArgumentError: this plan has released something already, or the ledger is for another delta.
        """
        self.settle()
        if self._ledger.events():
            raise InvalidArgumentError("the plan has released something already: give it the ledger before it trains.")
        if ledger.delta != self.delta:
            raise InvalidArgumentError(
                f"the ledger has delta={ledger.delta} and the plan {self.delta}: give one delta."
            )
        self._ledger.close()
        self._ledger = ledger
        self._note_mechanisms()

    def sampling_of(self, arguments: dict[str, Any] | None) -> Sampling:
        """How the batches of a running `fit` are drawn, as far as its arguments prove it.

        Args:
          arguments: the x, y, batch_size and steps_per_epoch of `fit`, or None if they are not known.

        Raises:
          InvalidArgumentError: an epoch has fewer batches than a step needs, Keras would tear examples apart, or a batch
            could hold an example more than once.
        """
        self._refuse_torn_examples(arguments)
        _refuse_repeated_examples(arguments)
        if arguments is None or arguments["steps_per_epoch"] is not None:
            return UNKNOWN
        x = arguments["x"]
        if any(x is batches for batches in self._drawn):
            return Sampling("poisson", self.num_examples, self.sampling_probability)
        if not _is_arrays(x) or not _is_arrays(arguments["y"]):
            return UNKNOWN
        size = number_of_examples(x, arguments["y"])
        # Keras goes through arrays once in an epoch, in batches of 32 unless told otherwise. What an epoch leaves of a
        # logical batch is dropped, so that no example is twice in one.
        batches = math.ceil(size / (arguments["batch_size"] or 32))
        if batches < self.accumulation_steps:
            raise InvalidArgumentError(
                f"an epoch has {batches} batches, and accumulation_steps={self.accumulation_steps} makes one step of more "
                "than that: give fit a smaller batch_size."
            )
        return Sampling("shuffled", size, pass_length=batches // self.accumulation_steps)

    def _refuse_torn_examples(self, arguments: dict[str, Any] | None) -> None:
        """Refuses data that Keras batches itself, row by row, where several rows are one example."""
        import tensorflow as tf

        if self.rows_per_example > 1 and arguments is not None and not isinstance(arguments["x"], tf.data.Dataset):
            raise InvalidArgumentError(
                f"fit batches arrays by single rows, and rows_per_example={self.rows_per_example} of them are one example "
                "here: give plan.batches(x, y)."
            )

    def record_figures(self, figures: Mapping[str, float]) -> None:
        """Keeps figures on the model as it is now for the report; held-out figures of `fit` are kept by themselves.

        Args:
          figures: by name, such as what `model.evaluate(x, y, return_dict=True)` returns, of data that are public: figures
            of private data are releases without noise, and every report lists them. What is more than one number, such as
            a score for each class, is left out.

        Raises:
          InvalidArgumentError: a value is no number.
          LedgerError: the ledger cannot be written.
        """
        import numpy as np

        self.settle()
        values = {name: np.asarray(value) for name, value in figures.items()}
        self._ledger.figures({name: value.item() for name, value in values.items() if value.ndim == 0})

    @property
    def ledger(self) -> Ledger:
        """The ledger that is being written."""
        return self._ledger

    def settle(self) -> None:
        """Replaces open reservations by the steps that ran."""
        for recorder in self._recorders.values():
            recorder.settle()

    def report(self) -> Report:
        """The epsilon of what ran, by the ledger; `print(plan.report())` reads as a statement."""
        self.settle()
        return compute_epsilon(self._ledger, delta=self.delta)

    def epsilon(self) -> float:
        """The epsilon of what ran (the largest, where parts do not compose), at this plan's delta.

        Asked while a batch runs, it counts what is reserved in full.
        """
        self._settle_between_batches()
        accounts = accounting.accounts(self._ledger.events(), self.delta)
        return max((account.epsilon for account in accounts), default=0.0)

    def quick_epsilon(self) -> float:
        """A bound on `epsilon()`, seldom more than half a percent above it, never for that above the target, and quick."""
        self._settle_between_batches()
        bound = accounting.quick_epsilon(self._ledger.events(), self.delta)
        return self.epsilon() if self.target_epsilon is not None and bound > self.target_epsilon else bound

    def _settle_between_batches(self) -> None:
        if not any(recorder.running for recorder in self._recorders.values()):
            self.settle()

    def close(self) -> None:
        """Settles, and gives the ledger free for other processes."""
        self.settle()
        self._ledger.close()

    def _note_mechanisms(self) -> None:
        """What a reader has to know of the mechanisms whose steps come into this ledger."""
        for mechanism in self._recorders:
            if mechanism.norms is not None:
                self._ledger.note(GRADIENT_NORMS.kind, GRADIENT_NORMS.text)
            if mechanism.noise_seed is not None:
                self._ledger.note(
                    TEST_SEED,
                    f"the noise was drawn from noise_seed={mechanism.noise_seed}, for tests: whoever knows the seed can "
                    "subtract it, so there is no privacy, whatever epsilon says.",
                )

    def _facts(self) -> dict[str, Any]:
        fields = (
            "num_examples",
            "batch_size",
            "epochs",
            "noise_multiplier",
            "target_epsilon",
            "accumulation_steps",
            "rows_per_example",
            "examples_per_user",
        )
        return {"unit": _unit(self.unit, self.examples_per_user), **{name: getattr(self, name) for name in fields}}


def _unit(unit: str | None, examples_per_user: int | None) -> Literal["example", "user"]:
    """Who is protected, if what was said of it agrees."""
    implied: Literal["example", "user"] = "example" if examples_per_user is None else "user"
    if unit not in (None, implied):
        raise InvalidArgumentError(
            f"unit={unit!r} with examples_per_user={examples_per_user} is not allowed: give unit='user' and the most examples "
            "of one user, or unit='example' and None."
        )
    return implied


def _check_sizes(num_examples: int, batch_size: int, epochs: int) -> None:
    _check.positive_integer(num_examples=num_examples, batch_size=batch_size, epochs=epochs)
    _check.at_most("num_examples", num_examples, batch_size=batch_size)


def _refuse_repeated_examples(arguments: dict[str, Any] | None) -> None:
    """An example that is in a batch twice moves the sum by two clips, and no account here allows for that."""
    import tensorflow as tf

    x = None if arguments is None else arguments["x"]
    if isinstance(x, tf.data.Dataset) and repeats_before_batching(x):
        raise InvalidArgumentError(
            "the dataset repeats examples before it batches them, so that one batch can hold an example twice: call "
            ".repeat() after .batch(), or give plan.batches(x, y)."
        )


def _is_arrays(part: Any) -> bool:
    """Whether Keras will take `part` for arrays and batch it itself."""
    import numpy as np
    import tensorflow as tf

    leaves = tf.nest.flatten(part)
    return bool(leaves) and all(isinstance(leaf, np.ndarray | tf.Tensor) for leaf in leaves)
