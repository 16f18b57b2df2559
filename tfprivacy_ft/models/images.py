"""Builders for images, of shape (height, width, channels)."""

from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.models._parts import fixed, sizes, top
from tfprivacy_ft.models.registry import register_model


@register_model("cnn")
def _cnn(
    input_shape,
    num_outputs,
    filters=(16, 32),
    kernel_sizes=None,
    strides=None,
    hidden_units=(32,),
    activation="tanh",
    from_logits=False,
):
    """Convolutions, each followed by max-pooling 2x2 with stride 1; the first is padded, the others are not."""
    import tensorflow as tf

    if len(input_shape) != 3:
        raise InvalidArgumentError(
            f"input_shape={input_shape} is not allowed for cnn: give (height, width, channels), like (28, 28, 1)."
        )
    fixed(input_shape, "cnn")
    # 8x8 and 4x4 with stride 2 leave nothing of an image under 13 pixels; from 16 on the second layer sees 4x4 or more.
    small = min(input_shape[:2]) < 16
    filters = sizes("filters", filters)
    kernel_sizes = sizes("kernel_sizes", kernel_sizes or ((3, 3) if small else (8, 4)))
    strides = sizes("strides", strides or ((1, 2) if small else (2, 2)))
    if not (len(filters) == len(kernel_sizes) == len(strides) > 0):
        raise InvalidArgumentError(
            f"filters={filters}, kernel_sizes={kernel_sizes} and strides={strides} have different lengths: "
            "give one number of each per convolution."
        )
    _refuse_too_small(input_shape, kernel_sizes, strides)

    inputs = x = tf.keras.Input(shape=input_shape)
    for i, (count, kernel, stride) in enumerate(zip(filters, kernel_sizes, strides, strict=True)):
        padding = "same" if i == 0 else "valid"
        x = tf.keras.layers.Conv2D(count, kernel, strides=stride, padding=padding, activation=activation)(x)
        x = tf.keras.layers.MaxPool2D(pool_size=2, strides=1)(x)
    x = tf.keras.layers.Flatten()(x)
    return tf.keras.Model(inputs, top(x, num_outputs, hidden_units, activation, from_logits))


def _refuse_too_small(input_shape, kernel_sizes, strides) -> None:
    for side in input_shape[:2]:
        size = side
        for i, (kernel, stride) in enumerate(zip(kernel_sizes, strides, strict=True)):
            size = -(-size // stride) if i == 0 else (size - kernel) // stride + 1
            size -= 1  # max-pooling 2 with stride 1
            if size < 1:
                raise InvalidArgumentError(
                    f"input_shape={input_shape} is too small for kernel_sizes={kernel_sizes} and strides={strides}: "
                    f"nothing is left after convolution {i + 1}; give smaller ones or larger images."
                )
