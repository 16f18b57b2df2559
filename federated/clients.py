"""Clients: who holds which examples, and who takes part in a round.

Promises: every example belongs to exactly one client and every client has one; a Poisson cohort takes each client
independently, by random numbers of the operating system. Knows neither TensorFlow nor models.
"""

import dataclasses
import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfprivacy_ft import _check
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError

__all__ = ["ClientData", "poisson_cohort", "split_by_label_skew", "split_by_owner", "split_evenly"]


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


def split_by_owner(x: Any, y: Any, owners: Any) -> ClientData:
    """One client per distinct value of `owners`.

    Args:
        x: Examples (n, ...).
        y: Labels (n, ...).
        owners: Key of the client that owns each example, (n,): numbers or strings.

    Raises:
        DatasetError: Lengths differ or there are no examples.
    """
    x, y, owners = np.asarray(x), np.asarray(y), np.asarray(owners)
    _same_length(x=x, y=y, owners=owners)
    if owners.ndim != 1:
        raise DatasetError(f"owners has shape {owners.shape}: give one key per example, shape ({len(x)},).")
    names, inverse = np.unique(owners, return_inverse=True)
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
