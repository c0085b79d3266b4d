"""What the documentation shows is run: Python, shell, the examples; and what is not, says why.

A block runs where a reader would run it: after those before it on its page, in one folder. One that
cannot (it needs ImageNet, days, a network) has a line before it, `<!-- not run: why -->`; commands
of keras-dfp in it must all the same be such as the command line takes.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from keras_dfp.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
}


def blocks(page):
    """Yields of each block its language, the lines before it, its code, and why it is not run."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        before = text[: block.start("code")].count("\n")
        yield block["language"], before, block["code"], block["why"]


def name(page):
    return str(page.relative_to(ROOT))


def test_no_block_is_missed():
    for page in PAGES:
        # What has no language is a drawing, or the end of a block.
        fences = [f for f in re.findall(r"^ *```(\w*)", page.read_text(), re.M) if f]
        assert [language for language, *_ in blocks(page)] == fences, page
        assert set(fences) <= {"python", "sh", "text"}, page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_such_as_there_are(page, tmp_path, monkeypatch):
    """Options and arguments, also of what is not run."""
    monkeypatch.chdir(tmp_path)
    for language, line, code, _ in blocks(page):
        if language != "sh":
            continue
        code = re.sub(r"\\\n| #.*", "", code).replace("$network", "resnet50")
        for command in re.findall(r"keras-dfp (\w[^\n;]*)", code):
            words = shlex.split(command)
            for word in words:
                # What a command before it has written.
                if re.fullmatch(r"\w+[.]json|runs/\S+", word):
                    Path(word).parent.mkdir(parents=True, exist_ok=True)
                    Path(word).touch() if "." in word else Path(word).mkdir(exist_ok=True)
            try:
                parse(main, words)
            except click.UsageError as error:
                pytest.fail(f"{name(page)}:{line}: keras-dfp {command}: {error.message}")


def parse(command, words):
    with command.make_context(command.name, list(words)) as context:
        if isinstance(command, click.Group) and context._protected_args:
            name, sub, rest = command.resolve_command(
                context, [*context._protected_args, *context.args]
            )
            parse(sub, rest)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with what pages speak of: photos of two classes, and of three."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    for folder, classes in (("photos", 2), ("other", 3)):
        for c in range(classes):
            Path(folder, f"class{c}").mkdir(parents=True)
            for i in range(20):
                pixels = rng.integers(0, 100, (32, 32, 3)) + 70 * c
                Image.fromarray(pixels.astype("uint8")).save(f"{folder}/class{c}/{i}.png")


def is_run(page):
    return any(why is None and language != "text" for language, _, _, why in blocks(page))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if is_run(page)], ids=name)
def test_blocks_run(page, reader):
    size = 224 if page.name == "README.md" else 96
    images = np.random.default_rng(1).random((16, size, size, 3), np.float32)
    known = {"__name__": "page", "images": images, "labels": np.arange(16) % 10}
    known["a"] = known["b"] = known["x"] = np.ones((4, 4), np.float32)
    for language, line, code, why in blocks(page):
        if why:
            continue
        if language == "python":
            exec(compile("\n" * line + code, page, "exec"), known)
        elif language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", code]
            result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
            assert result.returncode == 0, f"{name(page)}:{line}: {result.stdout}{result.stderr}"


def example(name, *arguments):
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_fine_tune(reader):
    output = example("fine_tune.py")
    first, second = (float(share) for share in re.findall(r"([\d.]+)% of the test", output))
    assert 80 < first < second
    assert Path("fine_tuned.keras").exists()
    assert output.endswith("tells 7, 8, 9\n")


@pytest.mark.slow
def test_transformer():
    output = example("transformer.py")
    assert "15 of 15 run on integers" in output
    assert float(re.search(r"([\d.]+)% of 1,000", output)[1]) > 90
    given, answer = re.search(r"(\d{8}) -> (\d{8})", output).groups()
    assert answer == "".join(sorted(given))


@pytest.mark.slow
def test_training_loop():
    output = example("training_loop.py")
    error = float(re.search(r"first gradient: ([\d.]+)%", output)[1])
    assert 0 < error < 5
    losses = re.findall(r"loss ([\d.]+), in float32 ([\d.]+)", output)
    assert all(float(a) == pytest.approx(float(b), abs=0.05) for a, b in losses)
    integers, exact = (float(share) for share in re.findall(r"([\d.]+)% of the test", output))
    assert integers > 85 and abs(integers - exact) < 3


@pytest.mark.slow
def test_custom_layer():
    output = example("custom_layer.py")
    assert re.search(r"Bilinear +3 matmul +INT16", output)
    assert re.search(r"Unreached +3 MatMul +FP32 +calls TensorFlow.*write keras.ops.matmul", output)
    error, variance = re.search(r"error (\S+); of the mean alone (\S+)", output).groups()
    assert float(error) < 0.01 * float(variance)
