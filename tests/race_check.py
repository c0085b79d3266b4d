"""Looks for data races in the kernels with ThreadSanitizer: `make race-check`, a few minutes.

ThreadSanitizer does not understand GCC's OpenMP; it does LLVM's, which tells it through Archer what
a parallel region orders. So clang builds the extension and a Python with ThreadSanitizer inside
(sanitizers.py), and that Python runs real ops on several threads. Nothing but the extension is
instrumented, and nothing else is reported. What it cannot see is how TensorFlow hands memory on
from op to op: pyx/tf/call.pxi says so where ops take and give it.
"""

import subprocess
import sys
from pathlib import Path

import sanitizers

BUILD = sanitizers.folder("race")
FLAGS = ["-fsanitize=thread", "-g", "-O1", "-Wno-pass-failed"]
FOUND = 66  # what a process with a race exits with

# What must be reported, and what must not.
RACE_C = """
int main(void) {
    int sum = 0;
    #pragma omp parallel num_threads(4)
    for (int i = 0; i < 1000; i++) {
        %s
        sum++;
    }
    return sum == 0;
}
"""


def environment():
    # <lib>/clang/<version>, beside LLVM's other libraries.
    archer = Path(sanitizers.clang("-print-resource-dir")).parents[1] / "libarcher.so"
    if not archer.is_file():
        sys.exit("race-check needs Archer, part of LLVM's OpenMP. Debian: apt install libomp-dev")
    return {
        **sanitizers.environment(BUILD),
        "OMP_TOOL_LIBRARIES": str(archer),
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
    }


def check_the_tools(env):
    for name, critical, expected in [("race", "", FOUND), ("none", "#pragma omp critical", 0)]:
        source = BUILD / f"{name}.c"
        source.write_text(RACE_C % critical)
        sanitizers.clang(*FLAGS, "-fopenmp", str(source), "-o", str(BUILD / name))
        code = subprocess.run([BUILD / name], env=env, stderr=subprocess.DEVNULL).returncode
        if code != expected:
            sys.exit(f"race-check: ThreadSanitizer and Archer exit with {code} on {source}, "
                     f"which should be {expected}: their result could not be trusted.")  # fmt: skip


def work():
    """What is watched: generated products, the five networks' smaller ones, quantizing, two ops."""
    import networks
    import numpy as np
    import test_generated
    import test_networks
    import test_threads
    from kernels import ISAS, THREADS, running

    from keras_dfp import reference
    from keras_dfp.native import extension, lib

    sanitizers.check_build(BUILD)
    for i in range(150):
        test_generated.check(i)
    for i, line in enumerate(test_networks.CONVOLUTIONS[::12]):
        runs = [("exact" if i % 2 else "spill", isa, 4) for isa in ISAS]
        test_networks.check(networks.case(line, batch=1, most=4), runs, seed=i)
    extension.set_loss_handler(lambda *loss: None)  # told, and nobody is warned
    extension.look_at_numbers(True, True)
    rng = np.random.default_rng(0)
    quantized = []
    for shape in ((300_000,), (3, 200_000), (10_001, 33), (600, 700)):
        x, axes = rng.standard_normal(shape).astype(np.float32), len(shape) - 1
        x.flat[: x.size // 3] *= 1e-9  # many are lost, and counted
        for how in ("nearest", "stochastic"):
            truth = reference.quantize(x, rounding=how, group_axes=axes)
            quantized.append((x, dict(rounding=how, group_axes=axes), truth))
    for isa in ISAS:
        for threads in THREADS:
            for number, (x, attributes, (q, e)) in enumerate(quantized):
                for more in (dict(n_counts=1), dict(site=f"{isa} {threads} {number}")):
                    with running(isa, threads):
                        result = lib.dfp_quantize(x=x, exponent=[], step=[], **attributes, **more)
                        back = lib.dfp_dequantize(*result[:2], token=np.zeros(0, np.float32))
                    np.testing.assert_array_equal(result.q, q)
                    np.testing.assert_array_equal(result.e, e)
                    np.testing.assert_array_equal(back, reference.dequantize(q, e))
    # TensorFlow makes an op's kernel once and hands it from thread to thread, in an order that is
    # not seen here: it is made before there are threads.
    test_threads.products()
    for isa in ISAS:
        with running(isa, 3, small=0):
            test_threads.at_once(test_threads.products, count=3)


def main():
    env = environment()
    check_the_tools(env)
    sanitizers.build(BUILD, FLAGS)
    code = subprocess.run([BUILD / "python", __file__, "work"], cwd=BUILD, env=env).returncode
    if code:
        found = "there are races" if code == FOUND else f"its Python exited with {code}"
        sys.exit(f"race-check: {found}, see above")
    print("race-check: no race")


if __name__ == "__main__":
    work() if sys.argv[1:] == ["work"] else main()
