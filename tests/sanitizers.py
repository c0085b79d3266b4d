"""Builds of the extension with a sanitizer inside, and a Python that starts with it in place.

They lie in folders of their own, build/race and build/sanitize; the normal build stays as it is.
Nothing but the extension is instrumented. Clang builds them: its OpenMP tells ThreadSanitizer what
a parallel region orders.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent

# Py_BytesMain is all there is to `python`; linked here, it starts with the sanitizer in place.
PYTHON_C = """
int Py_BytesMain(int, char **);
int main(int argc, char **argv) { return Py_BytesMain(argc, argv); }
"""


def folder(name):
    """Returns the folder of a build, which is there."""
    path = HERE.parent / "build" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def clang(*arguments):
    """Runs clang and returns what it prints."""
    return subprocess.run(
        ["clang", *arguments], check=True, text=True, stdout=subprocess.PIPE
    ).stdout.strip()


def environment(build):
    """Returns the environment in which the Python of a build finds it, and the tests."""
    paths = [str(build / "lib"), str(HERE), *sys.path[1:]]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def build(build, flags):
    """Makes `python` and `lib`, the package with its extension, in a folder."""
    (build / "python.c").write_text(PYTHON_C)
    libraries = sysconfig.get_config_var("LIBDIR")
    clang(
        *flags,
        str(build / "python.c"),
        *("-o", str(build / "python"), f"-L{libraries}", f"-Wl,-rpath,{libraries}"),
        f"-lpython{sysconfig.get_python_version()}",
        *(sysconfig.get_config_var("LINKFORSHARED") or "").split(),
        # AddressSanitizer looks for what throws exceptions when the process starts.
        *("-Wl,--no-as-needed", "-lstdc++"),
    )
    command = [sys.executable, "setup.py", "--quiet", "build"]
    subprocess.run(
        [*command, "--build-lib", build / "lib", "--build-temp", build / "temp"],
        cwd=HERE.parent,
        env={**os.environ, "CC": "clang", "LDSHARED": "clang -shared", "CFLAGS": " ".join(flags)},
        check=True,
    )


def check_build(build):
    """Raises unless it is that build whose ops run in this process."""
    from keras_dfp.native import extension

    assert Path(extension.__file__).is_relative_to(build), extension.__file__
