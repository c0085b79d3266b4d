"""Says in one line what is missing to compile the native core, and how to get it.

`setup.py` runs it before it compiles, and `make` before it installs anything; so it needs nothing
but Python.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile

# What must compile, by what is missing if it does not.
PROBES = [
    ("a working C compiler", "", []),
    ("Python's headers", "#include <Python.h>\n", []),
    (
        "OpenMP",
        "#include <omp.h>\nint threads(void) { return omp_get_max_threads(); }\n",
        ["-fopenmp"],
    ),
]


def missing() -> str:
    """Returns what is missing, `""` if nothing is."""
    # As setuptools chooses it.
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    with tempfile.TemporaryDirectory() as folder:
        for name, source, options in PROBES:
            file = os.path.join(folder, "probe.c")
            with open(file, "w") as stream:
                stream.write(source + "int one(void) { return 1; }\n")
            include = f"-I{sysconfig.get_path('include')}"
            options = [*options, include, "-shared", "-fPIC", file, "-o", f"{file}.so"]
            try:
                command = [*compiler.split(), *options]
                done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            except OSError:
                done = None
            if done is None or done.returncode:
                return f"{name} (tried CC={compiler})"
    return ""


if what := missing():
    sys.exit(
        f"keras-dfp cannot be compiled: {what} is missing. Debian, Ubuntu: apt install gcc "
        "python3-dev; with clang also libomp-dev; another compiler: CC=... before the command."
    )
