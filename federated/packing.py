"""Lays out the clients of one round as the tensors that `client_work` trains on.

Promises: the number of shards never varies; each client's batches keep their order and their rows; what only fills up
repeats a row of the same client and is marked. Knows nothing of models or privacy.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from federated import aggregation
from federated.rounds import Shard
from tfprivacy_ft.errors import DatasetError, InvalidArgumentError

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["Packer"]

# A message between TFF and its worker holds at most 2 GB.
_MOST_BYTES = 1_900_000_000


class _Client(NamedTuple):
    """Examples and labels (n, ...) of one client, how many steps it takes, and how many rows in the longest.

    `batches` says how many rows each step takes, in the order that they have; None has them drawn.
    """

    x: np.ndarray
    y: np.ndarray
    num_steps: int
    most_rows: int
    batches: list[int] | None


@dataclasses.dataclass(frozen=True)
class Packer:
    """Turns cohorts into shards.

    Args:
        x_spec, y_spec: One example and one label, without the batch axis.
        batch_size: Examples per local step, for clients given as arrays; None for all that a client has.
        local_epochs: Passes over the examples, for clients given as arrays.
        shards: Data sets to make of each cohort.
        clients_at_once: Most clients in one group.
        by_examples: Whether a client counts by the number of its examples, and not as one.
        with_noise: Whether clients add noise, and get a key for it.
        num_labels: Labels are whole numbers from 0 to below this; None for labels of any kind.
        few_shapes: Whether to fill tensors up to few sizes, for a compiler that starts anew at each.
    """

    x_spec: "tf.TensorSpec"
    y_spec: "tf.TensorSpec"
    batch_size: int | None
    local_epochs: int
    shards: int
    clients_at_once: int
    by_examples: bool = False
    with_noise: bool = False
    num_labels: int | None = None
    few_shapes: bool = False

    @property
    def signature(self) -> Shard:
        """The types of one shard's tensors."""
        import tensorflow as tf

        return Shard(
            tf.TensorSpec([None, *self.x_spec.shape], self.x_spec.dtype),
            tf.TensorSpec([None, *self.y_spec.shape], self.y_spec.dtype),
            tf.TensorSpec([None, None, None, None], tf.int32),
            tf.TensorSpec([None, None], tf.float32),
            tf.TensorSpec([None, aggregation.KEY_WORDS], tf.uint64),
        )

    def pack(self, clients: Sequence[Any], rng: np.random.Generator | None = None) -> list[Shard]:
        """Makes the shards of one cohort.

        Args:
            clients: For each client a pair of arrays (x, y) or a `tf.data.Dataset` of batches; may be empty.
            rng: Shuffles each client's examples in each pass; by default seeded by the operating system.

        Returns:
            `shards` of them, of NumPy arrays.

        Raises:
            DatasetError: A client has no examples, lengths differ, or shapes or types are not those of the model.
        """
        if not isinstance(clients, Sequence):
            raise InvalidArgumentError(
                f"the clients are a {type(clients).__name__}: give a list with one pair (x, y) or tf.data.Dataset each."
            )
        rng = np.random.default_rng() if rng is None else rng
        # Clients of like length side by side: a group takes as many steps as its longest.
        cohort = sorted((self._read(client) for client in clients), key=lambda client: -client.num_steps)
        at_once = max(1, min(self.clients_at_once, self._filled_up(math.ceil(len(cohort) / self.shards))))
        groups = [cohort[i : i + at_once] for i in range(0, len(cohort), at_once)]
        return [self._shard(groups[i :: self.shards], at_once, rng) for i in range(self.shards)]

    def _read(self, client: Any) -> _Client:
        if isinstance(client, tuple | list) and len(client) == 2:
            x, y = self._checked(*client)
            size = min(self.batch_size or len(x), len(x))
            return _Client(x, y, self.local_epochs * -(-len(x) // size), size, None)
        if not hasattr(client, "as_numpy_iterator"):
            raise InvalidArgumentError(
                f"a client is a {type(client).__name__}: give a pair of arrays (x, y) or a tf.data.Dataset of batches."
            )
        batches = []
        for element in client:
            if not (isinstance(element, tuple | list) and len(element) == 2):
                raise InvalidArgumentError("a client's tf.data.Dataset has to yield pairs (x, y) of batches.")
            batches.append(self._checked(*(np.asarray(part) for part in element)))
        if not batches:
            raise DatasetError("a client has no examples: leave it out of the cohort.")
        x, y = (_joined([batch[part] for batch in batches]) for part in (0, 1))
        sizes = [len(batch[0]) for batch in batches]
        return _Client(x, y, len(sizes), max(sizes), sizes)

    def _checked(self, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        x, y = as_given(x, self.x_spec, "x"), as_given(y, self.y_spec, "y")
        if len(x) != len(y):
            raise DatasetError(f"a client has {len(x)} examples and {len(y)} labels: give one label per example.")
        if not len(x):
            raise DatasetError("a client has no examples: leave it out of the cohort.")
        return x, y

    def _shard(self, groups: list[list[_Client]], at_once: int, rng: np.random.Generator) -> Shard:
        members = [client for group in groups for client in group]
        steps = self._filled_up(max((client.num_steps for client in members), default=0))
        size = max((client.most_rows for client in members), default=0)
        filled_up = self._filled_up(size)
        size = max(size, min(filled_up, self.batch_size or filled_up))
        # A padding row stands for a row of the same client; where there is no client, nobody looks at the answer.
        rows = np.full((self._filled_up(len(groups)), at_once, steps, size), -1, np.int32)
        weights = np.zeros(rows.shape[:2], np.float32)
        start = 0
        for g, group in enumerate(groups):
            lengths = np.array([len(client.x) for client in group])
            starts = start + np.cumsum(lengths) - lengths
            rows[g, : len(group)] = _placed(self._rows(group, lengths, steps, size, rng), starts)
            weights[g, : len(group)] = lengths if self.by_examples else 1.0
            start += lengths.sum()
        x, y = self._examples(members)
        if len(y) and self.num_labels is not None and (y.min() < 0 or y.max() >= self.num_labels):
            raise DatasetError(
                f"a client has labels other than the whole numbers from 0 to {self.num_labels - 1}: give the model more outputs, "
                "or leave the client out."
            )
        if x.nbytes + y.nbytes + rows.nbytes > _MOST_BYTES:
            raise DatasetError(
                f"a shard of this cohort holds {x.nbytes + y.nbytes + rows.nbytes:,} bytes, more than TFF can send at "
                "once: build the process with more shards, or use fewer or shorter clients."
            )
        make_key = aggregation.fresh_noise_key if self.with_noise else aggregation.blank_noise_key
        keys = np.array([make_key() for _ in rows], np.uint64).reshape(-1, aggregation.KEY_WORDS)
        return Shard(self._lengthened(x), self._lengthened(y), rows, weights, keys)

    def _examples(self, clients: list[_Client]) -> tuple[np.ndarray, np.ndarray]:
        if clients:
            return _joined([client.x for client in clients]), _joined([client.y for client in clients])
        x, y = (np.zeros([0, *(n or 0 for n in spec.shape)], spec.dtype.as_numpy_dtype) for spec in self._specs)
        return x, y

    def _filled_up(self, size: int) -> int:
        """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... where shapes are to be few."""
        if not self.few_shapes or size < 2:
            return max(size, int(self.few_shapes))
        power = 1 << (size - 1).bit_length()
        return power * 3 // 4 if size <= power * 3 // 4 else power

    def _lengthened(self, part: np.ndarray) -> np.ndarray:
        more = self._filled_up(len(part)) - len(part)
        return np.concatenate([part, np.zeros((more, *part.shape[1:]), part.dtype)]) if more else part

    def _rows(
        self, group: list[_Client], lengths: np.ndarray, steps: int, size: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Which of its own rows each client of a group takes, (k, steps, size); -1 for none."""
        rows = np.full((len(group), steps, size), -1)
        free = np.array([client.batches is None for client in group])
        if free.any():
            drawn = _drawn(lengths[free], self.batch_size, self.local_epochs, rng)
            rows[free, : drawn.shape[1], : drawn.shape[2]] = drawn
        for k, client in enumerate(group):
            if client.batches is not None:
                rows[k, : client.num_steps] = _in_order(np.array(client.batches), size)
        return rows

    @property
    def _specs(self) -> tuple["tf.TensorSpec", "tf.TensorSpec"]:
        return self.x_spec, self.y_spec


def _drawn(lengths: np.ndarray, batch_size: int | None, epochs: int, rng: np.random.Generator) -> np.ndarray:
    """Rows that clients with so many examples take, (k, steps, b): `epochs` passes, each in an order of its own."""
    longest = lengths.max()
    size = min(batch_size or longest, longest)
    per_pass = -(-longest // size)
    keys = rng.random((len(lengths), epochs, per_pass * size))
    missing = np.arange(per_pass * size) >= lengths[:, np.newaxis, np.newaxis]
    keys[np.broadcast_to(missing, keys.shape)] = 2.0  # beyond every draw, so that what is not there comes last
    return np.where(missing, -1, keys.argsort(axis=-1)).reshape(len(lengths), epochs * per_pass, size)


def _in_order(sizes: np.ndarray, size: int) -> np.ndarray:
    """Rows of batches of these sizes, (batches, size); -1 for none."""
    places, firsts = np.arange(size), np.cumsum(sizes) - sizes
    return np.where(places < sizes[:, np.newaxis], firsts[:, np.newaxis] + places, -1)


def _placed(rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Rows of clients, by where these start among all; a padding row stands for the first row of the same client."""
    starts = starts[:, np.newaxis, np.newaxis]
    return np.where(rows < 0, -1 - starts, starts + rows)


def as_given(values: Any, spec: "tf.TensorSpec", name: str) -> np.ndarray:
    """Values (n, ...) as an array of the type that the model takes.

    Raises:
        DatasetError: The shape or the type is another one.
    """
    given, (shape, wanted) = np.asarray(values), _shape_and_type(spec)
    if given.dtype == wanted and given.ndim == len(shape) + 1 and given.shape[1:] == shape:
        return given
    if given.ndim == len(shape) and shape and shape[-1] == 1 and given.shape[1:] == shape[:-1]:
        given = given[..., np.newaxis]  # one label per row for a model with one output
    fits = given.ndim == len(shape) + 1 and all(
        want is None or have == want for have, want in zip(given.shape[1:], shape, strict=True)
    )
    if not fits:
        raise DatasetError(f"{name} of a client has shape {given.shape}: the model takes (n, {str(shape)[1:-1]}).")
    if given.dtype != wanted and (given.dtype.kind not in "biuf" or (wanted.kind in "iu" and given.dtype.kind == "f")):
        raise DatasetError(f"{name} of a client is {given.dtype}: the model takes {wanted}.")
    return given.astype(wanted, copy=False)


@functools.cache  # TensorFlow takes its time over shapes, and every client is held against these
def _shape_and_type(spec: "tf.TensorSpec") -> tuple[tuple[int | None, ...], np.dtype]:
    return tuple(spec.shape), np.dtype(spec.dtype.as_numpy_dtype)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise DatasetError(f"examples of one round have shapes {sorted(shapes)}: pad them to one shape beforehand.")
    return np.concatenate(parts)
