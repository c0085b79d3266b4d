"""Builds the native core, `pyx/_native.pyx`, into `keras_dfp._native`, and says where the packages
lie; all else is in pyproject."""

import runpy
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
}

native = Extension(
    "keras_dfp._native",
    ["pyx/_native.pyx"],
    include_dirs=["pyx"],
    depends=sorted(str(p) for p in Path("pyx").rglob("*") if p.is_file()),
    # Baseline flags: each microkernel names its own instruction set, so one binary runs on every
    # CPU. Contraction off: a fused multiply-add the source does not ask for changes results.
    extra_compile_args=[
        "-O3",
        "-fopenmp",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
    ],
    extra_link_args=["-fopenmp"],
)


class BuildNative(build_ext):
    """Checks for the compiler first: its own errors are pages long."""

    def build_extensions(self):
        runpy.run_path("pyx/check_compiler.py", run_name="__main__")
        super().build_extensions()


# Folders beside the package that are parts of it; `keras_dfp/source_tree.py` finds them here.
BESIDE = ["benchmarks", "model_zoo"]
networks = [f"model_zoo.{recipe.parent.name}" for recipe in Path("model_zoo").glob("*/recipe.toml")]

setup(
    packages=[
        *find_packages(include=["keras_dfp*"]),
        *(f"keras_dfp.{folder}" for folder in [*BESIDE, *networks]),
    ],
    package_dir={f"keras_dfp.{folder}": folder for folder in BESIDE},
    cmdclass={"build_ext": BuildNative},
    ext_modules=cythonize(
        [native],
        build_dir="build/cython",
        include_path=["pyx"],
        compiler_directives=DIRECTIVES,
    ),
)
