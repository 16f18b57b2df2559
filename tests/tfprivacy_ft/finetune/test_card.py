"""The model card: what it says, what never gets into it, and that a reader's Markdown program shows text as text."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from markdown_it import MarkdownIt
from report_helpers import CLIENTS, ONE, a_run

from tfprivacy_ft import statement
from tfprivacy_ft.compute_epsilon import compute_epsilon
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.events import Event
from tfprivacy_ft.finetune.card import GENERATOR, write_card
from tfprivacy_ft.groups import NOT_NOISED, Figures, Groups
from tfprivacy_ft.ledger import TEST_SEED, Ledger

REPORT = compute_epsilon([ONE], delta=1e-5)
GROUPS = Groups(
    Figures(90, 0.9, 0.95), {"0": Figures(60, 0.95), "1": Figures(30, 0.8)}, {"sex = f": Figures(40, 0.7, 0.8)}
)
STAGES = [
    {"name": "head", "epochs": 40, "noise_multiplier": 3.25, "clipping": None},
    {"name": "full", "epochs": 3, "l2_norm_clip": 1.0},
]
VALUE = 0.123456789


def a_model(name="digits"):
    image, classes = SimpleNamespace(shape=(None, 8, 8, 1)), SimpleNamespace(shape=(None, 10))
    return SimpleNamespace(
        name=name, layers=[1, 2.0, 3], inputs=[image], outputs=[classes], count_params=lambda: 12_345
    )


def card(folder, **changed):
    arguments = {
        "report": REPORT, "recipe": "full", "data": {"x": [1437, 8, 8, 1]}, "figures": {"accuracy": 0.95}, "model": a_model(),
    }  # fmt: skip
    markdown, as_json = write_card(folder, **{**arguments, **changed})
    return markdown.read_text(encoding="utf-8"), json.loads(as_json.read_text(encoding="utf-8"))


def html(markdown):
    return MarkdownIt("commonmark").enable("table").render(markdown)


def tags(page):
    return re.findall(r"<(\w+)", page)


def test_it_says_what_was_trained_on_what_at_which_epsilon_and_with_what_result(tmp_path):
    book = a_run(tmp_path / "run")
    report = compute_epsilon(book)
    data = {"name": "scans", "x": np.full([50, 4], VALUE), "y": {"shape": [50], "dtype": "int32"}, "held out": 10}
    public = {"web": (np.full([7, 4], VALUE), [7])}
    text, read = card(tmp_path / "card", report=report, recipe=STAGES, data=data, public_data=public, groups=GROUPS)
    page = html(text)
    for said in (
        "Model card: digits", "8 x 8 x 1", "12,345", "2 int, 1 float", "50 x 4 of float64", "web: 7 x 4 of float64, 7",
        "a head on its features was trained", "All layers that were not frozen were trained", "<td>40</td>\n<td>3</td>",
        "<td>3.25</td>\n<td>-</td>", statement.headline(report.accounts[0]), "<td>0.95</td>", "<td>sex = f</td>", NOT_NOISED,
        "Accuracy is lowest for sex = f", "load_model(&quot;model.keras&quot;, compile=False)", "tensorflow",
    ):  # fmt: skip
        assert said in page, said
    for sentence in statement.not_covered(report):
        assert sentence in page
    assert "clipping" not in page  # left at None
    assert read["privacy"]["epsilon"] == report.epsilon and read["figures"] == {"accuracy": 0.95}
    assert (
        read["groups"] == GROUPS.to_dict() and read["recipe"][1] == STAGES[1] and read["model"]["inputs"] == [[8, 8, 1]]
    )
    both = text + json.dumps(read)
    assert "0.1234" not in both and str(tmp_path) not in both  # no value of the data, and no path


def test_without_groups_public_data_and_figures_it_says_so(tmp_path):
    text, read = card(tmp_path, figures={}, data={})
    for said in ("No held-out figures were given.", "No public data were named.", "No figures by class or group"):
        assert said in text
    assert read["groups"] is None and read["public_data"] == {}
    assert "| l2 norm clip" not in text


def test_no_private_step_no_privacy_and_several_units_are_said_as_they_are(tmp_path):
    text, read = card(tmp_path, report=compute_epsilon([], delta=1e-5), recipe="zero_shot")
    assert (
        text.count(statement.NOTHING_RELEASED) == 2
        and "Nothing was trained" in text
        and read["privacy"]["epsilon"] == 0
    )
    text, read = card(tmp_path, report=compute_epsilon([Event.unknown(count=1, noise_multiplier=0.0)], delta=1e-5))
    assert "there is no privacy guarantee" in text and read["privacy"]["epsilon"] == "Infinity"
    assert "The promise hides" not in text
    text, read = card(tmp_path, report=compute_epsilon([ONE, CLIENTS], delta=1e-5))
    assert statement.SIDE_BY_SIDE in text and len(read["privacy"]["headlines"]) == 2
    assert "hides one client or one example" in text


def test_a_test_seed_is_the_first_thing_said(tmp_path):
    with Ledger.open(tmp_path / "run", delta=1e-5) as book:
        book.settle([book.reserve(ONE)], ONE)
        book.note(TEST_SEED, "the noise can be subtracted.")
    text, read = card(tmp_path, report=compute_epsilon(tmp_path / "run"))
    assert 0 < text.index("**Warning: the noise can be subtracted.**") < text.index("**epsilon")
    assert read["privacy"]["warnings"] == ["the noise can be subtracted."]


HOSTILE = [
    "<script>alert(1)</script>",
    "[x](javascript:alert) ![y](http://z/p.png) http://z.example www.z.example a@z.example",
    "| a | b |\n\n# heading\n- item\n1. one",
    "- item",
    "2. item",
    "```\ncode `x` ~~s~~ **bold** _i_ &lt; \\",
    "> quote\r\n===\n---",
    "a\u2028# b\u202ec\x00\ud800",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_from_outside_is_text_and_nothing_else(tmp_path, text):
    def page_with(word):
        with Ledger.in_memory(delta=1e-5) as book:
            book.settle([book.reserve(ONE)], ONE)
            book.note("kind", word)
            book.note(TEST_SEED, word)
            report = compute_epsilon(book)
        groups = Groups(Figures(3, 0.5), {"0": Figures(3, 0.5)}, {word: Figures(3, 0.5)})
        both, _ = card(
            tmp_path, report=report, recipe=[{"name": word, word: word}], data={word: word}, figures={word: 0.5},
            model=a_model(word), public_data={word: word}, groups=groups, model_file=word,
        )  # fmt: skip
        return html(both), both

    (plain, _), (page, markdown) = page_with("word"), page_with(text)
    assert tags(page) == tags(plain)  # not one element more, or elsewhere
    visible = " ".join(re.sub("[\u202e\ud800]", "", text).replace("\x00", " ").split())
    assert visible in re.sub(r"&(\w+);", lambda m: {"lt": "<", "gt": ">", "amp": "&", "quot": '"'}[m[1]], page)
    # What makes links of bare addresses, as some programs do, finds none.
    outside_of_code = markdown.replace(json.dumps(text), "")
    assert not re.search(r"(?<!\\)(://|@)|www\.", outside_of_code)


def test_recipes_are_described(tmp_path):
    recipes = pytest.importorskip("tfprivacy_ft.finetune.recipes")
    recipe = recipes.Staged((recipes.Head(epochs=7, cache=str(tmp_path / "features")), recipes.LastLayers(count=2)))
    text, read = card(tmp_path / "card", recipe=recipe)
    assert "| epochs | 7 | \\- |" in text and "| count | \\- | 2 |" in text
    assert [stage["name"] for stage in read["recipe"]] == ["head", "last_layers"] and str(tmp_path) not in text
    assert "Nothing was trained" in card(tmp_path / "card", recipe=recipes.ZeroShot())[0]


def test_a_saved_model_loads_by_the_lines_of_its_card(tmp_path, monkeypatch):
    import tensorflow as tf

    model = tf.keras.Sequential([tf.keras.layers.Input((4,)), tf.keras.layers.Dense(3)], name="small")
    model.save(tmp_path / 'a "model".keras')
    text, read = card(tmp_path, model=model, model_file='a "model".keras')
    assert read["model"] == {
        "name": "small", "inputs": [[4]], "outputs": [[3]], "parameters": 15, "layers": {"Dense": 1}, "file": 'a "model".keras',
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search("```python\n(.*?)```", text, re.DOTALL)[1], names)
    np.testing.assert_array_equal(names["model"].get_weights()[0], model.get_weights()[0])


def test_an_older_card_is_replaced_and_another_file_is_not(tmp_path):
    card(tmp_path)
    text, _ = card(tmp_path, model=a_model("other"))
    assert "other" in text and GENERATOR in text
    (tmp_path / "card.json").write_text("mine")
    with pytest.raises(InvalidArgumentError, match=r"card\.json' is a file that no card wrote"):
        card(tmp_path, model=a_model("third"))
    assert "other" in (tmp_path / "card.md").read_text() and (tmp_path / "card.json").read_text() == "mine"
    with pytest.raises(InvalidArgumentError, match="give a folder that can"):
        card(tmp_path / "card.md")


def test_values_of_data_and_what_is_no_number_are_refused(tmp_path):
    for values in ({"y": list(range(50))}, {"y": {1, 2}}, {"x": [[0.5] * 20]}):
        with pytest.raises(InvalidArgumentError, match="may hold values, of which a card has none"):
            card(tmp_path, data=values)
    for wrong in ("high", True, np.ones(3), None):
        with pytest.raises(InvalidArgumentError, match=r"figures\['accuracy'\]"):
            card(tmp_path, figures={"accuracy": wrong})
    _, read = card(tmp_path, figures={"loss": math.inf, "accuracy": np.float32(0.5)})
    assert read["figures"] == {"loss": "Infinity", "accuracy": 0.5}
