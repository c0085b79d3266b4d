"""Two replicas on this machine's CPU, which TensorFlow must be told of before it does anything."""

import subprocess
import sys
from pathlib import Path

_TWO_CPUS = """
import keras
import tensorflow as tf
cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
"""


def check_on_two(program):
    """Runs a program in a process with CPU:0 and CPU:1; it must print "same" in the end."""
    run = subprocess.run(
        [sys.executable, "-c", _TWO_CPUS + program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.stdout.endswith("same\n"), run.stderr[-3000:]
