"""One round of federated averaging as functions of tensors, which engines put together and run.

Data goes one way: `broadcast` (what clients get from the state), `contribution` (what a shard of clients adds up to),
`finish` (the next state, from the state and the contributions of all shards, summed). Noise of the server is added in
`finish`, once; noise of clients in `contribution`, by each. Knows neither TFF nor accounts.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from federated import aggregation, client_work
from federated.stateless import StatelessModel
from tfprivacy_ft.events import Mechanism

if TYPE_CHECKING:
    import tensorflow as tf

    from tfprivacy_ft.moving_clip import Adaptive

__all__ = ["AveragingState", "Broadcast", "Contribution", "Round", "RoundPrivacy", "Shard", "Weights"]


class Weights(NamedTuple):
    """A model's weights; `tff.learning.models.ModelWeights` under another name, where there is no TFF."""

    trainable: list[Any]
    non_trainable: list[Any]


class AveragingState(NamedTuple):
    """The server's state between two rounds.

    Args:
        global_model_weights: Of the model, as `tff.learning.models.ModelWeights` or `Weights`.
        round_number: int32, rounds done.
        clip: float32, of the next round; infinite where nothing is clipped.
        client_learning_rate: float32, of the next round.
        noise_key: uint64 (3,), blank between rounds.
        optimizer: The server optimizer's state.
    """

    global_model_weights: Any
    round_number: Any
    clip: Any
    client_learning_rate: Any
    noise_key: Any
    optimizer: Any


class Broadcast(NamedTuple):
    """What every client gets."""

    weights: Any
    clip: Any
    client_learning_rate: Any


class Shard(NamedTuple):
    """The data of some clients.

    Args:
        x, y: Examples and labels (n, ...) of all of them.
        rows: int32 (groups, k, steps, b), as in `client_work.train_side_by_side`; one group trains after the other.
        weights: float32 (groups, k), by which clients count; 0 for what only fills up a group.
        noise_keys: uint64 (groups, 3), of the clients' own noise; blank where they add none.
    """

    x: Any
    y: Any
    rows: Any
    weights: Any
    noise_keys: Any


class Contribution(NamedTuple):
    """What a shard sends: the sum of its clients' reports, their votes on the clip, and by how much they count."""

    total: list[Any]
    votes: Any
    weight: Any


@dataclasses.dataclass(frozen=True)
class RoundPrivacy:
    """Clip and noise of a round.

    Args:
        clip: Largest norm of one client's update, > 0; infinite for no clip. Where it moves, the first one.
        mechanism: "gaussian" with a clip of the l2 norm, "laplace" with one of the l1 norm.
        noise_multiplier: Of the server, over the clip, >= 0; of sum and count of votes together, where the clip moves.
        local_noise_multiplier: Of each client, over the clip, >= 0.
        moving: By what rule the clip moves; None where it stays.
        multiplicative_noise: Standard deviation of the factor on each number of the noised mean, >= 0.
    """

    clip: float
    mechanism: Mechanism
    noise_multiplier: float
    local_noise_multiplier: float = 0.0
    moving: "Adaptive | None" = None
    multiplicative_noise: float = 0.0

    @property
    def order(self) -> int:
        """Of the norm."""
        return 1 if self.mechanism == "laplace" else 2


@dataclasses.dataclass(frozen=True)
class Round:
    """The mathematics of a round.

    Args:
        model: Of the clients.
        loss: From `client_work.per_example_loss`.
        privacy: Clip and noise.
        expected_clients: The constant that the sum is divided by, > 0; None divides by the weights of the clients there.
        client_learning_rate: Of the clients' SGD in the first round.
        proximal_strength: As in `client_work.train_side_by_side`.
        optimizer: Of the server, with the interface of `server_optimizers`.
        weights_class: Makes the weights in the state from two lists.
    """

    model: StatelessModel
    loss: Callable[["tf.Tensor", "tf.Tensor"], "tf.Tensor"]
    privacy: RoundPrivacy
    expected_clients: float | None
    client_learning_rate: float
    proximal_strength: float
    optimizer: Any
    weights_class: Callable[[list[Any], list[Any]], Any] = Weights

    def __post_init__(self) -> None:
        if self.privacy.moving is not None:
            self._moving_noise()  # refuses noise on the votes that would cost more than there is

    def initial_state(self) -> AveragingState:
        """The state before the first round, of tensors."""
        import tensorflow as tf

        trainable, others = (
            [tf.constant(value) for value in values] for values in (self.model.trainable, self.model.non_trainable)
        )
        return AveragingState(
            global_model_weights=self.weights_class(trainable, others),
            round_number=tf.constant(0),
            clip=tf.constant(self.privacy.clip, tf.float32),
            client_learning_rate=tf.constant(self.client_learning_rate, tf.float32),
            noise_key=tf.constant(aggregation.blank_noise_key()),
            optimizer=self.optimizer.initialize([tf.TensorSpec(value.shape, value.dtype) for value in trainable]),
        )

    def broadcast(self, state: AveragingState) -> Broadcast:
        """What clients get."""
        return Broadcast(state.global_model_weights, state.clip, state.client_learning_rate)

    def contribution(self, broadcast: Broadcast, shard: Shard) -> Contribution:
        """What the clients of one shard add up to, after training."""
        import tensorflow as tf

        trainable = tuple(broadcast.weights.trainable)

        def add_group(i, totals, votes):
            updates = client_work.train_side_by_side(
                self.model,
                self.loss,
                broadcast.client_learning_rate,
                trainable,
                tuple(broadcast.weights.non_trainable),
                shard.x,
                shard.y,
                shard.rows[i],
                self.proximal_strength,
            )
            sums = self._reports(updates, broadcast.clip, shard.weights[i], shard.noise_keys[i])
            votes += self._votes(updates, broadcast.clip, shard.weights[i])
            return i + 1, tuple(a + b for a, b in zip(totals, sums, strict=True)), votes

        zero = tuple(tf.zeros_like(weight) for weight in trainable)
        groups = tf.math.count_nonzero(tf.reduce_any(shard.weights > 0, axis=1), dtype=tf.int32)  # others only fill up
        start = (tf.constant(0), zero, tf.constant(0.0))
        _, total, votes = tf.while_loop(lambda i, *_: i < groups, add_group, start)
        return Contribution(list(total), votes, tf.reduce_sum(shard.weights))

    def finish(self, state: AveragingState, sent: Contribution) -> AveragingState:
        """The state after a round in which clients sent this, all together."""
        import tensorflow as tf

        privacy = self.privacy
        totals, votes = self._noised(list(sent.total), sent.votes, state.clip, state.noise_key)
        if self.expected_clients is None:
            means = [tf.math.divide_no_nan(total, tf.cast(sent.weight, total.dtype)) for total in totals]
        else:
            means = [total / tf.cast(self.expected_clients, total.dtype) for total in totals]
        if privacy.multiplicative_noise:
            key = state.noise_key + tf.constant([0, 0, 1], tf.uint64)  # another stream: the counter's upper half
            spread = [privacy.multiplicative_noise] * len(means)
            factors = aggregation.add_noise([tf.ones_like(mean) for mean in means], key, spread)
            means = [mean * factor for mean, factor in zip(means, factors, strict=True)]
        weights = state.global_model_weights
        optimizer, trainable = self.optimizer.next(state.optimizer, list(weights.trainable), means)
        return state._replace(
            global_model_weights=self.weights_class(list(trainable), list(weights.non_trainable)),
            round_number=state.round_number + 1,
            clip=self._moved(state.clip, votes),
            noise_key=tf.constant(aggregation.blank_noise_key()),
            optimizer=optimizer,
        )

    def _reports(self, updates, clip, weights, key):
        privacy = self.privacy
        if not privacy.local_noise_multiplier:
            return aggregation.clipped_sum(updates, clip, order=privacy.order, weights=weights)
        return aggregation.noised_sum(
            updates,
            clip,
            present=weights > 0,
            key=key,
            noise_multiplier=privacy.local_noise_multiplier,
            order=privacy.order,
        )

    def _votes(self, updates, clip, weights):
        import tensorflow as tf

        if self.privacy.moving is None:
            return tf.constant(0.0)
        _, within = aggregation.clip_scale(updates, clip)
        return tf.reduce_sum(tf.where(weights > 0, tf.where(within, 0.5, -0.5), 0.0))

    def _noised(self, totals, votes, clip, key):
        privacy = self.privacy
        if not privacy.noise_multiplier:
            return totals, votes
        if privacy.moving is None:
            scale = clip * privacy.noise_multiplier
            return aggregation.add_noise(totals, key, [scale] * len(totals), order=privacy.order), votes
        on_sum, on_count = self._moving_noise()
        *totals, votes = aggregation.add_noise([*totals, votes], key, [clip * on_sum] * len(totals) + [on_count])
        return totals, votes

    def _moving_noise(self) -> tuple[float, float]:
        """Noise multiplier of the sum, and standard deviation on the count of votes."""
        from tfprivacy_ft import moving_clip

        noise, rule = self.privacy.noise_multiplier, self.privacy.moving
        assert rule is not None and self.expected_clients is not None
        count_stddev = rule.count_stddev or moving_clip.usual_count_stddev(noise, self.expected_clients)
        return moving_clip.noise_on_sum(noise, count_stddev), count_stddev

    def _moved(self, clip, votes):
        from tfprivacy_ft import moving_clip

        if self.privacy.moving is None or not math.isfinite(self.privacy.clip):
            return clip
        return moving_clip.moved(self.privacy.moving, clip, votes / self.expected_clients, start=self.privacy.clip)
