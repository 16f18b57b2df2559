"""On a GPU: noise is drawn there, and a private step copies no more to the host than a plain one."""

import glob

import numpy as np
import pytest
import tensorflow as tf

from tfprivacy_ft.noise import DiscreteGaussianNoise, GaussianNoise
from tfprivacy_ft.optimizers import DPKerasSGDOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="there is no GPU"),
]
STEPS = 5


def copied_to_host(optimizer, folder):
    """Bytes that some steps of `fit` copied from the GPU to the host, read from TensorFlow's profile of them."""
    xplane_pb2 = pytest.importorskip("tensorflow.tsl.profiler.protobuf.xplane_pb2")
    model = tf.keras.Sequential(
        [tf.keras.layers.Input((32,)), tf.keras.layers.Dense(64, "relu"), tf.keras.layers.Dense(4)]
    )
    model.compile(optimizer, tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.default_rng(0)
    arrays = random.normal(size=(64, 32)).astype(np.float32), random.integers(0, 4, 64)
    batches = tf.data.Dataset.from_tensors(arrays).repeat()
    model.fit(batches, steps_per_epoch=STEPS, verbose=0)
    tf.profiler.experimental.start(str(folder))
    model.fit(batches, steps_per_epoch=STEPS, verbose=0)
    tf.profiler.experimental.stop()
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    space = xplane_pb2.XSpace()
    with open(path, "rb") as file:
        space.ParseFromString(file.read())
    total = 0
    for plane in space.planes:
        names = {key: stat.name for key, stat in plane.stat_metadata.items()}
        for event in (event for line in plane.lines for event in line.events):
            if "MemcpyD2H" in plane.event_metadata[event.metadata_id].name:
                details = {names[stat.metadata_id]: stat.str_value for stat in event.stats}
                total += int(details.get("memcpy_details", "size:0").split("size:")[1].split()[0])
    return total


@pytest.mark.parametrize("make", [GaussianNoise, DiscreteGaussianNoise])
def test_noise_is_drawn_on_the_gpu(make):
    noise, zeros = make(), [tf.zeros([1000])]
    drawn = tf.function(lambda: noise.draw(zeros, 1.0, 1.0)(zeros)[0])()
    assert "GPU" in drawn.device


def test_a_private_step_copies_nothing_of_the_batch_or_the_gradients_to_the_host(tmp_path):
    plain = copied_to_host(tf.keras.optimizers.SGD(0.1), tmp_path / "plain")
    private = copied_to_host(DPKerasSGDOptimizer(1.0, 1.0, learning_rate=0.1), tmp_path / "private")
    assert private - plain < 4 * 32 * STEPS  # scalars at most, where one row of the batch has 32 floats
