"""The team of threads, without OpenMP, Python and TensorFlow: team.c, a C program, and what
ThreadSanitizer and AddressSanitizer say of it."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "optimized": ["-O3"],
    "threads": ["-O1", "-g", "-fsanitize=thread"],
    "addresses": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("options", OPTIONS)
def test_team(tmp_path, compiler, options):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program, empty = tmp_path / "team", tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }")
    if subprocess.run([compiler, *OPTIONS[options], empty, "-o", tmp_path / "empty"]).returncode:
        pytest.skip(f"{compiler} has no library for {OPTIONS[options][-1]}")
    command = [compiler, *OPTIONS[options], "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT / 'pyx'}", ROOT / "tests" / "team.c", "-pthread", "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout
