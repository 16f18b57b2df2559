"""A report in words that a non-expert can quote: who is protected, against what, how much, and what is left out.

Printed figures are rounded up. Nothing is computed here.
"""

import math
import textwrap
from typing import TYPE_CHECKING

from tfprivacy_ft.accounting import Account
from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import TEST_SEED

if TYPE_CHECKING:
    from tfprivacy_ft.compute_epsilon import Report

__all__ = [
    "NOTHING_RELEASED",
    "SIDE_BY_SIDE",
    "against",
    "figure",
    "headline",
    "not_covered",
    "rows",
    "sampling_rate",
    "statement",
    "unsettled",
    "warnings",
]

NOTHING_RELEASED = "epsilon = 0: nothing was released."
SIDE_BY_SIDE = "Several units or relations: the figures stand side by side and do not add up."

_WIDTH = 100

_RELATIONS = {
    "add_or_remove_one": "whether {one} was in the data set at all (adding or removing one {unit})",
    "zero_out": "whether {one} was used or blanked out, how many there are being public (zeroing out one {unit})",
    "replace_one": "what {one} was, how many there are being public (replacing one {unit} by any other)",
    "local": "which of any two reports {one} sent, though whoever collects them sees each by itself (local)",
}
_PROTECTED = {
    "example": "one training example",
    "user": "one user, with all of its examples, which are at most {most}",
    "client": "one client, with all of its data",
}


def figure(value: float, digits: int = 4) -> str:
    """`digits` significant digits, rounded up: a quoted epsilon is never smaller than the one computed."""
    if math.isinf(value):
        return "infinite"
    if value == 0:
        return "0"
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    rounded = math.ceil(value * scale * (1 - 1e-12)) / scale
    return f"{rounded:,.0f}" if rounded >= 10 ** (digits - 1) else f"{rounded:.{digits}g}"


def against(account: Account) -> str:
    """What nobody can tell from the releases, as a clause."""
    return _RELATIONS[account.relation].format(one=f"any one {account.unit}", unit=account.unit)


def _protected(account: Account) -> str:
    return _PROTECTED[account.unit].format(most=max((e.examples_per_user for e in account.events), default=1))


def _row(label: str, text: str) -> str:
    indent = " " * 20
    return textwrap.fill(text, _WIDTH, initial_indent=f"  {label + ':':<18}", subsequent_indent=indent)


def _bullet(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ")


def _sampling_in_words(event: Event) -> str:
    of = f" of {event.population:,}" if event.population else ""
    unit, release = ("client", "round") if event.unit == "client" else ("example", "step")
    releases, them = (f"1 {release}", "it") if event.count == 1 else (f"{event.count:,} {release}s", "each of them")
    if event.sampler == "poisson":
        return (
            f"{releases}, each {unit}{of} in {them} independently with probability "
            f"{event.sampling_probability:.4g} (Poisson)"
        )
    if event.sampler == "shuffled":
        return (
            f"{releases} in which no {unit}{of} took part more than {event.participations:,} times "
            "(shuffled: no amplification by sampling)"
        )
    if event.sampler == "tree":
        return (
            f"{releases} in {_trees(event)}, in each of which no {unit}{of} is more than once (no amplification "
            "by sampling)"
        )
    if event.is_local:
        return (
            f"{releases}, in at most {event.participations:,} of which any one {unit}{of} reported, with noise "
            "that it added itself (local: no amplification by sampling)"
        )
    if event.sampler == "fixed":
        return f"{releases} of exactly {event.cohort_size:,}{of} {unit}s, drawn without replacement"
    return (
        f"{releases} of unknown make, so every {unit}{of} is taken to be in every one of them, once (no "
        "amplification by sampling)"
    )


def _noise_in_words(event: Event) -> str:
    if event.mechanism == "laplace":
        return f"Laplace noise, whose scale is {event.noise_multiplier:g} times the clip of the l1 norm"
    return f"noise multiplier {event.noise_multiplier:g}"


def _trees(event: Event) -> str:
    trees = "one tree" if event.participations == 1 else f"{event.participations:,} trees"
    return f"{trees} of partial sums with at most {event.leaves_per_tree:,} leaves"


def sampling_rate(event: Event) -> str:
    """How much of the data one release saw: a probability, a size, or, without sampling, how often one unit took part."""
    if event.sampler == "poisson":
        return f"q = {event.sampling_probability:.4g}"
    if event.sampler == "fixed":
        return f"{event.cohort_size:,} of {event.population:,}"
    if event.sampler == "tree":
        return _trees(event)
    return f"each at most {event.participations:,} times"


def headline(account: Account) -> str:
    """The one sentence to quote."""
    if math.isinf(account.epsilon):
        return (
            f"epsilon is infinite for {_protected(account)}: something was released without noise, so there is "
            "no privacy guarantee."
        )
    return f"epsilon = {figure(account.epsilon)} at delta = {account.delta:g} for {_protected(account)}."


def _meaning(account: Account) -> str:
    if math.isinf(account.epsilon):
        return f"None: what was released may tell {against(account)}."
    if account.epsilon > 20:
        return f"{against(account)}. An epsilon this large promises next to nothing."
    return (
        f"From what was released, nobody can tell {against(account)}, at odds better than "
        f"{figure(math.exp(account.epsilon))} to 1 if the odds were even before, but for a probability of about "
        f"{account.delta:g}."
    )


def rows(account: Account, report: "Report") -> list[tuple[str, str]]:
    """The statement on one account, as pairs of a label and what it says.

    Args:
      account: what was spent.
      report: that it is one of.
    """
    at = f"at delta = {account.delta:g}"
    pld = "no bound is known" if account.epsilon_pld is None else f"epsilon = {figure(account.epsilon_pld)} {at}"
    pairs = [
        ("Who is protected", f"{_protected(account)}."),
        ("Against what", _meaning(account)),
        ("By PLD", pld),
        ("By RDP", f"epsilon = {figure(account.epsilon_rdp)} {at}"),
        ("Not amplified", f"epsilon = {figure(account.epsilon_without_amplification)} if the sampling is not believed"),
    ]
    if account.epsilon_replace_one is not None:
        replaced = figure(account.epsilon_replace_one)
        pairs.append(("If replaced", f"epsilon = {replaced} against replacing one {account.unit} by any other"))
    if account.epsilon_pure is not None:
        pairs.append(("By pure DP", f"epsilon = {figure(account.epsilon_pure)} at delta = 0"))
    if account.by_group_lemma:
        text = "from the figures for one example, by a lemma that holds for any mechanism: an upper bound."
        pairs.append(("Of a user", text))
    if report.search is not None:
        text = (
            f"the best of a number of such runs, drawn beforehand: {report.search.distribution}, {report.search.mean:g} on "
            "average; of the others nothing is shown."
        )
        pairs.append(("A search", text))
    for event in account.events:
        pairs.append(("What ran", f"{_sampling_in_words(event)}; {_noise_in_words(event)}."))
    pairs.append(("Source", f"{report.source}."))
    return pairs


def _account_to_text(account: Account, report: "Report") -> list[str]:
    return [textwrap.fill(headline(account), _WIDTH), *(_row(label, text) for label, text in rows(account, report))]


def unsettled(report: "Report") -> str:
    """That reservations may not have run to the end."""
    return f"Reserved blocks that may not have run to the end, counted in full: {report.unsettled:,}."


def _solved_in_words(solved: dict[str, float]) -> str:
    """Whole numbers as they are; a noise multiplier rounded up, so that what is typed off keeps the promise."""
    figures = {
        "noise_multiplier": lambda value: figure(value, digits=6),
        "epochs": lambda value: f"{value:,.6g}",
        "epsilon": figure,
    }
    return ", ".join(
        f"{name.replace('_', ' ')} = {figures.get(name, lambda whole: f'{whole:,}')(value)}"
        for name, value in solved.items()
    )


def not_covered(report: "Report") -> list[str]:
    """What the figures leave out, one sentence each."""
    released = [note for note in report.notes if note.kind != TEST_SEED]
    sentences = [f"Released without noise, {note.kind}: {note.text}" for note in released]
    if not report.recorded:
        sentences += [
            "Whether a run really clipped, sampled and added noise like this: nothing was recorded.",
            "Anything released without noise, such as training metrics, or a choice made on private validation data.",
        ]
    elif not released:
        sentences.append("Releases without noise that the run did not record; it recorded none.")
    if report.search is None:
        sentences.append(
            "A search for hyper-parameters on the same data: each run tried spends its own epsilon, and they add up."
        )
    return sentences


def warnings(report: "Report") -> list[str]:
    """What makes the figures worthless, one sentence each; mostly nothing."""
    return [note.text for note in report.notes if note.kind == TEST_SEED]


def statement(report: "Report") -> str:
    """The whole report, in lines of at most 100 characters."""
    blocks = [_account_to_text(account, report) for account in report.accounts]
    if not blocks:
        blocks = [[NOTHING_RELEASED, _row("Source", f"{report.source}.")]]
    if len(blocks) > 1:
        blocks.insert(0, [SIDE_BY_SIDE])
    if report.solved:
        blocks.insert(0, [textwrap.fill(f"Solved for: {_solved_in_words(report.solved)}.", _WIDTH)])
    if found := warnings(report):
        blocks.insert(0, [textwrap.fill(f"WARNING: {text}", _WIDTH) for text in found])
    if report.unsettled:
        blocks.append([textwrap.fill(unsettled(report), _WIDTH)])
    blocks.append(["Not covered:", *(_bullet(sentence) for sentence in not_covered(report))])
    return "\n\n".join("\n".join(block) for block in blocks)
