"""Events as the accountants see them: what was drawn, how noisy, how often."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from tfprivacy_ft import pure
from tfprivacy_ft.events import Event, Mechanism

__all__ = ["Release", "from_events", "has_closed_form", "has_pld", "is_sampled", "needs_lemma"]


class Release(NamedTuple):
    """`times` equal releases, as far as epsilon is concerned; hashable, so that answers can be kept."""

    drawn: Literal["everyone", "poisson", "fixed"]
    noise_multiplier: float  # standard deviation, or scale of Laplace noise, over the sensitivity under the relation
    times: int
    sampling_probability: float = 1.0
    cohort_size: int = 1
    population: int = 1
    group: int = 1  # units of what is sampled that are protected together
    mechanism: Mechanism = "gaussian"

    @property
    def noise_of_group(self) -> float:
        """Were the whole group in the release, its noise over what it moves the sum by."""
        return self.noise_multiplier / self.group

    @property
    def pure_epsilon(self) -> float:
        """Of one of them, if its noise is Laplace noise."""
        of_one = 1 / self.noise_multiplier
        if self.drawn == "poisson":
            # Of a group each is sampled by itself; of pure epsilons, those of its members add up.
            return self.group * pure.amplified_epsilon(of_one, self.sampling_probability)
        if self.drawn == "fixed":
            return pure.amplified_epsilon(of_one, self.cohort_size / self.population)
        return self.group * of_one


def _release(event: Event, noise_factor: float) -> Release:
    noise = float(event.noise_multiplier) * noise_factor
    times, group, law = int(event.participations), int(event.examples_per_user), event.mechanism
    if event.sampler == "poisson" and event.sampling_probability is not None and event.sampling_probability < 1:
        q = float(event.sampling_probability)
        return Release("poisson", noise, times, sampling_probability=q, group=group, mechanism=law)
    if event.sampler == "fixed":
        cohort_size, population = int(event.cohort_size or 1), int(event.population or 1)
        # Replacing one unit moves the sum by twice the clip: to the accountant, half the noise.
        if cohort_size < population and group == 1:
            return Release("fixed", noise / 2, times, cohort_size=cohort_size, population=population, mechanism=law)
        # What sampling without replacement hides of a group is not known here, so all of it is taken to be in each.
        return Release("everyone", noise / 2, times, group=group, mechanism=law)
    if event.is_local:
        return Release("everyone", noise / 2, times, group=group, mechanism=law)  # any two reports are 2 clips apart
    if event.sampler == "tree":
        # A leaf is in one node of each level, and all nodes are released at once: one release, with their sensitivities
        # added up as the norm does.
        levels = event.tree_levels
        noise /= math.sqrt(levels) if law == "gaussian" else levels
    return Release("everyone", noise, times, group=group, mechanism=law)


def from_events(events: Iterable[Event], noise_factor: float = 1.0) -> tuple[Release, ...]:
    """The events in which somebody took part, equal ones merged, in a fixed order."""
    times: dict[Release, int] = {}
    for event in events:
        release = _release(event, noise_factor)
        key = release._replace(times=0)
        times[key] = times.get(key, 0) + release.times
    return tuple(sorted(key._replace(times=n) for key, n in times.items() if n > 0))


def is_sampled(releases: Iterable[Release]) -> bool:
    """Whether somebody may be left out of one by chance."""
    return any(release.drawn != "everyone" for release in releases)


def has_closed_form(releases: Iterable[Release]) -> bool:
    """Whether all of it is one Gaussian mechanism."""
    return all(release.drawn == "everyone" and release.mechanism == "gaussian" for release in releases)


def needs_lemma(releases: Iterable[Release]) -> bool:
    """Whether a whole group's chance to be sampled is one that RDP knows nothing of."""
    return any(r.group > 1 and r.drawn != "everyone" and r.mechanism == "gaussian" for r in releases)


def has_pld(releases: Iterable[Release]) -> bool:
    """Whether the losses of all of them have a known distribution; not so those of fixed-size cohorts."""
    return not any(release.drawn == "fixed" and release.mechanism == "gaussian" for release in releases)
