"""The model card: what was trained, on what, under which promise, and what it is worth; as Markdown and as JSON.

Promises: of data it holds shapes and dtypes, never values; the statement on epsilon is the report's, word for word, with
what it leaves out; whatever comes from a ledger or a caller is escaped for Markdown, so that it is text there and nothing
else; no path of the machine is in it. Computes no epsilon and no figure. Needs no TensorFlow.
"""

import collections
import datetime
import json
import math
import numbers
import os
import pathlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tfprivacy_ft
from tfprivacy_ft import _own_files, statement
from tfprivacy_ft.compute_epsilon import Report
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.ledger import software

if TYPE_CHECKING:
    from tfprivacy_ft.groups import Groups

__all__ = ["GENERATOR", "MARKDOWN_NAME", "write_card"]

MARKDOWN_NAME = "card.md"  # the JSON beside it has the same name and another ending
GENERATOR = "tfprivacy-ft card"  # both files carry it, so that a file of somebody else's is never overwritten

_MOST_NUMBERS = 16  # in a list: more than the axes of a shape are values

_IN_WORDS = {
    "head": "The backbone stayed as it was; a head on its features was trained.",
    "bias": "Biases, the offsets of normalisation layers and the head were trained; all other weights stayed as they were.",
    "lora": "Low-rank adapters and the head were trained, and the adapters merged into the weights.",
    "last_layers": "The last layers that have weights were trained; those before them stayed as they were.",
    "full": "All layers that were not frozen were trained.",
    "zero_shot": "Nothing was trained: the model is the one that was given.",
}


def write_card(
    folder: str | os.PathLike[str],
    *,
    report: Report,
    recipe: Any,
    data: Mapping[str, Any],
    figures: Mapping[str, float],
    model: Any,
    public_data: Any = None,
    groups: "Groups | None" = None,
    model_file: str = "model.keras",
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the card of a model, `card.md` and `card.json`; those of an earlier card are replaced.

    Args:
      folder: where they go; made if it is not there.
      report: what the training spent, such as `plan.report()`.
      recipe: how it was trained: a recipe of `tfprivacy_ft.finetune`, its name, or what each of its stages did, as a
        list of dictionaries with a `name` and settings.
      data: on the private data, by name: arrays, of which shape and dtype are kept; shapes; numbers; or words, such as
        {"name": "digits", "x": x_train, "y": y_train, "held out": 360}.
      figures: of the model on held-out data, by name, such as {"accuracy": 0.95}.
      model: the Keras model.
      public_data: (x, y), or a dictionary of such pairs by name; likewise only shapes are kept. None: none was used.
      groups: figures by class and group, from `tfprivacy_ft.groups.figures_by_group`; they are released without noise.
      model_file: the name that the model is saved by; without an ending it is the folder of a SavedModel.

    Returns:
      The paths of `card.md` and `card.json`.

    Raises:
      InvalidArgumentError: data or public_data hold values instead of shapes, a figure is no number, or a file cannot be
        written, or is one that no card wrote.

    Example:
      >>> import tempfile
      >>> from types import SimpleNamespace
      >>> from tfprivacy_ft.compute_epsilon import dpsgd
      >>> report = dpsgd(num_examples=1000, batch_size=100, noise_multiplier=2.0, steps=10, delta=1e-5)
      >>> model = SimpleNamespace(name="digits", layers=[], inputs=[], outputs=[], count_params=lambda: 650)
      >>> markdown, _ = write_card(tempfile.mkdtemp(), report=report, recipe="full", data={"x": [1000, 64]},
      ...                          figures={"accuracy": 0.95}, model=model)
      >>> markdown.read_text().splitlines()[2]
      '# Model card: digits'

    Source: Mitchell et al. 2019, "Model Cards for Model Reporting"; Ponomareva et al. 2023, "How to DP-fy ML", section 5,
      for what has to be stated beside an epsilon.
    """
    markdown = pathlib.Path(folder) / MARKDOWN_NAME
    as_json = markdown.with_suffix(".json")
    for file in (markdown, as_json):
        _refuse_foreign(file)
    contents = {
        "generator": GENERATOR,
        "version": tfprivacy_ft.__version__,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": _of_model(model) | {"file": model_file},
        "data": _shapes("data", data),
        "public_data": _public(public_data),
        "recipe": _stages(recipe),
        "privacy": _of_report(report),
        "figures": {str(name): _number(f"figures[{name!r}]", value) for name, value in figures.items()},
        "groups": None if groups is None else groups.to_dict(),
        "limits": _limits(report, groups),
        "software": software(),
    }
    _write(markdown, _render(contents, report, groups))
    _write(as_json, json.dumps(_plain(contents), indent=2, allow_nan=False) + "\n")
    return markdown, as_json


# What is in it.


def _of_model(model: Any) -> dict[str, Any]:
    kinds = collections.Counter(type(layer).__name__ for layer in model.layers)
    return {
        "name": str(model.name),
        "inputs": [list(each.shape)[1:] for each in model.inputs or []],  # of one example
        "outputs": [list(each.shape)[1:] for each in model.outputs or []],
        "parameters": int(model.count_params()),
        "layers": dict(kinds),
    }


def _shapes(name: str, value: Any) -> Any:
    """Facts on data: arrays become their shape and dtype, and what may be values is refused."""
    if hasattr(value, "shape") and hasattr(value, "dtype") and tuple(value.shape):
        return {"shape": [int(size) for size in value.shape], "dtype": getattr(value.dtype, "name", str(value.dtype))}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Real):
        return _number(name, value)
    if isinstance(value, Mapping):
        return {str(key): _shapes(f"{name}[{key!r}]", part) for key, part in value.items()}
    if isinstance(value, Sequence) and len(value) <= _MOST_NUMBERS:
        return [_shapes(name, part) for part in value]
    raise InvalidArgumentError(
        f"{name} is {type(value).__name__} and may hold values, of which a card has none: give arrays, whose shapes are kept, "
        "shapes, numbers or words."
    )


def _public(public_data: Any) -> dict[str, Any]:
    if public_data is None:
        return {}
    named = public_data if isinstance(public_data, Mapping) else {"public data": public_data}
    return _shapes("public_data", named)


def _stages(recipe: Any) -> list[dict[str, Any]]:
    """What each stage did, one dictionary each, without what was left at None."""
    if isinstance(recipe, str):
        recipe = {"name": recipe}
    if not isinstance(recipe, Mapping | list | tuple):
        from tfprivacy_ft.finetune.recipes import describe

        recipe = describe(recipe)
    if isinstance(recipe, Mapping):
        recipe = recipe.get("stages") or [recipe]
    return [{str(k): v for k, v in dict(stage).items() if v is not None} for stage in recipe]


def _of_report(report: Report) -> dict[str, Any]:
    """The report, without the names of the folders that it may have facts of."""
    kept = {name: value for name, value in report.to_dict().items() if name != "facts"}
    return kept | {"source": _source(report), "headlines": _headlines(report)}


def _source(report: Report) -> str:
    """Where the figures come from; the report's own text names a path of the machine."""
    if report.recorded:
        return "the ledger of the run, written before each step ran"
    return "settings that were given, not recorded by a run"


def _headlines(report: Report) -> list[str]:
    return [statement.headline(account) for account in report.accounts] or [statement.NOTHING_RELEASED]


def _limits(report: Report, groups: "Groups | None") -> list[str]:
    units = " or ".join(sorted({f"one {each.unit}" for each in report.accounts if math.isfinite(each.epsilon)}))
    small = "a private model does worse on small groups first."
    if groups is None:
        by_group = f"No figures by class or group were measured, and {small}"
    else:
        by_group = f"Accuracy is lowest for {groups.worst}; {small}"
    limits = [
        by_group,
        "Held-out figures are those of one model on one data set; elsewhere it may do worse.",
        "What the model knew before it was trained here, and whatever public data taught it, is covered by no epsilon.",
        "What users send to the model is not protected by how it was trained.",
        "Epsilon is that of this training alone: any other model of the same data spends more, and they add up.",
    ]
    if units:
        limits.insert(0, f"The promise hides {units}, and not what many of them have in common.")
    return limits


def _number(name: str, value: Any) -> float | int:
    number = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise InvalidArgumentError(f"{name}={value!r} is no number: give one number for each name.")
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def _plain(value: Any) -> Any:
    """Values that strict JSON can hold; what is not finite becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "Infinity" if value == math.inf else str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


# Markdown.


class _Markdown(str):
    """Text that is Markdown already."""


def _escaped(value: Any) -> str:
    """Any text as one line of Markdown that shows it, and does nothing else.

    Example:
      >>> print(_escaped("- [x](javascript:1) <b>\\n# a_b"))
      \\- \\[x\\](javascript:1) \\<b\\> \\# a\\_b
    """
    if isinstance(value, _Markdown):
        return value
    kept = []
    for character in str(value):
        kind = unicodedata.category(character)
        # Line breaks and control characters become blanks; marks that turn the reading direction, and halves of characters, go.
        kept.append(" " if kind in ("Cc", "Zl", "Zp") else "" if kind in ("Cf", "Cs") else character)
    text = " ".join("".join(kept).split())
    text = re.sub(r"([\\`*_{}\[\]<>|~&#$@])", r"\\\1", text)
    text = re.sub(r":(?=//)|(?<=www)\.", lambda found: "\\" + found[0], text, flags=re.IGNORECASE)  # links of their own
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)  # a list that begins here
    return re.sub(r"^([-+=])", r"\\\1", text)


def _in_words(value: Any) -> str:
    """A fact as a reader wants it."""
    if value is None:
        return "not said"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Real):
        return f"{value:,}" if isinstance(value, numbers.Integral) else f"{float(value):.6g}"
    if isinstance(value, Mapping):
        if set(value) == {"shape", "dtype"}:
            return f"{_in_words(value['shape'])} of {value['dtype']}"
        return "; ".join(f"{name}: {_in_words(part)}" for name, part in value.items())
    if not isinstance(value, list | tuple):
        return str(value)
    if value and all(part is None or isinstance(part, numbers.Integral) for part in value):
        return " x ".join("any" if part is None else f"{part:,}" for part in value)  # a shape
    return ", ".join(map(_in_words, value)) or "none"


def _settings(stages: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of a table: a setting, and its value in each stage."""
    names = dict.fromkeys(name for stage in stages for name in stage if name != "name")
    return [
        (name.replace("_", " "), [_in_words(stage[name]) if name in stage else "-" for stage in stages])
        for name in names
    ]


def _render(contents: Mapping[str, Any], report: Report, groups: "Groups | None") -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tfprivacy_ft"),
        finalize=_escaped,  # everything that the template does not say itself
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"words": _in_words, "python": lambda text: _Markdown(json.dumps(text))}
    return environment.get_template("card.md.j2").render(
        card=contents,
        report=report,
        statement=statement,
        stages=[(_IN_WORDS.get(str(stage.get("name"))) or str(stage.get("name"))) for stage in contents["recipe"]],
        settings=_settings(contents["recipe"]),
        groups=[] if groups is None else groups.rows(),
        layers=", ".join(f"{count} {kind}" for kind, count in contents["model"]["layers"].items()),
        has_auc=groups is not None and any(figures.auc is not None for _, figures in groups.rows()),
        source=_source(report),
    )


# Files.


def _refuse_foreign(file: pathlib.Path) -> None:
    """Refuses to overwrite what no earlier card wrote."""
    try:
        ours = _own_files.may_be_replaced(file, GENERATOR)
    except OSError as error:
        raise _unwritable(file, error) from error
    if not ours:
        raise InvalidArgumentError(
            f"{str(file)!r} is a file that no card wrote, and would be lost: give another folder, or remove it."
        )


def _write(file: pathlib.Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _own_files.replace_text(file, text)
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: pathlib.Path, error: OSError) -> InvalidArgumentError:
    return InvalidArgumentError(f"{str(file)!r} cannot be written ({error}): give a folder that can.")
