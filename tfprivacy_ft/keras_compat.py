"""Everything that differs between Keras 2.14 and Keras 3, and the little of TensorFlow that has no public name."""

import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import function_def_to_graph, ops

from tfprivacy_ft.errors import RawGradientsError, UnsupportedBackendError, UnsupportedModelError

keras: Any = tf.keras
IS_KERAS_3 = int(importlib.metadata.version("keras").partition(".")[0]) >= 3


def _check_backend() -> None:
    """Refuses the other backends of Keras 3, before they are imported if an environment variable names them."""
    named = os.environ.get("KERAS_BACKEND") if "keras" not in sys.modules else None
    backend = named or keras.config.backend()
    if backend != "tensorflow":
        raise UnsupportedBackendError(
            f"Keras runs on the backend {backend!r}, and private training needs TensorFlow's: set KERAS_BACKEND=tensorflow "
            "before Keras is imported."
        )


if IS_KERAS_3:
    _check_backend()

LOSS_SCOPE = "compile_loss"  # in which Keras 3 computes losses, and keeps the means that it shows of them


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
    frame: Any = sys._getframe(1)
    while frame is not None:
        if (
            frame.f_code.co_name == "fit"
            and frame.f_locals.get("self") is model
            and "steps_per_epoch" in frame.f_locals
        ):
            arguments = {name: frame.f_locals.get(name) for name in ("x", "y", "batch_size", "steps_per_epoch")}
            callbacks = frame.f_locals.get("callbacks")  # by now Keras's own list of them
            return arguments | {"callbacks": list(getattr(callbacks, "callbacks", callbacks) or [])}
        frame = frame.f_back
    return None


def tensorflow_variable(variable: Any) -> tf.Variable:
    """The TensorFlow variable behind one of Keras's."""
    return variable.value if IS_KERAS_3 and not isinstance(variable, tf.Variable) else variable


def name_of(variable: Any) -> str:
    """A variable's name with its layer's, as this Keras shows it."""
    return getattr(variable, "path", None) or variable.name.removesuffix(":0")


def layer_path(variable: tf.Variable) -> str:
    """The path of the layer that a variable belongs to, such as `body/dense_1`; its own name where it has none."""
    name = variable.name.partition(":")[0]
    return name.rpartition("/")[0] or name


def short_name(weight: Any) -> str:
    """A weight's name in its own layer, such as `kernel`."""
    return name_of(weight).rpartition("/")[2]


def own_trainable_weights(layer: Any) -> list[Any]:
    """Weights of a layer itself, and not of layers inside it, that Keras trains where nothing is frozen."""
    return list(layer._trainable_variables if IS_KERAS_3 else layer._trainable_weights)


def own_weights(layer: Any) -> list[Any]:
    """Weights of a layer itself, and not of layers inside it, in an order that freezing does not change."""
    others = layer._non_trainable_variables if IS_KERAS_3 else layer._non_trainable_weights
    return [*own_trainable_weights(layer), *others]


def layers_inside(layer: Any, *, nested: bool = True) -> list[Any]:
    """The layers that a layer or model is made of; with those inside of them if `nested`."""
    return list(layer._flatten_layers(recursive=nested, include_self=False))


def function_definition(graph: Any, name: str) -> Any:
    """The definition of a function that ops of `graph` call; None where it cannot be had."""
    while graph is not None:
        found = graph._get_function(name)
        if found is not None:
            return found.definition if hasattr(found, "definition") else found.function_def
        graph = getattr(graph, "outer_graph", None)
    return None


def function_body(definition: Any) -> Any:
    """A function of a graph as a graph of its own, with its `inputs` and `outputs`."""
    return function_def_to_graph.function_def_to_graph(definition)


def sources_of(dataset: tf.data.Dataset) -> list[tf.data.Dataset]:
    """The data sets that this step of a pipeline reads from."""
    return dataset._inputs()


def steps_per_execution(model: Any) -> int:
    """How many steps the model's training function runs at once."""
    public = getattr(model, "steps_per_execution", None)
    value = getattr(model, "_steps_per_execution", None) if public is None else public
    return 1 if value is None else int(value)


def is_saved_model(layer: Any) -> bool:
    """Whether a layer is a whole SavedModel, as Keras 3 loads it: a file of the layer has its path, and none of its weights."""
    return isinstance(layer, getattr(keras.layers, "TFSMLayer", ()))


def copy_of_layer(layer: Any) -> Any:
    """The layer made again of its configuration, with other weights."""
    if not is_saved_model(layer):
        return type(layer).from_config(layer.get_config())
    # Keras makes none of a file that may be somebody else's. This one runs in this process already.
    names = ("filepath", "call_endpoint", "call_training_endpoint", "trainable", "name")
    return type(layer)(**{name: getattr(layer, name) for name in names})


def write_saved_model(model: Any, folder: str) -> None:
    """Writes a SavedModel that computes what the model does, and has all that it needs."""
    if IS_KERAS_3:
        model.export(folder, verbose=False)
    else:
        model.save(folder, save_format="tf")


def clone_model(model: Any, clone_function: Callable[[Any], Any]) -> Any:
    """A functional model of the layers that `clone_function` makes of the model's, not compiled."""
    # Keras 3 compiles the clone of a compiled model, and would make an optimizer for it.
    bare = keras.Model(model.input, model.output, name=model.name)
    # It also calls new layers with all that the old ones were called with, such as a mask of None.
    options = {"call_function": _call_with_known_arguments} if IS_KERAS_3 else {}
    return keras.models.clone_model(bare, clone_function=clone_function, **options)


def _call_with_known_arguments(layer: Any, *args: Any, **kwargs: Any) -> Any:
    is_group_norm = isinstance(layer, keras.layers.GroupNormalization)
    return layer(args[0]) if is_group_norm else layer(*args, **kwargs)


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


_Mixin: Any = object  # stands for the Keras optimizer class that a hook is mixed into


class _Keras2Hook(_Mixin):
    """Keras 2.14 hands the loss to `compute_gradients`, and its result to `apply_gradients`."""

    def compute_gradients(self, loss, var_list, tape=None):
        """Private gradients of `loss` for `var_list`, as pairs (gradient, variable)."""
        if callable(loss):
            raise UnsupportedModelError("the loss is a function: give a loss tensor computed inside a tf.function.")
        variables = list(var_list() if callable(var_list) else var_list)
        self._made = list(zip(self.private_gradients(loss, variables), variables, strict=True))
        return self._made

    def apply_gradients(self, grads_and_vars, name=None, **kwargs):
        """Applies gradients that `compute_gradients` made, and no others."""
        pairs, made = list(grads_and_vars), getattr(self, "_made", [])
        self._made = []
        if len(pairs) != len(made) or any(g is not m for (g, _), (m, _) in zip(pairs, made, strict=True)):
            raise _raw_gradients()
        with tf.init_scope():
            self.build([v for _, v in pairs])
        update = super().apply_gradients
        self.mechanism.update(lambda: update(pairs, name=name, **kwargs))
        return self.iterations


class _Keras3Hook(_Mixin):
    """Keras 3 shows the loss to `scale_loss`, and calls `apply` with gradients that are not used here."""

    def scale_loss(self, loss):
        """Remembers the traced loss of this step."""
        self._loss = loss
        return super().scale_loss(loss)

    def apply(self, grads, trainable_variables=None):
        """Applies the private gradients of the loss that was shown to `scale_loss`; `grads` is not looked at."""
        loss, self._loss = getattr(self, "_loss", None), None
        if loss is None:
            raise _raw_gradients()
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        private = self.private_gradients(loss, [tensorflow_variable(v) for v in variables])
        if not self.built:
            with tf.init_scope():
                self.build(variables)
        update = super().apply
        self.mechanism.update(lambda: update(private, variables))


OptimizerHook = _Keras3Hook if IS_KERAS_3 else _Keras2Hook


_NO_WRAPPER = (
    "compile is called with auto_scale_loss=False"
    if IS_KERAS_3
    else "layers get dtype='mixed_float16' and the global policy stays float32"
)


def _raw_gradients() -> RawGradientsError:
    return RawGradientsError(
        "apply_gradients was given gradients that are not what this DP optimizer clipped and noised: train with model.fit "
        "or train_on_batch, with no LossScaleOptimizer around it (under mixed_float16 Keras adds one unless "
        f"{_NO_WRAPPER}; give loss_scale to this optimizer), or call optimizer.minimize on a loss inside a tf.function."
    )
