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
from tfprivacy_ft.weights import load_backbone

IMAGES, IMAGES_SHA256 = "pneumoniamnist.npz", "ce8250bf5debc3c389b89affcc1d9feac579b26e875a848301e9f937bb0c2eee"
IMAGES_URL = "https://medmnist.com"
SIZE = 96
MEANS = (103.939, 116.779, 123.68)  # of ImageNet: blue, green, red


def backbone():
    """From grey X-rays [28, 28, 1] in 0 .. 255 to the features of a pretrained SqueezeNet, [5, 5, 512]."""
    squeezenet = load_backbone("squeezenet", (SIZE, SIZE, 3))
    inputs = tf.keras.Input((28, 28, 1))
    resized = tf.keras.layers.Resizing(SIZE, SIZE)(inputs)
    colours = [tf.keras.layers.Rescaling(1.0, -mean)(resized) for mean in MEANS]
    return tf.keras.Model(inputs, squeezenet(tf.keras.layers.Concatenate()(colours)))


def images_of(part):
    """Images [n, 28, 28, 1] and labels [n] of "train", "val" or "test"."""
    content = datasets._read_checked(IMAGES, "pneumoniamnist", (IMAGES_SHA256,), IMAGES_URL)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    return images[..., None].astype(np.float32), labels.ravel().astype(np.int32)


def splits(runs):
    return [_finetune.Split(*images_of("train"), *images_of("test"), backbone=backbone())] * runs


if __name__ == "__main__":
    _finetune.main(__doc__, splits, measure="AUC", target_epsilon=3.0, target=0.93)
