"""Builds the native core, `pyx/_native.pyx`, into `keras_dfp._native`; all else is in pyproject."""

from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

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

setup(
    ext_modules=cythonize(
        [native],
        build_dir="build/cython",
        include_path=["pyx"],
        compiler_directives=DIRECTIVES,
    )
)
