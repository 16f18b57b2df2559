"""What privacy was spent: reports on runs, on several runs together, and on settings that are only planned.

For runs, the figures come from what their ledgers recorded; for `dpsgd`, `fedavg` and `solve`, from numbers typed in, and
the report says so. It computes nothing itself (`accounting` does), and needs no TensorFlow.
"""

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable
from typing import Any, Literal

from tfprivacy_ft import _check, accounting, ledger
from tfprivacy_ft.accounting import Account
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedEventError
from tfprivacy_ft.events import Event, Mechanism
from tfprivacy_ft.search import BestOf, Distribution
from tfprivacy_ft.statement import against, not_covered, statement, warnings

__all__ = ["Report", "best_of", "compose", "compute_epsilon", "dpftrl", "dpsgd", "fedavg", "solve"]


@dataclasses.dataclass(frozen=True)
class Report:
    """The privacy that was spent, by whom it is claimed, and what the claim leaves out.

    `str(report)` is the text to quote.

    Args:
      accounts: one for each unit of privacy and neighbouring relation; they do not add up.
      delta: the delta of every epsilon.
      source: where the events come from, in words.
      recorded: True if a run recorded the events, False if somebody typed them in.
      notes: releases without noise that the run recorded, and that it was run with a test seed, if so.
      facts: public facts that the run recorded.
      unsettled: reservations of the run that were never settled, and are counted in full.
      solved: what `solve` was asked for, by name.
      search: of which one such run is a part, and which the accounts then are of; None if there was none.
    """

    accounts: tuple[Account, ...]
    delta: float
    source: str
    recorded: bool
    notes: tuple[ledger.Note, ...] = ()
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    unsettled: int = 0
    solved: dict[str, float] = dataclasses.field(default_factory=dict)
    search: BestOf | None = None

    @property
    def epsilon(self) -> float:
        """The one epsilon; 0.0 if nothing was released, `math.inf` if something was released without noise.

        Raises:
          UnsupportedEventError: there are several accounts, which do not add up.
        """
        if len(self.accounts) > 1:
            kinds = " and ".join(f"{account.unit} / {account.relation}" for account in self.accounts)
            raise UnsupportedEventError(
                f"there is no single epsilon for {kinds}: read each of `accounts` with its own unit and relation."
            )
        return self.accounts[0].epsilon if self.accounts else 0.0

    def check_delta(self) -> None:
        """Warns if delta is so large, for the fewest units that any release was made of, that it protects nobody."""
        populations = [event.population for account in self.accounts for event in account.events if event.population]
        accounting.check_delta(self.delta, min(populations, default=None))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values that strict JSON can hold.

        An infinite epsilon is the text "Infinity" (which `float` reads back); null means that there is no such
        figure, as with several accounts or an accountant that has no bound.
        """
        return {
            "epsilon": _json_number(self.epsilon) if len(self.accounts) <= 1 else None,
            "delta": self.delta,
            "source": self.source,
            "recorded": self.recorded,
            "accounts": [_account_to_dict(account, can_be_private=not warnings(self)) for account in self.accounts],
            "notes": [dataclasses.asdict(note) for note in self.notes],
            "not_covered": not_covered(self),
            "warnings": warnings(self),
            "facts": self.facts,
            "unsettled": self.unsettled,
            "solved": {name: _json_number(value) for name, value in self.solved.items()},
            "search": None if self.search is None else dataclasses.asdict(self.search),
        }

    def to_json(self) -> str:
        """`to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, default=lambda number: number.item())  # NumPy's

    def to_csv(self) -> str:
        """A table with one row for each account under a row of names, for spreadsheets; floats in full, "inf" if infinite."""
        table = io.StringIO()
        writer = csv.DictWriter(
            table, [*_CSV_FIELDS, "releases", "samplers", "source", "recorded", "warnings"], lineterminator="\n"
        )
        writer.writeheader()
        for account in self.accounts:
            row = {name: getattr(account, name) for name in _CSV_FIELDS}
            row |= {"releases": account.releases, "samplers": " ".join(account.samplers)}
            row |= {"source": self.source, "recorded": self.recorded, "warnings": " ".join(warnings(self))}
            writer.writerow(row)
        return table.getvalue()

    def __str__(self) -> str:
        return statement(self)


_CSV_FIELDS = (
    "unit",
    "relation",
    "epsilon",
    "delta",
    "accountant",
    "epsilon_pld",
    "epsilon_rdp",
    "epsilon_without_amplification",
    "epsilon_replace_one",
    "epsilon_pure",
)


def compute_epsilon(
    source: str | os.PathLike[str] | ledger.LedgerContents | ledger.Ledger | Event | Iterable[Event],
    *,
    delta: float | None = None,
) -> Report:
    """The privacy spent by a run, or by a list of events.

    Args:
      source: a run's folder, its ledger file, what `ledger.read` read of it, its open ledger, or events.
      delta: in (0, 1); None takes the one that the run recorded.

    Returns:
      The report.

    Raises:
      InvalidArgumentError: delta is outside its range, or neither given nor recorded.
      LedgerError: there is no ledger, or (`LedgerDamagedError`) it cannot be trusted.

    Example:
      >>> report = compute_epsilon([Event.shuffled(count=10, passes=1, noise_multiplier=1.0)], delta=1e-5)
      >>> round(report.epsilon, 6)
      4.377178
    """
    if isinstance(source, str | os.PathLike | ledger.LedgerContents):
        contents = source if isinstance(source, ledger.LedgerContents) else ledger.read(source)
        where = f"recorded by the run in {contents.path}"
        return _report(
            contents.events, delta, contents.delta, where, notes=contents.notes, facts=contents.facts,
            unsettled=contents.unsettled,
        )  # fmt: skip
    if isinstance(source, ledger.Ledger):
        where = "recorded by the run" if source.path is None else f"recorded by the run in {source.path}"
        return _report(source.events(), delta, source.delta, where, notes=tuple(source.notes()), facts=source.facts)
    events = [source] if isinstance(source, Event) else list(source)
    return _report(events, delta, None, "given as events, not recorded by a run", recorded=False)


def compose(paths: Iterable[str | os.PathLike[str]], *, delta: float | None = None) -> Report:
    """The privacy spent by several runs on the same data, together.

    Args:
      paths: folders or ledger files of runs, each named once: stages of one training, or trainings one after the other.
      delta: in (0, 1), for all of them together; None takes the one that every run recorded.

    Returns:
      The report; runs that protect different units, or are stated for relations that do not compose, stand side by side in
      it.

    Raises:
      InvalidArgumentError: a run is named twice or none is, or delta is not given and the runs did not record the same.
      LedgerError: as in `compute_epsilon`.

    Example:
      >>> import tempfile
      >>> folders = [tempfile.mkdtemp(), tempfile.mkdtemp()]
      >>> for folder in folders:
      ...     with ledger.Ledger.open(folder, delta=1e-5) as book:
      ...         _ = book.reserve(Event.unknown(count=1, noise_multiplier=2**0.5))
      >>> round(compose(folders).epsilon, 6)
      4.377178
    """
    contents = [ledger.read(path) for path in paths]
    if not contents:
        raise InvalidArgumentError("paths is empty: name at least one run.")
    places = [content.path.resolve() for content in contents]
    for place in places:
        if places.count(place) > 1:
            raise InvalidArgumentError(f"{place} is named {places.count(place)} times: name every run once.")
    deltas = sorted({content.delta for content in contents if content.delta is not None})
    if delta is None and len(deltas) > 1:
        raise InvalidArgumentError(
            f"delta=None is not allowed here, because the runs recorded {' and '.join(map(str, deltas))}: give the one for "
            "all of them together."
        )
    return _report(
        [event for content in contents for event in content.events],
        delta,
        deltas[0] if deltas else None,
        f"recorded by the runs in {', '.join(str(content.path) for content in contents)}, taken to be on the same data",
        notes=tuple(dict.fromkeys(note for content in contents for note in content.notes)),
        facts={str(content.path): content.facts for content in contents},
        unsettled=sum(content.unsettled for content in contents),
    )


def dpsgd(
    *,
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    delta: float,
    epochs: float | None = None,
    steps: int | None = None,
    sampling: Literal["poisson", "shuffle"] = "poisson",
    examples_per_user: int | None = None,
    mechanism: Mechanism = "gaussian",
) -> Report:
    """The privacy of DP-SGD with these settings, for one example, or for one user.

    Args:
      num_examples: size of the data set, >= 1.
      batch_size: expected (Poisson) or largest (shuffle) batch, between 1 and `num_examples`.
      noise_multiplier: standard deviation of the noise over the clip, >= 0.
      delta: in (0, 1).
      epochs: > 0, not necessarily whole; means ceil(epochs * num_examples / batch_size) steps.
      steps: >= 1; give either epochs or steps.
      sampling: `"poisson"`: each example is in each batch independently. `"shuffle"`: each example at most once per
        epoch, without amplification; steps are taken to be epochs that leave out the last partial batch.
      examples_per_user: >= 1, the most examples that one user has; protects a user with all of them. None protects one
        example.
      mechanism: `"gaussian"`; or `"laplace"`, with the scale of its noise over the clip of the l1 norm for
        `noise_multiplier`, which also gives an epsilon for delta 0.

    Returns:
      The report.

    Raises:
      InvalidArgumentError: an argument is outside its range, or both or none of epochs and steps are given.

    Example:
      >>> report = dpsgd(num_examples=60_000, batch_size=256, noise_multiplier=1.1, epochs=60, delta=1e-5)
      >>> round(report.epsilon, 2)
      2.38

    Source:
      Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.
    """
    _check_settings(num_examples, batch_size, noise_multiplier, delta)
    event = _dpsgd_event(num_examples, batch_size, noise_multiplier, epochs, steps, sampling, examples_per_user)
    return _report([dataclasses.replace(event, mechanism=mechanism)], delta, None, _TYPED_IN, recorded=False)


def _check_settings(num_examples: int, batch_size: int, noise_multiplier: float, delta: float) -> None:
    _check.positive_integer(num_examples=num_examples, batch_size=batch_size)
    _check.at_most("num_examples", num_examples, batch_size=batch_size)
    _check.non_negative(noise_multiplier=noise_multiplier)
    accounting.check_delta(delta, num_examples)


def _dpsgd_event(
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    epochs: float | None,
    steps: int | None,
    sampling: str,
    examples_per_user: int | None,
) -> Event:
    count, passes = _steps_and_passes(num_examples, batch_size, epochs, steps)
    common: dict[str, Any] = {"count": count, "noise_multiplier": noise_multiplier, "population": num_examples}
    if examples_per_user is not None:
        common |= {"unit": "user", "examples_per_user": examples_per_user}
    if sampling == "poisson":
        return Event.poisson(sampling_probability=batch_size / num_examples, **common)
    if sampling == "shuffle":
        return Event.shuffled(passes=passes, **common)
    raise InvalidArgumentError(f"sampling={sampling!r} is not allowed: give 'poisson' or 'shuffle'.")


def solve(
    *,
    num_examples: int,
    delta: float,
    batch_size: int | None = None,
    noise_multiplier: float | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    target_epsilon: float | None = None,
    sampling: Literal["poisson", "shuffle"] = "poisson",
    examples_per_user: int | None = None,
) -> Report:
    """The one setting of DP-SGD that is left out, given all the others; never less privacy than asked.

    Args:
      num_examples, delta, sampling, examples_per_user: as in `dpsgd`.
      batch_size: as in `dpsgd`; None for the largest.
      noise_multiplier: > 0; None for the smallest, to 0.01 %.
      epochs, steps: as in `dpsgd`; both None for the largest number of steps (of whole epochs where batches are shuffled).
      target_epsilon: > 0; None for the epsilon of the others.

    Returns:
      The report on all settings together; its `solved` holds what was left out: "batch_size", "noise_multiplier", "steps"
      and "epochs", or "epsilon".

    Raises:
      InvalidArgumentError: an argument is outside its range, not exactly one is left out, or nothing meets the target.

    Example:
      >>> report = solve(num_examples=1000, batch_size=10, steps=1000, target_epsilon=1.0, delta=1e-5)
      >>> round(report.solved["noise_multiplier"], 3)
      1.415
    """
    _check.positive_integer(num_examples=num_examples)
    accounting.check_delta(delta, num_examples)
    given = {
        "batch_size": batch_size,
        "noise_multiplier": noise_multiplier,
        "epochs or steps": steps if epochs is None else epochs,
        "target_epsilon": target_epsilon,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) != 1:
        raise InvalidArgumentError(
            f"{len(missing)} of {', '.join(given)} are left out, and one can be solved for: leave out exactly one."
        )
    if target_epsilon is not None:
        _check.positive(target_epsilon=target_epsilon)
    if noise_multiplier is not None:
        _check.positive(noise_multiplier=noise_multiplier)
    if batch_size is not None:
        _check.positive_integer(batch_size=batch_size)
        _check.at_most("num_examples", num_examples, batch_size=batch_size)
    target: dict[str, Any] = {"target_epsilon": target_epsilon, "delta": delta}

    def event(size=batch_size, noise=noise_multiplier, number=steps) -> Event:
        return _dpsgd_event(num_examples, size, noise, epochs, number, sampling, examples_per_user)

    solved: dict[str, float]
    if missing == ["noise_multiplier"]:
        noise = accounting.solve_noise_multiplier(events_for=lambda noise: event(noise=noise), **target)
        found, solved = event(noise=noise), {"noise_multiplier": noise}
    elif missing == ["batch_size"]:
        size = accounting.solve_batch_size(events_for=lambda size: event(size=size), most=num_examples, **target)
        found, solved = event(size=max(size, 1)), {"batch_size": size}
    elif missing == ["epochs or steps"]:
        assert batch_size is not None
        one = event(number=1 if sampling == "poisson" else num_examples // batch_size)
        number = accounting.solve_steps(event=one, **target)
        solved = {"steps": number, "epochs": number * batch_size / num_examples}
        found = event(number=max(number, 1))
    else:
        found, solved = event(), {}
    if not all(solved.values()):
        raise InvalidArgumentError(
            f"target_epsilon={target_epsilon} is passed by a single {'example' if 'batch_size' in solved else 'step'}: "
            "allow more epsilon, or add more noise."
        )
    report = _report([found], delta, None, _TYPED_IN, recorded=False)
    return dataclasses.replace(report, solved=solved or {"epsilon": report.epsilon})


def fedavg(
    *,
    num_clients: int,
    clients_per_round: int,
    noise_multiplier: float,
    rounds: int,
    delta: float,
    sampling: Literal["poisson", "fixed", "cyclic"] = "poisson",
    mechanism: Mechanism = "gaussian",
    local_noise_multiplier: float = 0.0,
) -> Report:
    """The privacy of DP federated averaging with these settings, for one client and all of its data.

    Noise of the server protects against those who see the models; noise of the clients against the server, too. Where both
    are added, there is a figure for each, without amplification by sampling, since noise of clients shows how many there were;
    where only clients add it, theirs is the only one.

    Args:
      num_clients: how many clients there are, >= 1.
      clients_per_round: expected (Poisson) or exact (fixed) cohort, between 1 and `num_clients`.
      noise_multiplier: standard deviation of the server's noise on the sum over the clip of one client, >= 0.
      rounds: >= 1.
      delta: in (0, 1).
      sampling: `"poisson"`: each client is in each round independently. `"fixed"`: exactly `clients_per_round`,
        drawn without replacement, which is accounted for replacing one client and costs several times as much.
        `"cyclic"`: everybody in turn, once in each pass.
      mechanism: as in `dpsgd`.
      local_noise_multiplier: standard deviation of the noise that a client adds to its own update over the clip, >= 0.

    Returns:
      The report.

    Raises:
      InvalidArgumentError: an argument is outside its range.

    Example:
      >>> report = fedavg(num_clients=3000, clients_per_round=100, noise_multiplier=1.0, rounds=100, delta=1e-4)
      >>> round(report.epsilon, 2)
      1.88

    Source:
      McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models", Algorithm 1.
    """
    _check.positive_integer(num_clients=num_clients, clients_per_round=clients_per_round, rounds=rounds)
    _check.at_most("num_clients", num_clients, clients_per_round=clients_per_round)
    _check.non_negative(noise_multiplier=noise_multiplier, local_noise_multiplier=local_noise_multiplier)
    accounting.check_delta(delta, num_clients)
    passes = -(-rounds // -(-num_clients // clients_per_round))
    if sampling == "poisson" and local_noise_multiplier:
        sampling, passes = "cyclic", rounds  # noise of clients shows how many there were: no draw hides who took part
    if sampling == "poisson":
        event = Event.poisson(
            count=rounds,
            noise_multiplier=noise_multiplier,
            sampling_probability=clients_per_round / num_clients,
            population=num_clients,
            unit="client",
        )
    elif sampling == "fixed":
        event = Event.fixed(
            count=rounds, noise_multiplier=noise_multiplier, cohort_size=clients_per_round, population=num_clients
        )
    elif sampling == "cyclic":
        event = Event.shuffled(
            count=rounds, passes=passes, noise_multiplier=noise_multiplier, population=num_clients, unit="client"
        )
    else:
        raise InvalidArgumentError(f"sampling={sampling!r} is not allowed: give 'poisson', 'fixed' or 'cyclic'.")
    local = Event.local(
        count=rounds,
        participations=event.participations,
        noise_multiplier=local_noise_multiplier,
        population=num_clients,
    )
    events = [event] if noise_multiplier or not local_noise_multiplier else []
    events += [local] if local_noise_multiplier else []
    return _report(
        [dataclasses.replace(e, mechanism=mechanism) for e in events], delta, None, _TYPED_IN, recorded=False
    )


def dpftrl(
    *,
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    epochs: int,
    delta: float,
    examples_per_user: int | None = None,
) -> Report:
    """The privacy of DP-FTRL with these settings, for one example, or for one user: sums over steps, released by trees.

    Each epoch goes through the data once, in any order, and begins a new tree with one leaf for each step.

    Args:
      num_examples, batch_size, delta, examples_per_user: as in `dpsgd`; batches are of `batch_size`, but for the last.
      noise_multiplier: standard deviation of the noise in one node over the clip, >= 0.
      epochs: >= 1.

    Returns:
      The report.

    Raises:
      InvalidArgumentError: an argument is outside its range.

    Example:
      >>> report = dpftrl(num_examples=1000, batch_size=1, noise_multiplier=5.0, epochs=1, delta=1e-6)
      >>> round(report.accounts[0].epsilon_rdp, 2)
      3.13

    Source:
      Kairouz et al. 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling", Theorem 4.1.
    """
    _check_settings(num_examples, batch_size, noise_multiplier, delta)
    _check.positive_integer(epochs=epochs)
    event = Event.tree(
        trees=epochs,
        leaves_per_tree=math.ceil(num_examples / batch_size),
        noise_multiplier=noise_multiplier,
        population=num_examples,
        unit="example" if examples_per_user is None else "user",
        examples_per_user=1 if examples_per_user is None else examples_per_user,
    )
    return _report([event], delta, None, _TYPED_IN, recorded=False)


def best_of(report: Report, *, distribution: Distribution, mean: float) -> Report:
    """The privacy of a search: the best of a number of runs like the one reported on, a number that was drawn beforehand.

    Args:
      report: on one run of the search, or on the costliest if they differ.
      distribution, mean: of the number of runs, as in `BestOf`, which draws it.

    Returns:
      The report on the search, by Renyi divergences.

    Raises:
      InvalidArgumentError: an argument is outside its range.
      UnsupportedEventError: users with several examples were sampled, for which no divergence is known.

    Example:
      >>> one = dpsgd(num_examples=60_000, batch_size=256, noise_multiplier=1.1, epochs=60, delta=1e-5)
      >>> round(best_of(one, distribution="geometric", mean=10).epsilon, 2)
      5.05

    Source:
      Papernot & Steinke 2022, "Hyperparameter Tuning with Renyi Differential Privacy", Theorems 2 and 6.
    """
    search = BestOf(distribution, mean)
    if report.search is not None:
        raise InvalidArgumentError("the report is on a search already: give the report on one of its runs.")

    def searched(account: Account) -> Account:
        return dataclasses.replace(
            account,
            epsilon_pld=None,
            epsilon_rdp=search.epsilon(account.events, report.delta),
            epsilon_without_amplification=search.epsilon(map(_of_everyone, account.events), report.delta),
            epsilon_replace_one=None,
            epsilon_pure=None,
        )

    return dataclasses.replace(report, accounts=tuple(map(searched, report.accounts)), search=search)


def _of_everyone(event: Event) -> Event:
    """The same releases without sampling."""
    if event.sampler == "poisson":
        return dataclasses.replace(event, sampling_probability=1.0)
    return dataclasses.replace(event, cohort_size=event.population) if event.sampler == "fixed" else event


_TYPED_IN = "typed in, not recorded by a run"


def _steps_and_passes(num_examples: int, batch_size: int, epochs: float | None, steps: int | None) -> tuple[int, int]:
    """How many batches, and the most of them that one shuffled example can be in."""
    if (epochs is None) == (steps is None):
        raise InvalidArgumentError(f"epochs={epochs} and steps={steps} do not go together: give exactly one of them.")
    if epochs is not None:
        _check.positive(epochs=epochs)
        return math.ceil(epochs * num_examples / batch_size), math.ceil(epochs)
    _check.positive_integer(steps=steps)
    assert steps is not None
    return steps, math.ceil(steps / (num_examples // batch_size))


def _report(
    events: Iterable[Event],
    delta: float | None,
    recorded_delta: float | None,
    source: str,
    recorded: bool = True,
    **details: Any,
) -> Report:
    delta = recorded_delta if delta is None else delta
    if delta is None:
        raise InvalidArgumentError(
            "delta=None is not allowed here, because no run recorded one: give a number well below 1 / the number of "
            "protected units."
        )
    accounts = accounting.accounts(events, delta)
    return Report(accounts=accounts, delta=delta, source=source, recorded=recorded, **details)


# JSON.


def _json_number(value: float | None) -> float | str | None:
    return "Infinity" if value is not None and math.isinf(value) else value


def _account_to_dict(account: Account, can_be_private: bool) -> dict[str, Any]:
    return {
        "unit": account.unit,
        "relation": account.relation,
        "in_words": against(account),
        "delta": account.delta,
        "epsilon": _json_number(account.epsilon),
        "accountant": account.accountant,
        "by_group_lemma": account.by_group_lemma,
        "is_private": can_be_private and math.isfinite(account.epsilon),
        "epsilon_pld": _json_number(account.epsilon_pld),
        "epsilon_rdp": _json_number(account.epsilon_rdp),
        "epsilon_without_amplification": _json_number(account.epsilon_without_amplification),
        "epsilon_replace_one": _json_number(account.epsilon_replace_one),
        "epsilon_pure": _json_number(account.epsilon_pure),
        "events": [event.to_dict() for event in account.events],
    }
