"""`tfprivacy-ft federate`: what it refuses, what it reads, and what it leaves behind."""

import csv
import json

import numpy as np
import pytest
import tensorflow as tf
from table_files import write_table

from federated.command import FederateSettings, _from_file
from tfprivacy_ft import ledger
from tfprivacy_ft.cli import main
from tfprivacy_ft.compute_epsilon import compute_epsilon

RNG = np.random.default_rng(0)
TABLE = {
    "patient": np.array([f"p{i}" for i in RNG.integers(0, 40, 400)]),
    "age": RNG.integers(18, 90, 400).astype(float),
    "weight": RNG.normal(75, 10, 400),
    "city": np.array(["Rome", "Oslo"])[RNG.integers(0, 2, 400)],
    "ill": RNG.integers(0, 2, 400),
}
FEATURES = ["age", "weight"]


def write(folder, table=TABLE, ending="npz"):
    return write_table(folder, table, ending)


def words(data, run_dir, **changes):
    """The words of a command that would run; keyword arguments replace options, and None leaves one out."""
    options = {
        "data": data,
        "clients_by": "patient",
        "label": "ill",
        "classes": 2,
        "features": FEATURES,
        "bounds": ["age=0:120", "weight=0:200"],
        "model": "logistic",
        "rounds": 3,
        "clients_per_round": 10,
        "target_epsilon": 3.0,
        "delta": 1e-3,
        "run_dir": run_dir,
        **changes,
    }
    found = ["federate"]
    for name, value in options.items():
        if value is not None:
            found += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return found


def refused(given, capsys):
    """The one sentence with which the command refuses these words."""
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("tfprivacy-ft: ")
    return err.removeprefix("tfprivacy-ft: ").strip()


BUNDLED = {"data": "digits", "clients_by": None, "label": None, "classes": None, "features": None, "bounds": None}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rounds": 0}, "--rounds 0 is not allowed"),
        ({"delta": 1}, "--delta 1.0 is not allowed"),
        ({"target_epsilon": -1}, "--target-epsilon -1.0 is not allowed"),
        ({"clients_per_round": 41}, "--clients-per-round 41.0 is not allowed with 40 clients"),
        ({"clients_per_round": 2.5, "cohorts": "cyclic"}, "--clients-per-round 2.5 is not allowed for cyclic cohorts"),
        ({"held_out": 1}, "--held-out 1.0 is not allowed"),
        ({"classes": 1}, "--classes 1 is not allowed"),
        ({"classes": None, "label": None}, "is a file: give --label, --classes, too."),
        ({"num_clients": 5}, "--num-clients 5 is not for files"),
        (
            {"data": "digit"},
            "--data 'digit' is neither a file that ends in .csv, .csv.gz, .tsv, .parquet, .npz nor one of the data sets",
        ),
        ({"data": "no_such.npz"}, "--data 'no_such.npz' cannot be read (No such file or directory)"),
        ({"label": "sick"}, "column 'sick' is not in the table: it has patient, age, weight, city, ill."),
        ({"clients_by": "person"}, "column 'person' is not in the table"),
        ({"features": ["age", "height"], "bounds": None}, "column 'height' is not in the table"),
        ({"features": ["age", "ill"], "bounds": None}, "column 'ill' is the label"),
        ({"features": None}, "column 'city' holds text where numbers are needed"),
        ({"label": "age", "features": ["weight"], "bounds": None}, "column 'age' holds labels other than"),
        ({"bounds": ["age"]}, "--bounds 'age' is not allowed: give COLUMN=LOW:HIGH"),
        ({"bounds": ["age=5:5"]}, "--bounds 'age=5:5' is not allowed"),
        ({"bounds": ["age=0:nan"]}, "--bounds 'age=0:nan' is not allowed"),
        ({"bounds": ["ill=0:1"]}, "--bounds ['ill'] are no features: these are age, weight."),
        ({"bounds": ["age=0:1", "age=0:2"]}, "bounds something twice"),
        (BUNDLED, "--num-clients None is not allowed: give an integer >= 1"),
        ({**BUNDLED, "num_clients": 40, "label": "ill"}, "--data 'digits' is a bundled data set: leave out --label."),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(changes, says, tmp_path, capsys):
    changes = {"data": write(tmp_path), **changes}
    assert says in refused(words(run_dir=tmp_path / "run", **changes), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["--data", "--rounds", "--run-dir", "--delta"])
def test_what_is_needed_is_asked_for(missing, tmp_path, capsys):
    given = words("digits", tmp_path)
    at = given.index(missing)
    with pytest.raises(SystemExit) as stopped:
        main(given[:at] + given[at + 2 :])
    assert stopped.value.code == 2 and missing in capsys.readouterr().err


def settings_for(path, **changes):
    options = {"rounds": 1, "clients_per_round": 10, "target_epsilon": 1.0, "delta": 1e-3, "run_dir": "unused"}
    options |= {"label": "ill", "clients_by": "patient", "classes": 2, "features": FEATURES}
    return FederateSettings(data=str(path), **{**options, **changes})


def test_columns_are_scaled_by_the_bounds_given_and_by_nothing_else(tmp_path):
    path = write(tmp_path)
    order = np.argsort(TABLE["patient"], kind="stable")

    def column(clients, number):
        return np.concatenate([x[:, number] for x, _ in clients])

    plain, _ = _from_file(settings_for(path))
    np.testing.assert_allclose(column(plain, 0), TABLE["age"][order])
    scaled, _ = _from_file(settings_for(path, bounds=["age=20:80"]))
    np.testing.assert_allclose(column(scaled, 0), np.clip((TABLE["age"][order] - 50) / 30, -1, 1), atol=1e-6)
    np.testing.assert_allclose(column(scaled, 1), TABLE["weight"][order], rtol=1e-6)
    both, _ = _from_file(settings_for(path, bounds=["age=20:80", "-100:100"]))
    np.testing.assert_allclose(column(both, 1), np.clip(TABLE["weight"][order] / 100, -1, 1), atol=1e-6)
    np.testing.assert_array_equal(column(both, 0), column(scaled, 0))


def test_images_come_in_one_array(tmp_path):
    np.savez(tmp_path / "images.npz", x=np.full((6, 4, 4, 1), 255, np.uint8), y=np.arange(6) % 3, who=np.arange(6) // 2)
    options = {"label": "y", "clients_by": "who", "features": None, "classes": 3}
    clients, classes = _from_file(settings_for(tmp_path / "images.npz", bounds=["0:255"], **options))
    assert (clients.x.shape, len(clients), classes) == ((6, 4, 4, 1), 3, 3) and (clients.x == 1).all()


@pytest.mark.parametrize(
    ("way", "sampler", "size"),
    [("poisson", "poisson", 30), ("fixed", "fixed", 30), ("cyclic", "shuffled", 10)],  # accounted for by closed forms
)
def test_a_run_leaves_ledger_report_history_and_model(way, sampler, size, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(words(write(tmp_path), folder, cohorts=way, clients_per_round=size, held_out=0.25)) == 0
    out = capsys.readouterr().out
    book = ledger.read(folder)
    (event,) = book.events
    assert (event.sampler, event.unit, event.count, event.population) == (sampler, "client", 3, 30)
    epsilon = compute_epsilon(book).epsilon
    assert 2.99 < epsilon <= 3.0 and "epsilon = 3 at delta = 0.001 for one client" in out
    assert json.loads((folder / "report.json").read_text())["accounts"][0]["epsilon"] == pytest.approx(epsilon)
    assert (folder / "report.txt").read_text().strip() in out
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["round"] == "3" and 0 <= float(rows[-1]["accuracy"]) <= 1
    model = tf.keras.models.load_model(folder / "model.keras", compile=False)
    assert model.output_shape == (None, 1)
    held_out = json.loads((folder / "held_out.json").read_text())
    assert len(held_out["clients"]) == 10 and set(held_out["pooled"]) == {"loss", "accuracy", "auc"}
    assert (folder / "held_out.png").stat().st_size > 1000 and "worst tenth" in out
    assert any(note.kind == "evaluation" for note in book.notes)
    assert "holds a run already" in refused(words(write(tmp_path), folder), capsys)


def test_a_bundled_data_set_needs_no_file_and_no_figure_is_released_unasked(tmp_path, capsys):
    assert main(words(run_dir=tmp_path / "run", **BUNDLED, num_clients=20, clients_per_round=20)) == 0
    book = ledger.read(tmp_path / "run")
    assert book.events[0].population == 20 and book.notes == ()
    assert tf.keras.models.load_model(tmp_path / "run" / "model.keras", compile=False).output_shape == (None, 10)
