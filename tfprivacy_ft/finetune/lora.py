"""Low-rank adapters (LoRA): a few trained numbers beside each frozen kernel, and the plain model with both merged.

Promises: the adapted model gives the outputs of the model it was made from until it is trained; all but adapters and head
stay bit-identical; per-example clipping takes them on its fast path. The model that is given is left as it is.

On Keras 3 these are the layers' own adapters (`enable_lora`), on Keras 2 layers of `lora_layers`. A file or a weights file
of an adapted Keras 3 model holds merged kernels and adapters of zeros, from which no gradient leads away: to go on with
one, `add_lora(merge_lora(model))`. `get_weights` and `tf.train.Checkpoint` keep kernels and adapters apart.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from tfprivacy_ft import _check, keras_compat
from tfprivacy_ft.errors import InvalidArgumentError, UnsupportedModelError
from tfprivacy_ft.finetune import trainable
from tfprivacy_ft.keras_compat import IS_KERAS_3, keras

__all__ = ["add_lora", "merge_lora"]

_DENSE = (keras.layers.Dense, keras.layers.EinsumDense)
_KINDS = (*_DENSE, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)

Layers = Iterable[str] | Callable[[Any], bool]


def add_lora(
    model: Any, rank: int = 4, layers: Layers | None = None, alpha: float | None = None, *, also_last: bool = True
) -> Any:
    """A copy of a model with a low-rank adapter beside the kernels of some layers, everything else frozen.

    An adapted kernel W is W + alpha / rank * A B. B starts as zeros, so outputs are those of `model`.

    Args:
        model: A built functional or Sequential Keras model, or on Keras 3 one that can be made from its config, such as a
            KerasHub backbone. It is left as it is.
        rank: Columns of A and rows of B, >= 1.
        layers: Names of layers, or a function of a layer that says whether to adapt it; asked are all Dense, EinsumDense
            and Conv layers, those that MultiHeadAttention is made of ("query", "key", "value", "attention_output") among
            them. The name of a layer or model stands for all that are inside it, too. None: every Dense and EinsumDense but
            the last layer. On Keras 2, layers inside of layers of one's own cannot be adapted.
        alpha: Scale of the adapters, > 0; None for `rank`, that is a factor of 1.
        also_last: Whether to train the last layer, the head, as a whole if it got no adapter.

    Returns:
        A new, uncompiled model with the trained weights in `trainable_variables`.

    Raises:
        InvalidArgumentError: An argument is outside its range, or a name fits no layer that can be adapted.
        UnsupportedModelError: No layer can be adapted, one has a kernel constraint, the model has adapters already, or it
            cannot be copied.

    Example:
        >>> from tfprivacy_ft import models
        >>> model = models.build_model("mlp", input_shape=(4,), num_outputs=3, hidden_units=(8,))
        >>> [tuple(v.shape) for v in add_lora(model, rank=2, also_last=False).trainable_variables]
        [(4, 2), (2, 8)]

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, https://arxiv.org/abs/2106.09685;
        with differential privacy: Yu et al., ICLR 2022, https://arxiv.org/abs/2110.06500.
    """
    _check.positive_integer(rank=rank)
    _check.boolean(also_last=also_last)
    if alpha is not None:
        _check.positive(alpha=alpha)
    head = trainable.last_layer(model)
    if any(_is_adapted(layer) for layer in keras_compat.layers_inside(model)):
        raise UnsupportedModelError(f"Model {model.name!r} has adapters already: call merge_lora on it first.")
    chosen = _chosen(list(_places(model)), layers, head)
    for layer in chosen:
        if layer.kernel_constraint is not None:
            raise UnsupportedModelError(
                f"layer {layer.name!r} has a kernel constraint, which does not hold for a kernel with an adapter: leave it "
                "out of `layers`, or make it without the constraint."
            )
    new, twins = _adapted_copy(model, chosen, rank, rank if alpha is None else alpha)
    adapted = [twins[id(layer)] for layer in chosen]
    wanted = [weight for layer in adapted for weight in _adapter(layer)]
    if also_last and not any(layer is head for layer in chosen):
        wanted += trainable.trained_by_keras([twins[id(head)]])
    trainable.train_only(new, wanted)
    if IS_KERAS_3:  # the layers of `lora_layers` never train another weight
        _freeze_all_but_adapters(adapted)
    return new


def merge_lora(model: Any) -> Any:
    """The plain Keras model that a model with adapters computes: no adapter, no layer of this library.

    Weights beside which there is no adapter are bit-identical; an adapted kernel becomes W + alpha / rank * A B.

    Args:
        model: What `add_lora` returned, trained or not, or a model whose layers have adapters by Keras 3's `enable_lora`.
            It is left as it is.

    Returns:
        A new, uncompiled model, all of it trainable but for BatchNormalization.

    Raises:
        UnsupportedModelError: The model has no adapter, or it cannot be copied.

    Example:
        >>> from tfprivacy_ft import models
        >>> model = models.build_model("mlp", input_shape=(4,), num_outputs=3, hidden_units=(8,))
        >>> [tuple(v.shape) for v in merge_lora(add_lora(model)).weights]
        [(4, 8), (8,), (8, 3), (3,)]

    Source: Hu et al. 2022, section 4.1.
    """
    inside = keras_compat.layers_inside(model)
    if not any(_is_adapted(layer) for layer in inside):
        raise UnsupportedModelError(f"Model {model.name!r} has no adapter: there is nothing to merge.")
    new = _copy(model, _without_adapter)
    _copy_weights(model, new)
    trainable.train_all(new)
    return new


@dataclasses.dataclass(frozen=True)
class _Place:
    """A layer that can be adapted, and the names of the layers and models that it is inside of."""

    layer: Any
    within: tuple[str, ...] = ()


def _places(container: Any, within: tuple[str, ...] = ()) -> Iterator[_Place]:
    if not (IS_KERAS_3 or _is_plain_graph(container) or type(container) is keras.layers.MultiHeadAttention):
        return  # Keras 2 makes only these anew with other layers inside
    for layer in keras_compat.layers_inside(container, nested=False):
        if type(layer) in _KINDS:
            yield _Place(layer, within)
        else:
            yield from _places(layer, (*within, layer.name))


def _chosen(places: list[_Place], layers: Layers | None, head: Any) -> list[Any]:
    """The layers to adapt, each once."""
    if layers is None:
        found = [p.layer for p in places if type(p.layer) in _DENSE and p.layer is not head]
    elif callable(layers):
        found = [p.layer for p in places if layers(p.layer)]
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        known = {name for p in places for name in (p.layer.name, *p.within)}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InvalidArgumentError(
                f"layers={names!r} names {unknown[0]!r}, which is no layer that can be adapted: give some of "
                f"{sorted(known)}."
            )
        found = [p.layer for p in places if not {p.layer.name, *p.within}.isdisjoint(names)]
    if not found:
        raise UnsupportedModelError(
            f"No layer to adapt was found: adapters go beside {', '.join(k.__name__ for k in _KINDS)}; name in `layers` "
            f"some of {sorted({p.layer.name for p in places})}."
        )
    return list({id(layer): layer for layer in found}.values())


def _adapted_copy(model: Any, chosen: list[Any], rank: int, alpha: float) -> tuple[Any, dict[int, Any]]:
    """A copy with adapters, and by the id of each layer of `model` the copy's."""
    if IS_KERAS_3:
        new = _copy(model, _same)
        twins = _copy_weights(model, new)
        for layer in chosen:
            twins[id(layer)].enable_lora(rank, lora_alpha=alpha)
        return new, twins
    from tfprivacy_ft.finetune.lora_layers import ADAPTED

    ids = {id(layer) for layer in chosen}

    def rebuilt(layer: Any) -> Any:
        config = {**layer.get_config(), "lora_rank": rank, "lora_alpha": alpha}
        if id(layer) in ids:
            return ADAPTED[type(layer)].from_config(config)
        projections = [part.name for part in keras_compat.layers_inside(layer) if id(part) in ids]
        if projections:
            return ADAPTED[type(layer)].from_config({**config, "lora_projections": projections})
        return _same(layer)

    new = _copy(model, rebuilt)
    return new, _copy_weights(model, new)


def _freeze_all_but_adapters(layers: list[Any]) -> None:
    for layer in layers:
        for weight in _base_weights(layer):
            weight.trainable = False


def _same(layer: Any) -> Any:
    return type(layer).from_config(layer.get_config())


def _without_adapter(layer: Any) -> Any:
    config = {name: value for name, value in layer.get_config().items() if not name.startswith("lora_")}
    return _plain_class(layer).from_config(config)


def _plain_class(layer: Any) -> Any:
    if IS_KERAS_3:
        return type(layer)
    from tfprivacy_ft.finetune.lora_layers import ADAPTED

    return next((plain for plain, adapted in ADAPTED.items() if type(layer) is adapted), type(layer))


def _copy(model: Any, rebuilt: Callable[[Any], Any]) -> Any:
    """A model of new layers, each made by `rebuilt`; also those of models inside it."""

    def clone(layer: Any) -> Any:
        return _copy(layer, rebuilt) if isinstance(layer, keras.Model) else rebuilt(layer)

    try:
        new = keras.models.clone_model(model, clone_function=clone) if _is_plain_graph(model) else _same(model)
        if not new.built:
            raise ValueError("a copy has no weights until it is called")
    except (TypeError, ValueError, NotImplementedError) as error:
        raise _no_copy(model, str(error)) from error
    return new


def _is_plain_graph(layer: Any) -> bool:
    """Whether a model is made of calls of layers and of nothing else, so that it can be made anew from these."""
    return isinstance(layer, keras.Sequential) or type(layer) is _functional_class()


@functools.cache
def _functional_class() -> Any:
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, inputs))


def _no_copy(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Model {model.name!r} cannot be copied from its config ({reason}): give a functional or Sequential model whose "
        "layers all have get_config."
    )


def _is_adapted(layer: Any) -> bool:
    return getattr(layer, "lora_enabled", False) or bool(_adapter(layer))


def _adapter(layer: Any) -> list[Any]:
    """A and B of a layer itself; empty where it has no adapter."""
    names = ("lora_kernel_a", "lora_kernel_b")
    return [getattr(layer, name) for name in names] if all(hasattr(layer, name) for name in names) else []


def _copy_weights(model: Any, new: Any) -> dict[int, Any]:
    """Gives `new` the weights of `model`, kernels merged where only `model` has an adapter; which layer became which."""
    layers, copies = keras_compat.layers_inside(model), keras_compat.layers_inside(new)
    if len(layers) != len(copies):
        raise _no_copy(model, "a copy has other layers")
    for old, copy in zip(layers, copies, strict=True):
        sources, targets = _base_weights(old), _base_weights(copy)
        if [w.shape for w in sources] != [w.shape for w in targets]:
            raise _no_copy(model, f"layer {old.name!r} gets other weights")
        for source, target in zip(sources, targets, strict=True):
            is_merged = bool(_adapter(old)) and source is old._kernel
            target.assign(_merged_kernel(old) if is_merged else source)
    return {id(old): copy for old, copy in zip(layers, copies, strict=True)}


def _base_weights(layer: Any) -> list[Any]:
    """Weights of a layer itself, but for its adapter."""
    adapter = {id(weight) for weight in _adapter(layer)}
    return [weight for weight in keras_compat.own_weights(layer) if id(weight) not in adapter]


def _merged_kernel(layer: Any) -> np.ndarray:
    a, b = (np.asarray(weight) for weight in _adapter(layer))
    kernel = np.asarray(layer._kernel)
    return (kernel + np.float32(layer.lora_alpha / layer.lora_rank) * np.matmul(a, b)).astype(kernel.dtype)
