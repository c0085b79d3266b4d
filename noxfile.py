"""`make matrix`: a part of the tests with pairs of TensorFlow and Keras, on several Pythons.

Pythons are found on PATH; what is missing is skipped. `nox -l` lists the sessions,
`nox -s "smoke(3.13 nightly)"` runs one. A virtual environment is removed when its session ends.
"""

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.envdir = "build/nox"
nox.options.sessions = ["smoke"]

WHEELS = Path("build/wheels").absolute()
TESTS = ("registry", "policy", "backend", "attention", "rnn", "models", "ops")
PAIRS = {
    "3.11 tensorflow-2.16 keras-3.10": ("tensorflow-cpu==2.16.*", "keras==3.10.*"),
    "3.12 tensorflow-2.18 keras-3.12": ("tensorflow-cpu==2.18.*", "keras==3.12.*"),
    "3.13 tensorflow-2.20 keras-3.14": ("tensorflow-cpu==2.20.*", "keras==3.14.*"),
    "3.13 newest": ("tensorflow-cpu", "keras"),
    "3.13 nightly": ("--pre", "tf-nightly-cpu", "keras-nightly"),
}


def wheel(session: nox.Session) -> Path:
    """Returns the wheel for the session's Python; builds it if a source is newer."""
    tag = f"cp{session.python.replace('.', '')}"
    sources = [Path("setup.py"), Path("pyproject.toml")]
    for folder in ("pyx", "keras_dfp", "model_zoo"):
        sources += [f for f in Path(folder).rglob("*") if f.suffix not in (".so", ".pyc")]
    newest = max(file.stat().st_mtime for file in sources if file.is_file())
    built = [w for w in WHEELS.glob(f"*-{tag}-*.whl") if w.stat().st_mtime > newest]
    if not built:
        session.run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(WHEELS), ".")
        built = list(WHEELS.glob(f"*-{tag}-*.whl"))
    return built[-1]


@nox.session
@nox.parametrize(
    "python,pair",
    [nox.param(p.split()[0], pair, id=p) for p, pair in PAIRS.items()],
)
def smoke(session: nox.Session, pair: tuple[str, ...]) -> None:
    """Installs the wheel beside the pair, and tests it from a folder without the sources."""
    try:
        run_tests(session, pair)
    finally:
        # A gigabyte each.
        shutil.rmtree(session.virtualenv.location)


def run_tests(session: nox.Session, pair: tuple[str, ...]) -> None:
    session.install("--quiet", *pair, "click", "hypothesis", "pytest", "scipy", "tqdm")
    # Its dependencies are there: it must not bring `keras` beside `keras-nightly`.
    session.install("--quiet", "--no-deps", str(wheel(session)))
    folder = session.create_tmp()
    shutil.copytree("tests", Path(folder, "tests"), dirs_exist_ok=True)
    shutil.copy("pyproject.toml", folder)
    session.chdir(folder)
    tests = [f"tests/test_{name}.py" for name in TESTS]
    session.run("pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests)
