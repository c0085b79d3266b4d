"""Keras's own tests, which its wheel brings, with the plugin in place: `make keras-tests`.

    python tests/keras_tests.py [--policy dfp16] [folder or file in keras/src ...]

Under float32 each must end as it ends without the plugin: those that fail are run again in stock
Keras, which fails some of them for reasons of its own, such as packages that are not installed
(most tests of `ops` and `trainers` import jax; some import grain, pandas or torch). Any other
policy is the global one of every test; values that a test compares may then be apart by `TOLERANCE`
of the largest, and `keras_tests.toml` explains what fails all the same.
"""

import argparse
import fnmatch
import itertools
import os
import subprocess
import sys
import tempfile
import tomllib
import types
from pathlib import Path

import pytest

FOLDERS = ("dtype_policies", "saving", "optimizers", "models", "trainers", "ops", "layers")
EXPLAINED = Path(__file__).with_suffix(".toml")
# What a few products on 14-bit mantissas may be off, where a test allows for float32's rounding.
TOLERANCE = 4e-3
_POLICY, _FAILED = "KERAS_TESTS_POLICY", "KERAS_TESTS_FAILED"

# ---- inside pytest, as its plugin ----------------------------------------------------------------


def pytest_configure(config):
    for marker in ("requires_trainable_backend", "large"):
        config.addinivalue_line("markers", marker)
    # The tests import it; the wheel does not bring it.
    sys.modules["conftest"] = types.ModuleType("conftest")
    sys.modules["conftest"].skip_if_backend = lambda backend, reason: pytest.mark.skipif(
        backend == "tensorflow", reason=reason
    )
    if not (policy := os.environ.get(_POLICY)):
        return
    import keras
    import numpy as np
    from keras.src.testing import test_case

    import keras_dfp

    assert keras_dfp.backend.installed()
    if policy == "float32":
        return
    set_up, close = test_case.TestCase.setUp, test_case.TestCase.assertAllClose

    def set_up_under_policy(self):
        set_up(self)  # clears what is global
        keras.config.set_dtype_policy(policy)

    def roughly_close(self, actual, desired, atol=1e-6, *args, **kwargs):
        largest = np.max(np.abs(self.convert_to_numpy(desired)), initial=0)
        close(self, actual, desired, max(atol, TOLERANCE * largest), *args, **kwargs)

    test_case.TestCase.setUp = set_up_under_policy
    test_case.TestCase.assertAllClose = roughly_close


def pytest_runtest_logreport(report):
    # Also of a module that cannot be imported.
    if report.failed:
        with open(os.environ[_FAILED], "a") as file:
            file.write(report.nodeid + "\n")


pytest_collectreport = pytest_runtest_logreport

# ---- outside -------------------------------------------------------------------------------------


def failures(tests, policy: str, root: Path) -> set[str]:
    """Runs tests under a policy, or in stock Keras if that is empty; returns those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        failed, empty = Path(folder, "failed"), Path(folder, "pytest.ini")
        failed.touch()
        empty.write_text("[pytest]\n")
        environment = {
            **os.environ,
            _POLICY: policy,
            _FAILED: str(failed),
            "KERAS_BACKEND": "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        }
        options = ["-q", "--tb=line", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
        options += ["--disable-warnings", "-p", "keras_tests", "-c", empty, "--rootdir", root]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        code = subprocess.run(command, cwd=root, env=environment).returncode
        if code not in (0, 1):
            sys.exit(f"keras_tests: pytest ended with {code}")
        return set(failed.read_text().splitlines())


def explanation(test: str, explained: dict[str, list[str]]) -> str | None:
    for reason, patterns in explained.items():
        for pattern in patterns:
            if fnmatch.fnmatchcase(test, f"keras/src/{pattern}"):
                return reason
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs Keras's own tests with the plugin.")
    parser.add_argument("--policy", default="float32")
    parser.add_argument("tests", nargs="*", default=FOLDERS, help="in keras/src")
    arguments = parser.parse_args()
    import keras

    root = Path(keras.__file__).parents[1]
    explained = tomllib.loads(EXPLAINED.read_text()) if arguments.policy != "float32" else {}
    wrong, stale = [], []
    for tests in arguments.tests:
        failed = failures([f"keras/src/{tests}"], arguments.policy, root)
        unexplained = sorted(test for test in failed if not explanation(test, explained))
        stale += [
            pattern
            for pattern in itertools.chain(*explained.values())
            if pattern.startswith(f"{tests}/")
            and not fnmatch.filter(failed, f"keras/src/{pattern}")
        ]
        stock = failures(unexplained, "", root) if unexplained else set()
        wrong += [test for test in unexplained if test not in stock]
        print(
            f"{tests}: {len(failed)} failed under {arguments.policy}: "
            f"{len(failed) - len(unexplained)} explained, {len(stock)} in stock Keras too",
            flush=True,
        )
    print(*wrong, f"{len(wrong)} failed because of the plugin", sep="\n")
    print(*stale, f"{len(stale)} patterns of {EXPLAINED.name} explain nothing", sep="\n")
    return bool(wrong or stale)


if __name__ == "__main__":
    sys.exit(main())
