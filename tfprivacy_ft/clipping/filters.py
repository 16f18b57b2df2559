"""Each example's gradient of the filters of a convolution: what positions see of the images, times what is there.

With x the images and g the gradient at the positions, filter entry k, channel c and filter o of an example get
sum over positions p of x[p * stride + k * dilation, c] * g[p, o]; of a transposed convolution x and g change places.
"""

import tensorflow as tf

from tfprivacy_ft.clipping.calls import Convolution
from tfprivacy_ft.clipping.patches import axes_of, pad, patches, shifts
from tfprivacy_ft.clipping.sites import Arrangement, Contribution, Instantiated

_WIDE_PRODUCT = 64  # columns with which a batched product runs at full speed
_MOST_FOR_PATCHES = 64 << 20  # bytes that all patches of a batch may take; beyond, one entry of the kernel at a time


def filter_gradients(
    images: tf.Tensor,
    outputs: tf.Tensor,
    convolution: Convolution,
    shape: tuple[int, ...],
    batch_size,
    likely_rows: int,
) -> Contribution:
    """What each example adds to the gradient of the filters.

    Args:
      images: [B * rows, *sizes, c] float32 or float64, the rows of an example together.
      outputs: [B * rows, *positions, d] of that dtype, the same.
      convolution: how the positions look at the images.
      shape: the shape of the filters' variable.
      batch_size: scalar int32, B.
      likely_rows: how many rows there will be, by which memory is planned.
    """
    axes = axes_of(convolution, images, outputs)
    groups, width = convolution.groups, outputs.shape[-1]
    known = all(axis.is_known for axis in axes)
    by_example = _by_example(outputs, batch_size)
    if known and groups == 1:
        entries = images.shape[-1]
        for axis in axes:
            entries *= axis.kernel * axis.positions
        if 4 * entries * likely_rows <= _MOST_FOR_PATCHES:
            seen = _by_example(patches(images, axes), batch_size)
            if 2 * width <= min(seen.shape[2], _WIDE_PRODUCT):
                # With few filters a fifth faster than the other way round.
                arrangement = Arrangement((width, seen.shape[2]), (1, 0), shape)
                return Instantiated(tf.matmul(by_example, seen, transpose_a=True), arrangement)
            return Instantiated(tf.reshape(tf.matmul(seen, by_example, transpose_a=True), [-1, *shape]))
    each: list[tf.Tensor] = []
    padded = pad(images, axes)
    for window in shifts(axes):
        with tf.control_dependencies(each[-1:]):  # so that only one slice of the images is there at a time
            each.append(_product(_by_example(padded[window], batch_size), by_example, groups))
    return Instantiated(tf.reshape(tf.stack(each, 1), [-1, *shape]))


def _product(seen: tf.Tensor, outputs: tf.Tensor, groups: int) -> tf.Tensor:
    """[B, P, c] and [B, P, d] -> [B, c / groups, d]."""
    if groups == 1:
        return tf.matmul(seen, outputs, transpose_a=True)
    channels, width = seen.shape[2] // groups, outputs.shape[2]
    if channels == 1 and width == groups:
        return tf.reduce_sum(seen * outputs, 1)[:, None]
    outputs = tf.reshape(outputs, [*_leading(outputs), groups, width // groups])
    if channels == 1:
        return tf.reshape(tf.reduce_sum(seen[..., None] * outputs, 1), [-1, 1, width])
    seen = tf.reshape(seen, [*_leading(seen), groups, channels])
    return tf.reshape(tf.einsum("bpgc,bpgo->bcgo", seen, outputs), [-1, channels, width])


def _leading(tensor: tf.Tensor) -> list:
    shape = tf.shape(tensor)
    return [shape[0], shape[1] if tensor.shape[1] is None else tensor.shape[1]]


def _by_example(tensor: tf.Tensor, batch_size) -> tf.Tensor:
    """[B * rows, ..., n] -> [B, rows * positions, n]."""
    return tf.reshape(tensor, tf.stack([batch_size, -1, tensor.shape[-1]]))
