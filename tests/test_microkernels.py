"""Every microkernel against plain C, without TensorFlow: on this CPU, and on emulated ones.

The check is a C program, microkernels/microkernels.c. Cross compilers and QEMU are optional: on
Debian, `apt install qemu-user-static gcc-{aarch64,s390x,riscv64}-linux-gnu`.
"""

import shutil

import pytest
from c_programs import SANITIZE, WARNINGS
from c_programs import run as run_program

from keras_dfp.native import extension


def run(tmp_path, *how):
    return run_program(tmp_path, "microkernels/microkernels.c", *how)


def passed(printed):
    return {line.split(":")[0] for line in printed.splitlines() if "checks passed" in line}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_here(tmp_path, compiler):
    printed = run(tmp_path, compiler, ["-O3", *WARNINGS])
    expected = {entry["name"] for entry in extension.isas() if entry["available"]}
    if "avx512vnni" in expected:
        # AVX-VNNI's tile, with its instruction in AVX-512's encoding; AMX, emulated if need be.
        expected |= {"avxvnni-evex", "amx"}
    too_new = {line.split(":")[0] for line in printed.splitlines() if "not compiled" in line}
    assert passed(printed) >= expected - too_new


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_no_access_out_of_bounds(tmp_path, compiler):
    assert "portable" in passed(run(tmp_path, compiler, SANITIZE))


@pytest.mark.parametrize(
    "machine",
    ["aarch64", *(pytest.param(m, marks=pytest.mark.slow) for m in ("riscv64", "s390x"))],
)
def test_emulated(tmp_path, machine):
    printed = run(
        tmp_path,
        f"{machine}-linux-gnu-gcc",
        ["-O3", "-static", *WARNINGS],
        f"qemu-{machine}-static",
    )
    assert passed(printed) == {"portable", *(["neon"] if machine == "aarch64" else [])}


@pytest.mark.slow
def test_emulated_clang(tmp_path):
    if shutil.which("aarch64-linux-gnu-ld") is None:
        pytest.skip("aarch64-linux-gnu-ld is not installed")
    options = ["--target=aarch64-linux-gnu", "-O3", "-static"]
    assert passed(run(tmp_path, "clang", options, "qemu-aarch64-static")) == {"neon", "portable"}


@pytest.mark.slow
def test_old_compiler_leaves_kernels_out(tmp_path):
    """A gcc that calls itself version 7 does not know the newer instruction sets."""
    if "avx2" not in {entry["name"] for entry in extension.isas()}:
        pytest.skip("every gcc knows the instruction sets of this machine")
    printed = run(tmp_path, "gcc", ["-O1", "-U__GNUC__", "-D__GNUC__=7"])
    assert {"avx512vnni: not compiled", "avxvnni: not compiled"} <= set(printed.splitlines())
    assert "portable" in passed(printed)
