"""Everything that differs between Keras 2.14 and Keras 3, and the little of TensorFlow that has no public name."""

import importlib.metadata
import sys
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops

keras = tf.keras
IS_KERAS_3 = int(importlib.metadata.version("keras").partition(".")[0]) >= 3


def inside_xla() -> bool:
    """Whether the graph under construction is compiled by XLA (`jit_compile=True`)."""
    graph: Any = tf.compat.v1.get_default_graph()
    while graph is not None:
        context = graph._get_control_flow_context()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
        graph = getattr(graph, "outer_graph", None)
    return False


def fit_arguments(model: Any) -> dict[str, Any] | None:
    """The arguments of the `model.fit` that is running now, or None where none is.

    Keras tells its callbacks neither the data nor the batch size. The public parameters of `fit` are read from its
    frame; where that fails nothing is known, which the accounts take for the worst case.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if (
            frame.f_code.co_name == "fit"
            and frame.f_locals.get("self") is model
            and "steps_per_epoch" in frame.f_locals
        ):
            return {name: frame.f_locals.get(name) for name in ("x", "y", "batch_size", "steps_per_epoch", "shuffle")}
        frame = frame.f_back
    return None


def is_swish(op: tf.Operation) -> bool:
    """Whether `op` is the IdentityN by which `tf.nn.swish` saves memory: its gradient is that of its first input.

    TensorFlow overrides the gradient of that op by a Python function, which is found in the registry by its name.
    """
    if op.type != "IdentityN" or "_gradient_op_type" not in op.node_def.attr:
        return False
    function = ops.get_gradient_function(op)
    for name in ("tape_grad_fn", "grad_fn"):
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if name not in cells:
            return False
        function = cells[name].cell_contents
    return f"{function.__module__}.{function.__qualname__}".startswith("tensorflow.python.ops.nn_impl.swish.")
