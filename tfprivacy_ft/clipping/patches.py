"""What the positions of a convolution see of the images, moved by gathers and slices; nothing is computed.

`Axes` says where, axis by axis; sizes that are not known when traced are scalar tensors.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
import tensorflow as tf

from tfprivacy_ft.clipping.calls import Convolution

_WIDE = 8  # channels from which on pixels are long enough to be gathered one by one
_LARGEST_IDENTITY = 64  # entries of a patch up to which an identity filter is the fastest


@dataclasses.dataclass(frozen=True)
class Axis:
    """Position p < `positions` sees entries p * stride + k * dilation of the padded image, k < kernel."""

    size: Any
    positions: Any
    kernel: int
    stride: int
    dilation: int
    before: Any
    after: Any

    @property
    def is_known(self) -> bool:
        return isinstance(self.size, int) and isinstance(self.positions, int)


def axes_of(convolution: Convolution, images: tf.Tensor, outputs: tf.Tensor) -> list[Axis]:
    """Where `outputs` ([N, *positions, d]) look at `images` ([N, *sizes, c])."""
    axes = []
    for i, kernel in enumerate(convolution.kernel):
        size, positions = _size(images, i + 1), _size(outputs, i + 1)
        stride, dilation = convolution.strides[i], convolution.dilations[i]
        missing = (positions - 1) * stride + (kernel - 1) * dilation + 1 - size
        before = _positive(missing) // 2 if convolution.before is None else convolution.before[i]
        axes.append(Axis(size, positions, kernel, stride, dilation, before, _positive(missing - before)))
    return axes


def shifts(axes: list[Axis]) -> list[tuple[slice, ...]]:
    """For every entry of the kernel, the slice of the padded images that the positions see through it."""
    entries = itertools.product(*(range(axis.kernel) for axis in axes))
    return [(slice(None), *(_slice(a, k) for a, k in zip(axes, entry, strict=True))) for entry in entries]


def _slice(axis: Axis, entry: int) -> slice:
    start = entry * axis.dilation
    return slice(start, start + (axis.positions - 1) * axis.stride + 1, axis.stride)


def pad(images: tf.Tensor, axes: list[Axis]) -> tf.Tensor:
    """The images with the zeros around them that the positions see."""
    widths = [[a.before, a.after] for a in axes]
    if all(isinstance(w, int) and w == 0 for pair in widths for w in pair):
        return images
    return tf.pad(images, [[0, 0], *widths, [0, 0]])


def patches(images: tf.Tensor, axes: list[Axis]) -> tf.Tensor:
    """[N, P, kernel * c]: all that each of the P positions sees; sizes have to be known.

    By a gather at indices that are known when traced, which costs no more than a copy where one index moves eight floats
    or more. Narrower pixels: a convolution with an identity filter, or for large kernels a gather of each row's windows
    and then of whole windows.
    """
    channels, kernel, strides = images.shape[-1], [a.kernel for a in axes], [a.stride for a in axes]
    count, size = int(np.prod([a.positions for a in axes])), channels * int(np.prod(kernel))
    if max(kernel) == 1 and max(strides) == 1:
        return tf.reshape(images, [-1, count, size])
    plain = len(axes) == 2 and all(a.dilation == 1 for a in axes)
    # TensorFlow 2.21 was seen on some processors to read wrong pixels there.
    plain = plain and not (channels == 1 and axes[1].positions == 1 and strides[0] == 1 < strides[1])
    if plain and channels < _WIDE and size <= _LARGEST_IDENTITY:
        identity = np.eye(size, dtype=images.dtype.as_numpy_dtype).reshape([*kernel, channels, size])
        seen = tf.nn.conv2d(images, identity, strides, [[0, 0], *([a.before, a.after] for a in axes), [0, 0]])
        return tf.reshape(seen, [-1, count, size])
    return gathered_patches(images, axes)


def gathered_patches(images: tf.Tensor, axes: list[Axis]) -> tf.Tensor:
    """`patches` by gathers alone."""
    channels, kernel = images.shape[-1], [a.kernel for a in axes]
    count, size = int(np.prod([a.positions for a in axes])), channels * int(np.prod(kernel))
    padded = pad(images, axes)
    starts = [np.arange(a.positions) * a.stride for a in axes]
    offsets = [np.arange(a.kernel) * a.dilation for a in axes]
    if channels < _WIDE:
        padded = tf.gather(padded, (starts[-1][:, None] + offsets[-1]).astype(np.int32), axis=len(axes))
        padded = tf.reshape(padded, [-1, *padded.shape[1 : len(axes) + 1], kernel[-1] * channels])
        starts[-1], offsets[-1] = np.arange(axes[-1].positions), np.zeros(1, int)
    pixel = _flat(starts, padded.shape[1:-1])[:, None] + _flat(offsets, padded.shape[1:-1])
    pixels = tf.reshape(padded, [-1, padded.shape[1:-1].num_elements(), padded.shape[-1]])
    return tf.reshape(tf.gather(pixels, pixel.astype(np.int32), axis=1), [-1, count, size])


def _flat(places: list[np.ndarray], sizes) -> np.ndarray:
    """Row-major index of every combination of places, one along each axis."""
    index = np.zeros(1, int)
    for place, size in zip(places, sizes, strict=True):
        index = (index[:, None] * size + place).reshape(-1)
    return index


def _size(tensor: tf.Tensor, axis: int):
    return tf.shape(tensor)[axis] if tensor.shape[axis] is None else tensor.shape[axis]


def _positive(number):
    return max(number, 0) if isinstance(number, int) else tf.maximum(number, 0)
