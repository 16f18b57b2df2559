"""The vocabulary of the accounts: what one release of something computed from private data was.

An `Event` is written to the ledger before it happens and turned into epsilon by `accounting`. It holds public
facts only, and knows neither TensorFlow nor dp_accounting.
"""

import dataclasses
import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any, Literal

from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError

Unit = Literal["example", "user", "client"]
Sampler = Literal["poisson", "shuffled", "fixed", "unknown", "tree", "local"]
Mechanism = Literal["gaussian", "laplace"]
Relation = Literal["add_or_remove_one", "zero_out", "replace_one", "local"]

# Which neighbouring data sets each sampler is accounted for.
RELATIONS: dict[str, Relation] = {
    "poisson": "add_or_remove_one",
    "shuffled": "zero_out",
    "fixed": "replace_one",
    "unknown": "zero_out",
    "tree": "zero_out",
    "local": "local",
}


@dataclasses.dataclass(frozen=True)
class Event:
    """`count` releases of one mechanism on sampled units of privacy.

    Args:
      unit: who is protected: `"example"`, `"user"` (all examples of one, at most `examples_per_user`) or `"client"`.
      sampler: how the units of one release were chosen. `"poisson"`: each independently with
        `sampling_probability`. `"shuffled"`: each at most once in a pass, no amplification. `"fixed"`:
        `cohort_size` of `population`, uniformly without replacement. `"unknown"`: anything else, taken to be
        every unit in every release, once. `"tree"`: each at most once in each tree of partial sums. `"local"`: no sum at
        all, each unit releases by itself what it has clipped and noised, and whoever collects it knows whose it is.
      noise_multiplier: standard deviation of the noise divided by the clip, or scale of Laplace noise divided by the clip
        of the l1 norm; 0 means no privacy.
      count: releases (steps or rounds), >= 0.
      population: units that could take part, >= 1 (public); None where it is not known.
      sampling_probability: in (0, 1], for `"poisson"`.
      cohort_size: units in one release, for `"fixed"`.
      participations: the most releases any one unit took part in: passes for `"shuffled"`, trees for `"tree"`, its own
        reports for `"local"`, and `count` otherwise.
      l2_norm_clip: the clip, for the record; epsilon does not depend on it.
      examples_per_user: the most examples that one user has, >= 1, for the unit `"user"`. What is sampled and clipped, and
        counted in `population` and `participations`, is a single example.
      mechanism: `"gaussian"` or `"laplace"`.
      leaves_per_tree: the most releases (leaves) that one tree of partial sums has, >= 1, for `"tree"`.

    Raises:
      InvalidArgumentError: a value is outside its range.

    Example:
      >>> Event.poisson(count=2, noise_multiplier=1.1, sampling_probability=0.01, population=60000).relation
      'add_or_remove_one'
    """

    unit: Unit
    sampler: Sampler
    noise_multiplier: float
    count: int
    participations: int
    population: int | None = None
    sampling_probability: float | None = None
    cohort_size: int | None = None
    l2_norm_clip: float | None = None
    examples_per_user: int = 1
    mechanism: Mechanism = "gaussian"
    leaves_per_tree: int | None = None

    def __post_init__(self):
        if self.unit not in ("example", "user", "client"):
            raise InvalidArgumentError(f"unit={self.unit!r} is no unit of privacy: use 'example', 'user' or 'client'.")
        _check.positive_integer(examples_per_user=self.examples_per_user)
        if self.examples_per_user > 1 and self.unit != "user":
            raise InvalidArgumentError(
                f"examples_per_user={self.examples_per_user} does not go with unit={self.unit!r}: give unit='user'."
            )
        if self.mechanism not in ("gaussian", "laplace"):
            raise InvalidArgumentError(f"mechanism={self.mechanism!r} is unknown: use 'gaussian' or 'laplace'.")
        if self.mechanism == "laplace" and self.l2_norm_clip is not None:
            raise InvalidArgumentError(
                f"l2_norm_clip={self.l2_norm_clip} does not go with mechanism='laplace', whose clip bounds the l1 norm: leave "
                "it out."
            )
        if self.sampler not in RELATIONS:
            raise InvalidArgumentError(f"sampler={self.sampler!r} is unknown: use one of {', '.join(RELATIONS)}.")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise InvalidArgumentError(
                f"noise_multiplier={self.noise_multiplier} is not allowed: give a finite number >= 0."
            )
        for name in ("count", "participations"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise InvalidArgumentError(f"{name}={value!r} is not allowed: give an integer >= 0.")
        if self.population is not None and not (isinstance(self.population, Integral) and self.population >= 1):
            raise InvalidArgumentError(f"population={self.population!r} is not allowed: give an integer >= 1, or None.")
        if not 0 <= self.participations <= self.count:
            raise InvalidArgumentError(
                f"participations={self.participations} must lie between 0 and count={self.count}."
            )
        if self.sampler == "poisson" and not (
            self.sampling_probability is not None and 0 < self.sampling_probability <= 1
        ):
            raise InvalidArgumentError(
                f"sampling_probability={self.sampling_probability} is not allowed: give a number in (0, 1]."
            )
        if self.sampler == "fixed" and not (
            self.population and self.cohort_size is not None and 1 <= self.cohort_size <= self.population
        ):
            raise InvalidArgumentError(
                f"cohort_size={self.cohort_size} must lie between 1 and population={self.population}."
            )

        if self.sampler != "tree" and self.leaves_per_tree is not None:
            raise InvalidArgumentError(
                f"leaves_per_tree={self.leaves_per_tree} does not go with sampler={self.sampler!r}: leave it out."
            )
        if self.sampler == "tree":
            _check.positive_integer(leaves_per_tree=self.leaves_per_tree)
            assert self.leaves_per_tree is not None
            if self.count > self.participations * self.leaves_per_tree:
                raise InvalidArgumentError(
                    f"count={self.count} is more than participations={self.participations} trees of "
                    f"leaves_per_tree={self.leaves_per_tree} hold."
                )

    @property
    def in_passes(self) -> bool:
        """Whether units take part once in each pass (or tree) of several releases, rather than in each release."""
        return self.sampler in ("shuffled", "tree")

    @property
    def is_local(self) -> bool:
        """Whether it protects against whoever collects the releases, who sees each unit's own."""
        return self.sampler == "local"

    @property
    def tree_levels(self) -> int:
        """How many nodes of a binary tree hold one leaf, at most, the leaf and the root among them; for `"tree"`."""
        assert self.leaves_per_tree is not None
        return self.leaves_per_tree.bit_length()

    @property
    def relation(self) -> Relation:
        """The neighbouring relation that this event's epsilon is stated for."""
        return RELATIONS[self.sampler]

    def with_count(self, count: int) -> "Event":
        """The same event, `count` times; not for `"shuffled"` and `"tree"`, whose participations are passes."""
        if self.in_passes:
            raise InvalidArgumentError(
                f"the count of a {self.sampler} event does not give its passes: build a new event."
            )
        return dataclasses.replace(self, count=count, participations=count)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that JSON can hold; `Event(**event.to_dict()) == event`."""
        return dataclasses.asdict(self)

    @classmethod
    def poisson(
        cls,
        *,
        count: int,
        noise_multiplier: float,
        sampling_probability: float,
        population: int | None = None,
        unit: Unit = "example",
        l2_norm_clip: float | None = None,
        examples_per_user: int = 1,
        mechanism: Mechanism = "gaussian",
    ) -> "Event":
        """Each unit takes part in each of `count` releases independently with `sampling_probability`."""
        return cls(
            unit=unit,
            sampler="poisson",
            noise_multiplier=noise_multiplier,
            count=count,
            participations=count,
            population=population,
            sampling_probability=sampling_probability,
            l2_norm_clip=l2_norm_clip,
            examples_per_user=examples_per_user,
            mechanism=mechanism,
        )

    @classmethod
    def shuffled(
        cls,
        *,
        count: int,
        passes: int,
        noise_multiplier: float,
        population: int | None = None,
        unit: Unit = "example",
        l2_norm_clip: float | None = None,
        examples_per_user: int = 1,
        mechanism: Mechanism = "gaussian",
    ) -> "Event":
        """`count` releases in which no unit took part more than `passes` times."""
        return cls(
            unit=unit,
            sampler="shuffled",
            noise_multiplier=noise_multiplier,
            count=count,
            participations=passes,
            population=population,
            l2_norm_clip=l2_norm_clip,
            examples_per_user=examples_per_user,
            mechanism=mechanism,
        )

    @classmethod
    def fixed(
        cls,
        *,
        count: int,
        noise_multiplier: float,
        cohort_size: int,
        population: int,
        unit: Unit = "client",
        l2_norm_clip: float | None = None,
        mechanism: Mechanism = "gaussian",
    ) -> "Event":
        """Each release uses `cohort_size` of `population` units, drawn without replacement."""
        return cls(
            unit=unit,
            sampler="fixed",
            noise_multiplier=noise_multiplier,
            count=count,
            participations=count,
            population=population,
            cohort_size=cohort_size,
            l2_norm_clip=l2_norm_clip,
            mechanism=mechanism,
        )

    @classmethod
    def unknown(
        cls,
        *,
        count: int,
        noise_multiplier: float,
        population: int | None = None,
        unit: Unit = "example",
        l2_norm_clip: float | None = None,
        examples_per_user: int = 1,
        mechanism: Mechanism = "gaussian",
    ) -> "Event":
        """Batches that nobody vouches for: every unit is taken to be in every release."""
        return cls(
            unit=unit,
            sampler="unknown",
            noise_multiplier=noise_multiplier,
            count=count,
            participations=count,
            population=population,
            l2_norm_clip=l2_norm_clip,
            examples_per_user=examples_per_user,
            mechanism=mechanism,
        )

    @classmethod
    def tree(
        cls,
        *,
        trees: int,
        leaves_per_tree: int,
        noise_multiplier: float,
        population: int | None = None,
        unit: Unit = "example",
        l2_norm_clip: float | None = None,
        examples_per_user: int = 1,
    ) -> "Event":
        """Sums over all steps so far, released by trees of noisy partial sums (DP-FTRL); no unit is in a tree twice.

        Each node of a tree holds the sum of the leaves (steps) below it, with noise of its own.

        Args:
          trees: how many one after the other: one for each pass, where every pass begins a new one, >= 0.
          leaves_per_tree: steps in each, >= 1.
          noise_multiplier: standard deviation of a node's noise divided by the clip, >= 0.
          population, unit, l2_norm_clip, examples_per_user: as in the class.

        Source: Kairouz et al. 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling", Theorem 4.1 and
          appendix D.
        """
        _check.positive_integer(leaves_per_tree=leaves_per_tree)
        return cls(
            unit=unit,
            sampler="tree",
            noise_multiplier=noise_multiplier,
            count=trees * leaves_per_tree,
            participations=trees,
            population=population,
            l2_norm_clip=l2_norm_clip,
            examples_per_user=examples_per_user,
            leaves_per_tree=leaves_per_tree,
        )

    @classmethod
    def local(
        cls,
        *,
        count: int,
        noise_multiplier: float,
        participations: int | None = None,
        population: int | None = None,
        unit: Unit = "client",
        l2_norm_clip: float | None = None,
        mechanism: Mechanism = "gaussian",
    ) -> "Event":
        """`count` rounds in which units report one by one what they noised themselves (local differential privacy).

        Any two reports of a unit are to look alike, which are up to twice the clip apart; that others report too, or that
        the unit was drawn by lot, hides nothing from whoever collects the reports.

        Args:
          count: rounds, >= 0.
          noise_multiplier: standard deviation (or scale) of the noise on one report divided by the clip, >= 0.
          participations: the most rounds in which any one unit reported; None for all.
          population, unit, l2_norm_clip, mechanism: as in the class.

        Source: Kasiviswanathan et al. 2011, "What Can We Learn Privately?", Definition 2.3.
        """
        return cls(
            unit=unit,
            sampler="local",
            noise_multiplier=noise_multiplier,
            count=count,
            participations=count if participations is None else participations,
            population=population,
            l2_norm_clip=l2_norm_clip,
            mechanism=mechanism,
        )


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same releases with equal events joined into one: counts and participations add up, order is kept.

    Example:
      >>> merge([Event.unknown(count=2, noise_multiplier=1.0), Event.unknown(count=3, noise_multiplier=1.0)])[0].count
      5
    """
    totals: dict[Event, tuple[int, int]] = {}
    for event in events:
        kind = dataclasses.replace(event, count=0, participations=0)
        count, participations = totals.get(kind, (0, 0))
        totals[kind] = (count + event.count, participations + event.participations)
    return tuple(dataclasses.replace(kind, count=c, participations=p) for kind, (c, p) in totals.items())
