"""The team of threads, without OpenMP, Python and TensorFlow: team.c, a C program, and what
ThreadSanitizer and AddressSanitizer say of it."""

import shutil
import subprocess

import pytest
from c_programs import SANITIZE, WARNINGS, run

OPTIONS = {
    "optimized": ["-O3"],
    "threads": ["-g", "-O1", "-fsanitize=thread"],
    "addresses": SANITIZE,
}


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("options", OPTIONS)
def test_team(tmp_path, compiler, options):
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }")
    if (
        shutil.which(compiler)
        and subprocess.run(
            [compiler, *OPTIONS[options], empty, "-o", tmp_path / "empty"]
        ).returncode
    ):
        pytest.skip(f"{compiler} has no library for {options}")
    printed = run(tmp_path, "team.c", compiler, [*OPTIONS[options], *WARNINGS], timeout=120)
    assert printed.endswith("ok\n")
