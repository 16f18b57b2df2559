"""The folder of a run on a disk that is full: what is said, what is counted, and that the run goes on from where it was."""

import contextlib
import errno
import json
import os
import pathlib
import types

import numpy as np
import pytest

from tfprivacy_ft import datasets, ledger, models
from tfprivacy_ft.compute_epsilon import compute_epsilon
from tfprivacy_ft.errors import CheckpointError, DatasetError, LedgerError, PrivacyError
from tfprivacy_ft.finetune import Head, features, finetune, training
from tfprivacy_ft.finetune.checkpoints import CHECKPOINT_NAME, Checkpoint, RunFolder
from tfprivacy_ft.ledger import Position
from tfprivacy_ft.moving_clip import Adaptive

EPOCHS = 6  # of one step each
START = 0.1  # of the clip


@contextlib.contextmanager
def full_disk(name, when):
    """No room for files whose names begin like this, once `when()` is true."""
    sync = os.fsync

    def fsync(descriptor):
        if pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(name) and when():
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run that finds the disk full at each of its files, one after the other, and goes on each time."""
    folder = tmp_path_factory.mktemp("full")
    told = types.SimpleNamespace(folder=folder / "run", cache=folder / "cache", failures={}, optimizers=[], restored=[])
    data, backbone = datasets.load("breast_cancer"), models.build_model("mlp", (30,), 5, hidden_units=(4,))
    recipe = Head(epochs=EPOCHS, batch_size=455, clipping=Adaptive(learning_rate=1.0), cache=told.cache)
    make, restore = training._optimizer, training._restore

    def remembered(*arguments):
        told.optimizers.append(make(*arguments))
        return told.optimizers[-1]

    def looked_at(model, average, checkpoint):
        restore(model, average, checkpoint)
        told.restored.append((checkpoint.moving_clip, model.optimizer.l2_norm_clip))

    def run(**more):
        return finetune(
            backbone, data.x_train, data.y_train, recipe=recipe, num_classes=2, target_epsilon=3.0, delta=1e-4, verbose=0,
            run_dir=told.folder, **more,
        )  # fmt: skip

    there = {name: told.folder / name for name in (CHECKPOINT_NAME, "stage_1.npz")}
    fillings = {
        "features of": ("features-", lambda: True),
        "the run's beginning": ("run.json", lambda: True),
        "checkpoint": (CHECKPOINT_NAME, lambda: True),
        "ledger": (ledger.FILE_NAME, there[CHECKPOINT_NAME].exists),
        "stage": ("stage_1.npz", lambda: True),
        "the run's end": ("run.json", there["stage_1.npz"].exists),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_optimizer", remembered)
        patch.setattr(training, "_restore", looked_at)
        for number, (kind, filling) in enumerate(fillings.items()):
            with full_disk(*filling), pytest.raises(PrivacyError) as raised:
                run(resume=number > 0)
            told.failures[kind] = (raised.value, json.loads((told.folder / "run.json").read_text()))
        told.result = run(resume=True)
    return told


@pytest.mark.parametrize(
    ("kind", "error", "is_written_down"),
    [
        ("features of", DatasetError, True),
        ("the run's beginning", CheckpointError, False),
        ("checkpoint", CheckpointError, True),
        ("ledger", LedgerError, True),
        ("stage", CheckpointError, True),
        ("the run's end", CheckpointError, False),
    ],
)
def test_a_full_disk_is_one_sentence_and_the_folder_keeps_it(story, kind, error, is_written_down):
    raised, facts = story.failures[kind]
    assert type(raised) is error and "No space left on device" in str(raised) and "\n" not in str(raised)
    if is_written_down:
        assert (facts["state"], facts["sentence"]) == ("failed", str(raised))


def test_each_step_that_ran_counts_and_the_run_ends_once_there_is_room(story):
    ran = sum(optimizer.privacy_steps for optimizer in story.optimizers)
    means, steps = ledger.read(story.folder).events
    assert means.count == 2  # the mean of the features that no checkpoint could hold was released once more
    counted = steps.count
    # Whoever ran without a checkpoint ran again, and what was reserved where the ledger had no room may count, too.
    assert 5 <= ran <= counted <= ran + 1
    assert story.result.finished and story.result.epsilon == compute_epsilon(story.folder).epsilon <= 3.0
    assert [entry["epoch"] for entry in story.result.history] == list(range(1, len(story.result.history) + 1))
    assert json.loads((story.folder / "run.json").read_text())["state"] == "finished"


def test_nothing_is_left_that_was_not_finished(story):
    assert not [*story.folder.glob("*.new"), *story.cache.glob("*.new")]
    assert len(list(story.cache.iterdir())) == 1  # found again each time


def test_a_clip_that_moves_goes_on_from_where_it_was_under_the_same_noise(story):
    assert story.restored and all(kept == put_back != START for kept, put_back in story.restored)
    moving = [optimizer.mechanism.moving_clip for optimizer in story.optimizers]
    assert len({(each.noise_multiplier, each.count_stddev) for each in moving}) == 1
    assert len(ledger.read(story.folder).events) == 2  # the mean of the features; and all steps alike


def test_files_of_arrays_are_whole_or_not_there_on_a_disk_without_room(tmp_path):
    folder = RunFolder(tmp_path, resume=False)
    checkpoint = Checkpoint(0, 1, [], Position(), [np.zeros([50, 50])], [np.zeros(3)], {})
    folder.save(checkpoint)
    before = (tmp_path / CHECKPOINT_NAME).read_bytes()
    (tmp_path / f"{CHECKPOINT_NAME}.new").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"No space left on device.*go on with resume=True"):
        folder.save(checkpoint)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(CHECKPOINT_NAME, before)]


def test_features_without_room_leave_nothing(tmp_path):
    model, x = models.build_model("logistic", (4,), 3), np.ones([20_000, 4], np.float32)
    features.compute(model, x[:9], cache=tmp_path / "there")
    (file,) = (tmp_path / "there").iterdir()
    cache = tmp_path / "full"
    cache.mkdir()
    (cache / f"{file.stem}.{os.getpid()}.new").symlink_to("/dev/full")
    with pytest.raises(DatasetError, match=r"No space left on device.*a folder with room"):
        features.compute(model, x[:9], cache=cache)
    assert not list(cache.iterdir())
