"""Memory: ResNet-50 takes less under the policy than in float32, and nothing that repeats grows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import sys

import keras
import numpy as np

from keras_dfp.info import peak_memory

keras.config.set_dtype_policy(sys.argv[1])
model = keras.applications.ResNet50(weights=None)
model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy")
images = np.random.default_rng(0).standard_normal((32, 224, 224, 3)).astype(np.float32)
for _ in range(3):
    model.train_on_batch(images, np.arange(32))
print(peak_memory())
"""


REPEATED = """
import gc
import sys

import keras
import numpy as np

import keras_dfp
from keras_dfp import backend

images = np.random.default_rng(0).standard_normal((8, 12, 12, 3)).astype(np.float32)
labels = np.arange(8) % 4


def model(eagerly=True):
    inputs = keras.Input((12, 12, 3))
    x = keras.layers.Conv2D(8, 3, use_bias=False)(inputs)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.ReLU()(keras.layers.Add()([x, keras.layers.Conv2D(8, 3, padding="same")(x)]))
    made = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile("sgd", loss, run_eagerly=eagerly)
    return made


def models():
    model().train_on_batch(images, labels)
    keras.backend.clear_session()


def policies():
    for policy in ("dfp16", "float32"):
        keras_dfp.set_policy(policy)
        keras_dfp.set_model_policy(kept, policy)
    with keras_dfp.policy_scope("dfp16_paper"):
        pass


def installs():
    backend.uninstall()
    backend.install()


def taken():
    gc.collect()
    resident = int(open("/proc/self/statm").read().split()[1]) * 4096
    return resident, len(gc.get_objects())


what, times = sys.argv[1], int(sys.argv[2])
with keras_dfp.policy_scope("float32" if what == "policies" else "dfp16"):
    kept = model(eagerly=False)
steps = lambda: kept.train_on_batch(images, labels)
if what == "models":
    keras_dfp.set_policy("dfp16")
repeated = {"steps": steps, "models": models, "policies": policies, "installs": installs}[what]
# What is made once is made by then.
for _ in range(max(times // 5, 10)):
    repeated()
before = taken()
for _ in range(times):
    repeated()
print(*(now - then for now, then in zip(taken(), before)))
"""


def run(code, *arguments):
    """Returns the numbers that code prints in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [int(number) for number in output.split()]


def peak(policy):
    """Returns the resident memory, at most, of a process that trains three steps, in bytes."""
    return run(STEPS, policy)[0]


@pytest.mark.slow
def test_resnet50_takes_less_memory_than_in_float32():
    assert peak("dfp16") <= 0.95 * peak("float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "times"), [("steps", 1000), ("models", 200), ("policies", 1000), ("installs", 1000)]
)
def test_what_repeats_takes_no_more_memory(what, times):
    """An array of 8 KB kept each time would be 8 MB, an object of Python's one object."""
    resident, objects = run(REPEATED, what, times)
    assert resident < 6 * 2**20
    assert objects < times / 10
