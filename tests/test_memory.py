"""ResNet-50 under the policy takes less memory than in float32."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import resource
import sys

import keras
import numpy as np

import keras_dfp

keras.config.set_dtype_policy(sys.argv[1])
model = keras.applications.ResNet50(weights=None)
model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy")
images = np.random.default_rng(0).standard_normal((32, 224, 224, 3)).astype(np.float32)
for _ in range(3):
    model.train_on_batch(images, np.arange(32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(policy):
    """Returns the resident memory, at most, of a process that trains three steps, in KiB."""
    command = [sys.executable, "-c", STEPS, policy]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return int(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.slow
def test_resnet50_takes_less_memory_than_in_float32():
    assert peak("dfp16") <= 0.95 * peak("float32")
