"""The command `tfprivacy-ft`.

Promises: what is wrong is said in one sentence on stderr, with exit code 2; Ctrl-C ends with exit code 130 and leaves no
process behind; TensorFlow is imported by the work itself, so that `--help` and a wrong argument answer at once.
"""

import argparse
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tfprivacy_ft
from tfprivacy_ft._command import add_completion, with_option_names
from tfprivacy_ft.errors import PrivacyError

__all__ = ["main"]

_EXAMPLES = """\
examples:
  A private model on bundled data, central and federated, at epsilon 3 each:
    tfprivacy-ft demo

  With less privacy spent, in another folder:
    tfprivacy-ft demo --target-epsilon 1 --run-dir runs/epsilon_1

  A new head on a pretrained network, for a folder of images with a sub-folder per class:
    tfprivacy-ft finetune --data scans --image-size 96x96 --model squeezenet --recipe head --target-epsilon 3 --held-out 0.1

  A table of your own, with what may be known of its columns:
    tfprivacy-ft finetune --data people.csv --label income --classes "<=50K" ">50K" --model logistic --target-epsilon 1 \\
      --features age hours workclass --bounds age=17:90 hours=0:100 --categories workclass=Private,State-gov,Self-emp

  Federated, over the patients of a table of your own:
    tfprivacy-ft federate --data visits.csv --clients-by patient --label ill --classes 2 --bounds age=0:120 weight=2:250 \\
      --rounds 50 --clients-per-round 100 --target-epsilon 3 --delta 1e-5 --run-dir runs/visits

  A page on one run, written into its folder, and one that sets runs side by side:
    tfprivacy-ft report runs/demo/001/private
    tfprivacy-ft report runs/head runs/all --output report.html
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command `tfprivacy-ft`.

    Args:
      argv: the words after the command; None takes those of the process.

    Returns:
      0; 2 after one sentence on stderr that says what is wrong; 130 after Ctrl-C.

    Raises:
      SystemExit: the words are no command (code 2), or ask for help or the version (code 0).
    """
    options = vars(_parser().parse_args(argv))
    options.pop("print_completion")
    command: Callable[..., None] = options.pop("run")
    try:
        with _warnings_as_sentences(options):
            command(**options)
    except PrivacyError as error:
        sys.stderr.write(f"tfprivacy-ft: {with_option_names(str(error), options)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("tfprivacy-ft: interrupted; the ledgers written so far hold at least what was released.\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfprivacy-ft",
        description=tfprivacy_ft.__doc__.splitlines()[0] if tfprivacy_ft.__doc__ else None,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {tfprivacy_ft.__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="{demo,finetune,federate,report,worker}")
    _add_demo(commands)
    _add_finetune(commands)
    _add_federate(commands)
    _add_report(commands)
    _add_worker(commands)
    return parser


def _add_demo(commands: Any) -> None:
    text = "a private model on bundled data, central and federated, and the epsilon of each"
    parser = commands.add_parser("demo", help=text, description=f"Trains {text}.", allow_abbrev=False)
    parser.add_argument(
        "--run-dir",
        default="runs/demo",
        help="folder in which each demo gets a new numbered one (default: %(default)s)",
    )
    parser.add_argument(
        "--target-epsilon", type=float, default=3.0, help="budget of each private run, > 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--delta", type=float, default=1e-4, help="in (0, 1), well below 1 / number protected (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, help="epochs of fine-tuning (default: 20, with --small 2)")
    parser.add_argument("--rounds", type=int, help="federated rounds (default: 15, with --small 2)")
    parser.add_argument("--small", action="store_true", help="only show that it works; accuracy is poor")
    parser.set_defaults(run=_demo)


def _demo(**options: Any) -> None:
    # Imported here and not above: `federated` imports this package, and never the other way round at import time. The
    # demo needs both, so it lives over there, and this command is the only one that reaches for it, when it is called.
    from federated import demo

    demo.run_demo(demo.DemoSettings.from_options(**options))


def _add_finetune(commands: Any) -> None:
    text = "a model, pretrained or new, on a file or a folder of images, with differential privacy"
    epilog = (
        "Nothing that shapes model and inputs is read off the rows: classes, categories, bounds and the size of images are "
        "given. Pixels are scaled as a model by name reads them, and to -1 .. 1 for all others. FILE.json of --schema has any "
        "of label, classes, features, image_column, image_size, channels, bounds, categories, text, text_features and tokens; "
        "one is left beside the model, for later rows."
    )
    parser = commands.add_parser(
        "finetune", help=text, description=f"Trains {text}.", epilog=epilog, allow_abbrev=False
    )
    data = parser.add_argument_group("data").add_argument
    data(
        "--data",
        required=True,
        help="a .csv, .csv.gz, .tsv or .parquet file of columns; a .npz file of columns, or of arrays x, y, x_test and y_test; a "
        "folder of images with a sub-folder per class; or the name of a bundled data set, such as digits",
    )
    data("--label", metavar="COLUMN", help="labels; for tables")
    data(
        "--classes",
        metavar="CLASS",
        nargs="+",
        help="how many labels there are, numbered from 0, or all by name, in order",
    )
    data("--features", metavar="COLUMN", nargs="+", help="columns to learn from; default: all others")
    bounds = "cut numbers off at these bounds and scale them to -1 .. 1; without COLUMN= for all the others"
    data("--bounds", metavar="COLUMN=LOW:HIGH", nargs="+", help=bounds)
    categories = "what may stand in a column, by your list; anything else counts as none of these"
    data("--categories", metavar="COLUMN=A,B,...", nargs="+", help=categories)
    data("--text", metavar="COLUMN", nargs="+", help="columns of text, whose words are counted under a fixed hash")
    data("--text-features", metavar="N", type=int, help="numbers that each column of text becomes (default: 4096)")
    tokens = "the column of text that models of tokens read: text, transformer, lstm, or your own; it takes the place of features"
    data("--tokens", metavar="COLUMN", help=tokens)
    data("--max-tokens", metavar="N", type=int, help="tokens of a row; longer texts are cut off (default: 64)")
    buckets = "numbers to which words are hashed, by a fixed hash (default: 4096)"
    data("--token-buckets", metavar="N", type=int, help=buckets)
    data("--vocabulary", metavar="FILE", help="public words, one a line, to number words by in place of the hash")
    data("--schema", metavar="FILE.json", help="what is said of columns, in a file")
    data("--image-column", metavar="COLUMN", help="paths of images, relative to the table, in place of features")
    data("--image-size", metavar="HEIGHTxWIDTH", help="scale images to this size; needed where they have several")
    data("--channels", type=int, choices=(1, 3), help="grey or coloured; default: as the images are")
    held_out = "share of the rows to measure on and not to train on; their figures are releases without noise"
    data("--held-out", metavar="SHARE", type=float, default=0.0, help=f"{held_out} (default: none)")
    data("--test-data", metavar="FILE", help="rows like --data to measure on")
    public = (
        "rows like --data that the model has learned from: recorded, not accounted, and compared with the private rows"
    )
    data("--public-data", metavar="FILE_OR_NAME", help=public)
    training = parser.add_argument_group("training").add_argument
    training(
        "--model",
        metavar="NAME_OR_PATH",
        required=True,
        help="a pretrained one, such as squeezenet or MobileNetV2; the path of a Keras model; or a new one: logistic, mlp, cnn, "
        "resnet, or of --tokens: text, transformer, lstm",
    )
    training("--keep-head", action="store_true", help="the model at the path is a classifier of these classes already")
    recipe = "what is trained: head, bias, lora, last_layers, full, staged, light or zero_shot (default: head, new models full)"
    training("--recipe", help=recipe)
    training(
        "--fix-batchnorm", choices=("freeze", "groupnorm"), help="what to do with BatchNormalization, if there is any"
    )
    training("--epochs", metavar="N", type=int, help="of each stage; these four are by default as the recipe says")
    training("--batch-size", metavar="N", type=int, help="expected size of a batch")
    training("--learning-rate", metavar="RATE", type=float, help="of the optimizer")
    training("--l2-norm-clip", metavar="NORM", type=float, help="of one example's gradient")
    privacy = parser.add_argument_group("privacy and run").add_argument
    privacy("--target-epsilon", type=float, required=True, help="of one row, > 0; the noise is solved for")
    privacy("--delta", type=float, help="in (0, 1), well below 1 / rows (default: 1e-5, or less for many rows)")
    privacy(
        "--examples-per-user", metavar="K", type=int, help="the most rows of one person, who is then protected with all"
    )
    privacy("--run-dir", help="folder of the run (default: a new numbered one in runs/finetune)")
    privacy("--resume", action="store_true", help="go on with the run in --run-dir; give the same words otherwise")
    privacy(
        "--stages", metavar="K", type=int, help="run only so many stages now; the rest later, also on another machine"
    )
    parser.set_defaults(run=_finetune)


def _finetune(**options: Any) -> None:
    from tfprivacy_ft import finetune_command

    finetune_command.run_finetune(finetune_command.FinetuneSettings.from_options(**options))


def _add_federate(commands: Any) -> None:
    text = "a model across the clients of a file, with differential privacy for each client"
    epilog = (
        "Nothing that shapes the training is read off the rows: scale columns beforehand by constants, or give --bounds that "
        "you know without looking; labels are numbers from 0 to CLASSES - 1."
    )
    parser = commands.add_parser(
        "federate", help=text, description=f"Trains {text}.", epilog=epilog, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--data", required=True, help="a .csv, .parquet or .npz file, or the name of a bundled data set, such as digits"
    )
    add("--clients-by", metavar="COLUMN", help="whose row it is; for files")
    add("--label", metavar="COLUMN", help="labels, whole numbers from 0; for files")
    add("--classes", type=int, help="how many labels there are, >= 2; for files")
    add("--features", metavar="COLUMN", nargs="+", help="columns to learn from; default: all others")
    bounds = "cut columns off at these bounds and scale them to -1 .. 1; without COLUMN= for all the others"
    add("--bounds", metavar="COLUMN=LOW:HIGH", nargs="+", default=(), help=bounds)
    add("--num-clients", type=int, help="clients to split a bundled data set into")
    add("--model", default="mlp", help="name of a model, such as logistic, mlp or cnn (default: %(default)s)")
    add("--rounds", type=int, required=True, help=">= 1")
    add("--clients-per-round", type=float, required=True, help="(expected) size of a cohort")
    ways = ("poisson", "fixed", "cyclic")
    add("--cohorts", choices=ways, default="poisson", help="how each round's clients are chosen (default: %(default)s)")
    add("--target-epsilon", type=float, required=True, help="of one client, > 0; the noise is solved for")
    add("--delta", type=float, required=True, help="in (0, 1), well below 1 / number of clients")
    add("--run-dir", required=True, help="folder of the run, which holds none yet")
    held_out = "share of the clients to measure on and not to train on; their figures are releases without noise"
    add("--held-out", type=float, default=0.0, help=f"{held_out} (default: none)")
    add("--client-learning-rate", type=float, default=0.5, help="default: %(default)s")
    add("--l2-norm-clip", type=float, default=1.0, help="of one client's update (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="examples per local step (default: %(default)s)")
    add("--local-epochs", type=int, default=1, help="passes of a client in one round (default: %(default)s)")
    parser.set_defaults(run=_federate)


def _federate(**options: Any) -> None:
    from federated import command  # here and not above, as in `_demo`

    command.run_federate(command.FederateSettings(**options))


def _add_report(commands: Any) -> None:
    text = "one page on the privacy that runs spent, from their ledgers, and the same as JSON"
    epilog = (
        "The page loads nothing and runs no script. A damaged ledger is shown as such, without an epsilon, and the exit code "
        "then is 2."
    )
    parser = commands.add_parser("report", help=text, description=f"Writes {text}.", epilog=epilog, allow_abbrev=False)
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="the folder of a run, or its ledger file")
    parser.add_argument(
        "--output",
        help="the page, a name that ends in .html; the JSON lies beside it (default: privacy_report.html in the run's "
        "folder, or in the current one for several runs)",
    )
    parser.add_argument(
        "--figure", help="held-out figure to set against epsilon (default: the first of each run that is an accuracy)"
    )
    parser.add_argument("--delta", type=float, help="in (0, 1); default: the one that each run recorded")
    parser.set_defaults(run=_report)


def _report(run_dirs: Sequence[str], **options: Any) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from tfprivacy_ft import report

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("accounting", total=None)
        path = report.write_report(
            run_dirs, progress=lambda done, total: bar.update(task, completed=done, total=total), **options
        )
    sys.stdout.write(f"{path}\n")


def _add_worker(commands: Any) -> None:
    text = "a TFF worker, for federated.runtime.remote on this or another machine"
    epilog = (
        "There is no encryption and no password: leave it on loopback, and reach it from another machine through "
        "`ssh -L 8765:127.0.0.1:8765 HOST`."
    )
    parser = commands.add_parser("worker", help=text, description=f"Runs {text}.", epilog=epilog, allow_abbrev=False)
    parser.add_argument("--port", type=int, required=True, help="1 to 65535")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of the interface to listen on, 0.0.0.0 for all (default: %(default)s, this machine alone)",
    )
    parser.set_defaults(run=_worker)


def _worker(**options: Any) -> None:
    from federated import worker

    worker.serve(**options)


@contextmanager
def _warnings_as_sentences(options: Iterable[str]) -> Iterator[None]:
    """Shows this project's warnings as one line each, without the code that raised them; hides other libraries' own."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and not {"keras", "tensorflow"} & set(pathlib.Path(filename).parts):
            sys.stderr.write(f"tfprivacy-ft: warning: {with_option_names(str(message), options)}\n")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


if __name__ == "__main__":
    sys.exit(main())
