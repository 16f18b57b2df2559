import math

import numpy as np
import pytest

import federated
from federated.clients import sampling_probability
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError

X = np.arange(60, dtype=np.float32).reshape(30, 2)
Y = np.arange(30) % 3


def owned(clients):
    return np.sort(np.concatenate(clients.rows)).tolist()


def test_split_by_owner_keeps_each_owner_together():
    owners = np.array(["c", "a", "b", "a", "c"])
    clients = federated.split_by_owner(X[:5], Y[:5], owners)
    assert clients.names == ("a", "b", "c")
    for name, (x, y) in zip(clients.names, clients, strict=True):
        np.testing.assert_array_equal(x, X[:5][owners == name])
        np.testing.assert_array_equal(y, Y[:5][owners == name])


def test_split_evenly_gives_every_example_to_one_client():
    clients = federated.split_evenly(X, Y, num_clients=7, seed=1)
    sizes = [len(rows) for rows in clients.rows]
    assert owned(clients) == list(range(30)) and max(sizes) - min(sizes) <= 1
    again = federated.split_evenly(X, Y, num_clients=7, seed=1)
    assert all((a == b).all() for a, b in zip(clients.rows, again.rows, strict=True))


@pytest.mark.parametrize("concentration", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("seed", range(5))
def test_label_skew_loses_nothing_and_leaves_no_client_empty(concentration, seed):
    clients = federated.split_by_label_skew(X, Y, num_clients=25, concentration=concentration, seed=seed)
    assert owned(clients) == list(range(30)) and min(len(rows) for rows in clients.rows) >= 1


def test_a_smaller_concentration_is_more_skewed():
    y = np.arange(3000) % 10

    def purity(concentration):
        clients = federated.split_by_label_skew(y, y, num_clients=20, concentration=concentration, seed=0)
        return np.mean([np.bincount(labels).max() / len(labels) for _, labels in clients])

    assert purity(0.1) > 0.4 > 0.2 > purity(1000.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: federated.split_by_owner(X, Y[:-1], Y), "x has 30, y has 29"),
        (lambda: federated.split_by_owner(X, Y, Y[:-1]), "owners has 29"),
        (lambda: federated.split_by_owner(X, Y, X), "owners has shape"),
        (lambda: federated.split_by_owner(X[:0], Y[:0], Y[:0]), "no examples"),
        (lambda: federated.split_evenly(X, Y, num_clients=31, seed=0), "more than the 30 examples"),
        (lambda: federated.split_by_label_skew(X, X, num_clients=3, concentration=1.0, seed=0), "y has shape"),
        (lambda: federated.ClientData(X, Y, (), ()), "no clients"),
        (lambda: federated.ClientData(X, Y, (np.array([1]), np.array([], int)), ("a", "b")), "client 'b' has no"),
        (lambda: federated.ClientData(X, Y, (np.array([1]), np.array([1])), ("a", "b")), "belongs to two clients"),
        (lambda: federated.ClientData(X, Y, (np.array([30]),), ("a",)), "between 0 and 29"),
        (lambda: federated.ClientData(X, Y, (np.array([1]),), ("a", "b")), "2 names for 1"),
    ],
)
def test_bad_data_is_refused_by_name(call, says):
    with pytest.raises(DatasetError, match=says):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: federated.split_evenly(X, Y, num_clients=0, seed=0),
        lambda: federated.split_by_label_skew(X, Y, num_clients=3, concentration=0.0, seed=0),
        lambda: federated.poisson_cohort(10, 0.0),
        lambda: federated.poisson_cohort(10, 1.5),
        lambda: federated.poisson_cohort(0, 0.5),
        lambda: sampling_probability(10, 11),
        lambda: sampling_probability(10, 0),
        lambda: sampling_probability(10, math.nan),
    ],
)
def test_bad_arguments_are_refused(call):
    with pytest.raises(InvalidArgumentError):
        call()


def test_poisson_cohorts_take_each_client_with_the_same_probability():
    # 2000 draws of 50 clients at q = 0.3. A count leaves 0.3 * 2000 +- 130 with probability 2 exp(-2 * 130^2 / 2000),
    # below 1e-7 (Hoeffding); the sizes have a variance of 10.5, and of 0 if cohorts were of a fixed size.
    draws = [federated.poisson_cohort(50, 0.3) for _ in range(2000)]
    counts = np.bincount(np.concatenate(draws), minlength=50)
    assert np.abs(counts - 600).max() < 145  # 50 clients: below 1e-6 in all
    assert np.var([len(draw) for draw in draws]) > 5


def test_cohorts_do_not_follow_numpys_seed():
    np.random.seed(0)
    first = federated.poisson_cohort(1000, 0.5)
    np.random.seed(0)
    assert first.tolist() != federated.poisson_cohort(1000, 0.5).tolist()
