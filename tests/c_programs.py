"""C programs that check the core's headers without Python and TensorFlow: built, run, read."""

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Those of setup.py that change what is computed.
FLAGS = ["-D_GNU_SOURCE", "-fno-math-errno", "-fno-strict-aliasing", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(tmp_path, source, compiler, options, *emulator, timeout=None):
    """Builds a program of tests/, runs it and returns what it printed."""
    for tool in (compiler, *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    program = tmp_path / "program"
    command = [compiler, *options, *FLAGS, f"-I{TESTS.parent / 'pyx'}", TESTS / source]
    subprocess.run([*command, "-pthread", "-lm", "-o", program], check=True)
    done = subprocess.run(
        [*emulator, program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
