"""Small random models with data and losses: what the property tests of the clipping engine draw from.

`build(seed)` makes everything from one integer: a functional Keras model (branches, nested models, several inputs and
outputs, layers called twice, a table tied to an output projection), the examples, and the compiled loss.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft.keras_compat import IS_KERAS_3, keras

layers = keras.layers
VOCABULARY = 6
ACTIVATIONS = ("tanh", "tanh", "elu", "gelu", "swish", "softplus", "sigmoid", "relu", None)


@dataclasses.dataclass(frozen=True)
class Case:
    """A compiled model with examples.

    Args:
      seed: what it was made from.
      model: the model, built, with weights that are neither zeros nor ones.
      x: the model's inputs, examples first.
      y: the labels of its outputs, examples first.
      weights: [n] sample weights, or None.
      losses: a Keras loss for each output.
      loss_weights: the weight of each output's loss.
      summed: whether losses are summed over a batch, rather than averaged.
      regularised: layers whose kernels are regularised.
      parts: what the model is made of, in words.
      traits: of "dropout", "masked", "learned mask", "recurrent", "activity", "table": what a property may have to know.
    """

    seed: int
    model: Any
    x: tuple[np.ndarray, ...]
    y: tuple[np.ndarray, ...]
    weights: np.ndarray | None
    losses: list
    loss_weights: list[float]
    summed: bool
    regularised: list
    parts: list[str]
    traits: frozenset[str]

    def compile(self, optimizer="sgd", **options) -> None:
        """Compiles the model with its losses."""
        one = len(self.losses) == 1
        losses, weights = (self.losses[0], None) if one else (self.losses, self.loss_weights)
        self.model.compile(optimizer, losses, loss_weights=weights, **options)

    def loss(self, x, y, weights) -> tf.Tensor:
        """The scalar that Keras trains on."""
        x, y, weights = (_alone_or_all(parts) for parts in (x, y, self.for_each_output(weights)))
        return self.model.compute_loss(x, y, self.model(x, training=True), weights)

    def for_each_output(self, weights) -> list:
        """The weights as Keras wants them: Keras 3 does not spread those of examples over time."""
        if weights is None:
            return [None]
        ranks = [len(output.shape) for output in self.model.outputs]
        return [weights[:, None] if IS_KERAS_3 and rank == 3 else weights for rank in ranks]

    def batches(self, rows: int, steps: int, *, drop_remainder: bool) -> tf.data.Dataset:
        """All examples `steps` times, for `fit`."""
        parts = [_alone_or_all(part) for part in (self.x, self.y, self.for_each_output(self.weights))]
        arrays = tuple(part for part in parts if part is not None)
        return tf.data.Dataset.from_tensor_slices(arrays).repeat(steps).batch(rows, drop_remainder=drop_remainder)

    def regularisers(self) -> tf.Tensor:
        """The part of the loss that depends on no example."""
        return tf.add_n([0.0 * tf.reduce_sum(self.variables[0])] + [_penalty(layer) for layer in self.regularised])

    @property
    def variables(self) -> list[tf.Variable]:
        """The trainable variables."""
        return [v.value if IS_KERAS_3 else v for v in self.model.trainable_variables]

    def __str__(self) -> str:
        return f"seed {self.seed}: " + ", ".join(self.parts)


def _alone_or_all(parts):
    return parts[0] if len(parts) == 1 else tuple(parts)


def _penalty(layer) -> tf.Tensor:
    return layer.kernel_regularizer(tf.convert_to_tensor(layer.kernel))


def build(
    seed: int, examples: int, *, without: tuple[str, ...] = (), weighted: bool | None = None, needs: str = ""
) -> Case:
    """A random case.

    Args:
      seed: of everything.
      examples: how many.
      without: traits that it must not have.
      weighted: whether there are sample weights; None leaves that to the seed.
      needs: "dropout" to have it for sure, or nothing.
    """
    keras.utils.set_random_seed(seed % 2**31)
    return _Architect(seed, without, needs).build(examples, weighted)


class LowRank(layers.Layer):
    """A frozen kernel plus a product of two thin matrices."""

    def __init__(self, units: int, **options):
        super().__init__(**options)
        self.units, self.supports_masking = units, True

    def build(self, shape):
        self.frozen = self.add_weight(
            name="frozen", shape=(shape[-1], self.units), trainable=False, initializer="normal"
        )
        self.a = self.add_weight(name="a", shape=(shape[-1], 2))
        self.b = self.add_weight(name="b", shape=(2, self.units))

    def call(self, inputs):
        frozen, a, b = (tf.convert_to_tensor(v) for v in (self.frozen, self.a, self.b))
        return tf.tanh(tf.tensordot(inputs, frozen + 0.5 * tf.matmul(a, b), 1))


class Positions(layers.Layer):
    """A learned row for each position."""

    def __init__(self, **options):
        super().__init__(**options)
        self.supports_masking = True

    def build(self, shape):
        self.rows = self.add_weight(name="rows", shape=tuple(shape[1:]))

    def call(self, inputs):
        return inputs + tf.convert_to_tensor(self.rows)


class TiedProjection(layers.Layer):
    """Scores for each token of a table that is an embedding too."""

    def __init__(self, table, by_einsum: bool, **options):
        super().__init__(**options)
        self.table, self.by_einsum, self.supports_masking = table, by_einsum, True

    def call(self, inputs):
        table = tf.convert_to_tensor(self.table.embeddings)
        if self.by_einsum:
            return tf.einsum("btd,vd->btv", inputs, table)
        return tf.matmul(inputs, table, transpose_b=True)


class _Architect:
    """Draws a model, part by part."""

    def __init__(self, seed: int, without: tuple[str, ...], needs: str):
        self.seed, self.without, self.needs = seed, without, needs
        self.random = np.random.default_rng(seed)
        self.parts: list[str] = []
        self.traits: set[str] = set()
        self.regularised: list = []
        self.tables: list = []

    # Choices.

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def pick(self, *options):
        return options[self.random.integers(len(options))]

    def size(self, low: int = 2, high: int = 5) -> int:
        return int(self.random.integers(low, high + 1))

    def may(self, trait: str, probability: float) -> bool:
        """Whether to have a trait, which is then noted."""
        if trait in self.without or not self.chance(probability):
            return False
        self.traits.add(trait)
        return True

    def put(self, layer, *inputs, note: str = "", **options):
        """Calls a layer and notes it."""
        name = type(layer).__name__
        if hasattr(layer, "layer"):
            name += f"[{type(layer.layer).__name__}]"
        self.parts.append(name + (f" ({note})" if note else ""))
        return layer(*inputs, **options)

    def options(self) -> dict:
        """Regularisers of a kernel and of what the layer puts out, now and then."""
        options = {}
        if self.chance(0.08):
            options["kernel_regularizer"] = keras.regularizers.L2(0.03)
        if self.may("activity", 0.05):
            options["activity_regularizer"] = keras.regularizers.L2(0.05)
        return options

    def kept(self, layer):
        """Remembers a layer that is regularised."""
        if getattr(layer, "kernel_regularizer", None) is not None:
            self.regularised.append(layer)
            self.parts.append("kernel regulariser")
        return layer

    # The whole.

    def build(self, examples: int, weighted: bool | None) -> Case:
        inputs = [self.input()]
        hidden = self.body(inputs[0], self.size(1, 3))
        if self.chance(0.25):
            inputs.append(self.input())
            hidden = self.joined(hidden, self.body(inputs[1], self.size(1, 2)))
        if self.needs == "dropout":
            self.traits.add("dropout")
            hidden = self.put(layers.Dropout(0.4), self.put(layers.Dense(4, "tanh"), hidden))
        count = 2 if self.chance(0.2) else 1
        summed = self.chance(0.3)
        heads = [self.head(hidden, summed) for _ in range(count)]
        outputs = [h[0] for h in heads]
        model = keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs if count > 1 else outputs[0])
        self.stir(model)
        weights = None
        if self.chance(0.5) if weighted is None else weighted:
            weights = self.random.choice([0.0, 0.5, 1.0, 1.0, 3.0], examples).astype(keras.backend.floatx())
            self.parts.append("sample weights")
        loss_weights = [1.0] if count == 1 else [0.5, 2.0]
        case = Case(
            self.seed,
            model,
            tuple(self.data(t, examples) for t in inputs),
            tuple(h[2](examples) for h in heads),
            weights,
            [h[1] for h in heads],
            loss_weights,
            summed,
            self.regularised,
            self.parts,
            frozenset(self.traits),
        )
        case.compile()
        return case

    def input(self):
        kind = self.pick("vector", "sequence", "sequence", "image", "image", "volume", "tokens", "tokens")
        self.parts.append(kind)
        if kind == "tokens":
            return layers.Input((self.size(3, 6),), dtype="int32")
        shape = {
            "vector": (self.size(),),
            "sequence": (self.size(3, 6), self.size()),
            "image": (self.size(5, 8), self.size(5, 8), self.size(1, 4)),
            "volume": (self.size(4, 5), self.size(4, 5), self.size(4, 5), self.size(1, 2)),
        }[kind]
        return layers.Input(shape)

    def data(self, tensor, examples: int) -> np.ndarray:
        shape = (examples, *tensor.shape[1:])
        if "int" in str(tensor.dtype):
            return self.random.integers(0, VOCABULARY, shape).astype(np.int32)
        return self.random.normal(size=shape).astype(keras.backend.floatx())

    def stir(self, model) -> None:
        """Moves weights away from zeros and ones, where gradients may be zero or rules be right by chance."""
        for variable in model.trainable_variables:
            value = np.asarray(variable)
            variable.assign(value + 0.3 * self.random.normal(size=value.shape).astype(value.dtype))
        for layer in _all_layers(model):
            if isinstance(layer, layers.BatchNormalization):
                layer.moving_mean.assign(self.random.normal(size=layer.moving_mean.shape))
                layer.moving_variance.assign(self.random.uniform(0.5, 2.0, layer.moving_variance.shape))

    def body(self, hidden, blocks: int):
        if len(hidden.shape) == 2 and "int" in str(hidden.dtype):
            hidden = self.embedding(hidden)
        for _ in range(blocks):
            hidden = self.block(hidden)
        return hidden

    def block(self, hidden):
        rank = len(hidden.shape)
        if self.chance(0.12):
            return self.nested(hidden)
        if self.may("dropout", 0.06):
            return self.put(layers.Dropout(0.4), hidden)
        if self.chance(0.12):
            return self.residual(hidden)
        common = [self.dense, self.normalisation, self.slopes, self.twice, self.low_rank]
        by_rank = {
            2: [*common, self.dense, self.einsum_of_vector, self.to_sequence],
            3: [
                *common,
                *[self.convolution] * 3,
                *[self.attention] * 3,
                *[self.einsum_of_sequence] * 2,
                self.pooling,
                self.positions,
                self.over_time,
                self.recurrent,
                self.masking,
            ],
            4: [*common, *[self.convolution] * 6, self.pooling, self.pooling, self.to_sequence],
            5: [*[self.convolution] * 4, self.pooling, self.normalisation],
        }
        return self.pick(*by_rank[rank])(hidden)

    # Parts that fit any rank.

    def dense(self, hidden):
        return self.put(self.kept(layers.Dense(self.size(), self.pick(*ACTIVATIONS), **self.options())), hidden)

    def low_rank(self, hidden):
        if not self.keras_adapts() or self.chance(0.5):
            return self.put(LowRank(self.size()), hidden)
        layer = layers.Dense(self.size(), self.pick(*ACTIVATIONS))
        result = self.put(layer, hidden, note="low rank")
        layer.enable_lora(2)
        return result

    def keras_adapts(self) -> bool:
        """Whether Keras has low-rank pairs of its own, in the precision of the model: they are always float32."""
        return IS_KERAS_3 and keras.backend.floatx() == "float32"

    def normalisation(self, hidden):
        channels = hidden.shape[-1]
        kinds = ["layer", "batch"]
        # Of two numbers or one, the norm or the spread may be all there is.
        kinds += ["unit"] if channels > 2 else []
        kinds += ["group"] if len(hidden.shape) > 2 else []
        kinds += ["rms"] if IS_KERAS_3 and channels > 2 else []
        kind = self.pick(*kinds)
        if kind == "layer":
            axis = list(range(1, len(hidden.shape))) if channels <= 2 or self.chance(0.3) else -1
            options = {"epsilon": 1e-2, "center": self.chance(0.8), "scale": self.chance(0.8)}
            return self.put(layers.LayerNormalization(axis, **options), hidden)
        if kind == "batch":
            return self.put(layers.BatchNormalization(trainable=False), hidden, note="frozen")
        if kind == "unit":
            return self.put(layers.UnitNormalization(), hidden)
        if kind == "rms":
            return self.put(layers.RMSNormalization(epsilon=1e-2), hidden)
        groups = self.pick(*[g for g in range(1, channels + 1) if channels % g == 0])
        return self.put(layers.GroupNormalization(groups, epsilon=1e-2), hidden)

    def slopes(self, hidden):
        rank = len(hidden.shape)
        axes = self.pick(None, list(range(1, rank - 1)) or None)
        return self.put(layers.PReLU(shared_axes=axes), hidden)

    def twice(self, hidden):
        rank, width = len(hidden.shape), hidden.shape[-1]
        kinds = [lambda: self.kept(layers.Dense(width, "tanh", **self.options()))]
        kinds += [lambda: layers.LayerNormalization(epsilon=1e-2)] if width > 2 else []
        if rank in (3, 4):
            kind = layers.Conv1D if rank == 3 else layers.Conv2D
            kinds.append(lambda: kind(width, 2, padding="same", activation="tanh"))
        if rank == 3:
            kinds.append(lambda: layers.EinsumDense("abc,cd->abd", (hidden.shape[1], width), activation="tanh"))
        layer = self.pick(*kinds)()
        first = self.put(layer, hidden, note="called twice")
        if self.chance(0.5):
            return layer(first)
        return layers.Add()([first, layer(layers.Activation("tanh")(hidden))])

    def residual(self, hidden):
        rank, width = len(hidden.shape), hidden.shape[-1]
        branch = self.block(hidden) if rank < 5 else hidden
        self.parts.append("residual")
        if rank != len(branch.shape) or tuple(branch.shape[1:-1]) != tuple(hidden.shape[1:-1]):
            return self.joined(hidden, branch)
        if branch.shape[-1] != width:
            branch = self.put(layers.Dense(width), branch)
        return self.put(self.pick(layers.Add, layers.Multiply, layers.Concatenate)(), [hidden, branch])

    def joined(self, one, other):
        one, other = self.to_vector(one), self.to_vector(other)
        return self.put(layers.Concatenate(), [one, other])

    def nested(self, hidden):
        if len(hidden.shape) == 5:
            return self.convolution(hidden)
        inside = layers.Input(tuple(hidden.shape[1:]))
        self.parts.append("[")
        model = keras.Model(inside, self.block(inside))
        self.parts.append("] nested")
        if self.chance(0.3) and len(hidden.shape) == 3:
            self.parts.append("called twice")
            return self.joined(model(hidden), model(layers.Activation("tanh")(hidden)))
        return model(hidden)

    def to_vector(self, hidden):
        rank = len(hidden.shape)
        if rank == 2:
            return hidden
        pools = {
            3: [layers.GlobalAveragePooling1D, layers.GlobalMaxPooling1D],
            4: [layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D],
            5: [layers.GlobalAveragePooling3D],
        }[rank]
        return self.put(self.pick(layers.Flatten, *pools)(), hidden)

    def to_sequence(self, hidden):
        if len(hidden.shape) == 2:
            return self.put(layers.RepeatVector(3), hidden)
        return self.put(layers.Reshape((-1, hidden.shape[-1])), hidden)

    # Products.

    def einsum_of_vector(self, hidden):
        if self.chance(0.5):
            return self.put(layers.EinsumDense("ab,bc->ac", self.size(), bias_axes="c", activation="tanh"), hidden)
        heads = self.put(layers.EinsumDense("ab,bcd->acd", (2, self.size())), hidden, note="heads")
        return self.put(layers.Flatten(), heads)

    def einsum_of_sequence(self, hidden):
        kind = self.pick("plain", "heads", "over time", "there and back")
        width, time = hidden.shape[-1], hidden.shape[1]
        note = {"note": kind}
        if kind == "plain":
            bias = self.pick(None, "d")
            return self.put(layers.EinsumDense("abc,cd->abd", (time, self.size()), bias_axes=bias), hidden, **note)
        if kind == "over time":
            return self.put(layers.EinsumDense("abc,bd->adc", (self.size(), width), bias_axes="d"), hidden, **note)
        heads = layers.EinsumDense("abc,cde->abde", (time, 2, self.size()), bias_axes="de")
        many = self.put(heads, hidden, note="heads")
        if kind == "there and back":
            return self.put(layers.EinsumDense("abde,def->abf", (time, self.size())), many, **note)
        return self.put(layers.Reshape((time, -1)), many)

    def attention(self, hidden):
        options = {"value_dim": self.size(2, 3)} if self.chance(0.3) else {}
        layer = layers.MultiHeadAttention(self.size(1, 2), self.size(2, 3), use_bias=self.chance(0.7), **options)
        kind = self.pick("self", "cross", "masked", "causal")
        if kind == "cross":
            memory = self.put(layers.Dense(self.size(), "tanh"), hidden[:, :2])
            return self.put(layer, hidden, memory, note=kind)
        call: dict = {"use_causal_mask": True} if kind == "causal" else {}
        if kind == "masked":
            call["attention_mask"] = layers.Lambda(lambda t: t[:, None, :, 0] > 0, output_shape=(1, hidden.shape[1]))(
                hidden
            )
        return self.put(layer, hidden, hidden, note=kind, **call)

    def embedding(self, tokens):
        self.traits.add("table")
        masked = self.may("masked", 0.4)
        table = layers.Embedding(VOCABULARY, self.size(), mask_zero=masked)
        if self.chance(0.4):
            self.tables.append(table)
        hidden = self.put(table, tokens, note="mask_zero" if masked else "")
        if self.keras_adapts() and self.chance(0.15) and table not in self.tables:
            self.parts.append("low rank")
            table.enable_lora(2)
        if self.chance(0.15):
            other = self.put(table, layers.Lambda(lambda t: (t * 5 + 1) % VOCABULARY)(tokens), note="again")
            hidden = layers.Add()([hidden, other])
        return hidden

    # Sequences.

    def positions(self, hidden):
        return self.put(Positions(), hidden)

    def over_time(self, hidden):
        layer = layers.Dense(self.size(), "tanh")
        return self.put(layers.TimeDistributed(layer), hidden)

    def masking(self, hidden):
        if not self.may("masked", 0.7):
            return self.dense(hidden)
        self.traits.add("learned mask")
        shifted = layers.Lambda(lambda t: tf.where(t[:, :, :1] > 0.8, tf.zeros_like(t), t))(hidden)
        return self.put(layers.Masking(), shifted)

    def recurrent(self, hidden):
        if not self.may("recurrent", 0.25):
            return self.dense(hidden)
        kind = self.pick(layers.LSTM, layers.GRU, layers.SimpleRNN)
        return self.put(kind(self.size(), return_sequences=self.chance(0.5)), hidden)

    # Convolutions.

    def convolution(self, hidden):
        axes = len(hidden.shape) - 2
        kinds = ["plain", "plain", "strided", "dilated", "grouped", "transposed"]
        kinds += ["depthwise", "separable"] if axes < 3 else []
        kind = self.pick(*kinds)
        channels, width, sizes = hidden.shape[-1], self.size(), hidden.shape[1:-1]
        activation, padding = self.pick(*ACTIVATIONS), self.pick("same", "valid")
        largest = min(3, min(sizes))
        kernel = self.size(1, largest) if axes == 1 or self.chance(0.5) else tuple(
            self.size(1, largest) for _ in range(axes)
        )  # fmt: skip
        options: dict = {"activation": activation, "padding": padding, "use_bias": self.chance(0.7)}
        name = f"Conv{axes}D"
        if kind == "strided":
            options["strides"] = 2
        elif kind == "dilated":
            options.update(dilation_rate=2, padding="same")
        elif kind == "grouped":
            groups = self.pick(*[g for g in range(1, channels + 1) if channels % g == 0])
            options["groups"], width = groups, groups * self.size(1, 2)
        elif kind == "transposed":
            name, options["strides"] = name + "Transpose", self.pick(1, 2) if max(sizes) < 9 else 1
        elif kind == "separable":
            name, options["depth_multiplier"] = "Separable" + name, self.pick(1, 2)
        if options.get("strides", 1) > 1 and np.max(kernel) == 1:
            # TensorFlow's own gradient of such a kernel over few channels writes beyond its memory on some CPUs, and ends
            # the process (oneDNN, issue 6035).
            options["strides"] = 1
        if kind == "depthwise":
            strides = {"strides": 2} if self.chance(0.4) else {}
            layer = getattr(layers, "Depthwise" + name)(kernel, depth_multiplier=self.pick(1, 2), **options, **strides)
        else:
            if kind in ("plain", "strided"):
                options.update(self.options())
            layer = self.kept(getattr(layers, name)(width, kernel, **options))
        details = " ".join(f"{k}={v}" for k, v in options.items() if k in ("padding", "strides", "groups"))
        return self.put(layer, hidden, note=f"{kind} {kernel} {details}")

    def pooling(self, hidden):
        axes = len(hidden.shape) - 2
        if min(hidden.shape[1:-1]) < 2 or (axes == 3 and keras.backend.floatx() == "float64"):
            return self.dense(hidden)  # TensorFlow pools volumes in single precision only
        name = self.pick("Average", "Average", "Max") + f"Pooling{axes}D"
        options = {"strides": self.pick(None, 1), "padding": self.pick("same", "valid")}
        return self.put(getattr(layers, name)(2, **options), hidden)

    # Outputs.

    def head(self, hidden, summed: bool):
        """An output, its loss, and a function that draws labels."""
        reduction = "sum" if summed else "sum_over_batch_size"
        per_step = len(hidden.shape) == 3 and self.chance(0.6)
        if not per_step:
            hidden = self.to_vector(hidden)
        lead = tuple(hidden.shape[1:-1])
        kind = self.pick("classes", "classes", "probabilities", "mse", "huber", "bce")
        note = f"head, {kind} over {('B', *lead)}, {reduction}"
        if kind in ("classes", "probabilities"):
            if per_step and self.tables:
                table = self.tables[0]
                scores = self.put(layers.Dense(table.output_dim, "tanh"), hidden)
                output, count = self.put(TiedProjection(table, self.chance(0.5)), scores, note=note), VOCABULARY
            else:
                count = self.size(2, 4)
                output = self.put(layers.Dense(count), hidden, note=note)
            logits = kind == "classes"
            output = output if logits else layers.Activation("softmax")(output)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=logits, reduction=reduction)
            return output, loss, lambda n: self.random.integers(0, count, (n, *lead)).astype(np.int32)
        width, floatx = self.size(1, 3), keras.backend.floatx()
        output = self.put(layers.Dense(width), hidden, note=note)
        if kind == "bce":
            loss = keras.losses.BinaryCrossentropy(from_logits=True, reduction=reduction)
            return output, loss, lambda n: self.random.integers(0, 2, (n, *lead, width)).astype(floatx)
        kinds = {"mse": keras.losses.MeanSquaredError, "huber": keras.losses.Huber}
        loss = kinds[kind](reduction=reduction)
        return output, loss, lambda n: self.random.normal(size=(n, *lead, width)).astype(floatx)


def _all_layers(model) -> list:
    return list(model._flatten_layers(include_self=False, recursive=True))
