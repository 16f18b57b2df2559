"""One budget over several stages: the noise of each, by one solve.

Stage i gets noise_ratio_i * s, with the smallest s for which all stages together stay within the target; never less
privacy than asked, whatever the stages are.
"""

import math
from collections.abc import Sequence

from tfprivacy_ft import accounting
from tfprivacy_ft.events import Event
from tfprivacy_ft.finetune.recipes import Head, Recipe
from tfprivacy_ft.plan import PrivacyPlan
from tfprivacy_ft.sampling import Sampling

_NOISE_OF_MEAN = 10.0  # beside that of the stage's steps together


def solve(
    stages: Sequence[Recipe],
    *,
    num_examples: int,
    target_epsilon: float,
    delta: float,
    examples_per_user: int | None = None,
) -> tuple[float, ...]:
    """The noise multiplier of each stage, with which all of them together stay within the budget.

    Args:
      stages: recipes with no None among batch size and epochs, as `recipes.stages_of` gives them; at least one.
      num_examples: n.
      target_epsilon: > 0, of all stages together.
      delta: in (0, 1), well below 1/n.
      examples_per_user: the most examples of one person; None protects single examples.

    Raises:
      InvalidArgumentError: an argument is outside its range, or no noise reaches the target.

    Example:
      >>> from tfprivacy_ft.finetune.recipes import Full, Head
      >>> stages = (Head(batch_size=100, epochs=2), Full(batch_size=50, epochs=3, noise_ratio=2.0))
      >>> first, second = solve(stages, num_examples=1000, target_epsilon=3.0, delta=1e-5)
      >>> round(second / first, 6)
      2.0

    Source: composition by PLD, as `accounting.solve_noise_multiplier`.
    """

    def events(noise_multiplier: float) -> list[Event]:
        return [
            event
            for stage in stages
            for event in _events(stage, noise_multiplier * stage.noise_ratio, num_examples, examples_per_user)
        ]

    noise = accounting.solve_noise_multiplier(target_epsilon=target_epsilon, delta=delta, events_for=events)
    return tuple(noise * stage.noise_ratio for stage in stages)


def plan(
    stage: Recipe,
    noise_multiplier: float,
    *,
    num_examples: int,
    target_epsilon: float,
    delta: float,
    examples_per_user: int | None = None,
) -> PrivacyPlan:
    """The plan of one stage, which checks the whole target over everything in its ledger: the stages have to share one.

    Args:
      stage, num_examples, target_epsilon, delta, examples_per_user: as in `solve`.
      noise_multiplier: what `solve` gave for this stage.
    """
    batch_size = _size(stage.batch_size)
    return PrivacyPlan(
        num_examples=num_examples,
        batch_size=batch_size,
        epochs=_size(stage.epochs),
        delta=delta,
        noise_multiplier=noise_multiplier,
        target_epsilon=target_epsilon,
        # Checkpoints come by epochs, so whoever goes on after a crash loses at most what one of them spent, and no more.
        steps_per_block=math.ceil(num_examples / batch_size),
        rows_per_example=stage.augmentations,
        examples_per_user=examples_per_user,
    )


def event_of_mean(
    stage: Recipe, noise_multiplier: float, *, num_examples: int, examples_per_user: int | None = None
) -> Event:
    """The one release of the mean of the rows that a centered head reads.

    Its noise is what gives it about a hundredth of what the stage's steps have, by the central limit theorem.

    Args:
      stage, num_examples, examples_per_user: as in `solve`.
      noise_multiplier: of the stage's steps.

    Source: Dong, Roth & Su 2022, "Gaussian Differential Privacy", section 5: the steps have mu near q sqrt(T) / noise.
    """
    batch_size = _size(stage.batch_size)
    steps = math.ceil(num_examples / batch_size) * _size(stage.epochs)
    return Sampling("poisson", num_examples, 1.0).event(
        1,
        noise_multiplier=_NOISE_OF_MEAN * noise_multiplier * num_examples / (batch_size * math.sqrt(steps)),
        l2_norm_clip=1.0,
        examples_per_user=examples_per_user,
    )


def _events(stage: Recipe, noise_multiplier: float, n: int, examples_per_user: int | None) -> list[Event]:
    """What one stage releases."""
    batch_size = _size(stage.batch_size)
    steps = Sampling("poisson", n, batch_size / n).event(
        math.ceil(n / batch_size) * _size(stage.epochs),
        noise_multiplier=noise_multiplier,
        l2_norm_clip=None,
        examples_per_user=examples_per_user,
    )
    if not (isinstance(stage, Head) and stage.center):
        return [steps]
    return [event_of_mean(stage, noise_multiplier, num_examples=n, examples_per_user=examples_per_user), steps]


def _size(value: int | None) -> int:
    assert value is not None, "a stage without its defaults"
    return value
