"""Makes `keras_dfp.model_zoo` and `keras_dfp.benchmarks` of the folders beside the package.

An installation has them in the package, where `setup.py` puts them. A source tree has them beside
it, where people look for them, and runs as it is: with the tree on `PYTHONPATH`, say.
"""

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def _load(name: str) -> None:
    package = f"{__package__}.{name}"
    # Not `find_spec`, which may find those of another version that is installed.
    if not (_ROOT / __package__ / name / "__init__.py").exists():
        folder = _ROOT / name
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{package}: {folder} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
        spec.loader.exec_module(module)
        setattr(sys.modules[__package__], name, module)


_load("model_zoo")
_load("benchmarks")
