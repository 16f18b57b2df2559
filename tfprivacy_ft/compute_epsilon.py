"""What privacy was spent: a report that a non-expert can quote, and the command `compute-epsilon`.

For a run, the figures come from what its ledger recorded; for `dpsgd` and `fedavg`, from numbers typed in, and the
report says so. Printed figures are rounded up, JSON has them in full. It computes nothing itself (`accounting` does)
and answers in about two seconds, because it needs no TensorFlow.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tfprivacy_ft import _check, accounting, ledger
from tfprivacy_ft.accounting import Account
from tfprivacy_ft.errors import InvalidArgumentError, PrivacyError, UnsupportedEventError
from tfprivacy_ft.events import Event

__all__ = ["Report", "compute_epsilon", "dpsgd", "fedavg", "main"]


@dataclasses.dataclass(frozen=True)
class Report:
    """The privacy that was spent, by whom it is claimed, and what the claim leaves out.

    `str(report)` is the text to quote.

    Args:
      accounts: one for each unit of privacy and neighbouring relation; they do not add up.
      delta: the delta of every epsilon.
      source: where the events come from, in words.
      recorded: True if a run recorded the events, False if somebody typed them in.
      notes: releases without noise that the run recorded.
      facts: public facts that the run recorded.
      unsettled: reservations of the run that were never settled, and are counted in full.
    """

    accounts: tuple[Account, ...]
    delta: float
    source: str
    recorded: bool
    notes: tuple[ledger.Note, ...] = ()
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    unsettled: int = 0

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
            "accounts": [_account_to_dict(account) for account in self.accounts],
            "notes": [dataclasses.asdict(note) for note in self.notes],
            "not_covered": _not_covered(self),
            "facts": self.facts,
            "unsettled": self.unsettled,
        }

    def to_json(self) -> str:
        """`to_dict` as strict JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, default=lambda number: number.item())  # NumPy's

    def __str__(self) -> str:
        return _to_text(self)


def compute_epsilon(
    source: str | os.PathLike[str] | ledger.Ledger | Event | Iterable[Event], *, delta: float | None = None
) -> Report:
    """The privacy spent by a run, or by a list of events.

    Args:
      source: a run's folder, its ledger file, its open ledger, or events.
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
    if isinstance(source, str | os.PathLike):
        contents = ledger.read(source)
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


def dpsgd(
    *,
    num_examples: int,
    batch_size: int,
    noise_multiplier: float,
    delta: float,
    epochs: float | None = None,
    steps: int | None = None,
    sampling: Literal["poisson", "shuffle"] = "poisson",
) -> Report:
    """The privacy of DP-SGD with these settings, for one example.

    Args:
      num_examples: size of the data set, >= 1.
      batch_size: expected (Poisson) or largest (shuffle) batch, between 1 and `num_examples`.
      noise_multiplier: standard deviation of the noise over the clip, >= 0.
      delta: in (0, 1).
      epochs: > 0, not necessarily whole; means ceil(epochs * num_examples / batch_size) steps.
      steps: >= 1; give either epochs or steps.
      sampling: `"poisson"`: each example is in each batch independently. `"shuffle"`: each example at most once per
        epoch, without amplification; steps are taken to be epochs that leave out the last partial batch.

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
    _check.positive_integer(num_examples=num_examples, batch_size=batch_size)
    _check.at_most("num_examples", num_examples, batch_size=batch_size)
    _check.non_negative(noise_multiplier=noise_multiplier)
    accounting.check_delta(delta, num_examples)
    count, passes = _steps_and_passes(num_examples, batch_size, epochs, steps)
    if sampling == "poisson":
        event = Event.poisson(
            count=count,
            noise_multiplier=noise_multiplier,
            sampling_probability=batch_size / num_examples,
            population=num_examples,
        )
    elif sampling == "shuffle":
        event = Event.shuffled(count=count, passes=passes, noise_multiplier=noise_multiplier, population=num_examples)
    else:
        raise InvalidArgumentError(f"sampling={sampling!r} is not allowed: give 'poisson' or 'shuffle'.")
    return _report([event], delta, None, _TYPED_IN, recorded=False)


def fedavg(
    *,
    num_clients: int,
    clients_per_round: int,
    noise_multiplier: float,
    rounds: int,
    delta: float,
    sampling: Literal["poisson", "fixed"] = "poisson",
) -> Report:
    """The privacy of DP federated averaging with these settings, for one client and all of its data.

    Args:
      num_clients: how many clients there are, >= 1.
      clients_per_round: expected (Poisson) or exact (fixed) cohort, between 1 and `num_clients`.
      noise_multiplier: standard deviation of the noise on the sum over the clip of one client, >= 0.
      rounds: >= 1.
      delta: in (0, 1).
      sampling: `"poisson"`: each client is in each round independently. `"fixed"`: exactly `clients_per_round`,
        drawn without replacement, which is accounted for replacing one client and costs several times as much.

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
    _check.non_negative(noise_multiplier=noise_multiplier)
    accounting.check_delta(delta, num_clients)
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
    else:
        raise InvalidArgumentError(f"sampling={sampling!r} is not allowed: give 'poisson' or 'fixed'.")
    return _report([event], delta, None, _TYPED_IN, recorded=False)


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


def _account_to_dict(account: Account) -> dict[str, Any]:
    return {
        "unit": account.unit,
        "relation": account.relation,
        "in_words": _against(account),
        "delta": account.delta,
        "epsilon": _json_number(account.epsilon),
        "accountant": account.accountant,
        "is_private": math.isfinite(account.epsilon),
        "epsilon_pld": _json_number(account.epsilon_pld),
        "epsilon_rdp": _json_number(account.epsilon_rdp),
        "epsilon_without_amplification": _json_number(account.epsilon_without_amplification),
        "epsilon_replace_one": _json_number(account.epsilon_replace_one),
        "events": [event.to_dict() for event in account.events],
    }


# Text.

_WIDTH = 100

_RELATIONS = {
    "add_or_remove_one": "whether {one} was in the data set at all (adding or removing one {unit})",
    "zero_out": "whether {one} was used or blanked out, how many there are being public (zeroing out one {unit})",
    "replace_one": "what {one} was, how many there are being public (replacing one {unit} by any other)",
}
_PROTECTED = {"example": "one training example", "client": "one client, with all of its data"}


def _figure(value: float) -> str:
    """Four significant digits, rounded up: a quoted epsilon is never smaller than the one computed."""
    if math.isinf(value):
        return "infinite"
    if value == 0:
        return "0"
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    rounded = math.ceil(value * scale * (1 - 1e-12)) / scale
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:.4g}"


def _against(account: Account) -> str:
    return _RELATIONS[account.relation].format(one=f"any one {account.unit}", unit=account.unit)


def _row(label: str, text: str) -> str:
    indent = " " * 20
    return textwrap.fill(text, _WIDTH, initial_indent=f"  {label:<18}", subsequent_indent=indent)


def _bullet(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _sampling_in_words(event: Event) -> str:
    of = f" of {event.population:,}" if event.population else ""
    unit, releases = event.unit, "rounds" if event.unit == "client" else "steps"
    if event.sampler == "poisson":
        return (
            f"{event.count:,} {releases}, each {unit}{of} in each of them independently with probability "
            f"{event.sampling_probability:.4g} (Poisson)"
        )
    if event.sampler == "shuffled":
        return (
            f"{event.count:,} {releases} in which no {unit}{of} took part more than {event.participations:,} times "
            "(shuffled: no amplification by sampling)"
        )
    if event.sampler == "fixed":
        return f"{event.count:,} {releases} of exactly {event.cohort_size:,}{of} {unit}s, drawn without replacement"
    return (
        f"{event.count:,} {releases} of unknown make, so every {unit}{of} is taken to be in every one of them, once (no "
        "amplification by sampling)"
    )


def _headline(account: Account) -> str:
    if math.isinf(account.epsilon):
        return (
            f"epsilon is infinite for {_PROTECTED[account.unit]}: something was released without noise, so there is "
            "no privacy guarantee."
        )
    return f"epsilon = {_figure(account.epsilon)} at delta = {account.delta:g} for {_PROTECTED[account.unit]}."


def _meaning(account: Account) -> str:
    if math.isinf(account.epsilon):
        return f"None: what was released may tell {_against(account)}."
    if account.epsilon > 20:
        return f"{_against(account)}. An epsilon this large promises next to nothing."
    return (
        f"From what was released, nobody can tell {_against(account)}, at odds better than "
        f"{_figure(math.exp(account.epsilon))} to 1 if the odds were even before, but for a probability of about "
        f"{account.delta:g}."
    )


def _account_to_text(account: Account, report: Report) -> list[str]:
    at = f"at delta = {account.delta:g}"
    pld = "no bound is known" if account.epsilon_pld is None else f"epsilon = {_figure(account.epsilon_pld)} {at}"
    rows = [
        ("Who is protected:", f"{_PROTECTED[account.unit]}."),
        ("Against what:", _meaning(account)),
        ("By PLD:", pld),
        ("By RDP:", f"epsilon = {_figure(account.epsilon_rdp)} {at}"),
        (
            "Not amplified:",
            f"epsilon = {_figure(account.epsilon_without_amplification)} if the sampling is not believed",
        ),
    ]
    if account.epsilon_replace_one is not None:
        replaced = _figure(account.epsilon_replace_one)
        rows.append(("If replaced:", f"epsilon = {replaced} against replacing one {account.unit} by any other"))
    for event in account.events:
        rows.append(("What ran:", f"{_sampling_in_words(event)}; noise multiplier {event.noise_multiplier:g}."))
    rows.append(("Source:", f"{report.source}."))
    return [textwrap.fill(_headline(account), _WIDTH), *(_row(label, text) for label, text in rows)]


def _not_covered(report: Report) -> list[str]:
    """What the figures leave out, one sentence each."""
    sentences = [f"Released without noise, {note.kind}: {note.text}" for note in report.notes]
    if not report.recorded:
        sentences += [
            "Whether a run really clipped, sampled and added noise like this: nothing was recorded.",
            "Anything released without noise, such as training metrics, or a choice made on private validation data.",
        ]
    elif not report.notes:
        sentences.append("Releases without noise that the run did not record; it recorded none.")
    sentences.append(
        "A search for hyper-parameters on the same data: each run tried spends its own epsilon, and they add up."
    )
    return sentences


def _to_text(report: Report) -> str:
    blocks = [_account_to_text(account, report) for account in report.accounts]
    if not blocks:
        blocks = [["epsilon = 0: nothing was released.", _row("Source:", f"{report.source}.")]]
    if len(blocks) > 1:
        blocks.insert(0, ["Several units or relations: the figures stand side by side and do not add up."])
    if report.unsettled:
        text = f"Reserved blocks that may not have run to the end, counted in full: {report.unsettled:,}."
        blocks.append([textwrap.fill(text, _WIDTH)])
    blocks.append(["Not covered:", *(_bullet(sentence) for sentence in _not_covered(report))])
    return "\n\n".join("\n".join(block) for block in blocks)


# The command.

_EXAMPLES = """\
examples:
  Training on 60000 examples in batches of 256 for 60 epochs, with noise of 1.1 times the clip:
    compute-epsilon dpsgd --num-examples 60000 --batch-size 256 --noise-multiplier 1.1 --epochs 60 --delta 1e-5

  The same with batches from a plain shuffle, as Keras makes them (no amplification by sampling):
    compute-epsilon dpsgd --num-examples 60000 --batch-size 256 --noise-multiplier 1.1 --epochs 60 --delta 1e-5 \\
      --sampling shuffle

  100 rounds of federated averaging with about 100 of 3000 clients in each:
    compute-epsilon fedavg --num-clients 3000 --clients-per-round 100 --noise-multiplier 1 --rounds 100 --delta 1e-4

  What a run really spent, from the ledger in its folder:
    compute-epsilon run runs/mnist
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compute-epsilon",
        description="The differential privacy that a training run spent: epsilon at a given delta.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{dpsgd,fedavg,run}")
    _add_dpsgd(_add_command(commands, "dpsgd", "training with DP-SGD; protects one example"))
    _add_fedavg(_add_command(commands, "fedavg", "federated averaging with DP; protects one client"))
    _add_run(_add_command(commands, "run", "a run that kept a ledger; nothing has to be typed in"))
    return parser


def _add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=f"Epsilon of {text}.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help='strict JSON; an infinite epsilon is the text "Infinity"')
    return parser


def _add_dpsgd(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-examples", type=int, required=True, help="examples in the data set")
    parser.add_argument("--batch-size", type=int, required=True, help="expected batch size")
    _add_noise_and_delta(parser)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--epochs", type=float, help="passes over the data")
    length.add_argument("--steps", type=int, help="batches in all")
    parser.add_argument(
        "--sampling",
        choices=("poisson", "shuffle"),
        default="poisson",
        help="how batches are drawn: each example independently, or each once per epoch (default: poisson)",
    )


def _add_fedavg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-clients", type=int, required=True, help="clients that could take part")
    parser.add_argument("--clients-per-round", type=int, required=True, help="expected clients in one round")
    _add_noise_and_delta(parser)
    parser.add_argument("--rounds", type=int, required=True, help="rounds in all")
    parser.add_argument(
        "--sampling",
        choices=("poisson", "fixed"),
        default="poisson",
        help="how cohorts are drawn: each client independently, or a fixed number of them (default: poisson)",
    )


def _add_noise_and_delta(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--noise-multiplier", type=float, required=True, help="noise over clip; 0 means no privacy")
    parser.add_argument("--delta", type=float, required=True, help="in (0, 1), well below 1 / number protected")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder of the run, or its ledger file")
    parser.add_argument("--delta", type=float, help="in (0, 1); default: the one the run recorded")


def _run_command(options: dict[str, Any]) -> Report:
    command = options.pop("command")
    if command == "dpsgd":
        return dpsgd(**options)
    if command == "fedavg":
        return fedavg(**options)
    report = compute_epsilon(options["run_dir"], delta=options["delta"])
    populations = [event.population for account in report.accounts for event in account.events if event.population]
    if populations:
        accounting.check_delta(report.delta, min(populations))
    return report


def _with_option_names(sentence: str, options: Iterable[str]) -> str:
    """The sentence, with options named as they are typed."""
    for name in options:
        sentence = sentence.replace(f"{name}=", f"--{name.replace('_', '-')} ")
    return sentence


def main(argv: Sequence[str] | None = None) -> int:
    """The command `compute-epsilon`.

    Args:
      argv: the words after the command; None takes those of the process.

    Returns:
      0, or 2 after one sentence on stderr that says what is wrong.
    """
    options = vars(_parser().parse_args(argv))
    as_json = options.pop("json")
    names = sorted(options, key=len, reverse=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            report = _run_command(options)
        except PrivacyError as error:
            sys.stderr.write(f"compute-epsilon: {_with_option_names(str(error), names)}\n")
            return 2
    for message in dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning)):
        sys.stderr.write(f"compute-epsilon: warning: {_with_option_names(message, names)}\n")
    sys.stdout.write((report.to_json() if as_json else str(report)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
