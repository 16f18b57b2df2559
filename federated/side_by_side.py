"""What clients that train side by side need of layers: operations that TensorFlow can run for many weights at once.

Promises: what a layer computes does not change, nor do its gradients, but for rounding. Layers that are not known here,
and models that TensorFlow cannot take apart, are computed one client after the other, as exactly. Knows nothing of privacy.

`tf.vectorized_map` has no rule for a convolution whose kernel differs from client to client: it starts the operation once
per client. Here such a convolution is one product of matrices: what its positions see of the images, times the kernel.
"""

import contextlib
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf

    from tfprivacy_ft.clipping.patches import Axis

__all__ = ["convolution", "map_clients", "prepare"]

# Numbers that the positions of one example see, up to which a copy of them for all clients is worth its memory: 256 MiB for
# 64 clients with batches of 32. Beyond, a convolution is so long that starting it once per client costs little.
_MOST_SEEN = 1 << 15

_log = logging.getLogger(__name__)


def prepare(model: "tf.keras.Model") -> "tf.keras.Model":
    """Makes the layers of a model use operations that run for many weights at once, where there are such.

    Convolutions of one to three axes with their channels last get a `convolution_op` of their own, the method that Keras
    means to be overridden, and max-pooling, in Keras 2, another `pool_function`; LSTM and GRU leave the function that Keras
    wraps around them to look for a GPU.

    Args:
        model: A model that nobody else holds: its layers are changed.

    Returns:
        The same model.
    """
    import tensorflow as tf

    layers = tf.keras.layers
    for layer in model._flatten_layers(include_self=False):
        if type(layer) in (layers.Conv1D, layers.Conv2D, layers.Conv3D) and layer.data_format == "channels_last":
            # TensorFlow has no grouped convolution for CPUs, so Keras compiles one, by another method.
            name = "convolution_op" if layer.groups == 1 else "_jit_compiled_convolution_op"
            setattr(layer, name, functools.partial(_convolution_of, layer, getattr(layer, name)))
        elif isinstance(layer, layers.MaxPooling2D) and hasattr(layer, "pool_function"):
            layer.pool_function = functools.partial(_pooled, layer.pool_function)
        elif type(layer) in (layers.LSTM, layers.GRU):
            # Inside that function, tensors go from the forward to the backward pass that cannot be stacked.
            layer._could_use_gpu_kernel = False
    return model


def map_clients(step: Callable[[Any], Any], elements: Any) -> Any:
    """Calls a function for every client, for all at once where TensorFlow can; in a graph only.

    Args:
        step: Takes what belongs to one client, and returns tensors. Each client has random numbers of its own.
        elements: Tensors (k, ...), nested as `step` takes them.

    Returns:
        What `step` returns, each tensor (k, ...).
    """
    import tensorflow as tf

    try:
        with _quiet():
            found = tf.vectorized_map(step, elements)
    except Exception as error:
        _log.info(
            "clients train one after the other, as TensorFlow cannot take the model apart: %s", str(error).strip()
        )
        one = tf.nest.map_structure(lambda each: tf.TensorSpec(each.shape[1:], each.dtype), elements)
        outputs = tf.function(step, autograph=False).get_concrete_function(one).structured_outputs
        signature = tf.nest.map_structure(lambda each: tf.TensorSpec(each.shape, each.dtype), outputs)
        return tf.map_fn(step, elements, fn_output_signature=signature)
    alone = _one_after_the_other(tf.compat.v1.get_default_graph())
    _log.info("clients train side by side%s", f"; one after the other in {', '.join(alone)}" if alone else "")
    return found


def convolution(
    images: "tf.Tensor",
    kernel: "tf.Tensor",
    *,
    strides: Sequence[int],
    padding: str,
    dilations: Sequence[int],
) -> "tf.Tensor":
    """`tf.nn.convolution` as a product of matrices.

    Args:
        images: (b, *sizes, c) float, of one to three sizes, all known but b.
        kernel: (*kernel sizes, c / groups, d) of the same type.
        strides, dilations: One number >= 1 for each axis.
        padding: "VALID" or "SAME".

    Returns:
        (b, *positions, d).

    Example:
        >>> import tensorflow as tf
        >>> images = tf.reshape(tf.range(4.0), (1, 4, 1))
        >>> convolution(images, tf.ones((2, 1, 1)), strides=[1], padding="VALID", dilations=[1])[0, :, 0].numpy()
        array([1., 3., 5.], dtype=float32)
    """
    import tensorflow as tf

    groups = images.shape[-1] // kernel.shape[-2]
    if groups > 1:
        parts = zip(tf.split(images, groups, axis=-1), tf.split(kernel, groups, axis=-1), strict=True)
        outputs = [convolution(*p, strides=strides, padding=padding, dilations=dilations) for p in parts]
        return tf.concat(outputs, axis=-1)
    axes = _axes(images.shape[1:-1], kernel.shape[:-2], strides, padding, dilations)
    if max(strides) > 1:
        images, kernel, axes = _without_strides(images, kernel, axes)
    return _product(images, kernel, axes)


def max_pool(images: "tf.Tensor", sizes: Sequence[int], strides: Sequence[int]) -> "tf.Tensor":
    """`tf.nn.max_pool2d` without padding; of equal values in a window, the first gets the gradient, as there.

    Args:
        images: (b, height, width, c) float, of known height and width.
        sizes: Of the windows, height and width.
        strides: One for each, 1 or the size of the window.

    Returns:
        (b, positions, positions, c).

    Example:
        >>> import tensorflow as tf
        >>> max_pool(tf.reshape(tf.range(9.0), (1, 3, 3, 1)), sizes=[2, 2], strides=[1, 1])[0, :, :, 0].numpy()
        array([[4., 5.],
               [7., 8.]], dtype=float32)
    """
    for axis in (2, 1):  # within rows first, so that the first of equal values is that of the first row
        images = _largest(images, axis, sizes[axis - 1], strides[axis - 1])
    return images


def _largest(images: "tf.Tensor", axis: int, size: int, stride: int) -> "tf.Tensor":
    """The largest of each `size` neighbours along an axis, with a stride of 1 or of `size`."""
    import tensorflow as tf

    if size == 1:
        return images
    apart, together = (_windows if stride == 1 else _blocks)(images.shape, axis, size)

    @tf.custom_gradient
    def largest(images):
        found, *others = apart(images)
        stayed = []
        for other in others:
            stayed.append(found >= other)
            found = tf.maximum(found, other)

        def gradient(outer):
            parts = []
            for stay in reversed(stayed):
                parts.append(tf.where(stay, tf.zeros_like(outer), outer))
                outer = tf.where(stay, outer, tf.zeros_like(outer))
            return together([outer, *reversed(parts)])

        return found, gradient

    return largest(images)


def _windows(shape: "tf.TensorShape", axis: int, size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Takes images apart into the first, second, ... neighbour in each window with a stride of 1; and back, as a sum."""
    import tensorflow as tf

    positions = shape[axis] - size + 1

    def apart(images):
        starts = ([0] * axis + [i] + [0] * (3 - axis) for i in range(size))
        return [tf.slice(images, start, [-1] * axis + [positions] + [-1] * (3 - axis)) for start in starts]

    def together(parts):
        zeros = [[0, 0]]
        pads = (zeros * axis + [[i, size - 1 - i]] + zeros * (3 - axis) for i in range(size))
        return functools.reduce(tf.add, (tf.pad(part, pad) for part, pad in zip(parts, pads, strict=True)))

    return apart, together


def _blocks(shape: "tf.TensorShape", axis: int, size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The same with a stride of `size`, where windows do not overlap."""
    import tensorflow as tf

    _, *sizes = shape
    positions, rest = divmod(sizes[axis - 1], size)

    def apart(images):
        whole = tf.slice(images, [0] * 4, [-1] * axis + [positions * size] + [-1] * (3 - axis))
        return tf.unstack(tf.reshape(whole, [-1, *sizes[: axis - 1], positions, size, *sizes[axis:]]), axis=axis + 1)

    def together(parts):
        whole = tf.reshape(tf.stack(parts, axis=axis + 1), [-1, *sizes[: axis - 1], positions * size, *sizes[axis:]])
        return tf.pad(whole, [[0, 0]] * axis + [[0, rest]] + [[0, 0]] * (3 - axis))

    return apart, together


def _pooled(keras_op: Callable[..., "tf.Tensor"], images: "tf.Tensor", **options: Any) -> "tf.Tensor":
    """What stands in for the `pool_function` of a layer: itself but for windows that `max_pool` takes."""
    if options["data_format"] == "NHWC" and options["padding"] == "VALID" and images.shape[1:].is_fully_defined():
        sizes, strides = options["ksize"][1:3], options["strides"][1:3]
        if all(stride in (1, size) for size, stride in zip(sizes, strides, strict=True)):
            return max_pool(images, sizes, strides)
    return keras_op(images, **options)


def _convolution_of(layer: Any, keras_op: Callable[..., "tf.Tensor"], images: "tf.Tensor", kernel: Any) -> "tf.Tensor":
    """What stands in for `convolution_op` of a layer: itself where images are of unknown size, or large."""
    import tensorflow as tf

    sizes = images.shape[1:]
    padding = "VALID" if layer.padding == "causal" else layer.padding.upper()  # Keras has padded the images
    if not sizes.is_fully_defined():
        return keras_op(images, kernel)
    axes = _axes(sizes[:-1], layer.kernel_size, layer.strides, padding, layer.dilation_rate)
    if sizes[-1] * np.prod([axis.kernel * axis.positions for axis in axes]) > _MOST_SEEN:
        return keras_op(images, kernel)
    kernel = tf.convert_to_tensor(kernel)
    return convolution(images, kernel, strides=layer.strides, padding=padding, dilations=layer.dilation_rate)


def _axes(sizes: Any, kernel: Any, strides: Sequence[int], padding: str, dilations: Sequence[int]) -> list["Axis"]:
    from tfprivacy_ft.clipping.patches import Axis

    axes = []
    for size, entries, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        reach = (entries - 1) * dilation + 1
        positions = -(-size // stride) if padding == "SAME" else (size - reach) // stride + 1
        missing = (positions - 1) * stride + reach - size
        before = max(missing, 0) // 2 if padding == "SAME" else 0
        axes.append(Axis(size, positions, entries, stride, dilation, before, max(missing - before, 0)))
    return axes


def _without_strides(
    images: "tf.Tensor", kernel: "tf.Tensor", axes: list["Axis"]
) -> tuple["tf.Tensor", "tf.Tensor", list["Axis"]]:
    """The same convolution with strides of one: the pixels that a stride passes over become channels of one pixel.

    What a position sees is then fewer and longer pieces of memory, which are quicker to move.
    """
    import tensorflow as tf

    strides = [axis.stride for axis in axes]
    kernels = [-(-axis.kernel // axis.stride) for axis in axes]
    needed = [(axis.positions + entries - 1) * axis.stride for axis, entries in zip(axes, kernels, strict=True)]
    there = [axis.before + axis.size for axis in axes]
    sizes = [max(-(-n // s), m // s) for n, m, s in zip(there, needed, strides, strict=True)]
    after = [size * s - n for size, s, n in zip(sizes, strides, there, strict=True)]
    images = tf.pad(images, [[0, 0], *([axis.before, n] for axis, n in zip(axes, after, strict=True)), [0, 0]])
    more = [entries * axis.stride - axis.kernel for axis, entries in zip(axes, kernels, strict=True)]
    kernel = tf.pad(kernel, [*([0, n] for n in more), [0, 0], [0, 0]])
    plain = [
        dataclasses.replace(axis, size=size, kernel=entries, stride=1, before=0, after=0)
        for axis, size, entries in zip(axes, sizes, kernels, strict=True)
    ]
    return _folded(images, 1, strides), _folded(kernel, 0, strides), plain


def _folded(tensor: "tf.Tensor", first: int, strides: list[int]) -> "tf.Tensor":
    """(..., n * s, ..., c, ...) -> (..., n, ..., s * c, ...) for the axes from `first` on, one for each stride."""
    import tensorflow as tf

    last = first + len(strides)
    batch, sizes, (channels, *rest) = [-1] * first, tensor.shape[first:last], tensor.shape[last:]
    split = [n for size, stride in zip(sizes, strides, strict=True) for n in (size // stride, stride)]
    end = first + len(split)
    order = [*range(first), *range(first, end, 2), *range(first + 1, end, 2), *range(end, end + 1 + len(rest))]
    apart = tf.transpose(tf.reshape(tensor, [*batch, *split, channels, *rest]), order)
    return tf.reshape(apart, [*batch, *split[::2], int(np.prod(strides)) * channels, *rest])


def _product(images: "tf.Tensor", kernel: "tf.Tensor", axes: list["Axis"]) -> "tf.Tensor":
    """A convolution with strides of one. Its gradient by the images is one, too, with the kernel turned around."""
    import tensorflow as tf

    from tfprivacy_ft.clipping.patches import gathered_patches

    *entries, channels, width = kernel.shape

    @tf.custom_gradient
    def product(images, kernel):
        seen = tf.reshape(gathered_patches(images, axes), [-1, int(np.prod(entries)) * channels])
        filters = tf.reshape(kernel, [-1, width])

        def gradient(outer):
            by_kernel = tf.matmul(seen, tf.reshape(outer, [-1, width]), transpose_a=True)
            turned = tf.reverse(kernel, list(range(len(axes))))
            order = [*range(len(axes)), len(axes) + 1, len(axes)]
            by_images = _product(outer, tf.transpose(turned, order), [_backwards(axis) for axis in axes])
            return by_images, tf.reshape(by_kernel, kernel.shape)

        return tf.reshape(tf.matmul(seen, filters), [-1, *(axis.positions for axis in axes), width]), gradient

    return product(images, kernel)


def _backwards(axis: "Axis") -> "Axis":
    """How the pixels look at the positions that have seen them."""
    before = (axis.kernel - 1) * axis.dilation - axis.before
    after = axis.size - axis.positions + axis.before
    return dataclasses.replace(axis, size=axis.positions, positions=axis.size, before=before, after=after)


def _one_after_the_other(graph: Any) -> list[str]:
    """Operations, by the names of their layers, that a vectorised graph starts once per client."""
    # TensorFlow names such a loop after the operation; a loop of the model itself, as of an LSTM, has that name, too.
    names = [op.name for op in graph.get_operations() if op.type in ("While", "StatelessWhile")]
    loops = [re.search(r"loop_body/(?:[^/]+/)?([^/]+)/(?:.*/)?(?!while)[^/]+/pfor/while", name) for name in names]
    return list(dict.fromkeys(loop.group(1) for loop in loops if loop))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TensorFlow's remarks on what it turns into loops off the terminal."""
    import tensorflow as tf

    logger = tf.get_logger()
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
