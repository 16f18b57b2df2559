"""Builders for images, of shape (height, width, channels)."""

from tfprivacy_ft import _check
from tfprivacy_ft.errors import InvalidArgumentError
from tfprivacy_ft.models._parts import fixed, sizes, top
from tfprivacy_ft.models.registry import register_model

SQUEEZENET_FEATURES = 512
SQUEEZENET_SMALLEST_SIDE = 31  # of an image, that something is left after the last max-pooling
_FIRE_MODULES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


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

    _refuse_unless_image(input_shape, "cnn")
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


@register_model("resnet")
def _resnet(
    input_shape,
    num_outputs,
    blocks=(1, 1, 1),
    filters=(16, 32, 64),
    groups=8,
    activation="relu",
    from_logits=False,
):
    """Stages of residual blocks that normalise first (He et al. 2016b), by groups of channels (Wu & He 2018)."""
    import tensorflow as tf

    _refuse_unless_image(input_shape, "resnet")
    blocks, filters = sizes("blocks", blocks), sizes("filters", filters)
    _check.positive_integer(groups=groups)
    if not (len(blocks) == len(filters) > 0):
        raise InvalidArgumentError(
            f"blocks={blocks} and filters={filters} have different lengths: give one number of each per stage."
        )
    if any(count % groups for count in filters):
        raise InvalidArgumentError(f"groups={groups} does not divide each of filters={filters}: give a divisor of all.")

    def normalised(x):
        return tf.keras.layers.Activation(activation)(tf.keras.layers.GroupNormalization(groups)(x))

    def convolved(x, count, strides=1):
        return tf.keras.layers.Conv2D(count, 3, strides=strides, padding="same", use_bias=False)(x)

    inputs = tf.keras.Input(shape=input_shape)
    x = convolved(inputs, filters[0])
    for stage, (repeats, count) in enumerate(zip(blocks, filters, strict=True)):
        for i in range(repeats):
            strides = 2 if stage > 0 and i == 0 else 1
            before = normalised(x)
            if x.shape[-1] != count or strides > 1:
                x = tf.keras.layers.Conv2D(count, 1, strides=strides, use_bias=False)(before)
            x = tf.keras.layers.Add()([x, convolved(normalised(convolved(before, count, strides)), count)])
    x = tf.keras.layers.GlobalAveragePooling2D()(normalised(x))
    return tf.keras.Model(inputs, top(x, num_outputs, (), activation, from_logits))


@register_model("squeezenet")
def _squeezenet(input_shape, num_outputs, include_top=True, from_logits=False):
    """SqueezeNet 1.1, but for the mean over the image, which comes before its last layer and not after."""
    import tensorflow as tf

    _check.boolean(include_top=include_top)
    _refuse_unless_image(input_shape, "squeezenet", any_size=True)
    if any(side is not None and side < SQUEEZENET_SMALLEST_SIDE for side in input_shape[:2]):
        raise InvalidArgumentError(
            f"input_shape={input_shape} is too small for squeezenet: give images of {SQUEEZENET_SMALLEST_SIDE} pixels "
            "or more in each direction, enlarged if need be."
        )
    if not include_top and num_outputs != SQUEEZENET_FEATURES:
        raise InvalidArgumentError(
            f"num_outputs={num_outputs} is not allowed with include_top=False: squeezenet has {SQUEEZENET_FEATURES} "
            "features."
        )

    def convolved(x, count, size, name, **options):
        return tf.keras.layers.Conv2D(count, size, activation="relu", name=name, **options)(x)

    def fire(x, number, squeeze, expand):
        """Few 1x1 convolutions, then many 1x1 and 3x3 ones side by side."""
        x = convolved(x, squeeze, 1, f"fire{number}_squeeze1x1")
        one = convolved(x, expand, 1, f"fire{number}_expand1x1")
        three = convolved(x, expand, 3, f"fire{number}_expand3x3", padding="same")
        return tf.keras.layers.Concatenate(name=f"fire{number}_concat")([one, three])

    inputs = tf.keras.Input(shape=input_shape)
    x = convolved(inputs, 64, 3, "conv1", strides=2)
    for number, (squeeze, expand) in enumerate(_FIRE_MODULES, start=2):
        if number in (2, 4, 6):
            x = tf.keras.layers.MaxPool2D(3, strides=2, name=f"pool{number - 1}")(x)
        x = fire(x, number, squeeze, expand)
    x = tf.keras.layers.GlobalAveragePooling2D(name="features")(x)
    return tf.keras.Model(inputs, top(x, num_outputs, (), None, from_logits) if include_top else x)


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


def _refuse_unless_image(input_shape: tuple[int | None, ...], builder: str, any_size: bool = False) -> None:
    if len(input_shape) != 3 or input_shape[2] is None:
        raise InvalidArgumentError(
            f"input_shape={input_shape} is not allowed for {builder}: give (height, width, channels), like (28, 28, 1)."
        )
    if not any_size:
        fixed(input_shape, builder)
