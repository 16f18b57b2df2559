"""Runs rounds on TensorFlow Federated, as a `tff.learning.templates.LearningProcess`. Knows nothing of clips and noise."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

from federated import runtime
from federated.packing import Packer
from federated.process import AveragingProcess
from federated.rounds import AveragingState, Contribution, Round, Shard

__all__ = ["build", "in_worker"]


def build(round_: Round, packer: Packer, **process: Any) -> AveragingProcess:
    """Makes the process.

    Args:
        round_: What to compute; its weights are to be of `tff.learning.models.ModelWeights`.
        packer: Makes shards of cohorts; a shard is what TFF takes for a client.
        process: For the `AveragingProcess`.
    """
    tff: Any = runtime.require_tff()
    runtime.ensure_context()
    import tensorflow as tf

    @tff.tensorflow.computation()
    def initial_state():
        return round_.initial_state()

    state_type = initial_state.type_signature.result
    element = [tff.TensorType(part.dtype.as_numpy_dtype, part.shape) for part in packer.signature]
    data_type = tff.SequenceType(tff.StructWithPythonType(element, tuple))

    @tff.tensorflow.computation(state_type)
    def broadcast(state):
        return round_.broadcast(state)

    @tff.tensorflow.computation(broadcast.type_signature.result, data_type)
    def contribution(broadcast, data):
        compute = tf.function(round_.contribution, autograph=False)
        # One element: iterating over a data set makes TensorFlow set the function up anew in every round.
        return compute(broadcast, Shard(*data.get_single_element()))

    @tff.tensorflow.computation(state_type, contribution.type_signature.result)
    def finish(state, sent):
        after = round_.finish(state, Contribution(sent.total, sent.votes, sent.weight))
        return after, collections.OrderedDict(round=after.round_number, clip=after.clip)

    @tff.tensorflow.computation(state_type)
    def get_model_weights(state):
        return state.global_model_weights

    @tff.tensorflow.computation(state_type, get_model_weights.type_signature.result)
    def set_model_weights(state, weights):
        return AveragingState(*state)._replace(global_model_weights=weights)

    @tff.federated_computation()
    def initialize():
        return tff.federated_eval(initial_state, tff.SERVER)

    @tff.federated_computation(initialize.type_signature.result, tff.FederatedType(data_type, tff.CLIENTS))
    def next_round(state, client_data):
        to_clients = tff.federated_broadcast(tff.federated_map(broadcast, state))
        sent = tff.federated_sum(tff.federated_map(contribution, (to_clients, client_data)))
        after, measured = tff.federated_map(finish, (state, sent))
        return tff.learning.templates.LearningProcessOutput(after, measured)

    return _process_class()((initialize, next_round, get_model_weights, set_model_weights), packer=packer, **process)


def in_worker(computation: Any, prepare: Callable[..., tuple[Any, ...]] | None = None) -> Any:
    """A TFF computation that runs where `runtime` says, whichever thread calls it.

    Args:
        computation: What TFF made.
        prepare: Makes its arguments of those that it is called with; None for the same.
    """
    return _in_worker_class()(computation, prepare)


@functools.cache
def _in_worker_class() -> type:
    tff: Any = runtime.require_tff()

    class InWorker(tff.Computation):
        def __init__(self, inner: Any, prepare: Callable[..., tuple[Any, ...]] | None):
            self._inner, self._prepare = inner, prepare

        @property
        def type_signature(self) -> Any:
            return self._inner.type_signature

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            runtime.ensure_context()
            return self._inner(*self._prepare(*args, **kwargs)) if self._prepare else self._inner(*args, **kwargs)

        def __hash__(self) -> int:
            return hash(self._inner)

    return InWorker


@functools.cache
def _process_class() -> type:
    """The class of the processes; its bases are TFF's, which is not imported before it is needed."""
    tff: Any = runtime.require_tff()

    class Process(AveragingProcess, tff.learning.templates.LearningProcess):
        __doc__ = AveragingProcess.__doc__

        def __init__(self, computations: Sequence[Any], **process: Any):
            tff.learning.templates.LearningProcess.__init__(self, *computations)  # checks their types
            AveragingProcess.__init__(self, **process)
            initialize, next_round, get_model_weights, set_model_weights = computations
            self._initialize_fn = in_worker(initialize)
            self._next_fn = in_worker(next_round, self._as_data_sets)
            self._get_model_weights = in_worker(get_model_weights)
            self._set_model_weights = in_worker(set_model_weights)

        def _as_data_sets(self, state: Any, client_data: Sequence[Any]) -> tuple[Any, Any]:
            import tensorflow as tf

            state, shards = self._prepare(state, client_data)
            return state, [tf.data.Dataset.from_tensors(tuple(shard)) for shard in shards]

    Process.__name__ = Process.__qualname__ = "AveragingProcess"
    return Process
