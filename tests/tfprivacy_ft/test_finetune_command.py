"""`tfprivacy-ft finetune`: what it refuses, what it reads, and what it leaves behind."""

import json
import os

import numpy as np
import pytest
import tensorflow as tf

from tfprivacy_ft import ledger, models
from tfprivacy_ft.cli import main
from tfprivacy_ft.compute_epsilon import compute_epsilon
from tfprivacy_ft.encoding import Encoding
from tfprivacy_ft.finetune_command import FinetuneSettings, _pretrained, _read

RNG = np.random.default_rng(0)
ROWS = 200
ILL = RNG.integers(0, 2, ROWS)
TABLE = {
    "age": RNG.integers(18, 90, ROWS).astype(float),
    "city": np.array(["Rome", "Oslo"])[RNG.integers(0, 2, ROWS)],
    "note": np.array(["all is well", "in much pain"])[ILL],
    "ill": np.array(["no", "yes"])[ILL],
}
KNOWN = {
    "label": "ill",
    "classes": ["no", "yes"],
    "bounds": ["age=0:120"],
    "categories": ["city=Rome,Oslo"],
    "text": ["note"],
    "text_features": 32,
}


def write(folder, table=TABLE):
    np.savez(folder / "table.npz", **table)
    return folder / "table.npz"


def words(data, run_dir, **changes):
    """The words of a command; True stands for an option without a value, and None leaves one out."""
    options = {"data": data, "model": "logistic", "target_epsilon": 3.0, "run_dir": run_dir, **KNOWN, **changes}
    found = ["finetune"]
    for name, value in options.items():
        if value is not None:
            found.append(f"--{name.replace('_', '-')}")
            found += map(str, [] if value is True else value if isinstance(value, list) else [value])
    return found


NOTHING_KNOWN = dict.fromkeys(KNOWN)


def refused(given, capsys):
    """The one sentence with which the command refuses these words."""
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("tfprivacy-ft: ")
    return err.removeprefix("tfprivacy-ft: ").strip()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_epsilon": 0}, "--target-epsilon 0.0 is not allowed"),
        ({"delta": 1}, "--delta 1.0 is not allowed"),
        ({"held_out": 1}, "--held-out 1.0 is not allowed"),
        ({"held_out": 0.1, "test_data": "other.npz"}, "--held-out 0.1 is not allowed with --test-data 'other.npz'"),
        ({"stages": 0}, "--stages 0 is not allowed"),
        ({"recipe": "heads"}, "--recipe 'heads' is not allowed: give one of bias"),
        (
            {"recipe": "head"},
            "--recipe 'head' is not allowed with --model 'logistic', which starts from random weights",
        ),
        ({"model": "MobileNetV2", "recipe": "zero_shot"}, "--recipe 'zero_shot' trains nothing: give --keep-head with"),
        ({"keep_head": True}, "--keep-head is not allowed with --model 'logistic', which has no head of these classes"),
        ({"resume": True, "run_dir": None}, "--resume is not allowed without run_dir"),
        ({"data": "digit"}, "--data 'digit' is neither a file that ends in"),
        ({"data": "digits"}, "--data 'digits' is a bundled data set: leave out --label, --classes, --bounds, "),
        ({"label": None, "data": "people.csv"}, "--data 'people.csv' is a table: give --label, too."),
        ({"classes": None}, "is a file: give --classes, too, how many there are"),
        ({"classes": ["yes"]}, "--classes 'yes' is not allowed: give how many there are"),
        ({"bounds": ["age"]}, "--bounds 'age' is not allowed: give COLUMN=LOW:HIGH"),
        ({"categories": ["city"]}, "--categories 'city' is not allowed: give COLUMN=CATEGORY,CATEGORY"),
        ({"text": ["city", "note"]}, "columns ['city'] are given twice"),
        ({"image_size": "96"}, "--image-size '96' is not allowed: give HEIGHTxWIDTH"),
        ({"schema": "none.json"}, "--schema 'none.json' cannot be read (No such file or directory)"),
    ],
)
def test_words_that_do_not_fit_are_refused_before_a_folder_is_made(changes, says, tmp_path, capsys):
    given = words(**{"data": tmp_path / "table.npz", "run_dir": tmp_path / "run", **changes})
    assert says in refused(given, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "changes", "says"),
    [
        ({}, {"data": "none.npz"}, "--data 'none.npz' cannot be read (No such file or directory)"),
        ({}, {"label": "sick"}, "column 'sick' is not in the table: it has age, city, note, ill."),
        ({}, {"features": ["age", "city", "note", "height"]}, "column 'height' is not in the table"),
        ({}, {"categories": None}, "column 'city' holds text where numbers are needed"),
        ({"ill": np.full(ROWS, "yes")}, {}, "column 'ill' holds one class only"),
        ({"age": np.full(ROWS, np.nan)}, {}, f"column 'age' lacks {ROWS} of {ROWS} values"),
        ({"ill": TABLE["ill"][:-1]}, {}, f"there are {ROWS} rows of features and {ROWS - 1} labels"),
        ({}, {"image_size": "8x8"}, "--image-size HEIGHTxWIDTH and channels are for images"),
        ({}, {"held_out": 0.001}, f"--held-out 0.001 of {ROWS} rows leaves too few"),
        ({}, {"resume": True}, "holds no run to go on with"),
    ],
)
def test_data_that_do_not_fit_are_refused_and_the_folder_says_why(change, changes, says, tmp_path, capsys):
    path = write(tmp_path, {**TABLE, **change})
    sentence = refused(words(**{"data": path, "run_dir": tmp_path / "run", **changes}), capsys)
    assert says in sentence
    if "resume" not in changes:
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert run["state"] == "failed" and run["sentence"].split(" ", 2)[-1] in sentence


def read(data, **options):
    """The rows that the command would train on."""
    return _read(FinetuneSettings.from_options(data=str(data), model="logistic", target_epsilon=1.0, **options))


def test_a_schema_file_says_what_options_say(tmp_path, capsys):
    path = write(tmp_path)
    schema = tmp_path / "schema.json"
    known = Encoding(bounds={"age": (0, 120)}, categories={"city": ("Rome", "Oslo")}, text=("note",), text_features=32)
    schema.write_text(json.dumps({"label": "ill", "classes": ["no", "yes"], **known.to_json()}))
    by_file, by_options = read(path, schema=str(schema)), read(path, **KNOWN)
    np.testing.assert_array_equal(by_file.x, by_options.x)
    np.testing.assert_array_equal(by_file.y, ILL)
    assert by_file.x.shape == (ROWS, 1 + 2 + 32) and by_file.num_classes == 2
    assert "--label stand in --schema" in refused(
        words(path, None, **{**NOTHING_KNOWN, "label": "ill"}, schema=schema), capsys
    )
    schema.write_text('{"lable": "ill"}')
    assert "lable='ill' is not allowed in a schema: it has label, classes" in refused(
        words(path, None, **NOTHING_KNOWN, schema=schema), capsys
    )


# Whole batches, for which the noise is known in closed form, and so at once.
RUN = {"held_out": 0.25, "epochs": 2, "batch_size": 150, "delta": 1e-3}


@pytest.fixture(scope="module")
def table_run(tmp_path_factory):
    """A run on a table with columns of every kind: its folder, and what it printed."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("table")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(words(write(folder), folder / "run", **RUN)) == 0
    return folder / "run", printed.getvalue()


def test_a_run_leaves_ledger_report_card_and_model(table_run):
    folder, printed = table_run
    book = ledger.read(folder)
    assert [event.sampler for event in book.events] == ["poisson"] and book.events[0].population == 150
    epsilon = compute_epsilon(book).epsilon
    assert 2.9 < epsilon <= 3
    assert json.loads((folder / "report.json").read_text())["accounts"][0]["epsilon"] == pytest.approx(epsilon)
    assert (folder / "report.txt").read_text().strip() in printed
    assert json.loads((folder / "run.json").read_text())["state"] == "finished"
    assert json.loads((folder / "card.json").read_text()) and "class 1" in (folder / "card.md").read_text()
    assert "150 rows of 35 numbers, 2 classes" in printed and "Held out, without noise: " in printed
    assert str(folder) in printed and "val_accuracy" in printed and "epsilon" in printed


def test_the_model_reads_later_rows_by_the_schema_beside_it(table_run):
    folder, _ = table_run
    schema = json.loads((folder / "schema.json").read_text())
    known = Encoding.from_json({name: schema[name] for name in ("bounds", "categories", "text", "text_features")})
    model = tf.keras.models.load_model(folder / "model.keras", compile=False)
    later = {"age": [50], "city": ["Bonn"], "note": ["all is well"]}
    assert model.predict(known.encode(later, schema["features"]), verbose=0).shape == (1, 1)


def test_a_second_run_needs_another_folder_and_resume_needs_the_same_words(table_run, tmp_path, capsys):
    folder, _ = table_run
    path = write(tmp_path)
    assert "holds a run already: give --resume" in refused(words(path, folder, **RUN), capsys)
    assert main(words(path, folder, **{**RUN, "epochs": 4}, resume=True)) == 2
    assert "has another recipe" in capsys.readouterr().err
    assert main(words(path, folder, **RUN, resume=True)) == 0
    assert len(ledger.read(folder).events) == 1  # there was nothing left to do


def test_what_cannot_be_written_is_one_sentence_and_written_later(table_run, tmp_path, capsys):
    folder, _ = table_run
    given = words(write(tmp_path), folder, **RUN, resume=True)
    (folder / "report.txt").unlink()
    (folder / "report.txt").mkdir()  # as good as a full disk
    assert main(given) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text())["state"] == "failed"
    (folder / "report.txt").rmdir()
    assert main(given) == 0
    assert (folder / "report.txt").exists() and json.loads((folder / "run.json").read_text())["state"] == "finished"


def test_a_numbered_folder_is_made_where_none_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002"):
        refused(words("none.npz", None), capsys)
        assert json.loads((tmp_path / "runs/finetune" / number / "run.json").read_text())["state"] == "failed"


def test_stages_are_handed_over_and_a_network_at_a_path_gets_a_new_head(tmp_path, capsys):
    """A folder of images, whose run goes on after its first stage with the same words and --resume."""
    for number in range(40):
        path = tmp_path / "images" / ("dark", "light")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = RNG.integers(0, 128, (8, 8, 1)) + 128 * (number % 2)
        path.write_bytes(tf.io.encode_png(pixels.astype(np.uint8)).numpy())
    models.build_model("cnn", (8, 8, 1), 4).save(tmp_path / "network.keras")
    given = words(
        tmp_path / "images", tmp_path / "run", **NOTHING_KNOWN, model=tmp_path / "network.keras", recipe="light",
        epochs=1, batch_size=40, delta=1e-3, channels=1,
    )  # fmt: skip
    assert main([*given, "--stages", "1"]) == 0
    out = capsys.readouterr().out
    assert "40 rows of 8x8x1 numbers, 2 classes" in out and "Stages are left: go on with --resume" in out
    after_one = compute_epsilon(tmp_path / "run").epsilon
    assert main([*given, "--resume"]) == 0
    assert "Stages are left" not in capsys.readouterr().out
    assert after_one < compute_epsilon(tmp_path / "run").epsilon <= 3
    schema = json.loads((tmp_path / "run" / "schema.json").read_text())
    assert schema == {"classes": ["dark", "light"], "image_size": "8x8", "channels": 1, "pixels": "pixels / 127.5 - 1"}
    model = tf.keras.models.load_model(tmp_path / "run" / "model.keras", compile=False)
    assert model.output_shape == (None, 1)
    tuned = words(
        tmp_path / "images", tmp_path / "zero", **NOTHING_KNOWN, model=tmp_path / "run" / "model.keras", keep_head=True,
        recipe="zero_shot", channels=1, held_out=0.5,
    )  # fmt: skip
    assert main(tuned) == 0
    assert "epsilon = 0" in capsys.readouterr().out and not ledger.read(tmp_path / "zero").events


@pytest.mark.skipif("TFPRIVACY_FT_DATA" not in os.environ, reason="needs the folder TFPRIVACY_FT_DATA with squeezenet")
def test_squeezenet_reads_pixels_as_it_was_trained_to(tmp_path):
    settings = FinetuneSettings.from_options(data="digits", model="squeezenet", target_epsilon=1.0, image_size="32x32")
    model, rows = _pretrained(settings, _read(settings))
    assert model.output_shape == (None, 1, 1, 512) and rows.x.shape == (1437, 32, 32, 3)
    assert rows.x[..., 0].min() == np.float32(-103.939) and "caffe" in rows.schema.pixels
