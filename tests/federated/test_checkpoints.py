import csv
import dataclasses
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import federated
from federated import aggregation, checkpoints
from tfprivacy_ft import ledger
from tfprivacy_ft.errors import CheckpointError, InvalidArgumentError, LedgerDamagedError
from tfprivacy_ft.events import Event

DELTA = 1e-3
ROOT = pathlib.Path(federated.__file__).parents[1]
PROGRAM = pathlib.Path(__file__).with_name("_killed_run.py")


@pytest.fixture
def clients(draw_clients):
    return draw_clients([1, 4, 6, 20, 3, 3, 9, 2, 5, 12])


def simulate(process, clients, folder, **changes):
    options = {"rounds": 4, "delta": DELTA, "progress": False, "checkpoint_every": 2, "evaluate_every": 2}
    return federated.simulate(process, clients, run_dir=folder, **{**options, **changes})


@pytest.fixture
def break_in_round(wrap_next):
    """The process fails once in its n-th round from now, as if the power went; monkeypatch.undo mends it."""

    def break_(process, number):
        calls = []

        def breaking(real):
            def next_round(state, cohort):
                calls.append(None)
                if len(calls) == number:
                    raise RuntimeError("the power failed")
                return real(state, cohort)

            return next_round

        wrap_next(process, breaking)

    return break_


def released(folder):
    return sum(event.count for event in ledger.read(folder).events)


def weights(result):
    return [np.asarray(value) for value in result.weights.trainable]


def saved(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("round_*"))


# A folder of checkpoints.


@pytest.fixture(params=["tff", "numpy"])
def files(request, monkeypatch):
    """With TFF and without."""
    if request.param == "numpy":
        monkeypatch.setattr(checkpoints, "_tff_files", lambda: None)
    else:
        request.getfixturevalue("tff")
    return request.param


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


STATE = {"weights": [np.ones((2, 3), np.float32)], "count": np.int32(4), "key": np.zeros(3, np.uint64)}


def made(folder, number, **settings):
    store = checkpoints.Checkpoints(folder, settings={"noise_multiplier": 1.0, **settings}, like=STATE)
    state = {**STATE, "weights": [np.full((2, 3), number, np.float32)]}
    history = [{"round": number, "epsilon": float("inf")}]
    position = ledger.Position(number, "ab")
    checkpoint = checkpoints.Checkpoint(number, state, {"next": number}, position, (number, 3 * number), history)
    store.save(checkpoint)
    return store, checkpoint


def test_what_is_saved_is_what_comes_back_and_three_are_kept(files, tmp_path):
    for number in (8, 9, 10, 11):
        store, checkpoint = made(tmp_path / "c", number)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "round_10",
        "round_11",
        "round_9",
        "settings.json",
    ]
    found = store.newest()
    assert dataclasses.replace(found, state=None) == dataclasses.replace(checkpoint, state=None)
    np.testing.assert_array_equal(found.state["weights"][0], np.full((2, 3), 11, np.float32))
    assert (found.state["count"], found.state["count"].dtype) == (4, np.int32)
    assert checkpoints.Checkpoints(tmp_path / "none", settings={}, like=STATE).newest() is None
    assert not (tmp_path / "none").exists()


def test_what_a_crash_left_is_passed_over_and_replaced(files, tmp_path, caplog):
    made(tmp_path, 1)
    store, _ = made(tmp_path, 2)
    (tmp_path / "round_3_temp1234").mkdir()
    with open(largest(tmp_path / "round_2"), "r+b") as file:
        file.truncate(100)
    assert store.newest().round == 1
    assert "round_2 cannot be read" in caplog.text
    store, _ = made(tmp_path, 2)
    assert store.newest().round == 2 and not list(tmp_path.glob("*_temp*"))
    for path in tmp_path.glob("round_*"):
        largest(path).unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        store.newest()


def test_a_checkpoint_of_another_run_is_refused(files, tmp_path):
    made(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"noise_multiplier is 1.0 there and 2.0 here\)"):
        made(tmp_path, 2, noise_multiplier=2.0)
    with pytest.raises(CheckpointError, match=r"weights are 1, 3, 2x3 there and 3x2 here"):
        checkpoints.Checkpoints(tmp_path, settings={"noise_multiplier": 1.0}, like=[np.ones((3, 2), np.float32)])
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        made(tmp_path, 2)


def test_a_checkpoint_that_cannot_be_written_is_said(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        made(tmp_path / "file" / "c", 1)


# Runs.


def test_a_run_goes_on_where_it_was_cut_short(noisy, clients, tmp_path, monkeypatch, caplog, break_in_round):
    break_in_round(noisy, 4)
    with pytest.raises(RuntimeError, match="power"):
        simulate(noisy, clients, tmp_path, rounds=5, evaluate=lambda model: {"accuracy": 0.5})
    assert saved(tmp_path) == ["round_2"] and released(tmp_path) == 4
    monkeypatch.undo()
    result = simulate(noisy, clients, tmp_path, rounds=5, evaluate=lambda model: {"accuracy": 0.7})
    assert "going on after round 2" in caplog.text and "the 2 releases since are counted" in caplog.text
    assert released(tmp_path) == 4 + 3  # what was not in the checkpoint ran again and counts again
    assert [(entry["round"], entry["accuracy"]) for entry in result.history] == [(2, 0.5), (4, 0.7), (5, 0.7)]
    assert result.epsilon == result.history[-1]["epsilon"]
    assert saved(tmp_path) == ["round_2", "round_4", "round_5"]


def test_a_run_that_is_done_does_nothing_more_until_it_is_to_be_longer(noisy, clients, tmp_path):
    first = simulate(noisy, clients, tmp_path)
    again = simulate(noisy, clients, tmp_path, state=noisy.initialize())
    assert released(tmp_path) == 4 and again.history == first.history
    for one, other in zip(weights(first), weights(again), strict=True):
        np.testing.assert_array_equal(one, other)
    longer = simulate(noisy, clients, tmp_path, rounds=6)
    assert released(tmp_path) == 6 and longer.history[-1]["round"] == 6
    # Without checkpoints, nothing is gone on from.
    assert simulate(noisy, clients, tmp_path, checkpoint_every=None, rounds=1).history[0]["round"] == 1
    assert released(tmp_path) == 7


def test_a_run_that_its_budget_has_ended_stays_ended(noisy, clients, tmp_path, caplog):
    from tfprivacy_ft import accounting

    target = accounting.epsilon(noisy.event(10).with_count(3), DELTA) * 1.0001
    for _ in range(2):
        result = simulate(noisy, clients, tmp_path, target_epsilon=target)
        assert result.history[-1]["round"] == 3 and released(tmp_path) == 3
        assert "training stopped after round 3 of 4" in caplog.text
        caplog.clear()


def test_no_checkpoint_holds_a_key_of_the_noise(noisy, clients, tmp_path, monkeypatch):
    real, keys = aggregation.fresh_noise_key, []

    def fresh():
        keys.append(real())
        return keys[-1]

    monkeypatch.setattr(aggregation, "fresh_noise_key", fresh)
    result = simulate(noisy, clients, tmp_path, checkpoint_every=1, rounds=3)
    files = [path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert len(keys) >= 3 and len(files) >= 4
    assert not any(word.tobytes() in data for key in keys for word in key for data in files)
    assert any(weights(result)[0].tobytes() in data for data in files)  # a key would be found just so


def test_another_process_other_clients_and_another_ledger_are_refused(noisy, noiseless, clients, tmp_path):
    simulate(noisy, clients, tmp_path)
    with pytest.raises(CheckpointError, match=r"noise_multiplier is 1\.5 there and 0\.0 here"):
        simulate(noiseless, clients, tmp_path)
    with pytest.raises(CheckpointError, match="num_clients is 10 there and 9 here"):
        simulate(noisy, clients[:9], tmp_path)
    assert ledger.read(tmp_path).openings == 1  # refused before anything was written
    for name in (ledger.FILE_NAME, ledger.HEAD_NAME):
        (tmp_path / name).unlink()
    with pytest.raises(LedgerDamagedError, match="the checkpoint of round 4"):
        simulate(noisy, clients, tmp_path)
    with pytest.raises(InvalidArgumentError, match="give run_dir"):
        simulate(noisy, clients, None)
    with pytest.raises(InvalidArgumentError, match="checkpoint_every=0"):
        simulate(noisy, clients, tmp_path, checkpoint_every=0)


class InPasses:
    """Cohorts of 5 of 10 clients, one half after the other."""

    name, num_clients, clients_per_round = "in passes", 10, 4

    def __init__(self):
        self.next = 0
        self.drawn = []

    def event(self, **mechanism):
        return Event.shuffled(count=1, passes=int(self.next % 5 == 0), unit="client", population=10, **mechanism)

    def draw(self):
        members = np.arange(2) + 2 * (self.next % 5)
        self.next += 1
        self.drawn.append(members.tolist())
        return members

    def position(self):
        return {"next": self.next}

    def go_on_from(self, position, *, released_since=None):
        self.next = position["next"] + released_since


def test_cohorts_go_on_where_they_were_and_know_what_was_released_since(
    noisy, clients, tmp_path, monkeypatch, break_in_round
):
    break_in_round(noisy, 4)
    with pytest.raises(RuntimeError, match="power"):
        simulate(noisy, clients, tmp_path, cohorts=InPasses())
    monkeypatch.undo()
    cohorts = InPasses()
    simulate(noisy, clients, tmp_path, cohorts=cohorts)
    assert cohorts.drawn == [[8, 9], [0, 1]]  # who was in rounds 3 and 4 of this pass is not in it again
    (event,) = ledger.read(tmp_path).events
    assert (event.count, event.participations) == (6, 2)
    longer = InPasses()
    simulate(noisy, clients, tmp_path, cohorts=longer, rounds=6)
    assert longer.drawn == [[2, 3], [4, 5]]
    (event,) = ledger.read(tmp_path).events
    assert (event.count, event.participations) == (8, 2)


def test_any_position_of_the_ledger_is_known_again(tmp_path):
    positions = []
    with ledger.Ledger.open(tmp_path) as book:
        for _ in range(3):
            book.reserve(Event.unknown(count=1, noise_multiplier=1.0))
            positions.append(book.position())
    assert all(ledger.holds(tmp_path, position) for position in positions)
    shutil.copytree(tmp_path, tmp_path / "copy")
    lines = (tmp_path / "copy" / ledger.FILE_NAME).read_bytes().splitlines(keepends=True)
    (tmp_path / "copy" / ledger.FILE_NAME).write_bytes(b"".join(lines[:-1]))
    assert [ledger.holds(tmp_path / "copy", position) for position in positions] == [True, True, False]
    assert not ledger.holds(tmp_path, dataclasses.replace(positions[1], last_hash="0" * 64))


@pytest.mark.slow
def test_kill_9_at_any_moment_counts_every_round_and_the_run_ends(tff, tmp_path):
    for moment in ("client", "save"):
        program = subprocess.run(
            [sys.executable, str(PROGRAM), str(tmp_path), moment],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert program.returncode == -signal.SIGKILL, program.stderr
        assert saved(tmp_path)[:2] == ["round_2", "round_4"]
    assert released(tmp_path) == 5 + 2  # rounds 1 to 5, then 5 and 6 once more
    assert len(list((tmp_path / "checkpoints").glob("round_6_temp*"))) == 1
    spec = importlib.util.spec_from_file_location("killed_run", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.run(tmp_path)
    assert released(tmp_path) == 5 + 2 + 3
    assert [entry["round"] for entry in result.history] == [2, 4, 6, 7]
    assert saved(tmp_path) == ["round_4", "round_6", "round_7"]
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["2", "4", "6", "6", "7"]
    epsilons = [float(row["epsilon"]) for row in rows]
    assert epsilons == sorted(set(epsilons)) and epsilons[-1] == result.epsilon


def test_releases_of_clients_and_of_the_server_are_told_apart():
    from federated import _run

    with ledger.Ledger.in_memory(delta=DELTA) as book:
        for event in (
            Event.unknown(count=100, noise_multiplier=1.0, unit="client"),
            Event.local(count=3, noise_multiplier=1.0),
        ):
            book.reserve(event)
        assert _run.releases(book) == (3, 100)
