import itertools

import numpy as np
import pytest
import tensorflow as tf

from federated.packing import Packer
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError


def packer(**changes):
    options = {
        "x_spec": tf.TensorSpec([2], tf.float32),
        "y_spec": tf.TensorSpec([], tf.int32),
        "batch_size": 4,
        "local_epochs": 2,
        "shards": 2,
        "clients_at_once": 3,
    }
    return Packer(**{**options, **changes})


def client(number, size):
    return np.full((size, 2), number, np.float32), np.arange(size, dtype=np.int32)


def unpack(shards):
    """Each client's batches of labels, by the client's number."""
    found = {}
    for x, y, rows, *_ in shards:
        for of_client in rows.reshape(-1, *rows.shape[2:]):
            steps = [step[step >= 0] for step in of_client]
            steps = [step for step in steps if len(step)]
            if steps:
                numbers = np.unique(x[np.concatenate(steps)])
                assert len(numbers) == 1  # nobody takes a row of another client
                padding = of_client[of_client < 0]
                assert np.all(x[-padding - 1] == numbers[0])
                found[int(numbers[0])] = [y[step].tolist() for step in steps]
    return found


@pytest.mark.parametrize("clients_at_once", [1, 2, 100])
@pytest.mark.parametrize("shards", [1, 3])
def test_each_client_gets_its_own_rows_in_every_pass(clients_at_once, shards):
    sizes = {1: 1, 2: 9, 3: 4, 4: 5, 5: 13}
    datasets = packer(shards=shards, clients_at_once=clients_at_once).pack([client(i, n) for i, n in sizes.items()])
    assert len(datasets) == shards
    found = unpack(datasets)
    for number, size in sizes.items():
        steps = found[number]
        assert [len(step) for step in steps] == 2 * ([4] * (size // 4) + ([size % 4] if size % 4 else []))
        half = len(steps) // 2
        for one_pass in (steps[:half], steps[half:]):
            assert sorted(row for step in one_pass for row in step) == list(range(size))


def test_data_sets_keep_their_batches():
    x, y = client(7, 10)
    found = unpack(packer().pack([tf.data.Dataset.from_tensor_slices((x, y)).batch(3), client(8, 2)]))
    assert found[7] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


@pytest.mark.parametrize("clients", [[], [client(1, 5)]])
def test_every_cohort_gives_the_same_number_of_shards(clients):
    assert len(packer(shards=5).pack(clients)) == 5


def test_labels_of_rank_one_fit_a_model_with_one_output():
    shards = packer(y_spec=tf.TensorSpec([1], tf.float32)).pack([client(1, 3)])
    assert shards[0].y.shape == (3, 1)


def test_what_only_fills_up_a_group_counts_for_nothing_and_each_group_has_its_own_key():
    first, second = packer(by_examples=True, with_noise=True).pack([client(i, n) for i, n in enumerate([5, 1, 9])])
    assert sorted(np.concatenate([first.weights, second.weights]).ravel()) == [0.0, 1.0, 5.0, 9.0]
    keys = np.concatenate([first.noise_keys, second.noise_keys])
    assert len(np.unique(keys)) == keys.size == 6
    (quiet, _) = packer().pack([client(1, 5)])
    assert not quiet.noise_keys.any() and quiet.weights.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ((np.zeros((3, 5)), np.zeros(3, int)), r"x of a client has shape \(3, 5\)"),
        ((np.zeros((3, 2)), np.zeros(4, int)), "3 examples and 4 labels"),
        ((np.zeros((0, 2)), np.zeros(0, int)), "no examples"),
        ((np.zeros((3, 2)), np.zeros(3, float)), "y of a client is float64"),
        ((np.array([["a", "b"]]), np.zeros(1, int)), "x of a client is <U1"),
        (tf.data.Dataset.from_tensor_slices(client(1, 4)).batch(2).take(0), "no examples"),
    ],
)
def test_bad_clients_are_refused_by_what_is_wrong(bad, says):
    with pytest.raises(DatasetError, match=says):
        packer().pack([client(1, 3), bad])


@pytest.mark.parametrize("labels", [[0, 1, 3], [-1, 0, 1]])
def test_labels_that_the_model_has_no_output_for_are_refused_and_not_shown(labels):
    with pytest.raises(DatasetError, match=r"labels other than the whole numbers from 0 to 2:"):
        packer(num_labels=3).pack([(np.zeros((3, 2)), np.array(labels))])


@pytest.mark.parametrize("bad", [client(1, 3), 7])
def test_a_cohort_that_is_no_list_of_clients_is_refused(bad):
    with pytest.raises(InvalidArgumentError):
        packer().pack([bad] if bad == 7 else {"x": bad})


def test_cohorts_of_many_sizes_come_in_few_shapes_and_hold_the_same_rows():
    few, shapes = packer(few_shapes=True, clients_at_once=64, num_labels=99), set()
    for number in range(40, 81):
        shards = few.pack([client(i, 9) for i in range(number)])
        shapes |= {tuple(part.shape for part in shard) for shard in shards}
        found = unpack(shards)
        assert sorted(found) == list(range(number))
        assert all(sorted(itertools.chain(*steps)) == sorted(2 * list(range(9))) for steps in found.values())
        assert sum(float(shard.weights.sum()) for shard in shards) == number
    assert len(shapes) < 10
    assert {part.shape[0] for part in few.pack([])[0]} == {1}


def test_each_pass_goes_through_a_client_in_an_order_of_its_own_and_every_order_comes_up():
    found = unpack(packer(batch_size=1, local_epochs=300, shards=1).pack([client(1, 3)]))[1]
    passes = [tuple(row for step in found[i : i + 3] for row in step) for i in range(0, 900, 3)]
    counts = [passes.count(order) for order in set(passes)]
    # 300 draws from 6 orders: fewer than 12 or more than 100 of one comes up with probability below 1e-9.
    assert len(counts) == 6 and min(counts) >= 12 and max(counts) <= 100
