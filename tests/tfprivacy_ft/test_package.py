"""What `import tfprivacy_ft` does to the process, and what it leaves alone."""

import os
import subprocess
import sys

import pytest
import tensorflow as tf


def _run(code, **environment):
    clean = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=600, check=True
    )


def test_importing_it_needs_no_tensorflow():
    assert _run("import sys, tfprivacy_ft; print('tensorflow' in sys.modules)").stdout.strip() == "False"


@pytest.mark.skipif(not tf.__version__.startswith("2.14."), reason="newer TensorFlow logs before any setting is read")
def test_tensorflow_starts_without_noise():
    assert _run("import tfprivacy_ft.models, tensorflow as tf; tf.constant(1)").stderr == ""


def test_a_log_level_of_the_user_is_kept():
    code = "import os, tfprivacy_ft; print(os.environ['TF_CPP_MIN_LOG_LEVEL'])"
    assert _run(code, TF_CPP_MIN_LOG_LEVEL="0").stdout.strip() == "0"


def test_every_public_name_is_listed():
    import tfprivacy_ft

    assert {"datasets", "models", "__version__"} <= set(dir(tfprivacy_ft))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tfprivacy_ft.nothing
