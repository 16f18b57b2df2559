"""Runs rounds in this process by TensorFlow alone, on a GPU where there is one; needs no TFF."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from federated.packing import Packer
from federated.process import AveragingProcess
from federated.rounds import AveragingState, Contribution, Round

__all__ = ["RoundOutput", "build"]


class RoundOutput(NamedTuple):
    """What `next` returns, like `tff.learning.templates.LearningProcessOutput`."""

    state: AveragingState
    metrics: dict[str, Any]


def build(round_: Round, packer: Packer, *, jit_compile: bool = False, **process: Any) -> AveragingProcess:
    """Makes the process.

    Args:
        round_: What to compute.
        packer: Makes shards of cohorts, which TensorFlow computes side by side.
        jit_compile: Whether XLA compiles what clients do, for each new shape of a shard.
        process: For the `AveragingProcess`.
    """
    return _Process(round_, packer, jit_compile, **process)


class _Process(AveragingProcess):
    __doc__ = AveragingProcess.__doc__

    def __init__(self, round_: Round, packer: Packer, jit_compile: bool, **process: Any):
        super().__init__(packer=packer, **process)
        self._round, self._jit_compile = round_, jit_compile
        self._initial = _numbers(round_.initial_state())

    @functools.cached_property
    def _next(self) -> Any:
        import tensorflow as tf

        round_ = self._round
        # Traced once for all shards.
        contribution = tf.function(round_.contribution, autograph=False, jit_compile=self._jit_compile or None)

        def next_state(state, shards):
            sent = [contribution(round_.broadcast(state), shard) for shard in shards]
            return round_.finish(state, Contribution(*tf.nest.map_structure(lambda *parts: tf.add_n(parts), *sent)))

        specs = tf.nest.map_structure(lambda value: tf.TensorSpec(value.shape, value.dtype), self._initial)
        signature = [specs, [self._packer.signature] * self._packer.shards]
        return tf.function(next_state, input_signature=signature, autograph=False).get_concrete_function()

    def initialize(self) -> AveragingState:
        """The state before the first round."""
        return self._initial

    def next(self, state: AveragingState, client_data: Sequence[Any]) -> RoundOutput:
        """One round."""
        after = _numbers(self._next(*self._prepare(state, client_data)))
        return RoundOutput(after, {"round": after.round_number, "clip": after.clip})

    def get_model_weights(self, state: AveragingState) -> Any:
        """The model's weights in a state."""
        return state.global_model_weights

    def set_model_weights(self, state: AveragingState, weights: Any) -> AveragingState:
        """The state with other weights of the model."""
        return state._replace(global_model_weights=weights)


def _numbers(state: Any) -> Any:
    import tensorflow as tf

    return tf.nest.map_structure(lambda tensor: tensor.numpy(), state)
