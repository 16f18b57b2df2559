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


@pytest.mark.parametrize("concentration", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("seed", range(5))
def test_quantity_skew_loses_nothing_and_leaves_no_client_empty(concentration, seed):
    clients = federated.split_by_quantity_skew(X, Y, num_clients=25, concentration=concentration, seed=seed)
    assert owned(clients) == list(range(30)) and min(len(rows) for rows in clients.rows) >= 1


def test_a_smaller_concentration_has_larger_clients():
    def sizes(concentration, num_clients=50):
        clients = federated.split_by_quantity_skew(
            np.arange(5000), np.arange(5000), num_clients=num_clients, concentration=concentration, seed=0
        )
        return sorted(len(rows) for rows in clients.rows)

    assert sizes(0.1)[-5:] > sizes(1.0)[-5:] > sizes(1000.0)[-5:]
    assert sum(sizes(0.1)[-5:]) > 2500 and sizes(1000.0)[-1] < 150
    assert sizes(0.1, num_clients=5000) == [1] * 5000


def test_whole_clients_are_held_out():
    clients = federated.split_by_owner(X, Y, np.arange(30) // 3)
    training, held_out = clients.split(held_out=0.2, seed=3)
    assert (len(training), len(held_out)) == (8, 2)
    assert sorted(training.names + held_out.names) == list(clients.names)
    assert sorted(owned(training) + owned(held_out)) == list(range(30))
    for name, (x, y) in zip(held_out.names, held_out, strict=True):
        np.testing.assert_array_equal(x, clients[clients.names.index(name)][0])
        np.testing.assert_array_equal(y, clients[clients.names.index(name)][1])
    assert clients.split(seed=3)[1].names == clients.split(seed=3)[1].names
    assert len({clients.split(seed=seed)[1].names for seed in range(10)}) > 1


@pytest.mark.parametrize(("share", "size"), [(0.001, 1), (0.999, 9), (0.5, 5)])
def test_there_is_somebody_on_either_side(share, size):
    training, held_out = federated.split_by_owner(X, Y, np.arange(30) // 3).split(held_out=share, seed=0)
    assert (len(training), len(held_out)) == (10 - size, size)


# Tables.

TABLE = {
    "patient": ["b", "a", "b", "c"],
    "age": [61, 47, 62, 30],
    "smokes": [True, False, True, False],
    "weight": [80.5, 71.0, 79.0, 60.25],
    "ill": [1, 0, 1, 0],
}


def as_pandas(table):
    pandas = pytest.importorskip("pandas", reason="needs the extra 'tables'")
    return pandas.DataFrame(table)


@pytest.mark.parametrize("make", [dict, as_pandas])
def test_a_table_gives_one_client_per_owner(make):
    clients = federated.clients_from_table(make(TABLE), owner="patient", label="ill")
    assert clients.names == ("a", "b", "c")
    x, y = clients[1]
    assert x.dtype == np.float32 and x.tolist() == [[61, 1, 80.5], [62, 1, 79]]
    assert y.dtype == np.int32 and y.tolist() == [1, 1]


@pytest.mark.parametrize("make", [dict, as_pandas])
def test_features_come_in_the_order_asked_for(make):
    clients = federated.clients_from_table(make(TABLE), owner="patient", label="age", features=["weight", "ill"])
    assert clients[0][0].tolist() == [[71.0, 0.0]]
    assert (
        federated.clients_from_table(make(TABLE), owner="age", label="weight", features=["ill"]).y.dtype == np.float32
    )


def test_whole_floats_are_labels_of_classes():
    clients = federated.clients_from_table({**TABLE, "ill": [1.0, 0.0, 1.0, 0.0]}, owner="patient", label="ill")
    assert clients.y.dtype == np.int32


def test_a_single_feature_may_hold_arrays():
    images = np.arange(4 * 6, dtype=np.uint8).reshape(4, 2, 3)
    clients = federated.clients_from_table(
        {"x": images, "y": [0, 1, 2, 3], "who": [0, 0, 1, 1]}, owner="who", label="y"
    )
    np.testing.assert_array_equal(clients[1][0], images[2:])
    with pytest.raises(DatasetError, match=r"'x' has shape \(4, 2, 3\), where 'age' has \(4,\)"):
        federated.clients_from_table({**TABLE, "x": images}, owner="patient", label="ill", features=["age", "x"])


def test_integers_and_booleans_of_pandas_are_numbers():
    table = as_pandas(TABLE).astype({"age": "Int64", "smokes": "boolean", "patient": "category"})
    clients = federated.clients_from_table(table, owner="patient", label="ill", features=["age", "smokes"])
    assert clients[1][0].tolist() == [[61, 1], [62, 1]]


@pytest.mark.parametrize("make", [dict, as_pandas])
@pytest.mark.parametrize(
    ("changes", "options", "says"),
    [
        ({}, {"owner": "person"}, "column 'person' is not in the table: it has patient, age, smokes, weight, ill."),
        ({}, {"label": "sick"}, "column 'sick' is not in the table"),
        ({}, {"features": ["age", "height"]}, "column 'height' is not in the table"),
        ({}, {"features": ["age", "ill"]}, "column 'ill' is the label and cannot be a feature"),
        ({}, {"features": ["patient"]}, "column 'patient' is the owner and cannot be a feature"),
        ({}, {"features": []}, "there are no features"),
        ({}, {"features": ["age", "age"]}, "names a column twice"),
        ({}, {"features": "age"}, "features='age' is one name"),
        ({}, {"owner": "ill"}, "'ill' is given as owner and as label"),
        ({"age": ["senior", "young", "senior", "young"]}, {}, "column 'age' holds text"),
        (
            {"age": np.array(["2020-01-01"] * 4, "datetime64[ns]")},
            {},
            "column 'age' holds dates where numbers are needed",
        ),
        ({"ill": ["yes", "no", "yes", "no"]}, {}, "column 'ill' holds text"),
        ({"age": [61, np.nan, 62, 30]}, {}, "column 'age' lacks 1 of 4 values"),
        ({"age": [61, None, None, 30]}, {}, "column 'age' lacks 2 of 4 values"),
        ({"age": ["senior", None, "senior", "young"]}, {}, "column 'age' lacks 1 of 4 values"),
        ({"age": [61, np.inf, 62, 30]}, {}, "column 'age' holds infinite values"),
        ({"ill": [1, None, 0, 1]}, {}, "column 'ill' lacks 1 of 4 values"),
        ({"patient": ["a", None, "b", "c"]}, {}, "column 'patient' lacks 1 of 4 values"),
        ({name: [] for name in TABLE}, {}, "no examples were given"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_by_column(make, changes, options, says):
    with pytest.raises(DatasetError) as refused:
        federated.clients_from_table(make({**TABLE, **changes}), **{"owner": "patient", "label": "ill", **options})
    text = str(refused.value)
    assert says in text and text.count(". ") == 0 and "senior" not in text  # one sentence, and no value of the table


def test_values_that_pandas_holds_to_be_missing_are():
    table = as_pandas(TABLE).astype({"age": "Int64"})
    table.loc[1, "age"] = None
    with pytest.raises(DatasetError, match="column 'age' lacks 1 of 4 values"):
        federated.clients_from_table(table, owner="patient", label="ill")


def test_other_things_are_no_tables():
    with pytest.raises(DatasetError, match=r"table is a ndarray: give a pandas.DataFrame, or a dictionary"):
        federated.clients_from_table(X, owner="a", label="b")
    with pytest.raises(DatasetError, match="column 'age' is 2 times in the table"):
        twice = as_pandas(TABLE).rename(columns={"weight": "age"})
        federated.clients_from_table(twice, owner="patient", label="ill")
    with pytest.raises(DatasetError, match=r"column 'weight' has shape \(3,\), where 'age' has \(4,\)"):
        federated.clients_from_table({**TABLE, "weight": [1.0, 2.0, 3.0]}, owner="patient", label="ill")
    with pytest.raises(DatasetError, match="owners has 3"):
        federated.clients_from_table({**TABLE, "patient": ["a", "b", "c"]}, owner="patient", label="ill")


# Data sets of TensorFlow.


def rows_of(x, y):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((x, y))


def test_data_sets_become_clients_batched_or_not():
    clients = federated.clients_from_datasets(
        {"ann": rows_of(X[:5], Y[:5]), "bob": rows_of(X[5:12], Y[5:12]).batch(3), 7: rows_of(X[12:13], Y[12:13])}
    )
    assert clients.names == ("ann", "bob", 7)
    assert [len(rows) for rows in clients.rows] == [5, 7, 1]
    for i, part in enumerate((slice(0, 5), slice(5, 12), slice(12, 13))):
        np.testing.assert_array_equal(clients[i][0], X[part])
        np.testing.assert_array_equal(clients[i][1], Y[part])
        assert (clients[i][0].dtype, clients[i][1].dtype) == (X.dtype, Y.dtype)


def test_where_shapes_do_not_tell_batches_it_is_asked():
    dataset = rows_of(np.zeros([4, 8, 2]), np.zeros([4, 8]))
    for given in (dataset, rows_of(X, Y).batch(5, drop_remainder=True)):
        with pytest.raises(InvalidArgumentError, match="give batched=True or batched=False"):
            federated.clients_from_datasets({"ann": given})
    assert federated.clients_from_datasets({"ann": dataset}, batched=False).y.shape == (4, 8)
    assert federated.clients_from_datasets({"ann": dataset}, batched=True).y.shape == (32,)


def test_what_is_wrong_with_a_data_set_is_said_by_client():
    import tensorflow as tf

    good = rows_of(X, Y)

    def ragged():
        yield np.zeros(2, np.float32), 0
        yield np.zeros(3, np.float32), 1

    signature = (tf.TensorSpec([None], tf.float32), tf.TensorSpec([], tf.int64))
    cases = {
        r"client 'bob' has examples of shape \(3,\) \(float32\) .* where 'ann' has examples of shape \(2,\)": rows_of(
            np.zeros([2, 3], np.float32), Y[:2]
        ),
        r"client 'bob' has .* labels of shape \(\) \(float32\), where 'ann' .* \(int64\)": rows_of(
            X[:3], Y[:3].astype(np.float32)
        ),
        "client 'bob' has no examples": good.take(0),
        "client 'bob' has examples of several shapes": tf.data.Dataset.from_generator(
            ragged, output_signature=signature
        ),
        "client 'bob' does not have a tf.data.Dataset of pairs": tf.data.Dataset.from_tensor_slices(X),
        "client 'bob' does not have a tf.data.Dataset": (X, Y),
    }
    for says, bad in cases.items():
        with pytest.raises(DatasetError, match=says):
            federated.clients_from_datasets({"ann": good, "bob": bad})
    for nothing in ({}, [good]):
        with pytest.raises(DatasetError, match="no clients were given"):
            federated.clients_from_datasets(nothing)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: federated.split_by_owner(X, Y[:-1], Y), "x has 30, y has 29"),
        (lambda: federated.split_by_owner(X, Y, Y[:-1]), "owners has 29"),
        (lambda: federated.split_by_owner(X, Y, X), "owners has shape"),
        (lambda: federated.split_by_owner(X[:0], Y[:0], Y[:0]), "no examples"),
        (lambda: federated.split_evenly(X, Y, num_clients=31, seed=0), "more than the 30 examples"),
        (lambda: federated.split_by_label_skew(X, X, num_clients=3, concentration=1.0, seed=0), "y has shape"),
        (lambda: federated.split_by_owner(X[:2], Y[:2], ["a", None]), "owners lacks 1 of 2 keys"),
        (lambda: federated.split_by_owner(X[:2], Y[:2], [0.0, np.nan]), "owners lacks 1 of 2 keys"),
        (lambda: federated.split_by_owner(X[:2], Y[:2], np.array(["a", 1], object)), "keys of several kinds"),
        (lambda: federated.split_by_quantity_skew(X, Y, num_clients=31, concentration=1.0, seed=0), "more than the 30"),
        (lambda: federated.split_by_owner(X, Y, Y * 0).split(seed=0), "there is 1 client"),
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
        lambda: federated.split_by_quantity_skew(X, Y, num_clients=3, concentration=-1.0, seed=0),
        lambda: federated.split_by_quantity_skew(X, Y, num_clients=0, concentration=1.0, seed=0),
        lambda: federated.split_by_owner(X, Y, Y).split(held_out=0.0, seed=0),
        lambda: federated.split_by_owner(X, Y, Y).split(held_out=1.0, seed=0),
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
