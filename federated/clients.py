"""Clients: who holds which examples, and who takes part in a round.

Promises: every example belongs to exactly one client and every client has one; a Poisson cohort takes each client
independently, by random numbers of the operating system. Knows no models; TensorFlow and pandas are not imported before
data of theirs are read.
"""

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tfprivacy_ft import _check, tables
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = [
    "ClientData",
    "clients_from_datasets",
    "clients_from_table",
    "poisson_cohort",
    "sampling_probability",
    "split_by_label_skew",
    "split_by_owner",
    "split_by_quantity_skew",
    "split_evenly",
]

_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class ClientData:
    """Examples of many clients, kept once.

    Args:
        x: Examples (n, ...).
        y: Labels (n, ...).
        rows: For each client the rows of x and y it owns: integer arrays, none empty, no row twice.
        names: A name for each client, the key it was made from.

    Raises:
        DatasetError: There is nothing, lengths differ, or rows are missing, out of range or owned twice.

    Example:
        >>> clients = split_by_owner([[1.0], [2.0], [3.0]], [0, 1, 1], owners=["ann", "bob", "ann"])
        >>> len(clients), clients.names, clients[0][1].tolist()
        (2, ('ann', 'bob'), [0, 1])
    """

    x: np.ndarray
    y: np.ndarray
    rows: tuple[np.ndarray, ...]
    names: tuple[Any, ...]

    def __post_init__(self) -> None:
        _same_length(x=self.x, y=self.y)
        if not self.rows:
            raise DatasetError("no clients were given: give at least one.")
        if len(self.names) != len(self.rows):
            raise DatasetError(f"{len(self.names)} names for {len(self.rows)} clients: give one name each.")
        for name, rows in zip(self.names, self.rows, strict=True):
            if not len(rows):
                raise DatasetError(f"client {name!r} has no examples: leave it out.")
        taken = np.concatenate(self.rows)
        if taken.min() < 0 or taken.max() >= len(self.x):
            raise DatasetError(f"rows must lie between 0 and {len(self.x) - 1}: some client owns another one.")
        if len(np.unique(taken)) != len(taken):
            raise DatasetError("a row belongs to two clients: give each row to one, who is then protected as a whole.")

    def __len__(self) -> int:
        """The number of clients."""
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Examples (m, ...) and labels (m, ...) of client number i, 0 <= i < len(clients)."""
        return self.x[self.rows[i]], self.y[self.rows[i]]

    def cohort(self, members: Sequence[int] | np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The clients of these numbers, as `process.next` takes them."""
        return [self[int(i)] for i in members]

    def split(self, *, held_out: float = 0.2, seed: int) -> tuple["ClientData", "ClientData"]:
        """Sets whole clients aside, at random, to measure on people that training never saw.

        Args:
            held_out: Share of the clients that is set aside, in (0, 1); rounded, and at least one on either side.
            seed: Of the choice, which is no secret.

        Returns:
            Those to train on and those held out, both in the order that they had.

        Raises:
            InvalidArgumentError: `held_out` is outside its range.
            DatasetError: There are fewer than two clients.

        Example:
            >>> clients = split_evenly(np.zeros([50, 1]), np.zeros(50), num_clients=10, seed=0)
            >>> [len(part) for part in clients.split(held_out=0.3, seed=0)]
            [7, 3]
        """
        _check.open_unit_interval(held_out=held_out)
        if len(self) < 2:
            raise DatasetError(f"there is {len(self)} client: give two or more to set some aside.")
        size = min(max(round(held_out * len(self)), 1), len(self) - 1)
        order = np.random.default_rng(seed).permutation(len(self))
        return self._only(np.sort(order[size:])), self._only(np.sort(order[:size]))

    def _only(self, members: np.ndarray) -> "ClientData":
        rows, names = ([part[i] for i in members] for part in (self.rows, self.names))
        return ClientData(self.x, self.y, tuple(rows), tuple(names))


def split_by_owner(x: Any, y: Any, owners: Any) -> ClientData:
    """One client per distinct value of `owners`.

    Args:
        x: Examples (n, ...).
        y: Labels (n, ...).
        owners: Key of the client that owns each example, (n,): numbers or strings.

    Raises:
        DatasetError: Lengths differ, there are no examples, or keys are missing or of kinds that cannot be compared.
    """
    x, y, owners = np.asarray(x), np.asarray(y), np.asarray(owners)
    _same_length(x=x, y=y, owners=owners)
    if owners.ndim != 1:
        raise DatasetError(f"owners has shape {owners.shape}: give one key per example, shape ({len(x)},).")
    if missing := tables.count_missing(owners):
        raise DatasetError(
            f"owners lacks {missing} of {len(x)} keys: leave these examples out, for nobody would be protected."
        )
    try:
        names, inverse = np.unique(owners, return_inverse=True)
    except TypeError as error:
        raise DatasetError("owners holds keys of several kinds: give all as numbers, or all as text.") from error
    order = np.argsort(inverse, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(inverse))[:-1])
    return ClientData(x, y, tuple(rows), tuple(names.tolist()))


def split_evenly(x: Any, y: Any, *, num_clients: int, seed: int) -> ClientData:
    """Gives the examples to clients at random, in parts whose sizes differ by at most one (IID).

    Args:
        x: Examples (n, ...).
        y: Labels (n, ...).
        num_clients: >= 1, at most n.
        seed: Of the partition, which is no secret.

    Raises:
        DatasetError: Lengths differ, or there are fewer examples than clients.
    """
    x, y = np.asarray(x), np.asarray(y)
    _enough_for(x, y, num_clients)
    rows = np.array_split(np.random.default_rng(seed).permutation(len(x)), num_clients)
    return ClientData(x, y, tuple(rows), tuple(range(num_clients)))


def split_by_label_skew(x: Any, y: Any, *, num_clients: int, concentration: float, seed: int) -> ClientData:
    """Gives each client its own mixture of labels: the examples of each label go to clients in Dirichlet shares.

    A client that gets nothing takes one example from the largest client.

    Args:
        x: Examples (n, ...).
        y: Labels (n,).
        num_clients: >= 1, at most n.
        concentration: Of the Dirichlet distribution, > 0: 0.1 is strong skew, 100 nearly none.
        seed: Of the partition, which is no secret.

    Raises:
        DatasetError: Lengths differ, labels are not (n,), or there are fewer examples than clients.

    Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification", 2019, https://arxiv.org/abs/1909.06335; here the shares are drawn for each label, as in
        Yurochkin et al., ICML 2019, https://arxiv.org/abs/1905.12022, section 4.
    """
    x, y = np.asarray(x), np.asarray(y)
    _enough_for(x, y, num_clients)
    _check.positive(concentration=concentration)
    if y.ndim != 1:
        raise DatasetError(f"y has shape {y.shape}: label skew needs one label per example, shape ({len(x)},).")
    rng = np.random.default_rng(seed)
    owned: list[list[int]] = [[] for _ in range(num_clients)]
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        shares = rng.dirichlet(np.full(num_clients, float(concentration)))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for rows, part in zip(owned, np.split(members, cuts), strict=True):
            rows.extend(part.tolist())
    for rows in owned:
        if not rows:
            rows.append(max(owned, key=len).pop())
    return ClientData(x, y, tuple(np.sort(np.array(rows)) for rows in owned), tuple(range(num_clients)))


def split_by_quantity_skew(x: Any, y: Any, *, num_clients: int, concentration: float, seed: int) -> ClientData:
    """Gives clients very different numbers of examples, each client at least one and otherwise at random.

    What is left after one for each goes to clients in Dirichlet shares.

    Args:
        x: Examples (n, ...).
        y: Labels (n, ...).
        num_clients: >= 1, at most n.
        concentration: Of the Dirichlet distribution, > 0: at 0.1 a few clients own nearly all, at 100 all are alike.
        seed: Of the partition, which is no secret.

    Raises:
        DatasetError: Lengths differ, or there are fewer examples than clients.

    Example:
        >>> x = np.arange(1000)
        >>> clients = split_by_quantity_skew(x, x, num_clients=20, concentration=0.1, seed=0)
        >>> sum(len(rows) for rows in clients.rows), max(len(rows) for rows in clients.rows) > 200
        (1000, True)

    Source: Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022,
        https://arxiv.org/abs/2102.02079 (quantity skew).
    """
    x, y = np.asarray(x), np.asarray(y)
    _enough_for(x, y, num_clients)
    _check.positive(concentration=concentration)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(num_clients, float(concentration)))
    sizes = 1 + rng.multinomial(len(x) - num_clients, shares)
    rows = np.split(rng.permutation(len(x)), np.cumsum(sizes)[:-1])
    return ClientData(x, y, tuple(np.sort(part) for part in rows), tuple(range(num_clients)))


def clients_from_table(table: Any, *, owner: Any, label: Any, features: Sequence[Any] | None = None) -> ClientData:
    """One client per owner of rows of a table.

    Nothing is encoded, scaled or filled in: what is derived for that from private rows is a release.

    Args:
        table: A `pandas.DataFrame`, or a dictionary from names to columns of n values.
        owner: Name of the column that says whose row it is: numbers or text.
        label: Name of the column of labels, numbers: int32 where all are whole, else float32.
        features: Names of the columns of x, numbers or booleans, in this order; None for all others. They are stacked to
            float32 (n, features); a single one may hold arrays (n, ...), such as images, and is x as it is.

    Raises:
        DatasetError: It is no table or has no rows, a column is not there or of another length, values are missing, infinite
            or text, or a feature is the label or the owner.

    Example:
        >>> table = {"patient": ["b", "a", "b"], "age": [61, 47, 62], "ill": [1, 0, 1]}
        >>> clients = clients_from_table(table, owner="patient", label="ill")
        >>> clients.names, clients[1][0].tolist()
        (('a', 'b'), [[61.0], [62.0]])
    """
    if owner == label:
        raise DatasetError(f"column {owner!r} is given as owner and as label: give two different ones.")
    if isinstance(features, str):
        raise DatasetError(f"features={features!r} is one name: give a list of names.")
    rest = [name for name in tables.names(table) if name not in (owner, label)]
    chosen = rest if features is None else list(features)
    for role, name in {"owner": owner, "label": label}.items():
        if name in chosen:
            raise DatasetError(f"column {name!r} is the {role} and cannot be a feature: take it out of features.")
    owners, y = tables.keys(table, owner), tables.labels(table, label)
    return split_by_owner(tables.features(table, chosen), y, owners)


def clients_from_datasets(datasets: Mapping[Any, "tf.data.Dataset"], *, batched: bool | None = None) -> ClientData:
    """One client per `tf.data.Dataset`; each is read once, in full.

    Args:
        datasets: By name of the client, of pairs (x, y): examples, or batches of examples.
        batched: Whether they yield batches. None takes it from the shapes: labels that are single numbers are not batched,
            and both parts with an unknown first axis are; anything else is asked for.

    Raises:
        DatasetError: There are no clients, a data set does not yield pairs, is empty, or holds examples of another shape or
            type than the first client's; the text names the client.
        InvalidArgumentError: `batched` has to be given.

    Example:
        >>> import tensorflow as tf
        >>> rows = tf.data.Dataset.from_tensor_slices(([[1.0], [2.0], [3.0]], [0, 1, 1]))
        >>> clients = clients_from_datasets({"ann": rows.take(1), "bob": rows.skip(1).batch(2)})
        >>> [y.tolist() for _, y in clients]
        [[0], [1, 1]]
    """
    if not isinstance(datasets, Mapping) or not datasets:
        raise DatasetError("no clients were given: give a dictionary from names to data sets with at least one entry.")
    parts = [_read_dataset(name, dataset, batched) for name, dataset in datasets.items()]
    kinds = [tuple((part.shape[1:], part.dtype.name) for part in pair) for pair in parts]
    for name, kind in zip(datasets, kinds, strict=True):
        if kind != kinds[0]:
            raise DatasetError(
                f"client {name!r} has {_in_words(kind)}, where {next(iter(datasets))!r} has {_in_words(kinds[0])}: give all "
                "clients the same."
            )
    rows = np.split(np.arange(sum(len(y) for _, y in parts)), np.cumsum([len(y) for _, y in parts])[:-1])
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    return ClientData(x, y, tuple(rows), tuple(datasets))


def poisson_cohort(num_clients: int, sampling_probability: float, rng: np.random.Generator | None = None) -> np.ndarray:
    """Draws the clients of one round: each independently with `sampling_probability`.

    The cohort's size varies and is private as well; 0 is possible. Amplification by sampling counts on the draw
    staying secret, so by default it comes from the operating system.

    Args:
        num_clients: Clients in all, >= 1.
        sampling_probability: In (0, 1].
        rng: A generator of one's own, for tests.

    Returns:
        Numbers of the clients, increasing.

    Example:
        >>> poisson_cohort(3, 1.0).tolist()
        [0, 1, 2]
    """
    _check.positive_integer(num_clients=num_clients)
    _check.probability(sampling_probability=sampling_probability)
    rng = np.random.default_rng(secrets.randbits(256)) if rng is None else rng
    return np.flatnonzero(rng.random(num_clients) < sampling_probability)


def _read_dataset(name: Any, dataset: Any, batched: bool | None) -> tuple[np.ndarray, np.ndarray]:
    """All examples (n, ...) and labels (n, ...) of one client's data set."""
    import tensorflow as tf

    spec = getattr(dataset, "element_spec", None)
    if not (isinstance(spec, tuple) and len(spec) == 2 and all(isinstance(part, tf.TensorSpec) for part in spec)):
        raise DatasetError(f"client {name!r} does not have a tf.data.Dataset of pairs (x, y) of tensors: give one.")
    if not (_is_batched(name, spec) if batched is None else batched):
        dataset = dataset.batch(_ROWS_AT_ONCE)
    try:
        batches = list(dataset.as_numpy_iterator())
        x, y = (
            (np.concatenate(part) for part in zip(*batches, strict=True)) if batches else (np.array([]), np.array([]))
        )
    except (tf.errors.InvalidArgumentError, ValueError) as error:
        raise DatasetError(
            f"client {name!r} has examples of several shapes: pad them to one shape beforehand."
        ) from error
    if not len(y):
        raise DatasetError(f"client {name!r} has no examples: leave it out.")
    return x, y


def _is_batched(name: Any, spec: tuple["tf.TensorSpec", "tf.TensorSpec"]) -> bool:
    if spec[1].shape.rank == 0:
        return False
    if all(part.shape.rank is not None and part.shape[0] is None for part in spec):
        return True
    raise InvalidArgumentError(
        f"whether client {name!r} has batches cannot be seen from shapes {spec[0].shape} and {spec[1].shape}: give batched=True "
        "or batched=False."
    )


def _in_words(kind: Sequence[tuple[tuple[int, ...], str]]) -> str:
    (x_shape, x_type), (y_shape, y_type) = kind
    return f"examples of shape {x_shape} ({x_type}) and labels of shape {y_shape} ({y_type})"


def _same_length(**arrays: np.ndarray) -> None:
    lengths = {name: len(array) if np.ndim(array) else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DatasetError(f"lengths differ ({given}): give one entry of each per example.")
    if not next(iter(lengths.values())):
        raise DatasetError(f"no examples were given ({', '.join(lengths)} are empty): give at least one.")


def _enough_for(x: np.ndarray, y: np.ndarray, num_clients: int) -> None:
    _same_length(x=x, y=y)
    _check.positive_integer(num_clients=num_clients)
    if num_clients > len(x):
        raise DatasetError(f"num_clients={num_clients} is more than the {len(x)} examples: ask for fewer clients.")


def sampling_probability(num_clients: int, clients_per_round: float) -> float:
    """The sampling probability that makes `clients_per_round` the expected size of a cohort."""
    if not (math.isfinite(clients_per_round) and 0 < clients_per_round <= num_clients):
        raise InvalidArgumentError(
            f"clients_per_round={clients_per_round} is not allowed with {num_clients} clients: give a number > 0 and "
            "at most that."
        )
    return clients_per_round / num_clients
