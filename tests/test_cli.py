"""The command line: what it prints, writes and returns."""

import csv
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import click
import keras
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import keras_dfp
from keras_dfp.cli import main
from keras_dfp.files import written_whole


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
        (("learn",), "No such command 'learn'"),
        (("evaluate",), "Missing argument 'RUN'"),
        (("evaluate", "lenet5", "--weights", "imagenet"), "must be a network of the zoo: alexnet"),
        (("export", "runs"), "Missing argument 'TARGET'"),
        (
            ("export", "runs", "lenet.h5"),
            "must end in .keras, .tflite or .onnx, or be the name of a",
        ),
        (("info", "please"), "unexpected extra argument"),
        (("train", "lenet5"), "'lenet5' is not one of 'alexnet', 'googlenet_v1', 'lenet'"),
        (("train", "alexnet"), "alexnet needs --data: a folder of class folders"),
        (("train", "--policy", "int8"), "There is no policy 'int8'; there are float32, dfp16"),
        (("train", "--policy", "dfp16:mantissa_bits=7"), "integer from 8 to 16; got 7"),
        (("compare", "--policies", "float32,int8"), "There is no policy 'int8'"),
        (("compare", "--seeds", "0"), "0 is not in the range x>=1"),
        (("train", "--epochs", "0"), "0 is not in the range x>=1"),
        (("train", "--batch-size", "many"), "'many' is not a valid integer"),
        (("train", "--lr", "0"), "0 is not in the range x>0"),
        (("train", "--lr", "nan"), "'nan' is not a finite number"),
        (("train", "--lr", "inf"), "'inf' is not a finite number"),
        (("train", "--holdout", "nan"), "'nan' is not a finite number"),
        (("train", "--classes", "9" * 12), "is not in the range"),
        (("audit", "lenet", "--plot", "a.txt"), "a.txt must end in .png, .svg or .pdf"),
        (("train", "--seed", "-1"), "-1 is not in the range"),
        (("report",), "Missing argument 'RUN...'"),
        (("report", "runs", "--output", "page.txt"), "page.txt must end in .html or .htm"),
        (("report", "runs", "--output", "nowhere/a.html"), "There is no folder"),
        (("describe",), "Missing argument 'MODEL'"),
        (("describe", "resnet5"), "Did you mean: resnet50"),
        (
            ("describe", "my net"),
            "neither a .keras file nor the name of a network of the zoo or of",
        ),
        (("describe", os.curdir), ". is a folder. Of a run, name its model.keras."),
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
    assert "batch norm, ReLU6" in output and "float: padding" in output
    assert "Batch norm: 52 of 52 on the native op." in output
    assert "Kept for the backward pass, per sample: " in output


def test_describe_what_cannot_be_loaded(tmp_path):
    assert "Cannot load nowhere.keras: File not found" in run("describe", "nowhere.keras", code=1)
    path = tmp_path / "broken.keras"
    path.write_text("not a model")
    assert f"Cannot load {path}" in run("describe", str(path), code=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of lenet, and what `train` printed."""
    folder = tmp_path_factory.mktemp("train") / "a" / "b"
    return folder, run("train", "--steps", "60", "--output", str(folder))


def test_train(trained):
    folder, output = trained
    assert "Training lenet under dfp16: 1437 images of 10 classes, 360 to test on" in output
    assert re.search(r"^epoch 2/2: loss \d\.\d{4}, top-1 \d+\.\d+%.* img/s$", output, re.MULTILINE)
    assert re.search(r"^epoch 1/2: .* \d+ img/s, \d\d:\d\d left$", output, re.MULTILINE)
    assert f"In {folder}: model.keras, log.csv, tensorboard/" in output
    model = keras.models.load_model(folder / "model.keras")
    assert "5 of 5 run on integers" in str(keras_dfp.describe(model))


def test_train_again(trained):
    folder, _ = trained
    arguments = ("train", "--output", str(folder), "--steps")
    message = f"{folder} holds a run already. --resume goes on with it; --output chooses another"
    assert message in run(*arguments, "60", code=1)
    assert "It is finished already." in run(*arguments, "60", "--resume")
    assert "holds another run: steps is 60, not 61." in run(*arguments, "61", "--resume", code=1)


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "9999"), "A batch of 9999 images is more than the 1437"),
        (("--weights", "nowhere.keras"), "cannot start from the weights 'nowhere.keras'"),
        (("--data", "PHOTOS", "--batch-size", "4"), "(--skip-bad-images goes on without)"),
    ],
    ids=["batch", "weights", "images"],
)
def test_what_fails_early_leaves_nothing(command, options, message, tmp_path):
    for name in ("cat", "dog"):
        for number in range(8):
            path = tmp_path / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("no image")
    options = [str(tmp_path / "photos") if option == "PHOTOS" else option for option in options]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").touch()
    before = set(tmp_path.rglob("*"))
    for folder in (kept, tmp_path / "new" / "folder"):
        assert message in run(command, *options, "--output", str(folder), code=1)
        assert set(tmp_path.rglob("*")) == before


def test_evaluate(trained):
    folder, output = trained
    tested = re.search(r"test top-1 (\d+\.\d+%), top-5 (\d+\.\d+%)", output)
    expected = f"top-1 {tested[1]}, top-5 {tested[2]}\n"
    output = run("evaluate", str(folder))
    assert output.startswith("360 images under dfp16: loss ")
    assert output.endswith(expected)
    assert "360 images under float32" in run("evaluate", str(folder), "--policy", "float32")
    assert f"{folder.parent} is not the folder of a run" in run(
        "evaluate", str(folder.parent), code=1
    )


def test_evaluate_other_weights(trained, tmp_path):
    folder, output = trained
    keras.models.load_model(folder / "model.keras").save_weights(tmp_path / "lenet.weights.h5")
    arguments = ("evaluate", "lenet", "--weights", str(tmp_path / "lenet.weights.h5"))
    assert run(*arguments).split(": ")[1] == run("evaluate", str(folder)).split(": ")[1]
    missing = ("evaluate", "lenet", "--weights", "nowhere.h5")
    assert "there is no file 'nowhere.h5'" in run(*missing, code=1)
    assert "There are no trained weights of 'lenet'" in run(
        "evaluate", "lenet", "--weights", "imagenet", code=1
    )


def test_export(trained, tmp_path):
    folder, _ = trained
    run("export", str(folder), str(tmp_path / "plain.keras"))
    run("export", str(folder), str(tmp_path / "saved"))
    run("export", str(folder), str(tmp_path / "lenet-0.1.tflite"))
    assert sorted(os.listdir(tmp_path)) == ["lenet-0.1.tflite", "plain.keras", "saved"]
    assert (tmp_path / "lenet-0.1.tflite").read_bytes()[4:8] == b"TFL3"
    # The network without its augmentation, in float32.
    model = keras.models.load_model(folder / "model.keras")
    keras_dfp.set_model_policy(model, "float32")
    x = np.random.default_rng(0).normal(size=(3, *model.input_shape[1:])).astype("float32")
    saved = tf.saved_model.load(tmp_path / "saved")
    expected = model(x, training=False)
    np.testing.assert_allclose(saved.serve(x), expected, atol=1e-6)
    plain = keras.models.load_model(tmp_path / "plain.keras")
    np.testing.assert_allclose(plain(x), expected, atol=1e-6)
    assert "0 of 5 run on integers" in run("describe", str(tmp_path / "plain.keras"))
    assert "exists already" in run("export", str(folder), str(tmp_path / "saved"), code=1)
    assert "There is no folder" in run("export", str(folder), "nowhere/a.keras", code=1)
    message = "is not the folder of a run"
    assert message in run("export", str(tmp_path), str(tmp_path / "b.keras"), code=1)


def changed(**changes):
    def change(content):
        content.update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (b"{", "is not the folder of a run: Expecting"),
        (b"\xff", "is not the folder of a run: 'utf-8'"),
        (b"[" * 100_000, "is not the folder of a run: it is nested too deeply"),
        (b"[]", "run.json is spoiled, or of another version of keras-dfp: it must be a table"),
        (lambda c: c.pop("recipe"), "of another version of keras-dfp: key 'recipe' is missing"),
        (changed(later=1), "of another version of keras-dfp: unknown key 'later'"),
        (lambda c: c["settings"].update(later=1), "unknown key 'settings.later'"),
        (lambda c: c["settings"].update(seed=True), "settings.seed must be a whole number; got Tr"),
        (lambda c: c["settings"].update(holdout=2), "settings.holdout must be above 0 and below 1"),
        (lambda c: c["settings"].update(network="x"), "There is no network 'x' in the zoo"),
        (changed(input_shape=[8, 8]), "input_shape must be three sizes above 0; got [8, 8]"),
        (changed(input_shape=[10**9, 10**9, 1]), "Cannot build lenet for images of"),
        (changed(classes=["a"]), "checkpoint.npz is of another model"),
    ],
)
def test_a_run_json_that_is_spoiled(trained, tmp_path, change, message):
    for name in ("run.json", "checkpoint.npz"):
        shutil.copy(trained[0] / name, tmp_path / name)
    content = json.loads((tmp_path / "run.json").read_text())
    if callable(change):
        change(content)
        change = json.dumps(content).encode()
    (tmp_path / "run.json").write_bytes(change)
    assert message in run("evaluate", str(tmp_path), code=1)
    assert "Error: " in run("train", "--steps", "60", "--output", str(tmp_path), code=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-100], "BadZipFile"),
        (lambda data: data[:100] + b"0" * 50 + data[150:], "is not a checkpoint of this model"),
        (lambda data: b"", "is not a checkpoint of this model"),
        (changed(step="60"), "step must be a whole number; got '60'"),
        (changed(step=61), "there must be a loss for each step"),
        (changed(history=[{}, {}]), "the history of epoch 1 lacks epoch, step"),
        (changed(later=1), "of another version of keras-dfp: unknown key 'later'"),
        (changed(history=[]), "60 steps and 0 epochs of 44 steps do not go together"),
    ],
)
def test_a_checkpoint_that_is_spoiled(trained, tmp_path, change, message):
    for name in ("run.json", "checkpoint.npz"):
        shutil.copy(trained[0] / name, tmp_path / name)
    path = tmp_path / "checkpoint.npz"
    if change.__name__ == "<lambda>":
        path.write_bytes(change(path.read_bytes()))
    else:
        arrays = dict(np.load(path))
        state = json.loads(str(arrays["state"]))
        change(state)
        np.savez(path, **{**arrays, "state": json.dumps(state)})
    command = ("evaluate", str(tmp_path))
    if "go together" in message:
        command = ("train", "--steps", "60", "--output", str(tmp_path), "--resume")
    assert message in run(*command, code=1).splitlines()[-1]


def test_what_is_no_file_is_not_waited_for(trained, tmp_path):
    for name in ("model.keras", "run.json", "report.json"):
        os.mkfifo(tmp_path / name)
    for arguments in (
        ("evaluate", str(tmp_path)),
        ("bench", "report", str(tmp_path / "report.json")),
        ("describe", str(tmp_path / "model.keras")),
    ):
        assert "is a named pipe, not a file" in run(*arguments, code=1)


def test_a_name_that_is_too_long():
    for arguments in (("train", "--output"), ("describe",), ("audit",), ("evaluate",)):
        assert "Error: " in (output := run(*arguments, "n" * 300, code=1))
        assert "File name too long" in output


@pytest.mark.parametrize("name", ["bad.keras", "bad.weights.h5", "bad.h5"])
def test_weights_that_are_spoiled(tmp_path, name):
    (tmp_path / name).write_text("garbage")
    output = run("evaluate", "lenet", "--weights", str(tmp_path / name), code=1)
    assert output.startswith(f"Error: zoo.load: the weights in '{tmp_path / name}' do not fit")
    assert output.count("\n") == 1


def test_a_bench_report_that_is_spoiled(tmp_path):
    path = tmp_path / "report.json"
    for content in ("[]", "{", '{"schema": 1}', '{"schema": 1, "benchmark": "conv", "runs": [{}]}'):
        path.write_text(content)
        assert f"Error: {path} " in run("bench", "report", str(path), code=1)


def test_compare(tmp_path):
    arguments = ["compare", "--epochs", "1", "--output", str(tmp_path / "out"), "--policies"]
    output = run(*arguments, "float32,dfp16:mantissa_bits=8")
    assert output.count("\nepoch 1/1: ") == 2
    left = r" \(2 of 2\): 1 epochs, 44 steps; all runs: about \d\d:\d\d left\n"
    assert re.search(left, output)
    files = {"results.csv", "results.json", "results.md", "curves.png"}
    assert set(os.listdir(tmp_path / "out")) == {*files, "seed1"}
    assert sorted(os.listdir(tmp_path / "out" / "seed1")) == ["dfp16-mantissa_bits=8", "float32"]
    assert (tmp_path / "out" / "results.md").read_text() in output
    size = matplotlib.image.imread(tmp_path / "out" / "curves.png").shape[:2]
    assert size == (750, 1650)

    # More of it: what is there is kept.
    output = run(*arguments, "float32,dfp16:mantissa_bits=8", "--seeds", "2")
    assert output.count("finished already") == 2
    assert output.count("\nepoch 1/1: ") == 2
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["policy"], r["runs"], r["pairs"]) for r in results["summary"]] == [
        ("float32", 2, 0),
        ("dfp16:mantissa_bits=8", 2, 2),
    ]
    assert len(results["runs"][0]["losses"]["means"]) == 44
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, summary in zip(rows, results["summary"], strict=True):
        assert float(row["test_top1"]) == summary["test_top1"]

    # Also where only results are left; what was not asked for again stays, behind.
    shutil.rmtree(tmp_path / "out" / "seed1")
    output = run(*arguments, "dfp16:mantissa_bits=8")
    assert output.count("finished already") == 1
    assert set(os.listdir(tmp_path / "out")) == {*files, "seed2"}
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [r["policy"] for r in again["summary"]] == ["dfp16:mantissa_bits=8", "float32"]
    assert sorted(again["runs"], key=str) == sorted(results["runs"], key=str)


@pytest.mark.slow
def test_digits_are_learnt_under_both_policies(tmp_path):
    output = run("compare", "--output", str(tmp_path))
    accuracies = re.findall(r"^\| (?:float32|dfp16) .* (\d+\.\d+)% ", output, re.MULTILINE)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) >= 98


@pytest.mark.parametrize("command", ["train", "compare"])
def test_where_nothing_can_be_written(command, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file" in run(command, "--output", str(tmp_path / "file"), code=2)
    below = str(tmp_path / "file" / "folder")
    assert f"Cannot write to --output {below}: Not a directory" in run(
        command, "--output", below, code=1
    )


@pytest.mark.parametrize("command", ["train", "compare"])
def test_data_that_are_not_there(command, tmp_path):
    output = str(tmp_path / "out")
    arguments = (command, "resnet20", "--data", str(tmp_path / "nowhere"), "--output", output)
    assert f"Error: There is no folder {tmp_path / 'nowhere'}." in run(*arguments, code=1)
    assert os.listdir(tmp_path) == []


def test_a_bad_image_stops_or_is_skipped(tmp_path):
    random = np.random.default_rng(0)
    for part, name, number in itertools.product(("train", "test"), ("a", "b"), range(4)):
        folder = tmp_path / "data" / part / name
        folder.mkdir(parents=True, exist_ok=True)
        image = random.integers(0, 256, (8, 8, 1)).astype("uint8")
        (folder / f"{number}.png").write_bytes(tf.io.encode_png(image).numpy())
    bad = tmp_path / "data" / "train" / "b" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    train = ("train", "--data", str(tmp_path / "data"), "--batch-size", "4", "--epochs", "2")
    train += ("--output", str(tmp_path / "run"))
    assert f"Error: Cannot read {bad}: " in run(*train, code=1)
    assert not (tmp_path / "run" / "model.keras").exists()
    train = (*train[:-1], str(tmp_path / "skipping"), "--skip-bad-images")
    with pytest.warns(UserWarning, match=f"Skipped. Cannot read {bad}: "):
        assert "epoch 2/2: " in run(*train)


@pytest.mark.parametrize("command", ["train", "compare", "evaluate", "export"])
def test_without_its_packages(command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = {"evaluate": ("x",), "export": ("x", "y")}.get(command, ())
    assert "pip install pillow matplotlib scipy scikit-learn tensorboard" in run(
        command, *arguments, code=1
    )


@pytest.mark.slow
def test_export_to_onnx(trained, tmp_path):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    run("export", str(trained[0]), str(tmp_path / "lenet.onnx"))
    session = runtime.InferenceSession(tmp_path / "lenet.onnx")
    (inputs,) = session.get_inputs()
    x = np.random.default_rng(0).normal(size=(3, *inputs.shape[1:])).astype("float32")
    model = keras.models.load_model(trained[0] / "model.keras")
    keras_dfp.set_model_policy(model, "float32")
    expected = model(x, training=False)
    np.testing.assert_allclose(session.run(None, {inputs.name: x})[0], expected, atol=1e-5)


def test_export_to_onnx_without_its_packages(monkeypatch):
    found = importlib.util.find_spec
    onnx = ("tf2onnx", "onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n in onnx else found(n))
    assert "pip install tf2onnx onnx\n" in run("export", "x", "y.onnx", code=1)


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
        [*command, "--output", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    stopped = re.search(r"\nStopped after step (\d+); --resume goes on.\n\nInterrupted.\n$", errors)
    assert "Traceback" not in errors
    with np.load(tmp_path / "run" / "checkpoint.npz") as checkpoint:
        assert json.loads(str(checkpoint["state"]))["step"] == int(stopped[1])
    assert int(stopped[1]) >= 2 * 44
