"""Pure differential privacy, where delta is zero: amplification by sampling, and a bound on Renyi divergences.

Knows neither events nor accountants.
"""

import math

__all__ = ["amplified_epsilon", "randomized_response_divergence"]


def amplified_epsilon(epsilon: float, probability: float) -> float:
    """The epsilon of a pure mechanism on units that were sampled: log(1 + q (e^epsilon - 1)).

    It holds for Poisson sampling and adding or removing one, and for cohorts of a fixed share q drawn without replacement
    and replacing one.

    Args:
      epsilon: >= 0, of the mechanism on all units.
      probability: q in (0, 1].

    Example:
      >>> round(amplified_epsilon(1.0, 0.01), 4)
      0.017

    Source: Balle, Barthe, Gaboardi 2018, "Privacy Amplification by Subsampling", Theorems 8 and 9.
    """
    if epsilon < 700:
        return math.log1p(probability * math.expm1(epsilon))
    return epsilon + math.log(probability + (1 - probability) * math.exp(-epsilon))


def randomized_response_divergence(epsilon: float, order: float) -> float:
    """The largest Renyi divergence of any mechanism that is `epsilon`-private: that of randomized response.

    Args:
      epsilon: > 0.
      order: > 1.

    Source: Bun & Steinke 2016, "Concentrated Differential Privacy", Proposition 3.3; Kairouz, Oh, Viswanath 2015, Theorem
      3.2, for what every such mechanism can be made of.
    """
    truth, lie = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    first = order * truth + (1 - order) * lie
    second = order * lie + (1 - order) * truth
    return max(0.0, (first + math.log1p(math.exp(second - first))) / (order - 1))
