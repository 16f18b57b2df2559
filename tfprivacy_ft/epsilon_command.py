"""The command `compute-epsilon`.

Promises: figures on stdout, whatever else in single sentences on stderr; answers in about two seconds, without TensorFlow.
"""

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from tfprivacy_ft import accounting
from tfprivacy_ft.compute_epsilon import Report, compute_epsilon, dpsgd, fedavg
from tfprivacy_ft.errors import PrivacyError

__all__ = ["main"]

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
