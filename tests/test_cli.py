"""The command line: what it prints, writes and returns."""

import os
import re
import signal
import subprocess
import sys

import click
import keras
import matplotlib.image
import pytest
from click.testing import CliRunner
from keras_dfp.cli.files import written_whole

import keras_dfp
from keras_dfp.cli import main


def run(*arguments, code=0):
    result = CliRunner().invoke(main, arguments, prog_name="keras-dfp")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("command", main.commands)
def test_help_shows_examples(command):
    output = run(command, "--help")
    assert "Usage: keras-dfp" in output
    if main.commands[command].params:
        assert f"keras-dfp {command} " in output


def test_version():
    assert keras_dfp.__version__ in run("--version")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage:"),
        (("evaluate",), "No such command 'evaluate'"),
        (("info", "please"), "unexpected extra argument"),
        (("train", "alexnet"), "'alexnet' is not 'lenet'"),
        (("train", "--policy", "int8"), "'int8' is not one of 'float32', 'dfp16'"),
        (("train", "--epochs", "0"), "0 is not in the range x>=1"),
        (("train", "--batch-size", "many"), "'many' is not a valid integer"),
        (("train", "--lr", "0"), "0 is not in the range x>0"),
        (("train", "--seed", "-1"), "-1 is not in the range"),
        (("describe",), "Missing argument 'MODEL'"),
        (("describe", "resnet5"), "Did you mean: resnet50"),
        (
            ("describe", "my net"),
            "neither a .keras file nor the name of a network of the zoo or of",
        ),
        (("describe", "ResNet50", "--policy", "float32"), "is not one of 'dfp16', 'dfp16_paper'"),
    ],
)
def test_wrong_usage(arguments, message):
    assert message in run(*arguments, code=2)


def test_info():
    output = run("info")
    assert re.search(rf"kernel {keras_dfp.info()['isa']} +in use", output)


def small_model(policy):
    with keras_dfp.policy_scope(policy):
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])


def test_describe_a_file(tmp_path):
    path = str(tmp_path / "model.keras")
    small_model(keras_dfp.DFPPolicy(mantissa_bits=12)).save(path)
    assert re.search(r"head +Dense .*12", run("describe", path))
    small_model("float32").save(path)
    assert "0 of 1 run on integers" in run("describe", path)
    assert "1 of 1 run on integers" in run("describe", path, "--policy", "dfp16")
    assert "last dense layer" in run("describe", path, "--policy", "dfp16_paper")


def test_describe_a_network_of_the_zoo():
    output = run("describe", "alexnet", "--policy", "dfp16_paper")
    assert "6 of 8 run on integers" in output
    assert "2 LocalResponseNormalization" in output


def test_describe_an_application_by_name():
    output = run("describe", "mobilenetv2")
    assert re.search(r"predictions +Dense ", output)
    assert "53 of 53 run on integers" in output


def test_describe_what_cannot_be_loaded(tmp_path):
    assert "Cannot load nowhere.keras: File not found" in run("describe", "nowhere.keras", code=1)
    path = tmp_path / "broken.keras"
    path.write_text("not a model")
    assert f"Cannot load {path}" in run("describe", str(path), code=1)


def test_train(tmp_path):
    arguments = ("train", "--epochs", "2", "--output", str(tmp_path / "a" / "b"))
    output = run(*arguments)
    kernel = keras_dfp.info()["isa"]
    row = r"{} +2 +\d\.\d+ +\d+\.\d+% +\d+\.\d  {}\n"
    assert re.search(row.format("float32", "TensorFlow") + row.format("dfp16", kernel), output)
    files = sorted(os.listdir(tmp_path / "a" / "b"))
    assert files == ["curves.png", "dfp16.keras", "float32.keras"]
    assert matplotlib.image.imread(tmp_path / "a" / "b" / "curves.png").shape[:2] == (675, 1650)
    model = keras.models.load_model(tmp_path / "a" / "b" / "dfp16.keras")
    assert all(row["format"] for row in keras_dfp.describe(model).rows)


@pytest.mark.slow
def test_train_learns_the_digits(tmp_path):
    output = run("train", "--output", str(tmp_path))
    accuracies = re.findall(r"^(?:float32|dfp16) .* (\d+\.\d+)%", output, re.MULTILINE)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) >= 98


def test_train_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in run("train", "--output", str(tmp_path / "file"), code=2)
    below = str(tmp_path / "file" / "folder")
    assert f"Cannot write to --output {below}: Not a directory" in run(
        "train", "--output", below, code=1
    )


def test_train_without_its_packages(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'keras-dfp[train]'" in run("train", code=1)


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    def interrupted_save(self, path):
        path.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "float32.keras").write_text("from before")
    monkeypatch.setattr(keras.Model, "save", interrupted_save)
    output = run(
        "train", "--policy", "float32", "--epochs", "1", "--output", str(tmp_path), code=130
    )
    assert "Interrupted." in output
    assert os.listdir(tmp_path) == ["float32.keras"]
    assert (tmp_path / "float32.keras").read_text() == "from before"


def test_written_whole(tmp_path):
    path = tmp_path / "file.txt"
    with written_whole(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(click.ClickException), written_whole(path) as temporary:
        temporary.write_text("half")
        raise click.ClickException("")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_ctrl_c(tmp_path):
    command = [sys.executable, "-m", "keras_dfp", "train", "--epochs", "100000"]
    with subprocess.Popen(
        [*command, "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("Epoch 2/"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.endswith("\nInterrupted.\n")
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []
