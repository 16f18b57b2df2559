"""Backbones of KerasHub, of the current stack, are fine-tuned as other models are: by adapters, also those they bring."""

import warnings

import numpy as np
import pytest

from tfprivacy_ft import datasets
from tfprivacy_ft.clipping import SlowClippingWarning
from tfprivacy_ft.finetune import Full, Head, LoRA, Staged, finetune
from tfprivacy_ft.keras_compat import IS_KERAS_3, keras

if not IS_KERAS_3:
    pytest.skip("KerasHub needs Keras 3", allow_module_level=True)
keras_hub = pytest.importorskip("keras_hub")

STEPS = 64


@pytest.fixture(scope="module")
def digits():
    """Zeros and ones, each as a text of 64 shades whose first word, which a BERT says most about, tells which it is."""
    data = datasets.load("digits")
    chosen = data.y_train < 2
    shades = np.rint(data.x_train[chosen].reshape(-1, STEPS) * 16).astype(np.int32)
    shades[:, 0] = 17 + data.y_train[chosen]
    inputs = {"token_ids": shades, "segment_ids": np.zeros_like(shades), "padding_mask": np.ones_like(shades)}
    return inputs, data.y_train[chosen]


def bert():
    """A small BERT, and a model of what it says of a whole text."""
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=19, num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32, max_sequence_length=STEPS
    )
    return backbone, keras.Model(backbone.inputs, backbone.output["pooled_output"])


def run(model, digits, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowClippingWarning)
        return finetune(model, *digits, target_epsilon=8.0, delta=1e-3, num_classes=2, verbose=0, **arguments)


def test_lora_learns_merges_and_leaves_the_backbone_as_it_was(digits, tmp_path):
    _, model = bert()
    before = [weight.copy() for weight in model.get_weights()]
    result = run(model, digits, recipe=LoRA(rank=2))
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert 7.5 < result.epsilon <= 8.0 and result.history[-1]["accuracy"] > 0.8
    result.model.save(tmp_path / "model.keras")
    outputs = keras.models.load_model(tmp_path / "model.keras").predict(digits[0], verbose=0)
    np.testing.assert_allclose(outputs, result.model.predict(digits[0], verbose=0), atol=1e-5)
    assert not any("lora" in variable.path for variable in result.model.variables)


def test_adapters_that_a_backbone_brings_are_trained_and_kernels_below_them_are_not(digits):
    backbone, model = bert()
    backbone.enable_lora(2)
    trained = {variable.path for variable in backbone.trainable_variables}
    assert any("lora_kernel_a" in path for path in trained) and not any(path.endswith("kernel") for path in trained)
    result = run(model, digits, recipe=Staged((Head(epochs=2), Full(epochs=2, batch_size=len(digits[1])))))
    before, after = ({v.path: v.numpy() for v in m.weights} for m in (model, result.model))
    assert {path for path in before if not np.array_equal(before[path], after[path])} == trained
    assert {v.path for v in result.model.trainable_variables} == {*trained, "head/kernel", "head/bias"}
