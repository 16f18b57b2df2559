"""The command `compute-epsilon`: what it prints, where, and its exit codes."""

import os
import subprocess
import sys
import warnings

import pytest
from epsilon_helpers import DPSGD, FEDAVG, a_run, strict_json

from tfprivacy_ft import cli, epsilon_command
from tfprivacy_ft.compute_epsilon import dpsgd, fedavg
from tfprivacy_ft.epsilon_command import main
from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import TEST_SEED


def words(arguments, **changes):
    options = {**arguments, **changes}
    return [word for k, v in options.items() if v is not None for word in (f"--{k.replace('_', '-')}", str(v))]


def test_the_command_prints_the_report(capsys):
    assert main(["dpsgd", *words(DPSGD)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{dpsgd(**DPSGD)}\n" and err == ""
    assert main(["fedavg", *words(FEDAVG), "--json"]) == 0
    assert strict_json(capsys.readouterr().out) == fedavg(**FEDAVG).to_dict()
    assert main(["dpsgd", *words(DPSGD, epochs=None, steps=10), "--sampling", "shuffle", "--json"]) == 0
    assert strict_json(capsys.readouterr().out)["accounts"][0]["relation"] == "zero_out"
    assert main(["fedavg", *words(FEDAVG), "--sampling", "fixed", "--json"]) == 0
    assert strict_json(capsys.readouterr().out)["accounts"][0]["relation"] == "replace_one"


def test_the_command_reports_a_run(tmp_path, capsys):
    run = a_run(tmp_path, [Event.unknown(count=1, noise_multiplier=1.0, population=100)])
    assert main(["run", str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert strict_json(out)["epsilon"] == pytest.approx(4.377178) and err == ""
    assert main(["run", str(run), "--delta", "0.05"]) == 0
    assert "warning: --delta 0.05 is not below 1/100" in capsys.readouterr().err


def test_the_command_protects_users(capsys):
    options = words(DPSGD, epochs=None, steps=3, sampling="shuffle", noise_multiplier=9)
    assert main(["dpsgd", *options, "--examples-per-user", "4", "--json"]) == 0
    (account,) = strict_json(capsys.readouterr().out)["accounts"]
    assert account["unit"] == "user" and account["by_group_lemma"] is False
    assert (
        account["epsilon"]
        == dpsgd(**{**DPSGD, "epochs": None} | {"noise_multiplier": 9 / 4}, steps=3, sampling="shuffle").epsilon
    )


def test_several_runs_are_reported_each_by_itself_or_together(tmp_path, capsys):
    event = Event.unknown(count=1, noise_multiplier=2.0)
    runs = [str(a_run(tmp_path / name, [event])) for name in ("one", "other")]
    assert main(["run", *runs, "--json"]) == 0
    one, other = strict_json(capsys.readouterr().out)
    assert one["epsilon"] == other["epsilon"] and one["source"] != other["source"]
    assert main(["compose", *runs, "--json"]) == 0
    assert strict_json(capsys.readouterr().out)["epsilon"] > one["epsilon"]
    assert main(["run", *runs, "--csv"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["unit", "example", "example"]
    assert main(["run", *runs]) == 0
    assert capsys.readouterr().out.count("\n  Source:") == 2
    assert main(["compose", runs[0], runs[0]]) == 2
    assert "named 2 times" in capsys.readouterr().err


def test_the_exit_code_says_whether_epsilon_is_within_the_budget(tmp_path, capsys):
    runs = [str(a_run(tmp_path / f"{z}", [Event.unknown(count=1, noise_multiplier=z)])) for z in (1.0, 2.0)]
    assert main(["run", *runs, "--budget", "4.4"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["run", *runs, "--budget", "4.3"]) == 3
    out, err = capsys.readouterr()
    assert "epsilon = 4.378" in out and err == "compute-epsilon: epsilon 4.378 is over --budget 4.3.\n"
    assert main(["dpsgd", *words(DPSGD, noise_multiplier=0), "--budget", "1e9"]) == 3
    assert main(["run", *runs, "--budget", "0"]) == 2
    assert "--budget 0" in capsys.readouterr().err


def test_the_command_solves(capsys):
    options = words(DPSGD, noise_multiplier=None, epochs=None, steps=10)
    assert main(["solve", *options, "--target-epsilon", "1", "--json"]) == 0
    fields = strict_json(capsys.readouterr().out)
    assert 0.995 < fields["epsilon"] <= 1.0 and fields["solved"]["noise_multiplier"] > 0
    assert main(["solve", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["dpsgd", *words(DPSGD, batch_size=70000)],
            "--batch-size 70000 is not allowed: give at most --num-examples 6",
        ),
        (["dpsgd", *words(DPSGD, noise_multiplier="nan")], "--noise-multiplier nan"),
        (["dpsgd", *words(DPSGD, epochs="-1")], "--epochs -1"),
        (["dpsgd", *words(DPSGD, delta="2")], "--delta 2"),
        (["fedavg", *words(FEDAVG, clients_per_round=0)], "--clients-per-round 0"),
        (["run", "no/such/run"], "there is no ledger"),
        (["dpsgd", *words(DPSGD), "--mean", "10"], "--mean 10.0 needs --best-of too"),
        (["dpsgd", *words(DPSGD), "--best-of", "geometric", "--mean", "0.5"], "--mean 0.5 is not allowed"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(argv, said, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_a_large_delta_is_a_warning_on_stderr(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["dpsgd", *words(DPSGD, delta=1e-4)]) == 0
    out, err = capsys.readouterr()
    assert "warning: --delta 0.0001 is not below 1/60000" in err and "epsilon" in out


def test_a_search_is_accounted_for(capsys):
    assert main(["dpsgd", *words(DPSGD), "--best-of", "poisson", "--mean", "10"]) == 0
    assert "drawn beforehand: poisson, 10 on average" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", [[], ["dpsgd"], ["dpftrl"], ["fedavg"], ["run"], ["compose"], ["solve"]])
def test_help_has_worked_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "compute-epsilon dpsgd --num-examples 60000" in capsys.readouterr().out


def test_the_examples_of_the_help_work(capsys):
    text = epsilon_command._EXAMPLES.replace("\\\n", " ")
    commands = [line.split()[1:] for line in text.splitlines() if line.strip().startswith("compute-epsilon ")]
    assert len(commands) == 9
    for argv in commands[:5]:
        assert main(argv) == 0
        assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("command", "word"), [(main, "--examples-per-user"), (cli.main, "--run-dir")])
def test_shells_can_complete_the_words(command, word, capsys, tmp_path):
    for shell in ("zsh", "bash"):
        with pytest.raises(SystemExit) as caught:
            command(["--print-completion", shell])
        assert caught.value.code == 0
        script = capsys.readouterr().out
        assert word in script
    (tmp_path / "completion.bash").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "completion.bash")]).returncode == 0


WITHOUT_TENSORFLOW = """
import sys
from tfprivacy_ft import accounting, compute_epsilon, epsilon_command, ledger
status = epsilon_command.main(sys.argv[1:])
heavy = {"tensorflow", "keras", "tensorflow_privacy", "tensorflow_federated"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else status)
"""


def test_the_command_imports_no_tensorflow():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, "dpsgd", *words(DPSGD)], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_closed_form_needs_no_accountant():
    code = (
        "import sys; from tfprivacy_ft import accounting; from tfprivacy_ft.events import Event\n"
        "accounting.epsilon(Event.unknown(count=3, noise_multiplier=2.0), 1e-5)\n"
        "sys.exit('dp_accounting' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_module_is_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "tfprivacy_ft.epsilon_command", "dpsgd", *words(DPSGD)], capture_output=True, text=True
    )
    assert result.returncode == 0 and "2.382" in result.stdout
    broken = subprocess.run(
        [sys.executable, "-m", "tfprivacy_ft.epsilon_command", "run", os.devnull], capture_output=True, text=True
    )
    assert broken.returncode == 2 and "Traceback" not in broken.stderr


@pytest.mark.parametrize("output", ["--csv", "--json"])
def test_a_run_with_a_test_seed_is_within_no_budget(output, tmp_path, capsys):
    run = a_run(tmp_path, [Event.unknown(count=1, noise_multiplier=4.0)], notes=[(TEST_SEED, "the noise was seeded.")])
    assert main(["run", str(run), output, "--budget", "50"]) == epsilon_command.OVER_BUDGET
    out, err = capsys.readouterr()
    assert "the noise was seeded." in out and "warning: the noise was seeded." in err
    if output == "--json":
        assert strict_json(out)["accounts"][0]["is_private"] is False
