"""The README's code runs as it is printed there, and its links lead somewhere."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART, FINE_TUNING, FEDERATED, AUDIT = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def _run(code, folder):
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_quickstart_is_short():
    assert len(QUICKSTART.splitlines()) <= 15


@pytest.mark.slow
def test_the_quickstart_keeps_to_its_target(tmp_path):
    assert "\nepsilon = 3 at delta = 0.0001 for one training example." in _run(QUICKSTART, tmp_path)
    assert (tmp_path / "runs" / "quickstart" / "ledger.jsonl").exists()


@pytest.mark.slow
def test_fine_tuning_keeps_to_its_target_and_leaves_a_model_and_a_card(tmp_path):
    assert "at delta = 0.0001 for one training example." in _run(FINE_TUNING, tmp_path)
    left = {file.name for file in (tmp_path / "runs" / "finetune").iterdir()}
    assert left >= {"ledger.jsonl", "run.json", "model.keras", "card.md", "card.json"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorflow_federated") is None, reason="needs requirements/federated.txt")
def test_the_federated_example_spends_what_the_readme_says(tmp_path):
    printed = _run(FEDERATED, tmp_path)
    epsilon = re.search(r"^epsilon = (\S+) at delta = 0\.0001 for one client", printed, re.MULTILINE)
    assert epsilon and f"end in epsilon {epsilon[1]} for one client" in README
    assert (tmp_path / "runs" / "federated" / "model.keras").exists()


@pytest.mark.slow
def test_the_audit_finds_nothing_wrong(tmp_path):
    """595 of 600 guesses would have to be right, where about 505 are: by the binomial tail once in 10^36."""
    printed = _run(AUDIT, tmp_path)
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
