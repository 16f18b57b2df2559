"""The command `compute-epsilon`.

Promises: figures on stdout, whatever else in single sentences on stderr; the exit code says whether epsilon is within
`--budget`; no TensorFlow, so that answers take about two seconds, and solving a few more.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from tfprivacy_ft import _check
from tfprivacy_ft._command import add_completion, with_option_names
from tfprivacy_ft.compute_epsilon import Report, best_of, compose, compute_epsilon, dpftrl, dpsgd, fedavg, solve
from tfprivacy_ft.errors import InvalidArgumentError, PrivacyError
from tfprivacy_ft.statement import figure
from tfprivacy_ft.statement import warnings as doubts

__all__ = ["main"]

_EXAMPLES = """\
examples:
  Training on 60000 examples in batches of 256 for 60 epochs, with noise of 1.1 times the clip:
    compute-epsilon dpsgd --num-examples 60000 --batch-size 256 --noise-multiplier 1.1 --epochs 60 --delta 1e-5

  The same with batches from a plain shuffle, as Keras makes them (no amplification by sampling):
    compute-epsilon dpsgd --num-examples 60000 --batch-size 256 --noise-multiplier 1.1 --epochs 60 --delta 1e-5 \\
      --sampling shuffle

  The same by DP-FTRL, with trees of noisy sums, which needs no sampling:
    compute-epsilon dpftrl --num-examples 60000 --batch-size 256 --noise-multiplier 20 --epochs 60 --delta 1e-5

  100 rounds of federated averaging with about 100 of 3000 clients in each:
    compute-epsilon fedavg --num-clients 3000 --clients-per-round 100 --noise-multiplier 1 --rounds 100 --delta 1e-4

  The noise that keeps the first of these within epsilon 2:
    compute-epsilon solve --num-examples 60000 --batch-size 256 --epochs 60 --target-epsilon 2 --delta 1e-5

  What a run really spent, from the ledger in its folder, and whether that is within 3:
    compute-epsilon run runs/mnist --budget 3

  The best of a number of such runs, which was drawn beforehand with a mean of 10:
    compute-epsilon dpsgd --num-examples 60000 --batch-size 256 --noise-multiplier 1.1 --epochs 60 --delta 1e-5 \\
      --best-of geometric --mean 10

  What two runs on the same data spent together, and a table for a spreadsheet of each by itself:
    compute-epsilon compose runs/head runs/all
    compute-epsilon run runs/head runs/all --csv

exit codes: 0 within --budget, or none given; 3 over it; 2 for a mistake.
"""

WITHIN, MISTAKE, OVER_BUDGET = 0, 2, 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compute-epsilon",
        description="The differential privacy that a training run spent: epsilon at a given delta.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{dpsgd,dpftrl,fedavg,run,compose,solve}")
    _add_dpsgd(_add_command(commands, "dpsgd", "training with DP-SGD; protects one example"))
    _add_dpftrl(_add_command(commands, "dpftrl", "training with DP-FTRL (trees of sums); protects one example"))
    _add_fedavg(_add_command(commands, "fedavg", "federated averaging with DP; protects one client"))
    _add_run(_add_command(commands, "run", "runs that kept a ledger, each by itself; nothing has to be typed in"))
    _add_run(_add_command(commands, "compose", "several runs on the same data, together"))
    for name in ("dpsgd", "dpftrl", "fedavg", "run", "compose"):
        _add_search(commands.choices[name])
    _add_solve(_add_command(commands, "solve", "DP-SGD, and the one setting that is left out"))
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
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--json",
        action="store_true",
        help='strict JSON, a list of reports for several runs; an infinite epsilon is the text "Infinity"',
    )
    output.add_argument("--csv", action="store_true", help="a table with one row for each account")
    parser.add_argument("--budget", type=float, help="exit with code 3 if an epsilon is larger than this")
    return parser


def _add_dpsgd(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-examples", type=int, required=True, help="examples in the data set")
    parser.add_argument("--batch-size", type=int, required=True, help="expected batch size")
    _add_noise(parser)
    _add_mechanism(parser)
    _add_delta(parser)
    _add_length_and_sampling(parser, required=True)


def _add_dpftrl(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-examples", type=int, required=True, help="examples in the data set")
    parser.add_argument("--batch-size", type=int, required=True, help="examples in a batch")
    _add_noise(parser)
    _add_delta(parser)
    parser.add_argument("--epochs", type=int, required=True, help="passes over the data, each with a tree of its own")
    _add_user(parser)


def _add_solve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-examples", type=int, required=True, help="examples in the data set")
    _add_delta(parser)
    parser.add_argument("--target-epsilon", type=float, help="what epsilon may be; left out: what it is")
    parser.add_argument("--batch-size", type=int, help="expected batch size; left out: the largest")
    parser.add_argument("--noise-multiplier", type=float, help="noise over clip; left out: the smallest")
    _add_length_and_sampling(parser, required=False)


def _add_length_and_sampling(parser: argparse.ArgumentParser, required: bool) -> None:
    most = "" if required else "; both left out: the most"
    length = parser.add_mutually_exclusive_group(required=required)
    length.add_argument("--epochs", type=float, help=f"passes over the data{most}")
    length.add_argument("--steps", type=int, help=f"batches in all{most}")
    parser.add_argument(
        "--sampling",
        choices=("poisson", "shuffle"),
        default="poisson",
        help="how batches are drawn: each example independently, or each once per epoch (default: poisson)",
    )
    _add_user(parser)


def _add_user(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--examples-per-user", type=int, help="the most examples of one user; protects users rather than examples"
    )


def _add_fedavg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-clients", type=int, required=True, help="clients that could take part")
    parser.add_argument("--clients-per-round", type=int, required=True, help="expected clients in one round")
    _add_noise(parser)
    _add_mechanism(parser)
    _add_delta(parser)
    parser.add_argument("--rounds", type=int, required=True, help="rounds in all")
    parser.add_argument(
        "--sampling",
        choices=("poisson", "fixed", "cyclic"),
        default="poisson",
        help="how cohorts are made: each client independently, a fixed number of them, or all in turn (default: poisson)",
    )
    parser.add_argument(
        "--local-noise-multiplier",
        type=float,
        default=0.0,
        help="noise that each client adds to its own update, over the clip; protects against the server (default: 0)",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    search = parser.add_argument_group("a search, which makes a number of such runs that was drawn beforehand")
    search.add_argument(
        "--best-of", choices=("logarithmic", "geometric", "poisson"), help="how that number was drawn; none: no search"
    )
    search.add_argument("--mean", type=float, help="of that number")


def _add_noise(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--noise-multiplier", type=float, required=True, help="noise over clip; 0 means no privacy")


def _add_mechanism(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mechanism",
        choices=("gaussian", "laplace"),
        default="gaussian",
        help="of the noise; laplace, for which the clip is of the l1 norm, also has an epsilon for delta 0 (default: gaussian)",
    )


def _add_delta(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--delta", type=float, required=True, help="in (0, 1), well below 1 / number protected")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="the folder of a run, or its ledger file")
    parser.add_argument("--delta", type=float, help="in (0, 1); default: the one the runs recorded")


_TYPED_IN: dict[str, Callable[..., Report]] = {"dpsgd": dpsgd, "dpftrl": dpftrl, "fedavg": fedavg, "solve": solve}


def _reports(command: str, options: dict[str, Any]) -> list[Report]:
    if command in _TYPED_IN:
        return [_TYPED_IN[command](**options)]
    run_dirs, delta = options["run_dirs"], options["delta"]
    if command == "compose":
        reports = [compose(run_dirs, delta=delta)]
    else:
        reports = [compute_epsilon(run_dir, delta=delta) for run_dir in run_dirs]
    for report in reports:
        report.check_delta()
    return reports


def _written(reports: list[Report], output: str) -> str:
    if output == "csv":
        head, *_ = tables = [report.to_csv() for report in reports]
        return head + "".join(table.partition("\n")[2] for table in tables[1:])
    if output == "json":
        return (reports[0].to_json() if len(reports) == 1 else _json_list(reports)) + "\n"
    return "\n\n\n".join(map(str, reports)) + "\n"


def _json_list(reports: list[Report]) -> str:
    return json.dumps([json.loads(report.to_json()) for report in reports], indent=2, allow_nan=False)


def _largest(reports: list[Report]) -> float:
    return max((account.epsilon for report in reports for account in report.accounts), default=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `compute-epsilon`.

    Args:
      argv: the words after the command; None takes those of the process.

    Returns:
      0; 3 after one sentence on stderr if an epsilon is over `--budget`; 2 after one that says what is wrong.
    """
    options = vars(_parser().parse_args(argv))
    options.pop("print_completion")
    command, budget, as_json, as_csv = (options.pop(name) for name in ("command", "budget", "json", "csv"))
    names = ["budget", *options]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if budget is not None:
                _check.positive(budget=budget)
            distribution, mean = options.pop("best_of", None), options.pop("mean", None)
            if (distribution is None) != (mean is None):
                missing = (
                    f"mean={mean} needs --best-of" if distribution is None else f"best_of={distribution} needs --mean"
                )
                raise InvalidArgumentError(f"{missing} too: give both, or none.")
            reports = _reports(command, options)
            if distribution is not None:
                reports = [best_of(report, distribution=distribution, mean=mean) for report in reports]
        except PrivacyError as error:
            sys.stderr.write(f"compute-epsilon: {with_option_names(str(error), names)}\n")
            return MISTAKE
    for message in dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning)):
        sys.stderr.write(f"compute-epsilon: warning: {with_option_names(message, names)}\n")
    worthless = dict.fromkeys(sentence for report in reports for sentence in doubts(report))
    for sentence in worthless if as_json or as_csv else ():  # the text begins with them
        sys.stderr.write(f"compute-epsilon: warning: {sentence}\n")
    sys.stdout.write(_written(reports, "json" if as_json else "csv" if as_csv else "text"))
    if budget is not None and worthless:
        sys.stderr.write("compute-epsilon: no epsilon is within --budget where there is no privacy.\n")
        return OVER_BUDGET
    if budget is not None and _largest(reports) > budget:
        sys.stderr.write(f"compute-epsilon: epsilon {figure(_largest(reports))} is over --budget {budget:g}.\n")
        return OVER_BUDGET
    return WITHIN


if __name__ == "__main__":
    sys.exit(main())
