import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from tfprivacy_ft import ledger
from tfprivacy_ft.errors import InvalidArgumentError, LedgerDamagedError, LedgerError, LedgerLockedError
from tfprivacy_ft.events import Event
from tfprivacy_ft.ledger import EVALUATION, FILE_NAME, HEAD_NAME, Ledger, Note, Trained, read

STEPS = Event.poisson(count=10, noise_multiplier=1.1, sampling_probability=0.01, population=1000)
UNKNOWN = Event.unknown(count=10, noise_multiplier=1.1)


def steps_in(source):
    events = source.events() if isinstance(source, Ledger) else source.events
    return sum(event.count for event in events)


def write(folder, blocks):
    with Ledger.open(folder, delta=1e-5) as book:
        for _ in range(blocks):
            book.reserve(STEPS)


def files(folder):
    return folder / FILE_NAME, folder / HEAD_NAME


@pytest.fixture(params=["on disk", "in memory"])
def book(request, tmp_path):
    with Ledger.in_memory() if request.param == "in memory" else Ledger.open(tmp_path / "run") as opened:
        yield opened


# What is recorded.


def test_reservations_count_in_full_until_they_are_settled(book):
    first, second = book.reserve(STEPS), book.reserve(STEPS)
    assert steps_in(book) == 20
    book.settle([first], STEPS.with_count(4))
    assert book.events() == [STEPS.with_count(14)]
    book.settle([second], None)
    assert book.events() == [STEPS.with_count(4)]


def test_several_blocks_may_be_settled_as_one_pass(book):
    numbers = [book.reserve(UNKNOWN) for _ in range(3)]
    ran = Event.shuffled(count=25, passes=1, noise_multiplier=1.1)
    book.settle(numbers, ran)
    book.settle([book.reserve(UNKNOWN)], Event.shuffled(count=10, passes=1, noise_multiplier=1.1))
    assert book.events() == [Event.shuffled(count=35, passes=2, noise_multiplier=1.1)]


def test_nothing_that_ran_no_time_is_listed(book):
    book.settle([book.reserve(STEPS)], STEPS.with_count(0))
    book.reserve(STEPS.with_count(0))
    assert book.events() == []


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (STEPS.with_count(11), "count"),
        (Event.poisson(count=1, noise_multiplier=1.2, sampling_probability=0.01, population=1000), "noise_multiplier"),
        (Event.poisson(count=1, noise_multiplier=1.1, sampling_probability=0.001, population=1000), "sampler"),
        (Event.fixed(count=1, noise_multiplier=1.1, cohort_size=1, population=1000, unit="example"), "sampler"),
        (Event.unknown(count=1, noise_multiplier=1.1, unit="client"), "unit"),
        (Event.unknown(count=1, noise_multiplier=1.1, mechanism="laplace"), "mechanism"),
        (Event.tree(trees=1, leaves_per_tree=1, noise_multiplier=1.1), "leaves_per_tree"),
        ("an event", "event"),
    ],
)
def test_what_was_not_reserved_cannot_be_settled(book, event, name):
    number = book.reserve(STEPS)
    with pytest.raises(InvalidArgumentError, match=name):
        book.settle([number], event)
    assert steps_in(book) == 10


def test_more_passes_than_reserved_cannot_be_settled(book):
    number = book.reserve(Event.shuffled(count=10, passes=1, noise_multiplier=1.1))
    with pytest.raises(InvalidArgumentError, match="participations"):
        book.settle([number], Event.shuffled(count=10, passes=2, noise_multiplier=1.1))


def test_a_reservation_is_settled_once(book):
    number = book.reserve(STEPS)
    for numbers in ([number, number], [number + 1], [], ["first"], [number, None]):
        with pytest.raises(InvalidArgumentError, match="reservations"):
            book.settle(numbers, None)
    book.settle([number], None)
    with pytest.raises(InvalidArgumentError, match="reservations"):
        book.settle([number], None)


def test_only_events_are_reserved(book):
    with pytest.raises(InvalidArgumentError, match="event"):
        book.reserve({"count": 1})


def test_a_note_is_kept_once(book):
    for _ in range(3):
        book.note("training metrics", "loss and accuracy in clear")
    book.note("training metrics", "something else")
    assert book.notes() == [
        Note("training metrics", "loss and accuracy in clear"),
        Note("training metrics", "something else"),
    ]


def test_figures_go_with_what_was_released_by_then(tmp_path):
    with Ledger.open(tmp_path) as book:
        for value in (0.5, np.float32(0.75)):
            book.settle([book.reserve(STEPS)], STEPS)
            book.figures({"accuracy": value, "lost": float("inf")})
        with pytest.raises(InvalidArgumentError, match=r"figures\['accuracy'\]='good' is not allowed: give a number."):
            book.figures({"accuracy": "good"})
    contents = read(tmp_path)
    looks = [(moment.events, moment.figures) for moment in contents.history if moment.figures]
    assert looks == [((STEPS,), {"accuracy": 0.5}), ((STEPS.with_count(20),), {"accuracy": 0.75})]
    assert [len(moment.events) for moment in contents.history] == [1, 1, 1, 1]
    assert contents.notes == (EVALUATION,)
    assert contents.software["python"] and contents.records == 8


def test_a_ledger_in_memory_moves_to_a_folder_with_its_whole_way(tmp_path):
    write(tmp_path, 1)
    book = Ledger.in_memory(delta=1e-4, facts={"model": "cnn"})
    book.note("metrics", "shown")
    for value in (0.5, 0.75):
        book.settle([book.reserve(STEPS), book.reserve(STEPS)], STEPS.with_count(12))
        book.figures({"accuracy": value})
    book.trained(Trained(("head",), 10))
    book.reserve(UNKNOWN)
    with book.moved_to(tmp_path) as moved:
        assert steps_in(moved) == 10 + 24 + 10
        assert moved.notes() == book.notes() and moved.delta == 1e-4
        with pytest.raises(LedgerError, match="closed"):
            book.reserve(STEPS)
        with pytest.raises(LedgerError, match="on the disk already"):
            moved.moved_to(tmp_path / "other")
    contents = read(tmp_path)
    looks = [(steps_in(moment), moment.figures["accuracy"]) for moment in contents.history if moment.figures]
    assert looks == [(22, 0.5), (34, 0.75)]
    assert contents.trained == (Trained(("head",), 10),) and contents.unsettled == 2


def test_what_was_trained_is_kept_as_often_as_it_changes(tmp_path):
    head, everything = Trained(("head",), 10), Trained(("body", "head"), 1000)
    with Ledger.open(tmp_path) as book:
        for what in (head, head, everything, everything, head):
            book.trained(what)
    assert read(tmp_path).trained == (head, everything, head)


def test_threads_share_a_ledger(book):
    threads = [threading.Thread(target=lambda: [book.reserve(STEPS) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps_in(book) == 200


def test_delta_and_facts_are_kept_and_added_to(tmp_path):
    with Ledger.open(tmp_path / "a" / "run", delta=1e-5, facts={"model": "cnn"}) as book:
        assert (book.delta, book.facts) == (1e-5, {"model": "cnn"})
        assert book.path == tmp_path / "a" / "run" / FILE_NAME
    with Ledger.open(tmp_path / "a" / "run", facts={"data": "mnist"}) as book:
        assert (book.delta, book.facts) == (1e-5, {"model": "cnn", "data": "mnist"})
    contents = read(tmp_path / "a" / "run")
    assert (contents.delta, contents.openings, contents.unsettled) == (1e-5, 2, 0)


@pytest.mark.parametrize("delta", [0, 1, 2.0, float("nan")])
def test_delta_outside_its_range_is_refused_before_anything_is_written(tmp_path, delta):
    with pytest.raises(InvalidArgumentError, match="delta"):
        Ledger.open(tmp_path / "run", delta=delta)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("facts", [{"x": object()}, {"x": float("inf")}, {(1, 2): 3}])
def test_facts_have_to_be_json(tmp_path, facts):
    with pytest.raises(InvalidArgumentError, match="facts"):
        Ledger.open(tmp_path, facts=facts)


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    np = pytest.importorskip("numpy")
    with Ledger.open(tmp_path, facts={"n": np.int64(3), "x": np.float32(0.5)}) as book:
        book.reserve(Event.unknown(count=np.int64(10), noise_multiplier=np.float32(0.5)))
    assert read(tmp_path).facts == {"n": 3, "x": 0.5}
    assert read(tmp_path).events == (Event.unknown(count=10, noise_multiplier=0.5),)


def test_records_can_be_read_by_people(tmp_path):
    write(tmp_path, 1)
    opened, reserved = (json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines())
    assert [opened["kind"], reserved["kind"]] == ["open", "reserve"]
    assert [opened["sequence"], reserved["sequence"]] == [1, 2]
    assert opened["format"] == ledger.FORMAT_VERSION and opened["time"].endswith("+00:00")
    assert {"python", "tfprivacy-ft"} <= opened["software"].keys()
    assert Event(**reserved["event"]) == STEPS


# Continuing and reading.


def test_a_continued_ledger_counts_everything(tmp_path):
    write(tmp_path, 2)
    write(tmp_path, 3)
    assert steps_in(read(tmp_path)) == steps_in(read(tmp_path / FILE_NAME)) == 50


def test_a_later_run_may_settle_an_old_reservation(tmp_path):
    with Ledger.open(tmp_path) as book:
        number = book.reserve(STEPS)
    with Ledger.open(tmp_path) as book:
        book.settle([number], STEPS.with_count(3))
    assert steps_in(read(tmp_path)) == 3


def test_a_running_ledger_can_be_read(tmp_path):
    with Ledger.open(tmp_path) as book:
        book.reserve(STEPS)
        assert steps_in(read(tmp_path)) == 10


def test_reading_beside_a_fast_writer_is_never_taken_for_damage(tmp_path):
    stop = threading.Event()

    def keep_writing():
        with Ledger.open(tmp_path) as book:
            while not stop.is_set():
                book.reserve(STEPS)

    with Ledger.open(tmp_path) as book:
        book.reserve(STEPS)
    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        seen = [steps_in(read(tmp_path)) for _ in range(30)]
    finally:
        stop.set()
        writer.join()
    assert seen == sorted(seen) and seen[0] >= 10


def test_a_writer_between_head_and_ledger_is_waited_for(tmp_path, monkeypatch):
    write(tmp_path, 1)
    real, late = ledger._read_bytes, [2]

    def overtaken(file):
        data = real(file)
        if file.name == HEAD_NAME and late:
            monkeypatch.setattr(ledger, "_read_bytes", real)
            write(tmp_path, late.pop())
            monkeypatch.setattr(ledger, "_read_bytes", overtaken)
        return data

    monkeypatch.setattr(ledger, "_read_bytes", overtaken)
    assert steps_in(read(tmp_path)) == 30


def test_no_ledger_is_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", str(tmp_path / "nowhere" / FILE_NAME)):
        with pytest.raises(LedgerError, match="no ledger") as caught:
            read(path)
        assert not isinstance(caught.value, LedgerDamagedError)


def test_a_folder_that_cannot_be_made_is_a_ledger_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger.open(tmp_path / "file" / "run")


def test_a_second_writer_is_refused(tmp_path):
    with Ledger.open(tmp_path) as book:
        with pytest.raises(LedgerLockedError, match="another run"):
            Ledger.open(tmp_path)
        book.reserve(STEPS)
    write(tmp_path, 1)
    assert steps_in(read(tmp_path)) == 20


def test_a_second_process_is_refused(tmp_path):
    code = f"from tfprivacy_ft.ledger import Ledger; Ledger.open({str(tmp_path)!r})"
    with Ledger.open(tmp_path):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0 and "LedgerLockedError" in result.stderr


def test_a_closed_ledger_takes_nothing(tmp_path):
    for book in (Ledger.open(tmp_path), Ledger.in_memory()):
        book.close()
        book.close()
        with pytest.raises(LedgerError, match="closed"):
            book.reserve(STEPS)


def test_a_forked_child_may_not_write(tmp_path):
    with Ledger.open(tmp_path) as book:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                book.reserve(STEPS)
            except LedgerError:
                code = 0
            finally:
                book.close()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        book.reserve(STEPS)
        with pytest.raises(LedgerLockedError):
            Ledger.open(tmp_path)
    assert steps_in(read(tmp_path)) == 10


# Damage.


def refused(folder, match):
    """Neither readers nor writers accept the ledger, and nobody touches it."""
    before = [file.read_bytes() if file.exists() else None for file in files(folder)]
    with pytest.raises(LedgerDamagedError, match=match):
        read(folder)
    with pytest.raises(LedgerDamagedError, match=match):
        Ledger.open(folder)
    after = [file.read_bytes() if file.exists() else None for file in files(folder)]
    assert [one or None for one in after] == [one or None for one in before]


def test_a_cut_anywhere_in_the_last_record_is_found(tmp_path):
    write(tmp_path, 2)
    file, _ = files(tmp_path)
    data = file.read_bytes()
    last = len(data) - len(data.splitlines(keepends=True)[-1])
    for length in range(last, len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(LedgerDamagedError, match=f"{FILE_NAME}.* record 3"):
            read(tmp_path)
    refused(tmp_path, "record 3")


def test_records_cut_off_whole_are_found(tmp_path):
    write(tmp_path, 3)
    file, _ = files(tmp_path)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))
    refused(tmp_path, f"record 3.*{HEAD_NAME} says that there were 4")


def test_an_empty_or_missing_file_is_found(tmp_path):
    write(tmp_path, 1)
    file, _ = files(tmp_path)
    file.write_bytes(b"")
    refused(tmp_path, "record 1")
    file.unlink()
    with pytest.raises(LedgerDamagedError, match="record 1"):
        read(tmp_path)


def test_any_flipped_bit_is_found(tmp_path):
    write(tmp_path, 2)
    for file in files(tmp_path):
        data = file.read_bytes()
        for place in range(0, len(data), 7):
            damaged = bytearray(data)
            damaged[place] ^= 1 << (place % 8)
            file.write_bytes(damaged)
            with pytest.raises(LedgerDamagedError):
                read(tmp_path)
        file.write_bytes(data)
    assert steps_in(read(tmp_path)) == 20


def test_a_ledger_of_a_newer_version_is_not_called_damaged(tmp_path):
    write(tmp_path, 2)
    for file in files(tmp_path):
        file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(LedgerError, match=r"newer version of this package \(format 3") as caught:
        read(tmp_path)
    assert not isinstance(caught.value, LedgerDamagedError)


def test_a_ledger_of_the_first_format_is_read_and_continued(tmp_path):
    lines, last = [], "0" * 64
    event = {name: value for name, value in STEPS.to_dict().items() if name not in ("mechanism", "leaves_per_tree")}
    bodies = [
        {"kind": "open", "delta": 1e-5, "facts": {}, "software": {"python": "3.11"}, "dropped_bytes": 0},
        {"kind": "reserve", "event": event},
    ]
    for number, body in enumerate(bodies, start=1):
        record = {"format": 1, "sequence": number, "time": "2026-01-01T00:00:00+00:00", **body, "previous": last}
        lines.append(json.dumps(record).encode() + b"\n")
        last = ledger._hash(lines[-1])
    file, head = files(tmp_path)
    file.write_bytes(b"".join(lines))
    head.write_text(json.dumps({"format": 1, "records": 2, "hash": last}))
    assert read(tmp_path).events == (STEPS,)
    write(tmp_path, 1)
    assert read(tmp_path).events == (STEPS.with_count(20),)


def test_a_move_that_fails_half_way_can_be_tried_again(tmp_path, monkeypatch):
    book = Ledger.in_memory(delta=1e-4)
    book.settle([book.reserve(STEPS)], STEPS)
    append, seen = ledger._Journal.append, []

    def full(journal, line):
        seen.append(line)
        if len(seen) == 3:
            raise OSError(28, "no space left on device")
        append(journal, line)

    monkeypatch.setattr(ledger._Journal, "append", full)
    with pytest.raises(LedgerError, match="no space left"):
        book.moved_to(tmp_path)
    with book.moved_to(tmp_path) as moved:
        assert steps_in(moved) == 20  # what was written at the first try counts too


def test_an_edited_record_is_named(tmp_path):
    write(tmp_path, 3)
    file, _ = files(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"0.01", b"0.02")
    file.write_bytes(b"".join(lines))
    refused(tmp_path, "record 3: it does not carry the hash")


def test_an_edited_last_record_is_found_by_the_head(tmp_path):
    write(tmp_path, 1)
    file, _ = files(tmp_path)
    file.write_bytes(file.read_bytes().replace(b"0.01", b"0.02"))
    refused(tmp_path, "record 2: its hash")


def test_a_missing_head_is_found(tmp_path):
    write(tmp_path, 1)
    files(tmp_path)[1].unlink()
    refused(tmp_path, f"{HEAD_NAME} is missing")


def test_a_head_older_than_two_records_is_found(tmp_path):
    write(tmp_path, 1)
    old = files(tmp_path)[1].read_bytes()
    write(tmp_path, 2)
    files(tmp_path)[1].write_bytes(old)
    refused(tmp_path, "there were only 2 records")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"kind": "reserve"', b'"kind": "reward!"'),
        (b'"sampling_probability"', b'"sampling_percentage"'),
        (b'"noise_multiplier": 1.1', b'"noise_multiplier": "x"'),
        (b'"format": 2', b'"format": 3'),
        (b'"event": {', b'"events": {'),
    ],
)
def test_a_record_that_makes_no_sense_is_damage_even_with_the_right_hashes(tmp_path, old, new):
    write(tmp_path, 1)
    file, head = files(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(old, new)
    file.write_bytes(b"".join(lines))
    head.write_text(json.dumps({"format": 1, "records": 2, "hash": ledger._hash(lines[1])}))
    refused(tmp_path, "record 2")


# Crashes.


def test_a_record_written_in_part_never_ran_and_is_dropped(tmp_path):
    write(tmp_path, 2)
    file, head = files(tmp_path)
    data, counted = file.read_bytes(), head.read_bytes()
    write(tmp_path, 0)
    grown = file.read_bytes()
    for length in range(len(data), len(grown)):
        file.write_bytes(grown[:length])
        head.write_bytes(counted)
        assert steps_in(read(tmp_path)) == 20
        if length % 10 == 0:
            with Ledger.open(tmp_path) as book:
                assert steps_in(book) == 20
                book.reserve(STEPS)
            contents = read(tmp_path)
            assert (steps_in(contents), contents.openings) == (30, 2)


def test_a_whole_record_that_the_head_does_not_count_counts(tmp_path):
    with Ledger.open(tmp_path) as book:
        head = files(tmp_path)[1].read_bytes()
        book.reserve(STEPS)
    files(tmp_path)[1].write_bytes(head)
    assert steps_in(read(tmp_path)) == 10
    write(tmp_path, 1)
    assert steps_in(read(tmp_path)) == 20


def test_a_crash_before_the_first_record_leaves_a_usable_folder(tmp_path):
    files(tmp_path)[0].write_bytes(b"")
    write(tmp_path, 1)
    assert steps_in(read(tmp_path)) == 10


def test_a_garbled_record_that_the_head_does_not_count_is_dropped(tmp_path):
    write(tmp_path, 1)
    file, _ = files(tmp_path)
    for garbage in (b"\0" * 100, b'{"format": 1}\n', b"\xff\xfe\n"):
        with file.open("ab") as stream:
            stream.write(garbage)
        assert steps_in(read(tmp_path)) == 10
        write(tmp_path, 0)
    assert read(tmp_path).openings == 4


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_after_a_failed_write_no_block_may_run(tmp_path, monkeypatch, call):
    book = Ledger.open(tmp_path)
    number = book.reserve(STEPS)

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, disk_full)
        with pytest.raises(LedgerError, match="No space left"):
            book.reserve(STEPS)
    for attempt in (lambda: book.reserve(STEPS), lambda: book.settle([number], None), lambda: book.note("a", "b")):
        with pytest.raises(LedgerError, match="open it again"):
            attempt()
    book.close()
    assert 10 <= steps_in(read(tmp_path)) <= 20
    write(tmp_path, 1)
    assert 20 <= steps_in(read(tmp_path)) <= 30


def test_an_interrupted_write_is_not_written_over(tmp_path, monkeypatch):
    book = Ledger.open(tmp_path)

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            book.reserve(STEPS)
    with pytest.raises(LedgerError, match="KeyboardInterrupt"):
        book.reserve(STEPS)
    book.close()
    write(tmp_path, 1)
    assert steps_in(read(tmp_path)) in (10, 20)


def test_the_head_is_on_the_disk_before_reserve_returns(tmp_path, monkeypatch):
    calls = []
    with Ledger.open(tmp_path) as book:
        for name in ("write", "fsync", "replace"):
            real = getattr(os, name)

            def recorded(*args, name=name, real=real):
                calls.append(name)
                return real(*args)

            monkeypatch.setattr(os, name, recorded)
        book.reserve(STEPS)
        monkeypatch.undo()
    # record, on disk; head aside, on disk; renamed; the folder on disk
    assert calls == ["write", "fsync", "write", "fsync", "replace", "fsync"]


def run_code(code, *args):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *args], stdout=subprocess.PIPE, text=True)


RESERVE_FOREVER = """
    import sys
    from tfprivacy_ft.events import Event
    from tfprivacy_ft.ledger import Ledger
    event = Event.poisson(count=10, noise_multiplier=1.1, sampling_probability=0.01)
    with Ledger.open(sys.argv[1]) as book:
        while True:
            book.reserve(event)
            print("ran", flush=True)
"""


def test_kill_9_never_loses_a_block_that_ran(tmp_path):
    ran, moments = 0, random.Random(0)
    for _ in range(50):
        process = run_code(RESERVE_FOREVER, str(tmp_path))
        waited_for = moments.choice([0, 0, 1, 1, 2, 5])  # 0 may kill it while it opens the ledger, or even before
        for _ in range(waited_for):
            assert process.stdout.readline() == "ran\n"
        time.sleep(moments.uniform(0, 0.02 if waited_for else 0.4))
        process.send_signal(signal.SIGKILL)
        ran += waited_for + process.stdout.read().count("ran\n")
        process.wait()
        process.stdout.close()
        if not (tmp_path / FILE_NAME).exists():
            assert ran == 0
            continue
        blocks = steps_in(read(tmp_path)) // 10
        assert ran <= blocks <= ran + 1
        ran = blocks
    assert ran > 50


FILL_THE_DISK = """
    import resource, sys
    from tfprivacy_ft.errors import LedgerError
    from tfprivacy_ft.events import Event
    from tfprivacy_ft.ledger import Ledger
    event = Event.poisson(count=10, noise_multiplier=1.1, sampling_probability=0.01)
    book = Ledger.open(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    ran = 0
    try:
        while True:
            book.reserve(event)
            ran += 1
    except LedgerError:
        pass
    try:
        book.reserve(event)
        print("went on")
    except LedgerError:
        print(ran)
"""


@pytest.mark.parametrize("size", [2000, 2345, 3333])
def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, size):
    process = run_code(FILL_THE_DISK, str(tmp_path), str(size))
    ran = int(process.communicate()[0])
    assert 1 <= ran <= steps_in(read(tmp_path)) // 10 <= ran + 1
    write(tmp_path, 1)
    assert ran + 1 <= steps_in(read(tmp_path)) // 10 <= ran + 2


def test_what_clients_release_themselves_is_settled_as_that_alone():
    with Ledger.in_memory(delta=1e-5) as book:
        for one, other in (
            (Event.local(count=1, noise_multiplier=1.0), Event.unknown(count=1, noise_multiplier=1.0, unit="client")),
            (Event.unknown(count=1, noise_multiplier=1.0, unit="client"), Event.local(count=1, noise_multiplier=1.0)),
        ):
            number = book.reserve(one)
            with pytest.raises(InvalidArgumentError, match="settled as local"):
                book.settle([number], other)
