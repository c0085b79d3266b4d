"""Runs tests with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`, an hour or so.

Those of kernels and raw ops, `test_fuzz.py` among them, with all that is slow; what TensorFlow and
Python do is not watched. Arguments are pytest's, in place of these.
"""

import subprocess
import sys

import sanitizers

BUILD = sanitizers.folder("sanitize")
FLAGS = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-gline-tables-only",
    "-O1",
    "-Wno-pass-failed",
]
TESTS = ["test_fuzz.py", "test_kernels.py", "test_normalization.py", "test_quantize_sweep.py"]
# One that must be found: the last element of an array that has one less.
FAULT_C = """
#include <stdlib.h>
int main(int argc, char **argv) {
    int *x = malloc(argc * sizeof(int)), far = 0x7fffffff;
    if (argv[1]) return far + argc < 0;
    return x[argc];
}
"""


def environment():
    return {
        **sanitizers.environment(BUILD),
        # TensorFlow and Python keep what they have to the end.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


def check_the_tools(env):
    source = BUILD / "fault.c"
    source.write_text(FAULT_C)
    sanitizers.clang(*FLAGS, str(source), "-o", str(BUILD / "fault"))
    for arguments in ([], ["overflow"]):
        command = [BUILD / "fault", *arguments]
        if not subprocess.run(command, env=env, stderr=subprocess.DEVNULL).returncode:
            sys.exit(f"sanitize: {source} runs as if nothing were wrong with it")


def main(arguments):
    env = environment()
    check_the_tools(env)
    sanitizers.build(BUILD, FLAGS)
    tests = arguments or [str(sanitizers.HERE / name) for name in TESTS]
    command = [BUILD / "python", __file__, "work", "-p", "no:cacheprovider", "-q", *tests]
    code = subprocess.run(command, cwd=BUILD, env=env).returncode
    if code:
        sys.exit(f"sanitize: its Python exited with {code}, see above")
    print("sanitize: nothing found")


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        import pytest

        sanitizers.check_build(BUILD)
        sys.exit(pytest.main(sys.argv[2:]))
    main(sys.argv[1:])
