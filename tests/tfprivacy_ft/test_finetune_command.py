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
from tfprivacy_ft.tokens import Tokens

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
ONLY_TOKENS = dict.fromkeys(["bounds", "categories", "text", "text_features"])  # no other features


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
        ({"model": "text", "text": None}, "--model 'text' reads tokens: give --tokens, the column of text"),
        (
            {"model": "lstm"},
            "--model 'lstm' reads tokens: give --tokens, the column of text that becomes these, and no --text",
        ),
        (
            {"tokens": "note", **ONLY_TOKENS},
            "--tokens 'note' is not allowed with --model 'logistic', which reads no tokens",
        ),
        ({"model": "text", "tokens": "note"}, "--tokens 'note' stands for all features: leave out --features, --text"),
        ({"max_tokens": 9}, "--max-tokens, --token-buckets and --vocabulary are for --tokens COLUMN"),
        (
            {"tokens": "note", "token_buckets": 9, "vocabulary": "words"},
            "--token-buckets 9 is not allowed with --vocabulary",
        ),
        (
            {"tokens": "note", "vocabulary": "none.txt"},
            "--vocabulary 'none.txt' cannot be read (No such file or directory)",
        ),
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
        ({}, {"public_data": "none.npz"}, "--public-data 'none.npz' cannot be read (No such file or directory)"),
        (
            {},
            {"public_data": "digits"},
            "--public-data 'digits' has rows of shape (8, 8, 1), and those of the private data",
        ),
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


def image(path, height, width=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tf.io.encode_png(np.zeros([height, width, 1], np.uint8)).numpy())


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    """Data and models that cannot be trained with, and arrays that could."""
    folder = tmp_path_factory.mktemp("bad")
    for name, heights in {"sizes": (8, 9), "alike": (8, 8)}.items():
        for number, height in enumerate(heights):
            image(folder / name / "ab"[number] / "1.png", height)
    image(folder / "one_class" / "a" / "1.png", 8)
    (folder / "one_class" / "b").mkdir()
    image(folder / "damaged" / "a" / "1.png", 8)
    image(folder / "damaged" / "b" / "2.png", 8)
    (folder / "damaged" / "b" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    x, y = RNG.normal(size=[ROWS, 4]), ILL
    np.savez(folder / "good.npz", x=x, y=y)
    np.savez(folder / "nan.npz", x=np.where(np.arange(4) == 2, np.nan, x), y=y)
    np.savez(folder / "text.npz", x=x.astype(str), y=y)
    np.savez(folder / "cube.npz", x=x.reshape(ROWS, 2, 2, 1), y=y)
    np.savez(folder / "labels.npz", x=x, y=y + 1)
    network = models.build_model("mlp", (7,), 3)
    network.save(folder / "seven.keras")
    network.save_weights(folder / "only.weights.h5")
    models.build_model("mlp", (4,), 3).save(folder / "three.keras")
    (folder / "garbage.keras").write_bytes(b"PK no model")
    return folder


ARRAYS = {**NOTHING_KNOWN, "classes": 2}


@pytest.mark.parametrize(
    ("data", "changes", "says"),
    [
        ("sizes", NOTHING_KNOWN, "images have several sizes, such as 8x8 and 9x8: give --image-size HEIGHTxWIDTH"),
        ("one_class", NOTHING_KNOWN, "holds images of 1 classes: give images of two or more"),
        ("damaged", NOTHING_KNOWN, "2.png' is damaged: replace it, or leave it out"),
        ("nan.npz", ARRAYS, "column 'x' lacks 200 of 800 values"),
        ("text.npz", ARRAYS, "column 'x' holds text where numbers are needed"),
        ("labels.npz", ARRAYS, "column 'y' holds labels other than the whole numbers from 0 to 1"),
        ("good.npz", {**ARRAYS, "label": "z"}, "column 'z' is not in the table: it has x, y"),
        ("good.npz", {**ARRAYS, "model": "seven.keras"}, "which takes (7,)"),
        ("cube.npz", {**ARRAYS, "model": "seven.keras"}, "which takes (7,)"),
        (
            "alike",
            {**NOTHING_KNOWN, "model": "seven.keras"},
            "--model 'seven.keras' takes (7,), and the data are images",
        ),
        (
            "good.npz",
            {**ARRAYS, "model": "three.keras", "keep_head": True, "recipe": "full"},
            "gives 3 values for an example, and there are 2 classes",
        ),
        ("good.npz", {**ARRAYS, "model": "only.weights.h5"}, "holds weights alone"),
        ("good.npz", {**ARRAYS, "model": "garbage.keras"}, "garbage.keras' cannot be loaded"),
        ("good.npz", {**ARRAYS, "model": "none.keras"}, "There is no file and no pretrained model 'none.keras'"),
    ],
)
def test_bad_files_are_refused_in_one_sentence_and_the_folder_says_why(
    data, changes, says, bad_files, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(bad_files)
    assert main(words(data, tmp_path / "run", **{**changes, "delta": 1e-3})) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and "Traceback" not in err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["state"] == "failed" and "\n" not in run["sentence"]
    assert not (tmp_path / "run" / ledger.FILE_NAME).exists()  # nothing was released


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
    assert json.loads((folder / "card.json").read_text())["model"]["name"] == "logistic"
    card = (folder / "card.md").read_text()
    assert "# Model card: logistic" in card and "class yes" in card
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


def test_words_are_read_in_their_order_and_public_data_are_recorded_and_compared(tmp_path, capsys):
    """A model of tokens, its new head on a second run, and 60 rows that are public and private."""
    path = write(tmp_path)
    np.savez(tmp_path / "public.npz", note=np.array(["in much pain", "nothing new"])[[0, 1, 1]])
    tokens = {**ONLY_TOKENS, "tokens": "note", "max_tokens": 4, **RUN}
    first = words(
        path, tmp_path / "first", model="text", token_buckets=9, **tokens, public_data=tmp_path / "public.npz"
    )
    assert main(first) == 0
    out, err = capsys.readouterr()
    assert f"{ROWS * 3 // 4} rows of 4 tokens, 2 classes" in out
    shared = int(np.sum(TABLE["note"][_trained_on()] == "in much pain"))
    assert f"warning: {shared} of 150 private rows are among the public data" in err
    card = json.loads((tmp_path / "first" / "card.json").read_text())
    assert "| learning rate | 0.5 |" in (tmp_path / "first" / "card.md").read_text()  # vectors of words start near zero
    assert card["public_data"] == {str(tmp_path / "public.npz"): [[[3, 4]]]}
    schema = json.loads((tmp_path / "first" / "schema.json").read_text())
    assert schema["tokens"] == {"column": "note", "length": 4, "buckets": 9}
    model = tf.keras.models.load_model(tmp_path / "first" / "model.keras", compile=False)
    assert model.predict(Tokens.from_json(schema["tokens"]).encode(["all is well"]), verbose=0).shape == (1, 1)

    tuned = {**ONLY_TOKENS, "tokens": "note", "max_tokens": 4, "recipe": "zero_shot", "keep_head": True}
    again = words(path, None, **tuned, model=tmp_path / "first" / "model.keras", held_out=0.25)
    assert "--tokens 'note' become 4097 numbers, and the model knows 10" in refused(
        [*again, "--run-dir", str(tmp_path / "other")], capsys
    )
    assert main([*again, "--run-dir", str(tmp_path / "again"), "--token-buckets", "9"]) == 0


def test_tokens_by_a_public_list_of_words_and_public_images_of_any_class(tmp_path):
    (tmp_path / "words.txt").write_text("pain\nwell\n")
    given = {**{**NOTHING_KNOWN, **KNOWN}, **ONLY_TOKENS, "tokens": "note", "vocabulary": str(tmp_path / "words.txt")}
    rows = _read(FinetuneSettings.from_options(data=str(write(tmp_path)), model="lstm", target_epsilon=1.0, **given))
    assert rows.x.shape == (ROWS, 64) and rows.x.max() == 3 and rows.schema.tokens.vocabulary == ("pain", "well")
    settings = FinetuneSettings.from_options(
        data="digits", model="squeezenet", target_epsilon=1.0, image_size="32x32", public_data="digits"
    )
    rows = _read(settings)
    np.testing.assert_array_equal(rows.public, rows.x)


def _trained_on():
    """Which rows are not held out."""
    order = np.random.RandomState(0).permutation(ROWS)
    return order[round(RUN["held_out"] * ROWS) :]


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
    assert model.output_shape == (None, 1) and model.name == "network"  # of the file, where Keras chose another
    tuned = words(
        tmp_path / "images", tmp_path / "zero", **NOTHING_KNOWN, model=tmp_path / "run" / "model.keras", keep_head=True,
        recipe="zero_shot", channels=1, held_out=0.5,
    )  # fmt: skip
    assert main(tuned) == 0
    assert "epsilon = 0" in capsys.readouterr().out and not ledger.read(tmp_path / "zero").events
    assert "# Model card: network" in (tmp_path / "zero" / "card.md").read_text()


@pytest.mark.skipif("TFPRIVACY_FT_DATA" not in os.environ, reason="needs the folder TFPRIVACY_FT_DATA with squeezenet")
def test_squeezenet_reads_pixels_as_it_was_trained_to(tmp_path):
    settings = FinetuneSettings.from_options(data="digits", model="squeezenet", target_epsilon=1.0, image_size="32x32")
    model, rows = _pretrained(settings, _read(settings))
    assert model.output_shape == (None, 1, 1, 512) and rows.x.shape == (1437, 32, 32, 3)
    assert rows.x[..., 0].min() == np.float32(-103.939) and "caffe" in rows.schema.pixels
