"""Conv2D (Conv1D too, which Keras runs as Conv2D on images of height one): filters' gradients by patches.

A convolution is a matrix product of the image's patches with the filter, so that each example's filter gradient is one
product, patches^T [k, P] @ output gradient [P, d].
"""

import numpy as np
import tensorflow as tf

from tfprivacy_ft.clipping.sites import Contribution, Instantiated, Meeting, UseSite, by_example


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
        each = tf.matmul(_join_rows(patches, rows, batch_size), _join_rows(outputs, rows, batch_size), transpose_a=True)
        return Instantiated(tf.reshape(each, [-1, *self.meeting.variable_shape]))


def _join_rows(tensor: tf.Tensor, rows, batch_size: tf.Tensor) -> tf.Tensor:
    """[B * fold, P, n] -> [B, fold * P, n]."""
    if rows.fold == 1:
        return tensor
    return tf.reshape(by_example(tensor, rows, batch_size), tf.stack([batch_size, -1, tensor.shape[2]]))


def _patches(images: tf.Tensor, kernel: list[int], strides: list[int], padding: bytes) -> tf.Tensor:
    """[B, P, kh * kw * c] patches of [B, H, W, c] images, one for each position of the output.

    One channel: a convolution with an identity filter. More: a gather by indices that are known when traced, which
    was the fastest of ten ways on a CPU.
    """
    height, width, channels = images.shape[1:]
    rows, top, bottom = _positions(height, kernel[0], strides[0], padding)
    columns, left, right = _positions(width, kernel[1], strides[1], padding)
    count, size = len(rows) * len(columns), kernel[0] * kernel[1] * channels
    if channels == 1:
        identity = np.eye(size, dtype=np.float32).reshape([*kernel, 1, size])
        patches = tf.nn.conv2d(images, identity, strides, padding.decode())
        return tf.reshape(patches, [-1, count, size])
    padded = tf.pad(images, [[0, 0], [top, bottom], [left, right], [0, 0]])
    full_width = width + left + right
    offsets = np.arange(kernel[0])[:, None] * full_width + np.arange(kernel[1])
    starts = rows[:, None] * full_width + columns
    index = (starts.reshape(-1, 1) + offsets.reshape(1, -1)).astype(np.int32)
    pixels = tf.reshape(padded, [-1, (height + top + bottom) * full_width, channels])
    return tf.reshape(tf.gather(pixels, index, axis=1), [-1, count, size])


def _positions(size: int, kernel: int, stride: int, padding: bytes) -> tuple[np.ndarray, int, int]:
    """Where windows start in the padded image, and the padding before and after, as TensorFlow does it."""
    if padding == b"VALID":
        return np.arange((size - kernel) // stride + 1) * stride, 0, 0
    count = -(-size // stride)
    total = max((count - 1) * stride + kernel - size, 0)
    return np.arange(count) * stride, total // 2, total - total // 2
