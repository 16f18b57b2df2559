"""Layers of Keras 2 with low-rank adapters, written as Keras 3's own `enable_lora` is: kernel = frozen + scale A B.

The kernel and the bias are frozen for good, and A and B are trained. To load a saved model that has one of them, import
this module first.
"""

from typing import Any

import tensorflow as tf

from tfprivacy_ft import keras_compat
from tfprivacy_ft.keras_compat import keras

# Attributes of Keras's MultiHeadAttention that hold layers, in the order in which it makes them.
_ATTENTION_PARTS = ("_query_dense", "_key_dense", "_value_dense", "_softmax", "_dropout_layer", "_output_dense")

_Mixin: Any = object  # stands for the Keras layer that is mixed into


class _LowRankKernel(_Mixin):
    """A layer's kernel plus `lora_alpha / lora_rank` times A B, A of the kernel's shape but its last axis, B of rank rows."""

    def __init__(self, *args, lora_rank: int, lora_alpha: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha

    def build(self, input_shape):
        super().build(input_shape)
        shape, regularizer = tuple(self._kernel.shape), self.kernel_regularizer
        a, b = (*shape[:-1], self.lora_rank), (self.lora_rank, shape[-1])
        self.lora_kernel_a = self.add_weight("lora_kernel_a", a, initializer="he_uniform", regularizer=regularizer)
        self.lora_kernel_b = self.add_weight("lora_kernel_b", b, initializer="zeros", regularizer=regularizer)

    @property
    def kernel(self):
        product = tf.tensordot(self.lora_kernel_a, self.lora_kernel_b, 1)
        return self._kernel + self.lora_alpha / self.lora_rank * product

    @kernel.setter
    def kernel(self, value):
        self._kernel = value

    @property
    def trainable_weights(self):
        return [self.lora_kernel_a, self.lora_kernel_b] if self.built and self.trainable else []

    @property
    def non_trainable_weights(self):
        trained = {id(weight) for weight in self.trainable_weights}
        return [weight for weight in keras_compat.own_weights(self) if id(weight) not in trained]

    def get_config(self):
        return {**super().get_config(), "lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}


@keras.utils.register_keras_serializable("tfprivacy_ft")
class LoRADense(_LowRankKernel, keras.layers.Dense):
    """Dense with a low-rank adapter."""


@keras.utils.register_keras_serializable("tfprivacy_ft")
class LoRAEinsumDense(_LowRankKernel, keras.layers.EinsumDense):
    """EinsumDense with a low-rank adapter."""


@keras.utils.register_keras_serializable("tfprivacy_ft")
class LoRAConv1D(_LowRankKernel, keras.layers.Conv1D):
    """Conv1D with a low-rank adapter."""


@keras.utils.register_keras_serializable("tfprivacy_ft")
class LoRAConv2D(_LowRankKernel, keras.layers.Conv2D):
    """Conv2D with a low-rank adapter."""


@keras.utils.register_keras_serializable("tfprivacy_ft")
class LoRAConv3D(_LowRankKernel, keras.layers.Conv3D):
    """Conv3D with a low-rank adapter."""


@keras.utils.register_keras_serializable("tfprivacy_ft")
class LoRAMultiHeadAttention(keras.layers.MultiHeadAttention):
    """MultiHeadAttention some of whose projections have adapters: of "query", "key", "value", "attention_output"."""

    def __init__(self, *args, lora_rank: int, lora_alpha: float, lora_projections, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora_rank, self.lora_alpha, self.lora_projections = lora_rank, lora_alpha, list(lora_projections)

    def _build_from_signature(self, query, value, key=None):
        super()._build_from_signature(query, value, key)
        for name in _ATTENTION_PARTS:  # all are set anew, in the order of a plain layer, and so are then its weights
            part = getattr(self, name)
            delattr(self, name)
            setattr(self, name, self._adapted(part) if part.name in self.lora_projections else part)

    def _adapted(self, layer):
        rank = {"lora_rank": self.lora_rank, "lora_alpha": self.lora_alpha}
        return LoRAEinsumDense.from_config({**layer.get_config(), **rank})

    def get_config(self):
        adapters = {name: getattr(self, name) for name in ("lora_rank", "lora_alpha")}
        return {**super().get_config(), **adapters, "lora_projections": list(self.lora_projections)}


ADAPTED = {
    keras.layers.Dense: LoRADense,
    keras.layers.EinsumDense: LoRAEinsumDense,
    keras.layers.Conv1D: LoRAConv1D,
    keras.layers.Conv2D: LoRAConv2D,
    keras.layers.Conv3D: LoRAConv3D,
    keras.layers.MultiHeadAttention: LoRAMultiHeadAttention,
}
