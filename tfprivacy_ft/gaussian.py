"""The Gaussian mechanism by itself: its exact delta for an epsilon, and its epsilon for a delta.

Knows neither events nor accountants. Source: Balle & Wang 2018, "Improving the Gaussian Mechanism for Differential
Privacy", Theorem 8.
"""

import math

__all__ = ["delta_at", "epsilon_at"]


def _mills(x: float) -> float:
    """The upper tail of the standard normal at x >= 0, divided by its density there."""
    if x < 5:
        return math.sqrt(math.pi / 2) * math.exp(x * x / 2) * math.erfc(x / math.sqrt(2))
    fraction = x
    for k in range(60, 0, -1):  # the continued fraction of Laplace; 60 terms are exact to rounding from x = 5 on
        fraction = x + k / fraction
    return 1 / fraction


def delta_at(mu: float, candidate: float) -> float:
    """The delta of a Gaussian mechanism with sensitivity over noise `mu`, at epsilon `candidate`.

    Phi(-a) - e^epsilon Phi(-b) with a, b = epsilon/mu -+ mu/2. The two densities differ by exactly e^epsilon, so the
    product is written with the density at a: nothing overflows.
    """
    a = candidate / mu - mu / 2
    b = candidate / mu + mu / 2
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    tail = density * _mills(a) if a >= 0 else math.erfc(a / math.sqrt(2)) / 2
    return tail - density * _mills(b)


def epsilon_at(mu: float, delta: float) -> float:
    """The least epsilon of a Gaussian mechanism with sensitivity over noise `mu`, at `delta`, rounded upward."""
    if mu == 0 or math.erf(mu / math.sqrt(8)) <= delta:  # the total variation distance is delta at epsilon 0
        return 0.0
    if not math.isfinite(mu * mu):
        return math.inf
    low, high = 0.0, max(1.0, mu * mu)
    while delta_at(mu, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if delta_at(mu, middle) > delta:
            low = middle
        else:
            high = middle
    return high  # the side that satisfies delta
