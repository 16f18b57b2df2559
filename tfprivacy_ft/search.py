"""Hyper-parameter search that is accounted for: the best of a random number of runs, of which the others are not shown.

Choosing the best of k runs costs as much as all of them where k is fixed. Where k is drawn beforehand from one of three
distributions, the choice costs hardly more than two or three runs, however many were made.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Literal

from tfprivacy_ft import _check, accounting, bounds
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.events import Event

__all__ = ["BestOf"]

Distribution = Literal["logarithmic", "geometric", "poisson"]

# Of the truncated negative binomial distribution, which holds two of the three: more means a steadier number of runs.
_SHAPES = {"logarithmic": 0.0, "geometric": 1.0}


@dataclasses.dataclass(frozen=True)
class BestOf:
    """A search that draws how many runs it makes, makes them, and shows the best one and nothing of the others.

    Guarantees hold if `draw` is called once and before the first run, if every run is private by itself with at most the
    given events, and if what is best is told by the runs' own private outputs or by public data.

    Args:
      distribution: of the number of runs. `"poisson"` is the steadiest, may be 0, and is the cheapest for very few;
        `"geometric"` is 1 most often and has a long tail; `"logarithmic"` more so, and is the cheapest for many.
      mean: of that number, > 1 (for `"poisson"` > 0).

    Raises:
      InvalidArgumentError: an argument is outside its range.

    Example:
      >>> search = BestOf("geometric", mean=10)
      >>> one_run = Event.poisson(count=500, noise_multiplier=2.0, sampling_probability=0.01)
      >>> alone = accounting.epsilon(one_run, 1e-5, accountant="rdp")
      >>> alone < search.epsilon(one_run, delta=1e-5) < 4 * alone
      True

    Source: Papernot & Steinke 2022, "Hyperparameter Tuning with Renyi Differential Privacy", Theorems 2 and 6.
    """

    distribution: Distribution
    mean: float

    def __post_init__(self):
        if self.distribution not in (*_SHAPES, "poisson"):
            raise InvalidArgumentError(
                f"distribution={self.distribution!r} is not allowed: give 'logarithmic', 'geometric' or 'poisson'."
            )
        _check.positive(mean=self.mean)
        if self.distribution != "poisson" and self.mean <= 1:
            raise InvalidArgumentError(f"mean={self.mean} is not allowed: give a number > 1, as no run is no search.")

    def draw(self) -> int:
        """How many runs to make, with randomness from the operating system; for `"poisson"` it may be 0."""
        import numpy as np

        source = np.random.default_rng()
        if self.distribution == "poisson":
            return int(source.poisson(self.mean))
        if self.distribution == "geometric":
            return int(source.geometric(self._gamma()))
        return int(source.logseries(1 - self._gamma()))

    def epsilon(self, events: Event | Iterable[Event], delta: float) -> float:
        """The epsilon of the search, by Renyi divergences.

        Args:
          events: what one run releases, or the costliest of them if they differ: of one unit and relation.
          delta: in (0, 1).

        Returns:
          0.0 if a run releases nothing, `math.inf` if it releases something without noise.

        Raises:
          InvalidArgumentError: delta is outside its range.
          UnsupportedEventError: the events do not compose, or protect users by the group lemma.
        """
        import numpy as np

        _check.open_unit_interval(delta=delta)
        orders, divergences = accounting.renyi_divergences(events)
        if not divergences.any():
            return 0.0
        if not np.isfinite(divergences).any():
            return math.inf
        with bounds.quiet_accountant() as dp_accounting:
            if self.distribution == "poisson":
                choice = self._cost_if_poisson(orders, divergences)
            else:
                choice = self._cost_if_negative_binomial(orders, divergences)
            # Fewer than one run on average are taken for one.
            total = divergences + choice + max(math.log(self.mean), 0.0) / (orders - 1)
            usable = np.isfinite(total)
            return float(dp_accounting.rdp.compute_epsilon(orders[usable], total[usable], delta)[0])

    def _cost_if_negative_binomial(self, orders: Any, divergences: Any) -> float:
        """Theorem 2: the second order may be any, so the cheapest is taken; it does not depend on the first."""
        shape, log_inverse = 1 + _SHAPES[self.distribution], -math.log(self._gamma())
        return float(min(shape * ((1 - 1 / orders) * divergences + log_inverse / orders)))

    def _cost_if_poisson(self, orders: Any, divergences: Any) -> Any:
        """Theorem 6: mean times the delta at which the run is (log(1 + 1 / (order - 1)), delta)-private."""
        import numpy as np
        from dp_accounting.rdp import rdp_privacy_accountant

        known = np.isfinite(divergences)
        epsilons = -np.log1p(-1 / orders)
        deltas = [
            rdp_privacy_accountant.compute_delta(orders[known], divergences[known], epsilon)[0] for epsilon in epsilons
        ]
        return self.mean * np.array(deltas)

    def _gamma(self) -> float:
        """The distribution's parameter in (0, 1): the chance to stop after a run, of the geometric one."""
        if self.distribution == "geometric":
            return 1 / self.mean
        low, high = 0.0, 1.0
        for _ in range(200):
            middle = (low + high) / 2
            if middle and (1 / middle - 1) / -math.log(middle) > self.mean:
                low = middle
            else:
                high = middle
        return high
