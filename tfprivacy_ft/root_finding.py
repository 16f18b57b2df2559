"""The least noise, and the largest count, that meet a target.

Both searches keep a side that was measured and found within the target, and only ever return that side.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = ["LEAST_NOISE", "MOST_NOISE", "largest_count", "least_noise", "log_excess"]

LEAST_NOISE, MOST_NOISE = 1e-3, 1e7
_NOISE_TOLERANCE = 1e-4  # relative
_ROUGH_TOLERANCE = 5e-3  # a straight line across is closer to the answer than `_NOISE_TOLERANCE` by far
_FAR = 50.0  # stands for an infinitely bad or good fit, so that the searches can interpolate


def log_excess(spent: float, target: float) -> float:
    """log(spent / target), kept finite: positive exactly when the target is passed."""
    if spent > target:
        return max(min(_FAR, math.log(spent / target)), 1e-300)
    return max(-_FAR, math.log(spent / target)) if spent > 0 else -_FAR


def least_noise(excess: Callable[[float], float], guesses: Sequence[Callable[[float], float]] = ()) -> float | None:
    """The smallest noise with excess(noise) <= 0, or up to 0.01 % more; None if there is none, or none that misses.

    Args:
      excess: by how much a noise multiplier misses (> 0) or meets (<= 0) the target; falls as noise grows.
      guesses: nearly the same and cheaper, the roughest first: they tell where to begin.
    """
    start = _START
    for rough in guesses:
        bracket = _bracket_noise(rough, start)
        if bracket is not None:
            start = _narrow_noise(rough, bracket, _ROUGH_TOLERANCE).root
    bracket = _bracket_noise(excess, start)
    # What is returned was itself measured and is within the target.
    return None if bracket is None else _narrow_noise(excess, bracket, _NOISE_TOLERANCE).feasible


def largest_count(excess: Callable[[int], float], most: int, guesses: Sequence[Callable[[int], float]] = ()) -> int:
    """The largest n in [0, most] with excess(n) <= 0; 0 is taken to satisfy it.

    Args:
      excess: by how much a count misses (> 0) or meets (<= 0) the target; grows with the count.
      most: where to stop looking, >= 0.
      guesses: as in `least_noise`.
    """
    start = 1
    for rough in guesses:
        start = max(1, _largest_count(rough, start, most))
    return _largest_count(excess, start, most)


class _Start(NamedTuple):
    """Where a search for noise begins: how far the first stride goes, and what is known of excess over log(noise)."""

    noise: float
    stride: float  # in log(noise)
    steepness: float  # by how much excess falls


_START = _Start(1.0, math.log(2), 1.0)  # epsilon falls at least as fast as noise grows


class _Bracket(NamedTuple):
    """Two noise multipliers with the answer between them, and by how much each misses or meets the target."""

    too_small: float
    too_small_excess: float
    feasible: float
    feasible_excess: float

    @property
    def width(self) -> float:
        return math.log(self.feasible / self.too_small)

    @property
    def root(self) -> _Start:
        """The straight line between the two: from where it meets the target, one stride closes a bracket."""
        fall = self.too_small_excess - self.feasible_excess
        noise = self.too_small * math.exp(self.width * self.too_small_excess / fall)
        return _Start(noise, 0.95 * _NOISE_TOLERANCE, max(fall / self.width, 0.5))


def _bracket_noise(excess: Callable[[float], float], start: _Start) -> _Bracket | None:
    """Walks from `start` in growing strides until the target lies between two neighbours; None if it never does."""
    noise, stride, steepness = start
    reach = 0.5
    miss = excess(noise)
    upwards = miss > 0
    while True:
        end = MOST_NOISE if upwards else LEAST_NOISE
        if noise == end:
            return None
        step, to_end = max(stride, min(abs(miss) / steepness, reach) + stride / 2), abs(math.log(end / noise))
        following = noise * math.exp(step if upwards else -step) if step < to_end else end
        following_miss = excess(following)
        if upwards and following_miss <= 0:
            return _Bracket(noise, miss, following, following_miss)
        if not upwards and following_miss > 0:
            return _Bracket(following, following_miss, noise, miss)
        steepness = max(abs(following_miss - miss) / min(step, to_end), 0.5)
        noise, miss, stride, reach = following, following_miss, 2 * stride, 2 * reach


def _narrow_noise(excess: Callable[[float], float], bracket: _Bracket, tolerance: float) -> _Bracket:
    """Regula falsi on log(noise), Illinois variant, until the bracket is `tolerance` wide."""
    over, under = bracket.too_small_excess, -bracket.feasible_excess  # halved where a side stays for a second time
    was_feasible = None
    for _ in range(200):
        width = bracket.width
        if width <= tolerance:
            break
        to_root = width * (over / (over + under) if over + under > 0 else 0.5)
        # Past the root, near enough for the next look, on the other side of it, to close the bracket.
        if to_root <= 0.6 * tolerance:
            step = 0.95 * tolerance
        elif width - to_root <= 0.6 * tolerance:
            step = width - 0.95 * tolerance
        else:
            step = to_root + 0.4 * tolerance
        noise = bracket.too_small * math.exp(step)
        miss = excess(noise)
        feasible = miss <= 0
        if feasible:
            bracket, under = bracket._replace(feasible=noise, feasible_excess=miss), -miss
            over /= 2 if was_feasible else 1
        else:
            bracket, over = bracket._replace(too_small=noise, too_small_excess=miss), miss
            under /= 2 if was_feasible is False else 1
        was_feasible = feasible
    return bracket


def _largest_count(excess: Callable[[int], float], start: int, most: int) -> int:
    low, low_miss, high, high_miss = 0, -_FAR, most + 1, _FAR
    guess = min(start, most)
    stride = 1.05
    while high - low > 1:
        miss = excess(guess)
        if miss <= 0:
            low, low_miss = guess, miss
        else:
            high, high_miss = guess, miss
        if low == 0:
            guess = high // 2
        elif high == most + 1:
            guess, stride = math.ceil(low * stride) + 1, stride**2
        else:
            # Epsilon is close to a power of n: interpolate logarithms, and keep off the ends so that it halves soon.
            share = min(max(low_miss / (low_miss - high_miss), 0.02), 0.98)
            guess = round(low * (high / low) ** share)
        guess = min(max(guess, low + 1), high - 1)
    return low
