"""`python tests/check_wheel.py WHEEL [PIP ARGUMENTS]`: installs a wheel and uses it.

It does so in an environment of its own, where there is no compiler and no source tree; `make wheel`
and the workflow of the wheels run it.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PROGRAM = """
import importlib, pathlib, shutil, sys
assert not any(map(shutil.which, ("cc", "gcc", "clang"))), "there is a compiler"

import keras, numpy as np
import keras_dfp
from keras_dfp import zoo

assert pathlib.Path(keras_dfp.__file__).is_relative_to(sys.prefix), keras_dfp.__file__
assert "keras_dfp.libs/libgomp" in pathlib.Path("/proc/self/maps").read_text(), "another libgomp"
keras.utils.set_random_seed(0)
keras_dfp.set_policy("dfp16")
for name in zoo.list():
    zoo.recipe(name)
    importlib.import_module(f"keras_dfp.model_zoo.{name}.architecture")
importlib.import_module("keras_dfp.benchmarks.worker")
model = zoo.load("lenet", input_shape=(8, 8, 1))
model.compile("adam", "sparse_categorical_crossentropy")
x, y = np.random.default_rng(0).random((64, 8, 8, 1)), np.arange(64) % 10
losses = model.fit(x, y, epochs=16, verbose=0).history["loss"]
assert losses[-1] < losses[0], losses
assert "5 of 5 run on integers" in str(keras_dfp.describe(model))
print("trained under", keras_dfp.info()["isa"], "from loss", losses[0], "to", losses[-1])
"""


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (native,) = [name for name in names if name.startswith("keras_dfp/_native.")]
        stripped = b".symtab" not in archive.read(native)
    assert "manylinux" in wheel.name, f"{wheel.name} is for this machine only"
    assert stripped, f"{native} is not stripped"
    assert len(names) == len(set(names)), "a file is there twice"
    assert "keras_dfp/training/summary.html" in names, "the template of reports is not there"
    assert [n for n in names if n.startswith("keras_dfp.libs/libgomp")], "libgomp is not there"


def main(wheel: Path, *pip: str) -> None:
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = f"{folder}/bin/python"
        install = [python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]", *pip]
        subprocess.run(install, check=True)
        # Nothing of this machine but the environment's own programs.
        environment = {"PATH": f"{folder}/bin", "HOME": folder, "TF_CPP_MIN_LOG_LEVEL": "3"}
        for command in (
            [python, "-c", PROGRAM],
            ["keras-dfp", "info"],
            ["keras-dfp", "bench", "-h"],
        ):
            executable = f"{folder}/bin/{os.path.basename(command[0])}"
            command = [executable, *command[1:]]
            subprocess.run(command, check=True, cwd=folder, env=environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:])
