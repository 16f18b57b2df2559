"""The README's code runs as it is printed there, and its links lead somewhere."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART, FINE_TUNING, FEDERATED, AUDIT = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
HAS_TFF = importlib.util.find_spec("tensorflow_federated") is not None

# Each in a folder of its own; in one process, since one takes longer to start than to train.
ONE_AFTER_THE_OTHER = """
import contextlib, json, os, sys, traceback
for name, code in json.loads(sys.argv[1]).items():
    os.mkdir(name)
    os.chdir(name)
    with open("printed.txt", "w") as printed, contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        except BaseException:
            with open("error.txt", "w") as error:
                traceback.print_exc(file=error)
    os.chdir("..")
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder in which the README's programs ran, each in one of its name."""
    folder = tmp_path_factory.mktemp("readme")
    codes = {"quickstart": QUICKSTART, "fine-tuning": FINE_TUNING, "audit": AUDIT}
    if HAS_TFF:
        codes["federated"] = FEDERATED
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, json.dumps(codes)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert ran.returncode == 0, ran.stderr
    return folder


def _printed(folder):
    error = folder / "error.txt"
    assert not error.exists(), error.read_text()
    return (folder / "printed.txt").read_text()


def test_the_quickstart_is_short():
    assert len(QUICKSTART.splitlines()) <= 15


@pytest.mark.slow
def test_the_quickstart_keeps_to_its_target(programs):
    folder = programs / "quickstart"
    assert "\nepsilon = 3 at delta = 0.0001 for one training example." in _printed(folder)
    assert (folder / "runs" / "quickstart" / "ledger.jsonl").exists()


@pytest.mark.slow
def test_fine_tuning_keeps_to_its_target_and_leaves_a_model_and_a_card(programs):
    folder = programs / "fine-tuning"
    assert "at delta = 0.0001 for one training example." in _printed(folder)
    left = {file.name for file in (folder / "runs" / "finetune").iterdir()}
    assert left >= {"ledger.jsonl", "run.json", "model.keras", "card.md", "card.json"}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TFF, reason="needs requirements/federated.txt")
def test_the_federated_example_spends_what_the_readme_says(programs):
    folder = programs / "federated"
    printed = _printed(folder)
    epsilon = re.search(r"^epsilon = (\S+) at delta = 0\.0001 for one client", printed, re.MULTILINE)
    assert epsilon and f"end in epsilon {epsilon[1]} for one client" in README
    assert (folder / "runs" / "federated" / "model.keras").exists()


@pytest.mark.slow
def test_the_audit_finds_nothing_wrong(programs):
    """595 of 600 guesses would have to be right, where about 505 are: by the binomial tail once in 10^36."""
    printed = _printed(programs / "audit")
    assert re.search(
        r"^epsilon >= \d\S* at delta = 1e-05, with 0\.95 confidence; reported: 4\.$", printed, re.MULTILINE
    )
    assert "The report is not contradicted, which proves nothing" in printed


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", text).strip().lower().replace(" ", "-")
        for text in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings
        elif not target.startswith("http"):
            assert (ROOT / target).exists()


def test_every_module_is_in_the_table():
    for package in ("tfprivacy_ft", "federated"):
        for path in (ROOT / package).glob("[a-z]*.py"):
            assert f"`{path.stem}`" in README
