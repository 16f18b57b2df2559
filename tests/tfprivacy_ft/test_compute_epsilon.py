import json
import math
import os
import subprocess
import sys
import warnings

import pytest

from tfprivacy_ft import compute_epsilon as module
from tfprivacy_ft.compute_epsilon import compute_epsilon, dpsgd, fedavg, main
from tfprivacy_ft.errors import InvalidArgumentError, LedgerError, UnsupportedEventError
from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import Ledger

DPSGD = {"num_examples": 60000, "batch_size": 256, "noise_multiplier": 1.1, "epochs": 60, "delta": 1e-5}
FEDAVG = {"num_clients": 3000, "clients_per_round": 100, "noise_multiplier": 1.0, "rounds": 100, "delta": 1e-4}


def words(arguments, **changes):
    options = {**arguments, **changes}
    return [word for k, v in options.items() if v is not None for word in (f"--{k.replace('_', '-')}", str(v))]


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    return json.loads(text, parse_constant=refuse)


def test_dpsgd_by_epochs_and_by_steps():
    report = dpsgd(**DPSGD)
    assert report.epsilon == pytest.approx(2.382, rel=3e-4)
    (account,) = report.accounts
    assert account.releases == 14063 and account.epsilon_rdp == pytest.approx(2.597, rel=3e-4)
    assert dpsgd(**{**DPSGD, "epochs": None}, steps=14063).accounts == report.accounts


@pytest.mark.parametrize(
    ("length", "count", "passes"),
    [({"epochs": 60}, 14063, 60), ({"epochs": 0.5}, 118, 1), ({"steps": 234}, 234, 1), ({"steps": 235}, 235, 2)],
)
def test_shuffled_batches_are_not_amplified(length, count, passes):
    report = dpsgd(**{**DPSGD, "epochs": None, **length}, sampling="shuffle")
    (event,) = report.accounts[0].events
    assert (event.sampler, event.count, event.participations) == ("shuffled", count, passes)
    assert report.epsilon == report.accounts[0].epsilon_without_amplification


def test_shuffled_figures():
    (account,) = dpsgd(**DPSGD, sampling="shuffle").accounts
    assert account.epsilon == pytest.approx(54.05, rel=2e-4)
    assert account.epsilon_rdp == pytest.approx(56.95, rel=2e-4)
    assert account.epsilon_replace_one == pytest.approx(158.4, rel=5e-4)


def test_fedavg_protects_a_client():
    report = fedavg(**FEDAVG)
    assert report.epsilon == pytest.approx(1.879, rel=3e-4)
    assert report.accounts[0].unit == "client"


def test_fixed_cohorts_cost_more():
    report = fedavg(
        num_clients=10000, clients_per_round=100, noise_multiplier=1.0, rounds=1000, delta=1e-6, sampling="fixed"
    )
    assert report.epsilon == pytest.approx(23.3, rel=1e-3)
    assert report.accounts[0].epsilon_pld is None
    assert "no bound" in str(report)


@pytest.mark.parametrize("name", ["num_examples", "batch_size", "noise_multiplier", "epochs", "delta"])
@pytest.mark.parametrize("value", [math.nan, -1, math.inf, "7"])
def test_arguments_of_dpsgd_are_checked_by_name(name, value):
    with pytest.raises(InvalidArgumentError, match=name):
        dpsgd(**{**DPSGD, name: value})


@pytest.mark.parametrize("name", ["num_clients", "clients_per_round", "noise_multiplier", "rounds", "delta"])
@pytest.mark.parametrize("value", [math.nan, -1, math.inf, "7"])
def test_arguments_of_fedavg_are_checked_by_name(name, value):
    with pytest.raises(InvalidArgumentError, match=name):
        fedavg(**{**FEDAVG, name: value})


def test_arguments_that_contradict_each_other():
    with pytest.raises(InvalidArgumentError, match=r"batch_size=60001.*num_examples=60000"):
        dpsgd(**{**DPSGD, "batch_size": 60001})
    with pytest.raises(InvalidArgumentError, match=r"clients_per_round=3001.*num_clients=3000"):
        fedavg(**{**FEDAVG, "clients_per_round": 3001})
    for length in ({"epochs": None}, {"steps": 5}):
        with pytest.raises(InvalidArgumentError, match="exactly one"):
            dpsgd(**{**DPSGD, **length})
    for function, arguments in ((dpsgd, DPSGD), (fedavg, FEDAVG)):
        with pytest.raises(InvalidArgumentError, match="sampling"):
            function(**arguments, sampling="lottery")


def test_a_large_delta_warns():
    with pytest.warns(UserWarning, match="delta"):
        dpsgd(**{**DPSGD, "delta": 1e-4})
    with pytest.warns(UserWarning, match="delta"):
        fedavg(**{**FEDAVG, "delta": 1e-2})


# Runs.


def a_run(folder, events, delta=1e-5, notes=()):
    with Ledger.open(folder, delta=delta, facts={"model": "cnn"}) as book:
        for event in events:
            book.settle([book.reserve(event)], event)
        for note in notes:
            book.note(*note)
    return folder


def test_a_run_reports_what_its_ledger_says(tmp_path):
    event = Event.poisson(count=14063, noise_multiplier=1.1, sampling_probability=256 / 60000, population=60000)
    run = a_run(tmp_path / "mnist", [event], notes=[("training metrics", "loss of every epoch.")])
    report = compute_epsilon(run)
    assert report.recorded and report.delta == 1e-5 and report.facts == {"model": "cnn"}
    assert report.epsilon == dpsgd(**DPSGD).epsilon
    text = str(report)
    for part in ("2.382", "2.597", "6,270", "one training example", "1e-05", "recorded by the run", "Poisson", "mnist"):
        assert part in " ".join(text.split())
    assert "Released without noise, training metrics: loss of every epoch." in text
    assert compute_epsilon(run / "ledger.jsonl").accounts == report.accounts
    assert compute_epsilon(str(run), delta=1e-6).epsilon > report.epsilon
    with Ledger.open(run) as book:
        assert compute_epsilon(book).accounts == report.accounts
        assert compute_epsilon(book).notes == report.notes


def test_blocks_that_were_never_settled_are_said_to_count(tmp_path):
    with Ledger.open(tmp_path, delta=1e-5) as book:
        book.reserve(Event.unknown(count=10, noise_multiplier=4.0))
    assert "may not have run to the end, counted in full: 1." in str(compute_epsilon(tmp_path))
    assert compute_epsilon(tmp_path).unsettled == 1


def test_units_stand_side_by_side(tmp_path):
    events = [
        Event.unknown(count=1, noise_multiplier=2.0),
        Event.poisson(count=1, noise_multiplier=1.0, sampling_probability=0.1, unit="client"),
    ]
    report = compute_epsilon(events, delta=1e-5)
    assert [account.unit for account in report.accounts] == ["example", "client"]
    assert "do not add up" in str(report)
    assert strict_json(report.to_json())["epsilon"] is None
    with pytest.raises(UnsupportedEventError, match="no single epsilon"):
        _ = report.epsilon


def test_nothing_released_is_epsilon_zero(tmp_path):
    report = compute_epsilon(a_run(tmp_path, []))
    assert report.epsilon == 0.0
    assert "nothing was released" in str(report)


def test_delta_must_come_from_somewhere(tmp_path):
    with pytest.raises(InvalidArgumentError, match="no run recorded one"):
        compute_epsilon([Event.unknown(count=1, noise_multiplier=1.0)])
    with pytest.raises(InvalidArgumentError, match="no run recorded one"):
        compute_epsilon(a_run(tmp_path, [], delta=None))
    with pytest.raises(LedgerError, match="no ledger"):
        compute_epsilon(tmp_path / "elsewhere")


# The text and the JSON.


def test_no_noise_is_called_no_privacy():
    report = dpsgd(**{**DPSGD, "noise_multiplier": 0})
    assert report.epsilon == math.inf
    assert "epsilon is infinite" in str(report) and "no privacy guarantee" in " ".join(str(report).split())
    fields = strict_json(report.to_json())
    assert fields["epsilon"] == fields["accounts"][0]["epsilon_rdp"] == "Infinity"
    assert fields["accounts"][0]["is_private"] is False
    assert float(fields["epsilon"]) == math.inf


def test_json_holds_the_figures_in_full():
    report = dpsgd(**DPSGD)
    fields = strict_json(report.to_json())
    assert fields == report.to_dict()
    assert fields["epsilon"] == report.epsilon and fields["recorded"] is False
    account = fields["accounts"][0]
    assert (account["unit"], account["relation"], account["accountant"]) == ("example", "add_or_remove_one", "pld")
    assert Event(**account["events"][0]) == report.accounts[0].events[0]


def test_json_takes_numbers_of_numpy():
    np = pytest.importorskip("numpy")
    event = Event.unknown(count=np.int64(3), noise_multiplier=np.float32(4))
    assert strict_json(compute_epsilon(event, delta=1e-5).to_json())["accounts"][0]["events"][0]["count"] == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.38171, "2.382"), (2.3811, "2.382"), (2.0, "2"), (54.0458, "54.05"), (6269.96, "6,270"),
     (123456.2, "123,500"), (0.00123411, "0.001235"), (9.9999, "10"), (math.inf, "infinite")],
)  # fmt: skip
def test_quoted_figures_are_rounded_up(value, text):
    assert module._figure(value) == text


def test_a_typed_in_report_says_so():
    text = " ".join(str(fedavg(**FEDAVG)).split())
    assert "typed in, not recorded by a run" in text
    assert "one client, with all of its data" in text
    assert "adding or removing one client" in text
    assert "hyper-parameters" in text
    assert max(len(line) for line in str(fedavg(**FEDAVG)).splitlines()) <= 100


# The command.


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


@pytest.mark.parametrize("command", [[], ["dpsgd"], ["fedavg"], ["run"]])
def test_help_has_worked_examples(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "compute-epsilon dpsgd --num-examples 60000" in capsys.readouterr().out


def test_the_examples_of_the_help_work(capsys):
    text = module._EXAMPLES.replace("\\\n", " ")
    commands = [line.split()[1:] for line in text.splitlines() if line.strip().startswith("compute-epsilon ")]
    assert len(commands) == 4
    for argv in commands[:3]:
        assert main(argv) == 0
        assert "warning" not in capsys.readouterr().err


WITHOUT_TENSORFLOW = """
import sys
from tfprivacy_ft import accounting, compute_epsilon, ledger
status = compute_epsilon.main(sys.argv[1:])
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
        [sys.executable, "-m", "tfprivacy_ft.compute_epsilon", "dpsgd", *words(DPSGD)], capture_output=True, text=True
    )
    assert result.returncode == 0 and "2.382" in result.stdout
    broken = subprocess.run(
        [sys.executable, "-m", "tfprivacy_ft.compute_epsilon", "run", os.devnull], capture_output=True, text=True
    )
    assert broken.returncode == 2 and "Traceback" not in broken.stderr
