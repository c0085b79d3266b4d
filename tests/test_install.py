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


@pytest.mark.parametrize("arguments", [["--help"], ["train"]])
def test_the_command_on_another_backend(arguments):
    result = subprocess.run(
        [sys.executable, "-m", "keras_dfp", *arguments],
        cwd=ROOT,
        # Not installed, or it does not know it: as where `import keras` already fails.
        env={**os.environ, "KERAS_BACKEND": "nowhere"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: keras_dfp works with Keras's TensorFlow backend, but Keras runs")
    assert "'nowhere'" in line and "Set KERAS_BACKEND=tensorflow" in line


def test_an_unknown_instruction_set():
    error = errors_of("import keras_dfp", KERAS_DFP_ISA="mmx")
    assert "KERAS_DFP_ISA" in error
    assert "'mmx' is not available; available here: " in error
    assert "portable" in error


@pytest.mark.parametrize(
    ("refused", "missing"),
    [("", "a working C compiler"), ("Python.h", "Python's headers"), ("omp.h", "OpenMP")],
)
def test_without_what_compiling_needs(refused, missing, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f"#!/bin/sh\n! cat $(echo $* | grep -o '[^ ]*[.]c ') | grep -q '{refused}'\n"
    )
    compiler.chmod(0o755)
    check = [sys.executable, ROOT / "pyx" / "check_compiler.py"]
    environment = {**os.environ, "CC": str(compiler)}
    result = subprocess.run(check, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"keras-dfp cannot be compiled: {missing} (tried CC={compiler})")


def tracked():
    """Returns the files of the project, relative to its root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    # What is new, too; not what was deleted, or is no file, as a link to a folder.
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in listed.splitlines() if (ROOT / name).exists())


def test_there_are_no_links():
    # Some file systems and archives have none.
    assert not [name for name in tracked() if (ROOT / name).is_symlink()]


@pytest.mark.slow
def test_sdist_and_wheel(tmp_path):
    files, source = tracked(), tmp_path / "source"
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        for name in files:
            archive.write(ROOT / name, name)
    with zipfile.ZipFile(tmp_path / "source.zip") as archive:
        archive.extractall(source)

    # The tree runs as it is, but for what is compiled.
    (native,) = (ROOT / "keras_dfp").glob("_native.*.so")
    shutil.copy(native, source / "keras_dfp")
    uses = """
import sys, keras_dfp, keras_dfp.benchmarks.worker
assert keras_dfp.__file__.startswith(sys.argv[1]), keras_dfp.__file__
assert keras_dfp.model_zoo.__file__.startswith(sys.argv[1]), keras_dfp.model_zoo.__file__
assert keras_dfp.zoo.load("lenet").count_params() > 0
"""
    subprocess.run([sys.executable, "-c", uses, source], cwd=source, check=True)

    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (sdist,) = (source / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        names = [member.name.partition("/")[2] for member in members if member.isfile()]
        assert all(member.isfile() or member.isdir() for member in members)
    made = ("PKG-INFO", "setup.cfg", "keras_dfp.egg-info/")
    names = sorted(name for name in names if not name.startswith(made))
    assert names == [name for name in files if not name.startswith(".")]

    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--wheel-dir", tmp_path, sdist]
    environment = {**os.environ, "CC": "no-such-compiler"}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "keras-dfp cannot be compiled: a working C compiler (tried CC=no-such" in failed.stderr
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if ".dist-info/" not in name)
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA")))
        archive.extractall(tmp_path / "site")
    beside = ("benchmarks/", "model_zoo/")
    expected = [f"keras_dfp/{name}" for name in files if name.startswith(beside)]
    expected += [name for name in files if name.startswith("keras_dfp/")]
    (native,) = [name for name in names if re.fullmatch(r"keras_dfp/_native\..*so", name)]
    assert names == sorted([*expected, native])
    assert "License-Expression: Apache-2.0" in metadata.decode()
    site = tmp_path / "site"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", uses, site], cwd=tmp_path, env=environment, check=True)
