"""Releases -> epsilon, bounded from above in several ways: this is where dp_accounting is asked.

The releases are of one unit and one relation; what may be put together is for `accounting` to say. dp_accounting is
imported when a sampled release first needs it.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tfprivacy_ft import gaussian, pure
from tfprivacy_ft.errors import UnsupportedEventError
from tfprivacy_ft.releases import Release, has_closed_form, has_pld, is_sampled, needs_lemma

__all__ = [
    "by_group_lemma",
    "coarse_epsilon",
    "fine_epsilon",
    "has_mixtures",
    "limit_epsilon",
    "pld_epsilon",
    "pure_epsilon",
    "quiet_accountant",
    "rdp_epsilon",
    "rdp_of_all",
    "rdp_of_one",
    "unsampled_epsilon",
]

# Pure.


def pure_epsilon(releases: Iterable[Release]) -> float | None:
    """Pure epsilons add up; None if there is none, as with Gaussian noise."""
    total = 0.0
    for release in releases:
        if release.mechanism != "laplace":
            return None
        total += release.times * release.pure_epsilon if release.noise_multiplier else math.inf
    return total


# Without sampling.


def unsampled_epsilon(releases: Iterable[Release], delta: float) -> float:
    """The same releases with everyone in each of them."""
    unsampled: dict[Release, int] = {}
    for release in releases:
        if release.noise_multiplier == 0:
            return math.inf
        key = Release("everyone", release.noise_multiplier, 0, group=release.group, mechanism=release.mechanism)
        unsampled[key] = unsampled.get(key, 0) + release.times
    everyone = tuple(sorted(key._replace(times=times) for key, times in unsampled.items()))
    return _gaussians_epsilon(everyone, delta) if has_closed_form(everyone) else pld_epsilon(everyone, delta, None)


def _gaussians_epsilon(releases: Iterable[Release], delta: float) -> float:
    """Composed Gaussians are one Gaussian: the squares of 1 / noise add up."""
    mu_squared = 0.0
    for release in releases:
        mu_squared += release.times / release.noise_of_group / release.noise_of_group
    return gaussian.epsilon_at(math.sqrt(mu_squared), delta)


# Renyi differential privacy.

_ROUNDING = 1e-12  # of the logarithm of a sum of up to a thousand terms, with room to spare


@contextlib.contextmanager
def quiet_accountant() -> Iterator[Any]:
    """Gives dp_accounting, and drops what it logs while the block runs (thousands of lines on unusual orders)."""
    import dp_accounting

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "dp_accounting" not in record.pathname

    logger = logging.getLogger("absl")
    logger.addFilter(from_elsewhere)
    try:
        yield dp_accounting
    finally:
        logger.removeFilter(from_elsewhere)


@functools.lru_cache(maxsize=256)
def rdp_of_one(release: Release, orders: tuple[int, ...] | None = None) -> tuple[Any, Any]:
    """The Renyi orders, and the divergence of one such release at each; infinite where it could not be computed."""
    import numpy as np

    if release.mechanism == "laplace":
        return _rdp_of_one_laplace(release, orders)
    with quiet_accountant() as dp_accounting:
        event = dp_accounting.GaussianDpEvent(release.noise_of_group)
        relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
        if release.drawn == "poisson":
            event = dp_accounting.PoissonSampledDpEvent(release.sampling_probability, event)
        elif release.drawn == "fixed":
            event = dp_accounting.SampledWithoutReplacementDpEvent(release.population, release.cohort_size, event)
            relation = dp_accounting.NeighboringRelation.REPLACE_ONE
        divergences = []
        orders = dp_accounting.rdp.RdpAccountant(orders, relation).orders
        with np.errstate(all="ignore"):
            for order in orders:
                try:
                    divergence = dp_accounting.rdp.RdpAccountant([order], relation).compose(event).rdp[0]
                except (ValueError, OverflowError, ZeroDivisionError):  # an order that floating point cannot reach
                    divergence = math.inf
                if release.drawn != "everyone":
                    # These are logarithms of sums close to 1: what rounding may have taken away is given back, and
                    # an order below zero, which would count as perfect privacy, is not used.
                    divergence = divergence + _ROUNDING / (order - 1) if divergence >= 0 else math.inf
                divergences.append(divergence)
    return orders, np.array(divergences)


def _rdp_of_one_laplace(release: Release, orders: tuple[int, ...] | None) -> tuple[Any, Any]:
    """The most that its pure epsilon allows for, whichever way the noise on many numbers shares the sensitivity."""
    import numpy as np

    orders = rdp_of_one(Release("everyone", 1.0, 1), orders)[0]
    divergences = [pure.randomized_response_divergence(release.pure_epsilon, float(order)) for order in orders]
    return orders, np.array(divergences) + _ROUNDING / (np.asarray(orders) - 1)


def rdp_of_all(releases: tuple[Release, ...], orders: tuple[int, ...] | None = None) -> tuple[Any, Any]:
    """The Renyi orders, and the divergence of all releases together at each."""
    looked_at, total = rdp_of_one(releases[0]._replace(times=1), orders)
    total = releases[0].times * total
    for release in releases[1:]:
        total = total + release.times * rdp_of_one(release._replace(times=1), orders)[1]
    return looked_at, total


@functools.lru_cache(maxsize=1024)
def rdp_epsilon(releases: tuple[Release, ...], delta: float, orders: tuple[int, ...] | None = None) -> float:
    """Divergences add up over releases; the best order gives epsilon, those of dp_accounting or the few that are given.

    Source: Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy", Proposition 12.
    """
    if not releases:
        return 0.0
    if any(release.noise_multiplier == 0 for release in releases):
        return math.inf
    if needs_lemma(releases):
        by_lemma = by_group_lemma(functools.partial(rdp_epsilon, orders=orders), releases, delta)
        return min(by_lemma, unsampled_epsilon(releases, delta))
    bound = pure_epsilon(releases)
    bound = math.inf if bound is None else bound
    looked_at, total = rdp_of_all(releases, orders)
    usable = [i for i, divergence in enumerate(total) if math.isfinite(divergence)]
    if not usable:
        return bound
    with quiet_accountant() as dp_accounting:
        return min(bound, float(dp_accounting.rdp.compute_epsilon(looked_at[usable], total[usable], delta)[0]))


# Groups: all examples of one user.


def has_mixtures() -> bool:
    """Whether dp_accounting knows the loss of a mixture of Gaussians, which is what a sampled group is; 0.4.3 does not."""
    from dp_accounting.pld import privacy_loss_distribution

    return hasattr(privacy_loss_distribution, "from_mixture_gaussian_mechanism")


def by_group_lemma(
    epsilon_of: Callable[[tuple[Release, ...], float], float], releases: tuple[Release, ...], delta: float
) -> float:
    """From (epsilon, delta) for one to (k epsilon, (e^{k epsilon} - 1) / (e^epsilon - 1) delta) for k of them.

    Source: Vadhan 2017, "The Complexity of Differential Privacy", Lemma 2.2.
    """
    size = max(release.group for release in releases)
    alone = tuple(sorted(release._replace(group=1) for release in releases))
    best = math.inf
    for step in range(400):  # ever smaller deltas for one, until what the group makes of it is within delta
        smaller = delta / size * 10.0 ** (-step / 8)
        one = epsilon_of(alone, smaller)
        if not math.isfinite(one) or size * one > 600:
            break
        factor = math.expm1(size * one) / math.expm1(one) if one > 0 else size
        if smaller * factor <= delta:
            best = size * one
            break
    return best


# Privacy loss distributions.

_DEFAULT_DISCRETIZATION = 1e-4  # of privacy losses; a coarser grid gives a larger epsilon, never a smaller one
_MOST_CELLS = 500_000  # of a grid of losses; one evaluation then takes about a second at most
_MOST_PURE_EPSILON = 500.0  # the exponential of larger ones is beyond floating point
_WIDEST_CELL = 700.0  # likewise
_FEW_ORDERS = (3, 4, 5, 6, 8, 10, 12, 16, 24, 32)  # of dp_accounting's own, all quick to compute
_TAIL = 1e-22  # the mass that PLD's own truncation leaves out, about e^-50


@functools.lru_cache(maxsize=8)
def _loss_of_one(noise_multiplier: float, sampling_probability: float, interval: float, group: int = 1) -> Any:
    """The privacy loss distribution of one release, rounded to the side of more loss.

    Of a group, each example is sampled by itself: Ganesh 2024, "Tight Group-Level DP Guarantees for DP-SGD with Sampling
    via Mixture of Gaussians Mechanisms", Theorem 1.1.
    """
    from dp_accounting.pld import privacy_loss_distribution

    if group > 1:
        taken = range(group + 1)
        q = sampling_probability
        chances = [math.comb(group, n) * q**n * (1 - q) ** (group - n) for n in taken]
        return privacy_loss_distribution.from_mixture_gaussian_mechanism(
            standard_deviation=noise_multiplier,
            sensitivities=list(taken),
            sampling_probs=[chance / math.fsum(chances) for chance in chances],
            value_discretization_interval=interval,
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=sampling_probability,
    )


@functools.lru_cache(maxsize=8)
def _loss_of_one_pure(pure_epsilon: float, interval: float) -> Any:
    """The privacy loss distribution of randomized response, which dominates that of every mechanism as private.

    The loss of Laplace noise on a single number lies below it, and would do for vectors if one number were their worst
    case, for which there is no proof that we know of.
    """
    from dp_accounting.pld import common, privacy_loss_distribution

    return privacy_loss_distribution.from_privacy_parameters(
        common.DifferentialPrivacyParameters(pure_epsilon, 0.0), value_discretization_interval=interval
    )


def _default_interval(releases: tuple[Release, ...]) -> float:
    """1e-4, or 1e-3 for mixtures, doubled until the largest losses that matter fit into `_MOST_CELLS` cells."""
    pure_epsilons = {release.pure_epsilon for release in releases if release.mechanism == "laplace"}
    noises = [release.noise_of_group for release in releases if release.mechanism == "gaussian"]
    if not noises and len(pure_epsilons) == 1:
        return pure_epsilons.pop()  # all losses are multiples of it: nothing is rounded
    of_one = max([*pure_epsilons, *(10 / noise + 0.5 / noise**2 for noise in noises)])
    # The loss of a mixture is found cell by cell, which takes half a minute on the finer grid.
    finest = 10 * _DEFAULT_DISCRETIZATION if needs_lemma(releases) and has_mixtures() else _DEFAULT_DISCRETIZATION
    # The loss of a pure mechanism is one number, rounded up to the grid.
    finest = min([finest, *(one / 200 for one in pure_epsilons)])
    # All orders find a bound that is no larger: where a few show that the finest grid fits, they need not be looked at.
    if max(of_one, rdp_epsilon(releases, _TAIL, _FEW_ORDERS)) <= finest * _MOST_CELLS:
        return finest
    largest = max(of_one, rdp_epsilon(releases, _TAIL))
    if not math.isfinite(largest):
        largest = of_one + unsampled_epsilon(releases, _TAIL)
    doublings = max(0, math.ceil(math.log2(largest / finest / _MOST_CELLS)))
    return finest * 2**doublings


def limit_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """A guess, for the searches to start from: the Gaussian mechanism that many releases come near to. No bound.

    Source: Bu, Dong, Long, Su 2020, "Deep Learning with Gaussian Differential Privacy", Corollary 4.
    """
    mu_squared = 0.0
    for release in releases:
        if release.noise_multiplier == 0:
            return math.inf
        q = release.cohort_size / release.population if release.drawn == "fixed" else release.sampling_probability
        mu_squared_of_one = (release.group / release.noise_multiplier) ** 2
        if q < 1:
            amplified = (q * release.group) ** 2 * math.expm1(min(release.noise_multiplier**-2, 700.0))
            mu_squared_of_one = min(amplified, mu_squared_of_one)
        mu_squared += release.times * mu_squared_of_one
    return gaussian.epsilon_at(math.sqrt(mu_squared), delta)


def coarse_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """A quick look: ten times the default grid, where there is one."""
    exact = has_closed_form(releases) or all(release.mechanism == "laplace" for release in releases)
    exact = exact or any(release.noise_multiplier == 0 for release in releases)  # no privacy, and no grid
    if exact:
        return fine_epsilon(releases, delta)
    interval = _default_interval(releases)
    return pld_epsilon(releases, delta, max(interval, min(10 * interval, _WIDEST_CELL)))


def fine_epsilon(releases: tuple[Release, ...], delta: float) -> float:
    """By the default grid."""
    return pld_epsilon(releases, delta, None)


@functools.lru_cache(maxsize=4)
def _loss_of_all(releases: tuple[Release, ...], interval: float) -> Any:
    """The privacy loss distribution of all releases together."""
    total = None
    for release in releases:
        if has_closed_form([release]):
            composed = _loss_of_one(release.noise_of_group / math.sqrt(release.times), 1.0, interval)
        elif release.mechanism == "laplace":
            composed = _loss_of_one_pure(release.pure_epsilon, interval).self_compose(release.times)
        else:
            one = _loss_of_one(release.noise_multiplier, release.sampling_probability, interval, release.group)
            composed = one.self_compose(release.times)
        total = composed if total is None else total.compose(composed)
    return total


@functools.lru_cache(maxsize=1024)
def pld_epsilon(releases: tuple[Release, ...], delta: float, interval: float | None) -> float:
    """Losses are composed on a grid of this interval, or the default one; the closed form where that is exact."""
    if not has_pld(releases):
        raise UnsupportedEventError(
            "accountant='pld' has no bound for fixed-size cohorts drawn without replacement: use accountant='rdp', or "
            "Poisson sampling."
        )
    # Sampling never costs privacy, so the unsampled figure is a bound too: all there is to say where nothing is
    # sampled, and a way out where the grid or the tails give up (losses in the thousands, delta below 1e-14).
    # Small pure epsilons may be below the grid, and then RDP is the tighter of the two.
    bound = rdp_epsilon(releases, delta) if any(r.mechanism == "laplace" for r in releases) else math.inf
    if is_sampled(releases) or has_closed_form(releases):
        bound = min(bound, unsampled_epsilon(releases, delta))
    if has_closed_form(releases) or any(release.noise_multiplier == 0 for release in releases):
        return bound
    if any(release.mechanism == "laplace" and release.pure_epsilon > _MOST_PURE_EPSILON for release in releases):
        return bound
    if needs_lemma(releases) and not has_mixtures():
        return min(bound, by_group_lemma(functools.partial(pld_epsilon, interval=interval), releases, delta))
    interval = interval or _default_interval(releases)
    if interval > _WIDEST_CELL:
        return bound
    with quiet_accountant():
        total = _loss_of_all(releases, interval)
        return min(bound, float(total.get_epsilon_for_delta(delta)))
