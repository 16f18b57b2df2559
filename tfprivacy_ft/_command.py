"""What the commands `tfprivacy-ft` and `compute-epsilon` have in common."""

import argparse
import sys
from collections.abc import Iterable
from typing import Any


def with_option_names(sentence: str, options: Iterable[str]) -> str:
    """The sentence, with options named as they are typed.

    Example:
      >>> with_option_names("batch_size=0 is not allowed.", ["batch_size"])
      '--batch-size 0 is not allowed.'
      >>> with_option_names("Give resume=True.", ["resume"])
      'Give --resume.'
    """
    for name in sorted(options, key=len, reverse=True):
        option = f"--{name.replace('_', '-')}"
        sentence = sentence.replace(f"{name}=True", option).replace(f"{name}=", f"{option} ")
    return sentence


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option_string: Any = None) -> None:
        import shtab

        sys.stdout.write(shtab.complete(parser, shell) + "\n")
        parser.exit(0)


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Adds `--print-completion SHELL`, which writes a script that makes the shell complete the command's words."""
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="write a script for the shell that completes this command's words, and stop",
    )
