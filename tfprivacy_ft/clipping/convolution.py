"""Conv2D (Conv1D too, which Keras runs as Conv2D on images of height one): filters' gradients by patches.

A convolution is a matrix product of the image's patches with the filter, so that each example's filter gradient is one
product, patches^T [k, P] @ output gradient [P, d].
"""

import numpy as np
import tensorflow as tf

from tfprivacy_ft.clipping.sites import Contribution, Instantiated, Meeting, UseSite, by_example, flatten, keep_rows

_WIDE = 8  # channels from which on pixels are long enough to be gathered one by one
_WIDE_PRODUCT = 64  # columns with which a batched product runs at full speed
_LARGEST_IDENTITY = 64  # entries of a patch up to which an identity filter is the fastest


class Conv2DSite(UseSite):
    """images [B * fold, H, W, c] convolved with weight [kh, kw, c, d]; no groups, no dilation, static H, W, c."""

    @classmethod
    def match(cls, meeting: Meeting) -> "Conv2DSite | None":
        op = meeting.op
        if op.type != "Conv2D" or meeting.index != 1 or op.get_attr("data_format") != b"NHWC":
            return None
        images = meeting.other().shape
        known = images.rank == 4 and images[1:].is_fully_defined() and meeting.output.shape[1:].is_fully_defined()
        plain = list(op.get_attr("dilations")) == [1, 1, 1, 1] and op.get_attr("padding") in (b"SAME", b"VALID")
        if not (meeting.batch_first(meeting.other()) and known and plain) or images[3] != meeting.weight.shape[2]:
            return None
        return cls(meeting)

    def at(self, gradient: tf.Tensor, batch_size: tf.Tensor) -> Contribution:
        images = tf.cast(self.meeting.other(), tf.float32)
        rows = self.meeting.rows(self.meeting.other())
        strides = self.meeting.op.get_attr("strides")[1:3]
        patches = _patches(
            images, self.meeting.weight.shape[:2].as_list(), strides, self.meeting.op.get_attr("padding")
        )
        positions, filters = patches.shape[1], self.meeting.weight.shape[3]
        outputs = tf.reshape(tf.cast(gradient, tf.float32), [-1, positions, filters])
        patches, outputs = _join_rows(patches, rows, batch_size), _join_rows(outputs, rows, batch_size)
        if 2 * filters <= min(patches.shape[2], _WIDE_PRODUCT):
            return _Transposed(tf.matmul(outputs, patches, transpose_a=True), self.meeting.variable_shape)
        each = tf.matmul(patches, outputs, transpose_a=True)
        return Instantiated(tf.reshape(each, [-1, *self.meeting.variable_shape]))


class _Transposed(Contribution):
    """Filters' gradients, formed as [B, d, kh * kw * c]: with few filters a fifth faster than the other way round."""

    def __init__(self, each: tf.Tensor, shape: tuple[int, ...]):
        self._each, self._shape = each, shape

    def squared_norms(self) -> tf.Tensor:
        return tf.reduce_sum(tf.square(flatten(self._each)), 1)

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        total = tf.linalg.matvec(flatten(self._each), weights, transpose_a=True)
        return tf.reshape(tf.transpose(tf.reshape(total, self._each.shape[1:])), self._shape)

    def per_example(self) -> tf.Tensor:
        return tf.reshape(tf.transpose(self._each, [0, 2, 1]), [-1, *self._shape])

    def keep(self, rows: tf.Tensor) -> Contribution:
        return _Transposed(keep_rows(self._each, rows), self._shape)


def _join_rows(tensor: tf.Tensor, rows, batch_size: tf.Tensor) -> tf.Tensor:
    """[B * fold, P, n] -> [B, fold * P, n]."""
    if rows.fold == 1:
        return tensor
    return tf.reshape(by_example(tensor, rows, batch_size), tf.stack([batch_size, -1, tensor.shape[2]]))


def _patches(images: tf.Tensor, kernel: list[int], strides: list[int], padding: bytes) -> tf.Tensor:
    """[B, P, kh * kw * c] patches of [B, H, W, c] images, one for each position of the output.

    By a gather at indices that are known when traced, which costs no more than a copy where one index moves eight floats
    or more. Narrower pixels: a convolution with an identity filter, or for large kernels a gather of each row's windows
    and then of whole windows.
    """
    height, width, channels = images.shape[1:]
    rows, top, bottom = _positions(height, kernel[0], strides[0], padding)
    columns, left, right = _positions(width, kernel[1], strides[1], padding)
    count, size = len(rows) * len(columns), kernel[0] * kernel[1] * channels
    if kernel == [1, 1] and list(strides) == [1, 1]:
        return tf.reshape(images, [-1, count, size])
    if channels < _WIDE and size <= _LARGEST_IDENTITY:
        identity = np.eye(size, dtype=np.float32).reshape([*kernel, channels, size])
        return tf.reshape(tf.nn.conv2d(images, identity, strides, padding.decode()), [-1, count, size])
    padded = tf.pad(images, [[0, 0], [top, bottom], [left, right], [0, 0]])
    across = np.arange(kernel[1])
    if channels < _WIDE:
        padded = tf.gather(padded, (columns[:, None] + across).astype(np.int32), axis=2)
        padded = tf.reshape(padded, [-1, height + top + bottom, len(columns), kernel[1] * channels])
        columns, across = np.arange(len(columns)), np.zeros(1, int)
    full_height, full_width, depth = padded.shape[1:]
    starts, down = rows[:, None] * full_width + columns, np.arange(kernel[0])[:, None] * full_width
    index = (starts.reshape(-1, 1) + (down + across).reshape(1, -1)).astype(np.int32)
    pixels = tf.reshape(padded, [-1, full_height * full_width, depth])
    return tf.reshape(tf.gather(pixels, index, axis=1), [-1, count, size])


def _positions(size: int, kernel: int, stride: int, padding: bytes) -> tuple[np.ndarray, int, int]:
    """Where windows start in the padded image, and the padding before and after, as TensorFlow does it."""
    if padding == b"VALID":
        return np.arange((size - kernel) // stride + 1) * stride, 0, 0
    count = -(-size // stride)
    total = max((count - 1) * stride + kernel - size, 0)
    return np.arange(count) * stride, total // 2, total - total // 2
