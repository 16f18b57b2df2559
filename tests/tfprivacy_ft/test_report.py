"""The report on runs, as data, as JSON and as a page: what it says, what it escapes, and what it does with bad ledgers."""

import dataclasses
import itertools
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from epsilon_helpers import strict_json
from report_helpers import CLIENTS, NORMS, ONE, a_run

from tfprivacy_ft import accounting, cli, statement
from tfprivacy_ft.compute_epsilon import compute_epsilon
from tfprivacy_ft.errors import InvalidArgumentError, LedgerDamagedError, LedgerError
from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import TEST_SEED, Ledger, Trained
from tfprivacy_ft.report import FILE_NAME, gather, write_report


def damaged(folder):
    file = a_run(folder) / "ledger.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"count": 4', b'"count": 3', 1))
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def page_of(*folders, **options):
    return Page(gather(folders, **options).to_html())


def test_the_json_holds_the_epsilons_of_the_ledger_all_along_the_run(tmp_path):
    fields = strict_json(gather([a_run(tmp_path / "run")]).to_json())
    (run,) = fields["runs"]
    assert run["report"] == compute_epsilon(tmp_path / "run").to_dict()
    (line,) = run["lines"]
    expected = [accounting.gaussian_epsilon(noise_multiplier=4.0, delta=1e-5, releases=n) for n in (0, 4, 8, 12)]
    assert [point["epsilon"] for point in line["points"]] == expected
    assert [(point["releases"], point["figure"]) for point in line["points"]] == [
        (0, None),
        (4, 0.5),
        (8, 0.6),
        (12, 0.7),
    ]
    assert (run["name"], run["intact"], run["target_epsilon"], run["figure"]) == ("run", True, 9.0, "val_accuracy")
    assert run["last_figures"] == {"val_loss": 1.5, "val_accuracy": 0.7}
    assert run["trained"] == [{"variables": ["dense/kernel", "dense/bias"], "parameters": 30}]
    assert run["ledger"]["records"] == 1 + 1 + 3 * 3 + 1 and run["ledger"]["unsettled"] == 0
    assert run["ledger"]["started"] < run["ledger"]["written"]


def test_the_page_holds_the_statement_the_table_and_the_state_of_the_ledger(tmp_path):
    report = gather([a_run(tmp_path / "run")])
    page = Page(report.to_html())
    (account,) = report.intact[0].report.accounts
    rows = [text for _, text in statement.rows(account, report.intact[0].report)]
    expected = [statement.headline(account), *rows, *statement.not_covered(report.intact[0].report)]
    for text in (*expected, "target, 9", "30 parameters", "dense/kernel", "val_accuracy: 0.7", "unknown", "Intact."):
        assert text in page.text, text
    assert (
        page.tags.count("figure") == page.tags.count("title") - 1 == 2
    )  # epsilon over steps, accuracy against epsilon


def test_several_runs_stand_side_by_side(tmp_path):
    one, other = a_run(tmp_path / "a" / "run"), a_run(tmp_path / "b" / "run", figure="accuracy", delta=1e-6)
    report = gather([one, other / "ledger.jsonl"])
    assert [run.name for run in report.runs] == ["a/run", "b/run"]
    page = Page(report.to_html())
    assert "a/run: val_accuracy 0.7 at epsilon" in page.text and "b/run: accuracy 0.7 at epsilon" in page.text
    assert "since they differ in delta and in the name of the figure" in page.text
    assert "compute-epsilon compose" in page.text


def test_units_are_never_added(tmp_path):
    run = gather([a_run(tmp_path / "run", [ONE, CLIENTS, ONE])]).intact[0]
    ends = {line.unit: line.points[-1] for line in run.lines}
    assert {unit: end.releases for unit, end in ends.items()} == {"example": 8, "client": 2}
    for account in run.report.accounts:
        assert ends[account.unit].epsilon == account.epsilon
    page = page_of(tmp_path / "run")
    assert page.text.count(statement.SIDE_BY_SIDE) == 2
    assert "one client, zero out" in page.text and "differ in who is protected (unit)" in page.text
    assert "steps or rounds" in page.text


def test_a_line_goes_on_where_the_relation_changes(tmp_path):
    poisson = Event.poisson(count=2, noise_multiplier=4.0, sampling_probability=0.1)
    sampled, rest = gather([a_run(tmp_path / "run", [poisson, ONE], figure=None)]).intact[0].lines
    assert (sampled.relation, rest.relation) == ("add_or_remove_one", "zero_out")
    assert rest.points[0] == sampled.points[-1] and [point.releases for point in rest.points] == [2, 6]


def test_an_infinite_epsilon_is_said_and_not_drawn(tmp_path):
    run = a_run(tmp_path / "run", [ONE, Event.unknown(count=1, noise_multiplier=0.0)])
    fields = strict_json(gather([run]).to_json())["runs"][0]
    assert fields["report"]["epsilon"] == fields["lines"][0]["points"][-1]["epsilon"] == "Infinity"
    page = page_of(run)
    assert "epsilon is infinite for one training example" in page.text
    assert "Where epsilon is infinite there is nothing to draw" in page.text
    assert "there is nothing to draw" not in page_of(a_run(tmp_path / "private")).text
    never = page_of(a_run(tmp_path / "never", [Event.unknown(count=1, noise_multiplier=0.0)], facts={}))
    assert ("role", "img") not in never.attributes and "infinite" in never.text
    assert ("role", "img") in page.attributes


def test_without_figures_the_page_says_how_to_get_them(tmp_path):
    run = a_run(tmp_path / "run", figure=None)
    assert "model.fit validation_data=" in page_of(run).text
    assert gather([run]).intact[0].figure is None
    page = page_of(run, a_run(tmp_path / "other"))
    assert "No such figure was recorded by run." in page.text and "validation_data=" not in page.text


def test_another_figure_can_be_named(tmp_path):
    runs = [a_run(tmp_path / "run"), a_run(tmp_path / "none", figure=None)]
    assert [run.figure for run in gather(runs, figure="val_loss").intact] == ["val_loss", None]
    assert "Held-out figure against epsilon" in page_of(*runs, figure="val_loss").text
    with pytest.raises(InvalidArgumentError, match=r"figure='f1' .* they have val_loss, val_accuracy"):
        gather(runs, figure="f1")


def test_a_run_that_went_on_after_its_last_figure_is_told_apart(tmp_path):
    run = a_run(tmp_path / "run")
    assert "More was released" not in page_of(run).text
    a_run(run, [ONE], figure=None)
    assert "More was released after the last figure of run" in page_of(run).text


def test_gradient_norms_are_shown_only_where_they_were_kept(tmp_path):
    with_norms, without = a_run(tmp_path / "with", norms=NORMS), a_run(tmp_path / "without")
    assert "radient norms" not in page_of(without).text
    report = gather([with_norms, without])
    page = Page(report.to_html())
    assert "releases without noise: epsilon does not cover them" in page.text and "clip, 1" in page.text
    assert page.text.count("20.0 %") == 3 and "with: share of examples that was clipped" in page.text
    kept, nothing = strict_json(report.to_json())["runs"]
    assert nothing["gradient_norms"] == [] and len(kept["gradient_norms"]) == 3
    assert {**kept["gradient_norms"][0], "time": ""} == {
        "time": "", "edges": [0.0, 0.5, 1.0, 4.0], "counts": [5, 3, 2], "clipped": 2,
    }  # fmt: skip


HOSTILE = "<script>alert(1)<b onclick=alert(2)>&amp;$x_"


def test_whatever_comes_from_a_ledger_is_harmless(tmp_path):
    run = tmp_path / HOSTILE
    a_run(run, figure=f"{HOSTILE}accuracy", facts={HOSTILE: HOSTILE, "list": [HOSTILE], "target_epsilon": HOSTILE})
    with Ledger.open(run) as book:
        book.note(HOSTILE, f"{HOSTILE}.")
        book.trained(Trained((f"</details>{HOSTILE}", "surrogate \ud800"), 3))
    html = gather([run, damaged(tmp_path / "<i>damaged")]).to_html()
    page = Page(html)
    assert not {"script", "b", "i", "img", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert page.tags.count("details") == html.count("</details>")
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcdoc", "action")]
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "xlink:href"))
    assert page.text.count(HOSTILE) > 8
    assert "default-src 'none'" in dict(page.attributes).values() or "default-src 'none'" in html
    write_report([run], tmp_path / "page.html")
    assert "surrogate \\ud800" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_ids_are_given_once(tmp_path):
    page = page_of(a_run(tmp_path / "a", norms=NORMS), a_run(tmp_path / "b", norms=NORMS))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 50
    assert {value[1:] for name, value in page.attributes if name == "xlink:href"} <= set(ids)


def test_the_same_ledgers_make_the_same_page(tmp_path):
    run = a_run(tmp_path / "run", norms=NORMS)
    one, other = gather([run]), gather([run])
    assert one.to_html() == dataclasses.replace(other, made=one.made).to_html()


def test_a_damaged_ledger_has_no_epsilon_and_the_page_is_written(tmp_path, capsys):
    runs = [a_run(tmp_path / "good"), damaged(tmp_path / "bad")]
    output = tmp_path / "page.html"
    with pytest.raises(LedgerDamagedError, match=r"1 of 2 ledgers .*page\.html shows no epsilon for it: .*record 3"):
        write_report(runs, output)
    page = Page(output.read_text(encoding="utf-8"))
    assert "bad : no epsilon can be given." in page.text and "Damaged." in page.text and "good" in page.text
    good, bad = strict_json((tmp_path / "page.json").read_text())["runs"]
    assert good["intact"] and set(bad) == {"name", "path", "intact", "damage"} and not bad["intact"]
    assert cli.main(["report", *map(str, runs), "--output", str(output)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "record 3" in err
    assert cli.main(["report", str(runs[1])]) == 2
    assert "no epsilon can be given" in (runs[1] / FILE_NAME).read_text(encoding="utf-8")


def test_open_reservations_are_counted_in_full(tmp_path):
    with Ledger.open(tmp_path / "run", delta=1e-5) as book:
        book.reserve(ONE)
    (run,) = gather([tmp_path / "run"]).intact
    assert [point.releases for point in run.lines[0].points] == [0, 4]
    assert page_of(tmp_path / "run").text.count("may not have run to the end, counted in full: 1.") == 2


def test_nothing_released_is_epsilon_zero(tmp_path):
    Ledger.open(tmp_path / "run", delta=1e-5).close()
    report = gather([tmp_path / "run"])
    assert report.intact[0].lines == () and strict_json(report.to_json())["runs"][0]["report"]["epsilon"] == 0
    assert statement.NOTHING_RELEASED in Page(report.to_html()).text


def test_a_figure_from_before_the_end_says_so(tmp_path):
    run = a_run(tmp_path / "run", [ONE], figure="accuracy")
    assert "accuracy: 0.5, after" not in page_of(run).text
    a_run(run, [ONE], figure=None)
    text = page_of(run).text
    assert re.search(r"accuracy: [0-9.]+, after (\d+) of (\d+) steps", text).groups() == (
        str(ONE.count),
        str(2 * ONE.count),
    )


def test_warnings_come_first(tmp_path):
    run = a_run(tmp_path / "run", [Event.unknown(count=1, noise_multiplier=4.0, population=50)], delta=0.1)
    with Ledger.open(run) as book:
        book.note(TEST_SEED, "the noise was <seeded>.")
    page = page_of(run)
    assert 0 < page.text.index("the noise was <seeded>.") < page.text.index("delta=0.1 is not below 1/50")
    assert page.text.index("delta=0.1 is not below 1/50") < page.text.index("epsilon =")
    assert len(strict_json(gather([run]).to_json())["runs"][0]["warnings"]) == 2


def test_long_runs_are_thinned_and_keep_their_ends(tmp_path):
    run = a_run(tmp_path / "run", [ONE] * 60, figure=None)
    for i in range(2):
        a_run(run, [ONE], figure="accuracy" if i else None)
    seen = []
    report = gather([run], progress=lambda done, total: seen.append((done, total)))
    points = report.intact[0].lines[0].points
    assert 20 <= len(points) <= 26 and [point.releases for point in (points[0], points[-1])] == [0, 4 * 62]
    assert points[-1].figure == 0.5 and points[-1].epsilon == report.intact[0].report.epsilon
    assert seen == [(i + 1, len(points) - 1) for i in range(len(points) - 1)]
    gaps = [after.releases - before.releases for before, after in itertools.pairwise(points)]
    assert max(gaps) <= 5 * 4


def test_only_older_reports_are_replaced(tmp_path):
    run = a_run(tmp_path / "run")
    assert write_report([run]) == write_report([run]) == run / FILE_NAME
    assert sorted(path.name for path in run.iterdir() if "report" in path.name) == [
        "privacy_report.html",
        "privacy_report.json",
    ]
    for name in ("mine.html", "mine.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InvalidArgumentError, match=r"is a file that no report wrote"):
            write_report([run], tmp_path / "mine.html")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    for output, said in (("page.json", "ends in .html"), ("no/such/page.html", "cannot be written")):
        with pytest.raises(InvalidArgumentError, match=said):
            write_report([run], tmp_path / output)
    with pytest.raises(InvalidArgumentError, match="cannot be written"):
        (tmp_path / "folder.html").mkdir()
        write_report([run], tmp_path / "folder.html")


def test_mistakes_are_one_sentence_and_no_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, without_delta = str(a_run(tmp_path / "run")), str(a_run(tmp_path / "without", delta=None))
    for words, said in (
        (["no/such/run"], "there is no ledger"),
        ([run, run], "named 2 times"),
        ([run, run + "/ledger.jsonl"], "named 2 times"),
        ([run, without_delta], "--delta None is not allowed"),
        ([run, "--delta", "2"], "--delta 2.0 is not allowed"),
        ([run, "--figure", "f1"], "--figure 'f1'"),
        ([run, "--output", "page.pdf"], "--output 'page.pdf'"),
    ):
        assert cli.main(["report", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and said in err and err.count("\n") == 1, err
    assert not list(tmp_path.rglob("*.html"))
    with pytest.raises(InvalidArgumentError, match="name at least one run"):
        gather([])
    with pytest.raises(LedgerError):
        gather([tmp_path])


def test_the_command_says_where_the_page_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [str(a_run(tmp_path / name)) for name in ("one", "other")]
    assert cli.main(["report", runs[0], "--delta", "1e-6"]) == 0
    assert capsys.readouterr() == (f"{runs[0]}/{FILE_NAME}\n", "")
    fields = strict_json((tmp_path / "one" / "privacy_report.json").read_text())
    assert fields["runs"][0]["report"]["delta"] == 1e-6
    assert cli.main(["report", *runs, "--figure", "val_loss"]) == 0
    assert capsys.readouterr() == (f"{FILE_NAME}\n", "")
    assert "other" in (tmp_path / FILE_NAME).read_text(encoding="utf-8")
    assert math.isfinite(strict_json((tmp_path / "privacy_report.json").read_text())["runs"][1]["report"]["epsilon"])


WITHOUT_TENSORFLOW = """
import sys
from tfprivacy_ft import report
report.write_report(sys.argv[1:])
heavy = {"tensorflow", "keras", "tensorflow_federated", "matplotlib.pyplot"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def test_it_needs_no_tensorflow_and_no_window(tmp_path):
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(a_run(tmp_path / "run"))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (ran.returncode, ran.stderr) == (0, "")
