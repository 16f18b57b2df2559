"""The command `tfprivacy-ft`: its exit codes, and the demo with everything that it leaves behind."""

import csv
import importlib.util
import re
import signal
import subprocess
import sys
import time

import pytest

from tfprivacy_ft import ledger
from tfprivacy_ft.cli import main
from tfprivacy_ft.compute_epsilon import compute_epsilon

COMMAND = [sys.executable, "-m", "tfprivacy_ft.cli"]
HAS_TFF = importlib.util.find_spec("tensorflow_federated") is not None
PRIVATE_RUNS = {"private": "example", **({"federated": "client"} if HAS_TFF else {})}


def test_help_and_version_import_neither_tensorflow_nor_federated():
    code = (
        "import sys, contextlib, tfprivacy_ft.cli as cli\n"
        "for word in ('--help', '--version'):\n"
        "    with contextlib.suppress(SystemExit): cli.main([word])\n"
        "assert not {'tensorflow', 'federated', 'rich'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert "tfprivacy-ft demo" in ran.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--target-epsilon", "-1"], "--target-epsilon -1.0 is not allowed"),
        (["--target-epsilon", "nan"], "--target-epsilon nan is not allowed"),
        (["--target-epsilon", "1e9"], "--target-epsilon 1000000000.0 is not met"),
        (["--delta", "1"], "--delta 1.0 is not allowed"),
        (["--epochs", "0"], "--epochs 0 is not allowed"),
        (["--rounds", "-3", "--small"], "--rounds -3 is not allowed"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, sentence, tmp_path, capsys):
    folder = tmp_path / "runs"
    assert main(["demo", "--run-dir", str(folder), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"tfprivacy-ft: {sentence}")
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--run-dir", str(tmp_path / "file" / "runs")]) == 2
    assert "--run-dir" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["dmo"], ["demo", "--target", "3"]])
def test_unknown_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: tfprivacy-ft" in capsys.readouterr().err


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small demo in a folder where an earlier one has been: what it printed, and its folder."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "001").mkdir()
    command = [*COMMAND, "demo", "--small", "--target-epsilon", "2", "--run-dir", str(runs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600), runs / "002"


def without_start_up(text):
    """What was written, but for the lines that TensorFlow 2.21 writes at its start before any program can silence it."""
    lines = [s for s in text.splitlines() if not re.match(r"WARNING: All log messages before absl|[IEW]0000 ", s)]
    return "\n".join(lines)


@pytest.mark.slow
def test_demo_prints_one_table_and_where_the_rest_is(demo):
    ran, folder = demo
    assert (ran.returncode, without_start_up(ran.stderr)) == (0, "")
    assert len(ran.stdout.splitlines()) < 40
    rows = [line.split() for line in ran.stdout.splitlines() if " example " in line or " client " in line]
    for row, unit in zip((r for r in rows if "poisson" in r), PRIVATE_RUNS.values(), strict=True):
        accuracy, epsilon, delta, *words, unamplified = row[-6:]
        assert words == [unit, "poisson"] and float(delta) == 1e-4
        assert 0 <= float(accuracy) <= 1 and 0 < float(epsilon) <= 2 < float(unamplified)
    assert str(folder) in ran.stdout.replace("\n", "")


@pytest.mark.slow
def test_demo_keeps_to_the_target_by_its_ledgers_and_continues_none(demo):
    _, folder = demo
    assert list((folder.parent / "001").iterdir()) == []
    for name, unit in PRIVATE_RUNS.items():
        report = compute_epsilon(folder / name)
        assert 1.9 < report.epsilon <= 2
        assert [account.unit for account in report.accounts] == [unit]
        assert (folder / name / "report.txt").read_text() == f"{report}\n"
        contents = ledger.read(folder / name)
        assert contents.unsettled == 0 and contents.openings == 1


@pytest.mark.slow
def test_demo_leaves_histories_and_a_plot(demo):
    _, folder = demo
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    for name in PRIVATE_RUNS:
        with open(folder / name / "history.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2
        assert 0 < float(rows[0]["epsilon"]) < float(rows[1]["epsilon"]) <= 2


LOAD = """
import pathlib, sys
import numpy as np, tensorflow as tf
for path in sys.argv[1:]:
    model = tf.keras.models.load_model(path)
    assert model.predict(np.zeros([2, 8, 8, 1]), verbose=0).shape == (2, 10)
assert not {"tfprivacy_ft", "federated"} & set(sys.modules)
"""


@pytest.mark.slow
def test_models_of_the_demo_load_in_plain_keras(demo, tmp_path):
    _, folder = demo
    paths = [str(folder / name / "model.keras") for name in ("public_only", "not_private", *PRIVATE_RUNS)]
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TFF, reason="needs requirements/federated.txt")
def test_ctrl_c_ends_with_130_without_a_traceback_or_a_worker(tmp_path):
    import psutil

    command = [*COMMAND, "demo", "--small", "--epochs", "1", "--rounds", "500", "--run-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        book, deadline = tmp_path / "001" / "federated" / ledger.FILE_NAME, time.monotonic() + 600
        while not (book.exists() and book.read_text().count("\n") > 5):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.count("\n") == 1 and err.startswith("tfprivacy-ft: interrupted")
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers)
    assert ledger.read(book).events


@pytest.mark.skipif(HAS_TFF, reason="TensorFlow Federated is installed")
def test_a_worker_needs_tff(capsys):
    assert main(["worker", "--port", "8765"]) == 2
    assert "requirements/federated.txt" in capsys.readouterr().err
