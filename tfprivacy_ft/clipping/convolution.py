"""Convolutions of one, two and three axes: strided, dilated, grouped, depthwise, separable, transposed, causal.

Keras runs Conv1D as Conv2D on images of height one, a dilated convolution as a plain one on images taken apart into
blocks (SpaceToBatchND), a grouped one inside a function. All come down to one formula, in `filters`.
"""

import tensorflow as tf

from tfprivacy_ft.clipping import calls
from tfprivacy_ft.clipping.filters import filter_gradients
from tfprivacy_ft.clipping.layout import Blocks, Rows
from tfprivacy_ft.clipping.sites import Contribution, Meeting, UseSite, widened

_LIKELY_BATCH = 256  # where it is not known when traced; only the memory that is planned for depends on it


class ConvolutionSite(UseSite):
    """images [B * fold, *sizes, c] convolved with weight [*kernel, c / groups, d], channels last."""

    def __init__(self, meeting: Meeting, call: calls.Call, convolution: calls.Convolution):
        super().__init__(meeting)
        self._call, self._convolution = call, convolution

    @classmethod
    def match(cls, meeting: Meeting) -> "ConvolutionSite | None":
        op, call = meeting.op, calls.find(meeting.op)
        if call is None or call.weight != meeting.index or sum(t is meeting.weight for t in op.inputs) != 1:
            return None
        if any(map(meeting.layouts.reaches_loss, op.outputs[1:])):
            return None  # the gradient would have to be known there, too
        rows = meeting.layouts.of(op.inputs[call.data])
        images = meeting.layouts.shape(op.outputs[0] if op.type in calls.TRANSPOSED else op.inputs[call.data])
        if not (isinstance(rows, Blocks) or (isinstance(rows, Rows) and rows.axis == 0)) or images is None:
            return None
        read = meeting.weight.dtype != tf.resource
        convolution = call.convolution(meeting.weight.shape if read else meeting.variable_shape, images[-1])
        return None if convolution is None else cls(meeting, call, convolution)

    def at(self, gradient: tf.Tensor, batch_size: tf.Tensor) -> Contribution:
        call, convolution = self._call, self._convolution
        rows = self.meeting.layouts.of(self.meeting.op.inputs[call.data])
        assert isinstance(rows, Rows | Blocks)
        blocks = call.blocks * (rows.blocks if isinstance(rows, Blocks) else 1)
        gradient.set_shape(self.meeting.output.shape)
        data = call.data_inside(widened(self.meeting.op.inputs[call.data]))
        data = _examples_together(data, blocks, batch_size)
        gradient = call.gradient_inside(widened(gradient))
        gradient = _examples_together(gradient, blocks, batch_size)
        images, outputs = (gradient, data) if convolution.transposed else (data, gradient)
        unknown = [None] * (len(convolution.kernel) + 1)
        images.set_shape([*unknown, convolution.channels])
        outputs.set_shape([*unknown, convolution.width])
        layouts = self.meeting.layouts
        likely_batch = layouts.batch if layouts.batch_is_static else _LIKELY_BATCH
        likely_rows = likely_batch * blocks * (rows.fold or 1)
        return filter_gradients(images, outputs, convolution, self.meeting.variable_shape, batch_size, likely_rows)


def _examples_together(tensor: tf.Tensor, blocks: int, batch_size: tf.Tensor) -> tf.Tensor:
    """[blocks * B * fold, ...] -> [B * blocks * fold, ...]."""
    if blocks == 1:
        return tensor
    apart = tf.reshape(tensor, tf.stack([blocks, batch_size, -1]))
    together = tf.reshape(tf.transpose(apart, [1, 0, 2]), tf.shape(tensor))
    together.set_shape(tensor.shape)
    return together
