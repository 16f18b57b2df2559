"""PneumoniaMNIST: a private linear head on a pretrained SqueezeNet's features at epsilon 3; target AUC 0.93.

The X-rays of 28 x 28 are resized to 96 x 96, and their features are the last ones of a SqueezeNet that knows ImageNet, in all 25
places: 12,800 numbers, of which the mean over places gives much less. The published test set is what is measured on, the
published validation set is left alone. Images and weights are read from the folder in the environment variable
TFPRIVACY_FT_DATA, or from ../shared/data.
"""

import io

import _finetune
import numpy as np
import tensorflow as tf

from tfprivacy_ft import datasets

IMAGES, IMAGES_SHA256 = "pneumoniamnist.npz", "ce8250bf5debc3c389b89affcc1d9feac579b26e875a848301e9f937bb0c2eee"
IMAGES_URL = "https://medmnist.com"
SIZE = 96
MEANS = (103.939, 116.779, 123.68)  # of ImageNet: blue, green, red


def squeezenet():
    """SqueezeNet as pretrained, up to its last features before the mean over places: [batch, 5, 5, 512]."""
    from tfprivacy_ft.weights import load_backbone

    return load_backbone("squeezenet", (SIZE, SIZE, 3))


def features(model, images):
    """Unit rows [n, 12800] of grey images [n, 28, 28] in 0 .. 255."""
    found = []
    for part in np.array_split(images.astype(np.float32)[..., None], max(1, len(images) // 128)):
        resized = tf.repeat(tf.image.resize(part, (SIZE, SIZE)), 3, axis=-1) - tf.constant(MEANS)
        found.append(model(resized, training=False).numpy().reshape(len(part), -1))
    return _finetune.unit_rows(np.concatenate(found))


def splits(runs):
    content = datasets._read_checked(IMAGES, "pneumoniamnist", (IMAGES_SHA256,), IMAGES_URL)
    model = squeezenet()
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        x, x_test = (features(model, arrays[f"{part}_images"]) for part in ("train", "test"))
        y, y_test = (arrays[f"{part}_labels"].ravel().astype(np.int32) for part in ("train", "test"))
    return [_finetune.Split(x, y, x_test, y_test)] * runs


if __name__ == "__main__":
    _finetune.main(__doc__, splits, measure="AUC", target_epsilon=3.0, target=0.93)
