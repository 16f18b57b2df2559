"""From right guesses to a lower bound on epsilon: the statistics of an audit in one training run. Knows no TensorFlow.

Each of m canaries was put into the data by the toss of a fair coin of its own, and after the training somebody guesses
some of the coins. If the training is (epsilon, delta)-private, many of the guesses are wrong; too many right ones refute
it. Whoever guesses may know everything but the coins; how many guesses are made has to be settled before they are made.
"""

import numpy as np
from scipy import special

from tfprivacy_ft import _check

__all__ = ["epsilon_lower_bound", "p_value"]

_BISECTIONS = 50


def p_value(epsilon: float, *, num_canaries: int, guesses: int, correct: int, delta: float) -> float:
    """The most likely that so many right guesses, or more, can be if the mechanism is (epsilon, delta)-private.

    Guarantees that a private mechanism, its canaries being independent fair coins, has a p-value of at most alpha with
    probability at most alpha, however clever the guesses. It never falls where epsilon or delta grows, nor rises where
    `correct` does.

    Args:
      epsilon: >= 0, of the hypothesis.
      num_canaries: m >= 1, the coins tossed.
      guesses: r in [1, m], the coins guessed at; settled beforehand.
      correct: in [0, r], the guesses that were right.
      delta: in [0, 1), of the hypothesis.

    Returns:
      A number in [0, 1].

    Raises:
      InvalidArgumentError: an argument is outside its range.

    Example:
      >>> round(p_value(0.0, num_canaries=10, guesses=10, correct=10, delta=0.0) * 2**10, 6)
      1.0

    Source: Steinke, Nasr & Jagielski 2023, "Privacy Auditing with One (1) Training Run", Theorem 5.2.
    """
    _check.non_negative(epsilon=epsilon)
    _check_guesses(num_canaries, guesses, correct, delta)
    return _p_value(epsilon, num_canaries, guesses, correct, delta)


def epsilon_lower_bound(num_canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that so many right guesses refute.

    Guarantees that it is above the true epsilon (at this delta) with probability at most 1 - confidence.

    Args:
      num_canaries, guesses, correct, delta: as in `p_value`.
      confidence: in (0, 1).

    Returns:
      A number >= 0; 0.0 where nothing is refuted.

    Raises:
      InvalidArgumentError: an argument is outside its range.

    Example:
      >>> round(epsilon_lower_bound(num_canaries=1000, guesses=100, correct=95, delta=1e-5), 2)
      2.17
      >>> epsilon_lower_bound(num_canaries=1000, guesses=100, correct=52, delta=1e-5)
      0.0

    Source: Steinke, Nasr & Jagielski 2023, appendix D.
    """
    _check_guesses(num_canaries, guesses, correct, delta)
    _check.open_unit_interval(confidence=confidence)

    def refuted(epsilon: float) -> bool:
        return _p_value(epsilon, num_canaries, guesses, correct, delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):  # ends, as the p-value comes to 1
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _p_value(epsilon: float, num_canaries: int, guesses: int, correct: int, delta: float) -> float:
    """P[W >= v] + 2 m delta max_i P[v - i <= W < v] / i, of W binomial: r guesses, right as in randomized response.

    Where 2 m delta / i > 1, its i-th part could fall as epsilon grows. There a larger one stands for it, without its
    first term, which would count negatively; so that the bisection finds the only place to cross a level.
    """
    if correct == 0:
        return 1.0
    right = special.expit(epsilon)
    at_least = special.bdtrc(correct - 1, guesses, right)  # P[W >= v]
    i = np.arange(1, correct + 1)
    nearly = special.bdtrc(correct - 1 - i, guesses, right)  # P[W >= v - i]
    share = 2 * num_canaries * delta / i
    return float(min(np.max(np.maximum(1 - share, 0) * at_least + share * nearly), 1.0))


def _check_guesses(num_canaries: int, guesses: int, correct: int, delta: float) -> None:
    _check.positive_integer(num_canaries=num_canaries, guesses=guesses)
    _check.at_most("num_canaries", num_canaries, guesses=guesses)
    _check.non_negative_integer(correct=correct)
    _check.at_most("guesses", guesses, correct=correct)
    if delta != 0:
        _check.open_unit_interval(delta=delta)
