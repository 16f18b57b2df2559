"""DP Keras optimizers: clip every example's gradient, add Gaussian noise to the sum, then step as Keras would.

`model.compile(optimizer=DPKerasAdamOptimizer(...))` is all that changes in a Keras program. The optimizer takes the traced
loss of the ordinary training step and finds every example's gradient in it (see `clipping`); Keras's own optimizer
applies the private gradient. One step releases

    (sum over examples of clipped gradients + N(0, (l2_norm_clip * noise_multiplier)^2)) / expected batch size

on every trainable variable, used in the step or not. Data-independent gradients (weight regularisers) and decoupled
weight decay are added outside. What this module does not know: samplers, budgets, ledgers.
"""

import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfprivacy_ft import _check, keras_compat
from tfprivacy_ft.accumulation import Accumulator, Whole
from tfprivacy_ft.clipping import ClippedSum, ClippingRule, Flat, clipped_sum, rules
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.gradient_norms import NormHistogram
from tfprivacy_ft.guard import StepGuard
from tfprivacy_ft.keras_compat import OptimizerHook, keras
from tfprivacy_ft.ledger import Trained
from tfprivacy_ft.moving_clip import Adaptive, MovingClip
from tfprivacy_ft.noise import AddNoise, DiscreteGaussianNoise, GaussianNoise, Noise


class NoPlanWarning(UserWarning):
    """A DP optimizer runs without a plan: nothing is written, and batches are taken to be of fixed, public size."""


class SeededNoiseWarning(UserWarning):
    """A DP optimizer draws its noise from a seed: whoever knows it can subtract the noise, so nothing is private."""


class Mechanism:
    """The private part of one optimizer: clip, noise, denominator, step counter. In no checkpoint.

    Args:
      l2_norm_clip: > 0, the most one example adds to the sum, in l2 norm over all variables together.
      noise_multiplier: >= 0, standard deviation of the noise on the sum, divided by `l2_norm_clip`.
      expected_batch_size: > 0, what the sum is divided by; None divides by the rows of the batch, which is right only
        where that number is fixed and public.
      clipping: how gradients are shortened to `l2_norm_clip`.
      accumulation_steps: micro-batches whose sums are added up before noise is drawn, once, for all of them.
      rows_per_example: consecutive rows of a batch that are one example.
      loss_scale: what the loss is multiplied by while it is differentiated, or None.
      keep_gradient_norms: whether to count, without noise, how long the gradients are.
      noise: where the noise comes from; None for `GaussianNoise()`.
      noise_seed: the seed that `noise` was made with, or None.
    """

    def __init__(
        self,
        l2_norm_clip: float,
        noise_multiplier: float,
        expected_batch_size: float | None = None,
        clipping: ClippingRule | None = None,
        accumulation_steps: int = 1,
        rows_per_example: int = 1,
        loss_scale: float | None = None,
        keep_gradient_norms: bool = False,
        noise: Noise | None = None,
        noise_seed: int | None = None,
    ):
        self._l2_norm_clip, self._noise_multiplier = float(l2_norm_clip), float(noise_multiplier)
        self.clipping = clipping or Flat()
        self.moving_clip = (
            MovingClip(clipping, self._l2_norm_clip, self._noise_multiplier, expected_batch_size)
            if isinstance(clipping, Adaptive)
            else None
        )
        with tf.init_scope():
            # A variable, because a Python number would go stale in Keras's cached training function; 0: the rows.
            self.expected_batch_size = tf.Variable(
                float(expected_batch_size or 0.0), trainable=False, name="expected_batch_size"
            )
        self.noise, self.guard = noise or GaussianNoise(), StepGuard()
        self.noise_seed = noise_seed
        self.accumulation_steps = accumulation_steps
        self.rows_per_example, self.loss_scale = rows_per_example, loss_scale
        self.accumulator = Accumulator(accumulation_steps) if accumulation_steps > 1 else None
        self.norms = NormHistogram(self._l2_norm_clip) if keep_gradient_norms else None
        self.has_plan = self._warned = False
        self.trained: Trained | None = None  # what the step that was traced last moves
        self._allowed: tf.Tensor | None = None

    @property
    def l2_norm_clip(self) -> float:
        """The most one example adds to the sum; where the clip moves, as it is now."""
        return float(self._clip())

    @property
    def noise_multiplier(self) -> float:
        """Noise standard deviation divided by the clip."""
        return self._noise_multiplier

    def gradients(self, loss: tf.Tensor, variables: list[tf.Variable]) -> list[tf.Tensor]:
        """The private gradients of one step, all zero where it was not let through; adds ops to the training step.

        In the midst of a logical batch there is no step, and nothing is let through.
        """
        self._check_strategy()
        self.trained = Trained(
            tuple(keras_compat.name_of(v) for v in variables), sum(int(v.shape.num_elements()) for v in variables)
        )
        clip = self._clip()
        clipped = clipped_sum(
            loss,
            variables,
            clip,
            self.clipping,
            rows_per_example=self.rows_per_example,
            loss_scale=self.loss_scale,
        )
        batch = self._add_up(clipped, variables)
        self._allowed = self.guard.enter(batch.complete, batch.announced)
        denominator = tf.where(self.expected_batch_size > 0, self.expected_batch_size, batch.rows)
        private = [total / tf.cast(denominator, total.dtype) for total in self._released(batch.sums, clip)]
        if self.norms is not None:
            # The parts of a logical batch are counted as they come, before anybody knows whether its step happens.
            self.norms.add(clipped.norms, clipped.real & (self._allowed | (self.accumulator is not None)), clip)
        if self.moving_clip is not None:
            self.moving_clip.move(self._noisy_votes(batch.votes), denominator, self._allowed)
        result = []
        for gradient, regular, variable in zip(private, clipped.data_independent, variables, strict=True):
            gradient = tf.cast(gradient, variable.dtype)
            result.append(gradient if regular is None else gradient + tf.cast(regular, variable.dtype))
        return result

    def _clip(self) -> tf.Tensor | float:
        return self._l2_norm_clip if self.moving_clip is None else self.moving_clip.value()

    def _add_up(self, clipped: ClippedSum, variables: list[tf.Variable]) -> Whole:
        """The sums of the logical batch up to here."""
        rows, votes = tf.cast(clipped.batch_size, tf.float32), tf.zeros([])
        if self.moving_clip is not None:
            votes = self.moving_clip.votes(clipped.norms, clipped.real)
        if self.accumulator is None:
            return Whole(clipped.sums, rows, votes, tf.constant(True), tf.constant(True))
        return self.accumulator.add(clipped.sums, rows, votes, variables)

    def _released(self, sums: list[tf.Tensor], clip: tf.Tensor | float) -> list[tf.Tensor]:
        """The noisy sums, or zeros where the step was not let through."""
        multiplier = self.noise_multiplier if self.moving_clip is None else self.moving_clip.noise_multiplier

        def draw() -> AddNoise:
            return self.noise.draw(sums, clip, multiplier) if multiplier and sums else list

        # Noise needs no data, and outside of the cond is drawn beside the backward pass; not for a part of a logical batch.
        drawn = draw() if self.accumulator is None else None

        def noisy() -> list[tf.Tensor]:
            add_noise = drawn or draw()
            return add_noise(sums)

        return tf.cond(self._allowed, noisy, lambda: [tf.zeros_like(total) for total in sums])

    def _noisy_votes(self, votes: tf.Tensor) -> tf.Tensor:
        """The votes on the clip, of which an example has half a one, for or against."""
        assert self.moving_clip is not None
        stddev = self.moving_clip.count_stddev
        return self.noise.draw([votes], 0.5, stddev / 0.5)([votes])[0] if stddev else votes

    def update(self, apply: Callable[[], Any]) -> None:
        """Adds `apply` to the graph, to run only if the step of the last `gradients` was let through."""
        assert self._allowed is not None

        def run() -> tf.Operation:
            apply()
            return tf.no_op()

        tf.cond(self._allowed, run, tf.no_op)
        self._allowed = None

    def warn_without_plan(self) -> None:
        """Says once that nobody keeps the accounts, and once that a seed makes the noise, where it does."""
        if self.has_plan or self._warned:
            return
        self._warned = True
        warnings.warn(
            "this DP optimizer runs without a PrivacyPlan: no ledger is written, and every batch is taken to be of fixed, "
            "public size; use plan.optimizer(...) to have the privacy spent recorded.",
            NoPlanWarning,
            stacklevel=3,
        )
        if self.noise_seed is not None:
            warnings.warn(
                f"noise_seed={self.noise_seed} is for tests only: whoever knows it can subtract the noise, so nothing is "
                "private; leave it out to train for real.",
                SeededNoiseWarning,
                stacklevel=3,
            )

    def _check_strategy(self) -> None:
        strategy = tf.distribute.get_strategy()
        if tf.distribute.has_strategy() and not isinstance(strategy, tf.distribute.OneDeviceStrategy):
            raise UnsupportedModelError(
                f"{type(strategy).__name__} splits the batch over replicas, for which clip and noise are not yet exact: train "
                "on one device, without a strategy."
            )


def make_dp_optimizer_class(base: type) -> type:
    """A differentially private version of any Keras optimizer class.

    Guarantees that one step has sensitivity `l2_norm_clip` before the noise, per example, for every model that the
    clipping engine accepts, and refuses the others.

    Args:
      base: a subclass of `keras.optimizers.Optimizer`, such as `keras.optimizers.Lion`.

    Returns:
      A subclass that takes `l2_norm_clip`, `noise_multiplier` and `num_microbatches` first, then `base`'s own arguments,
      and the keywords `expected_batch_size`, `clipping`, `accumulation_steps`, `rows_per_example`, `loss_scale`,
      `keep_gradient_norms`, `secure_noise` and `noise_seed`.

    Raises:
      InvalidArgumentError: `base` is not a Keras optimizer class of this Keras, or is private already.

    Example:
      >>> import tensorflow as tf
      >>> DPLion = make_dp_optimizer_class(tf.keras.optimizers.Lion)
      >>> DPLion(l2_norm_clip=1.0, noise_multiplier=1.1).l2_norm_clip
      1.0

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.
    """
    if not (isinstance(base, type) and issubclass(base, keras.optimizers.Optimizer)):
        raise InvalidArgumentError(
            f"{base!r} is not a Keras optimizer class: give a subclass of keras.optimizers.Optimizer (legacy ones do not "
            "work)."
        )
    if issubclass(base, DPOptimizer):
        raise InvalidArgumentError(f"{base.__name__} is private already: use it as it is.")
    name = f"DPKeras{base.__name__}Optimizer"
    members = {"__doc__": _CLASS_DOC.format(base=base.__name__), "__module__": __name__}
    made = type(name, (OptimizerHook, DPOptimizer, base), members)
    return keras.utils.register_keras_serializable(package="tfprivacy_ft")(made)


_CLASS_DOC = """`{base}` on differentially private gradients.

    Args:
      l2_norm_clip: > 0, bound on each example's gradient norm over all variables together; None where `clipping`
        has a total of its own.
      noise_multiplier: >= 0, noise standard deviation divided by `l2_norm_clip`; 0 gives no privacy.
      num_microbatches: None; one example is one microbatch. Accepted for programs written for TensorFlow Privacy when
        it equals `expected_batch_size`.
      *args: `{base}`'s own arguments, the learning rate first.
      expected_batch_size: > 0, what the noisy sum is divided by, a constant; None divides by the rows of each batch,
        right for batches of fixed, public size.
      clipping: a rule of `tfprivacy_ft.clipping`: `Flat()`, which is None, `PerLayer()` or `Automatic()`; or
        `tfprivacy_ft.moving_clip.Adaptive()`, which moves the clip.
      accumulation_steps: k >= 1; k batches of `fit` make one logical batch, whose clipped sum gets noise once and moves
        the weights once; `expected_batch_size` and `iterations` are those of logical batches. Without a plan, what a
        `fit` leaves of a logical batch goes on with the next.
      rows_per_example: K >= 1; K consecutive rows of a batch, such as augmentations of one image or the records of one
        person, are one example, whose loss is the one Keras gives these rows together, and whose gradient is clipped
        once. Batches have to be made for it, as `plan.batches` makes them: a shuffle of rows tears examples apart.
        `expected_batch_size` counts examples, not rows.
      loss_scale: > 0, for models in float16: what the loss is multiplied by while it is differentiated, a power of two
        such as 1024; gradients are divided by it in float32. None for other models.
      keep_gradient_norms: whether to count how long the examples' gradients are, and how many are clipped. Under a plan
        that goes to the ledger after every epoch, for the report: a release without noise, listed as one.
      secure_noise: True draws discrete Gaussian noise on a grid, from the cipher ChaCha20, which withstands who looks at the
        last bits of the weights or tries to predict the generator; it takes several times as long to draw. See
        `tfprivacy_ft.noise.DiscreteGaussianNoise` for what it does not cover. False draws normal noise in float32.
      noise_seed: an int >= 0, for tests only: the noise is then the same in every process with that seed. Whoever knows it
        can subtract the noise, so nothing is private; a plan records it, and every report warns. None for real training.
      **kwargs: `{base}`'s own keyword arguments.

    Raises:
      InvalidArgumentError: an argument is outside its range.
      RawGradientsError: `apply_gradients` was given gradients that this optimizer did not make.
      UnsupportedModelError: examples see each other in the model; the text names the layer and the fix.
    """


class DPOptimizer:
    """What every DP optimizer has, whichever Keras it runs on."""

    def __init__(
        self,
        l2_norm_clip: float | None,
        noise_multiplier: float,
        num_microbatches: int | None = None,
        *args: Any,
        expected_batch_size: float | None = None,
        clipping: ClippingRule | None = None,
        accumulation_steps: int = 1,
        rows_per_example: int = 1,
        loss_scale: float | None = None,
        keep_gradient_norms: bool = False,
        secure_noise: bool = False,
        noise_seed: int | None = None,
        **kwargs: Any,
    ):
        _check.positive_integer(accumulation_steps=accumulation_steps, rows_per_example=rows_per_example)
        if loss_scale is not None:
            _check.positive(loss_scale=loss_scale)
        noise = _noise(secure_noise, noise_seed)
        if kwargs.get("loss_scale_factor") is not None:
            raise InvalidArgumentError(
                "loss_scale_factor is Keras's and would divide the noisy gradient by the scale: use loss_scale."
            )
        if kwargs.get("gradient_accumulation_steps") is not None:
            raise InvalidArgumentError(
                "gradient_accumulation_steps is Keras's and would draw noise for every micro-batch: use accumulation_steps, "
                "which draws it once."
            )
        clipping = clipping or Flat()
        l2_norm_clip = rules.check(clipping, l2_norm_clip)
        _check.non_negative(noise_multiplier=noise_multiplier)
        if expected_batch_size is not None:
            _check.positive(expected_batch_size=expected_batch_size)
        if num_microbatches is not None and num_microbatches != expected_batch_size:
            raise InvalidArgumentError(
                f"num_microbatches={num_microbatches!r} is not allowed: one example is one microbatch here, so leave it None "
                "and give expected_batch_size."
            )
        super().__init__(*args, **kwargs)
        self._mechanism = Mechanism(
            l2_norm_clip,
            noise_multiplier,
            expected_batch_size,
            clipping,
            accumulation_steps,
            rows_per_example,
            loss_scale,
            keep_gradient_norms,
            noise,
            noise_seed,
        )

    @property
    def l2_norm_clip(self) -> float:
        """The bound on each example's gradient norm; where the clip moves, as it is now."""
        return self._mechanism.l2_norm_clip

    @property
    def noise_multiplier(self) -> float:
        """Noise standard deviation divided by the clip."""
        return self._mechanism.noise_multiplier

    @property
    def expected_batch_size(self) -> tf.Variable:
        """What the noisy sum is divided by: a float32 variable; 0 stands for the rows of each batch."""
        return self._mechanism.expected_batch_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in a logical batch."""
        return self._mechanism.accumulation_steps

    @property
    def rows_per_example(self) -> int:
        """Consecutive rows of a batch that are one example."""
        return self._mechanism.rows_per_example

    @property
    def privacy_steps(self) -> int:
        """Private steps that this optimizer made in this process; restoring a checkpoint does not take any back."""
        return self._mechanism.guard.done

    @property
    def mechanism(self) -> Mechanism:
        """Clip, noise and step counter, for a plan to attach to."""
        return self._mechanism

    def private_gradients(self, loss: tf.Tensor, variables: list[tf.Variable]) -> list[tf.Tensor]:
        """The private gradients of a traced loss; what the hook of this Keras version asks for."""
        self._mechanism.warn_without_plan()
        return self._mechanism.gradients(loss, variables)

    def get_config(self) -> dict[str, Any]:
        """The arguments, so that a saved model can be compiled again."""
        expected = float(self.expected_batch_size.numpy())
        return {
            **super().get_config(),  # type: ignore[misc]  # of the Keras class that stands behind this one
            "l2_norm_clip": self.l2_norm_clip,
            "noise_multiplier": self.noise_multiplier,
            "expected_batch_size": expected or None,
            "clipping": rules.to_config(self._mechanism.clipping),
            "accumulation_steps": self.accumulation_steps,
            "rows_per_example": self.rows_per_example,
            "loss_scale": self._mechanism.loss_scale,
            "keep_gradient_norms": self._mechanism.norms is not None,
            "secure_noise": isinstance(self._mechanism.noise, DiscreteGaussianNoise),
            "noise_seed": self._mechanism.noise_seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """An optimizer from its arguments."""
        clipping = rules.from_config(config.get("clipping"), custom_objects)
        return super().from_config({**config, "clipping": clipping}, custom_objects=custom_objects)  # type: ignore[misc]


def _noise(secure_noise: bool, noise_seed: int | None) -> Noise:
    _check.boolean(secure_noise=secure_noise)
    if noise_seed is None:
        return DiscreteGaussianNoise() if secure_noise else GaussianNoise()
    _check.non_negative_integer(noise_seed=noise_seed)
    if secure_noise:
        raise InvalidArgumentError(
            f"secure_noise=True with noise_seed={noise_seed} is not allowed: noise from a seed is not secure, so leave one "
            "of them out."
        )
    return GaussianNoise(int(noise_seed))


DPKerasSGDOptimizer = make_dp_optimizer_class(keras.optimizers.SGD)
DPKerasAdamOptimizer = make_dp_optimizer_class(keras.optimizers.Adam)
DPKerasAdamWOptimizer = make_dp_optimizer_class(keras.optimizers.AdamW)
DPKerasAdagradOptimizer = make_dp_optimizer_class(keras.optimizers.Adagrad)
