"""What is needed to import the package, and what it is built into."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def errors_of(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    return result.stderr.splitlines()[-1]


def test_without_tensorflow():
    error = errors_of("import sys; sys.modules['tensorflow'] = None; import keras_dfp")
    assert error.startswith("ImportError: keras_dfp needs TensorFlow, which is not installed.")
    assert "`pip install tensorflow-cpu` or `pip install tensorflow`" in error


@pytest.mark.slow
def test_on_another_backend():
    # Keras's other backends need packages that the tests do without.
    error = errors_of("import keras; keras.backend.backend = lambda: 'jax'; import keras_dfp")
    assert error.startswith("ImportError: keras_dfp works with Keras's TensorFlow backend")
    assert "'jax'" in error


def test_an_unknown_instruction_set():
    error = errors_of("import keras_dfp", KERAS_DFP_ISA="mmx")
    assert "KERAS_DFP_ISA" in error
    assert "'mmx' is not available; available here: " in error
    assert "portable" in error


@pytest.mark.slow
def test_sdist_and_wheel(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so")
    shutil.copytree(ROOT, source, ignore=ignored)

    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (sdist,) = (source / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, pattern in (("pyx", "*"), ("tests", "*.py"), ("docs", "*.md")):
        for file in (source / folder).rglob(pattern):
            assert str(file.relative_to(source)) in names
    built = [name for name in names if name.endswith((".c", ".so"))]
    assert built == ["tests/microkernels/microkernels.c"]

    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, sdist], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert [name for name in names if re.fullmatch(r"keras_dfp/_native\..*so", name)]
    assert "keras_dfp/cli/train.py" in names
    for network in (ROOT / "model_zoo").glob("*/recipe.toml"):
        for file in network.parent.glob("[!_]*.*"):
            assert f"keras_dfp/model_zoo/{network.parent.name}/{file.name}" in names
    assert "keras_dfp/benchmarks/worker.py" in names
    assert not [name for name in names if not name.startswith(("keras_dfp/", "keras_dfp-"))]
    assert "License-Expression: Apache-2.0" in metadata
