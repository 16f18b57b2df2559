"""One budget over several stages: the noise of each, by one solve.

Stage i gets noise_ratio_i * s, with the smallest s for which all stages together stay within the target; never less
privacy than asked, whatever the stages are.
"""

import math
from collections.abc import Sequence

from tfprivacy_ft import accounting
from tfprivacy_ft.events import Event
from tfprivacy_ft.finetune.recipes import Recipe
from tfprivacy_ft.plan import PrivacyPlan
from tfprivacy_ft.sampling import Sampling


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
        return [_event(stage, noise_multiplier, num_examples, examples_per_user) for stage in stages]

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


def _event(stage: Recipe, noise_multiplier: float, n: int, examples_per_user: int | None) -> Event:
    batch_size = _size(stage.batch_size)
    return Sampling("poisson", n, batch_size / n).event(
        math.ceil(n / batch_size) * _size(stage.epochs),
        noise_multiplier=noise_multiplier * stage.noise_ratio,
        l2_norm_clip=None,
        examples_per_user=examples_per_user,
    )


def _size(value: int | None) -> int:
    assert value is not None, "a stage without its defaults"
    return value
