"""Several workers on this machine: `fit` in MultiWorkerMirroredStrategy, and `keras-dfp train`."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import workers as processes
from test_training import class_folders

from keras_dfp import internals, reference
from keras_dfp.backend import distribution
from keras_dfp.training import workers
from keras_dfp.training.errors import RunError

FIT = [sys.executable, "fit_workers.py"]
# Seconds, of which workers stay for 5 (`workers.LINGER`).
ENDS_WITHIN = 30


def fit_workers(count, *arguments):
    with processes.started(count, [*FIT, "workers", *arguments]) as started:
        ended = processes.outputs(started)
    for code, _, errors in ended.values():
        assert code == 0, errors[-3000:]
    results = [json.loads(output.splitlines()[-1]) for _, output, _ in ended.values()]
    assert all(result == results[0] for result in results)
    return results[0]


def fit_alone(kind, count, *arguments):
    run = subprocess.run(
        [*FIT, kind, *arguments],
        cwd=Path(__file__).parent,
        env={**os.environ, "REPLICAS": str(count), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=processes.LIMIT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def check_close(result, expected, tolerance):
    for got, wanted in zip(result["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


def test_fit_on_two_workers():
    """Under the policy, integers exchanged: equal on both, to the bits of MirroredStrategy and of
    one process that adds up what the two would."""
    arguments = ["dfp16", "dfp16", "no", "arrays"]
    result = fit_workers(2, *arguments)
    assert result == fit_alone("mirrored", 2, *arguments)
    assert result["weights"] == fit_alone("shares", 2, *arguments)["weights"]


# One process has another sum: its weight gradients are aligned to the largest exponent of the whole
# batch and not of a share, and those of shares are rounded to 14 bits. Each of these is half a unit
# of 2**-12 of the largest value of a gradient, which is below 2 here; three of them, in 6 steps at
# a rate of 0.1, with momentum of 0.9 at most tenfold.
OF_INTEGERS = 6 * 0.1 * 10 * 3 * 0.5 * 2**-12 * 2
# As much of float32's 2**-24, for each of the 432 terms that a sum has at most.
OF_FLOATS = 6 * 0.1 * 10 * 432 * 2**-24 * 2


@pytest.mark.slow
def test_fit_of_one_process():
    arguments = ["dfp16", "dfp16", "no", "arrays"]
    check_close(fit_workers(2, *arguments), fit_alone("one", 1, *arguments), OF_INTEGERS)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("exchange", ["float32", "dfp16"])
@pytest.mark.parametrize("policy", ["float32", "dfp16"])
def test_fit_with_batch_norm_across_workers(policy, exchange, count):
    arguments = [policy, exchange, "bn", "dataset"]
    result = fit_workers(count, *arguments)
    mirrored = fit_alone("mirrored", count, *arguments)
    tolerance = OF_FLOATS if policy == exchange == "float32" else OF_INTEGERS
    check_close(result, fit_alone("one", 1, *arguments), tolerance)
    # Batch norm's sums are float32: two replicas have one sum, three may have two.
    check_close(result, mirrored, 0 if exchange == "dfp16" and count == 2 else tolerance)
    assert result["history"]["loss"][0] > result["history"]["loss"][-1]


@pytest.mark.slow
def test_stock_fit_still_needs_help():
    """When this fails, Keras is right: then `backend/distribution.py` goes."""
    assert internals.KERAS <= distribution.FAULTY
    program = (
        "import runpy, sys; import keras_dfp.backend.distribution as d\n"
        "from keras_dfp import backend\n"
        "from keras_dfp.backend import registry\n"
        "import keras_dfp\n"
        "backend.uninstall()\n"
        "registry.REGISTRY[:] = [r for r in registry.REGISTRY if r.make.__module__ != d.__name__]\n"
        "backend.install()\n"
        "sys.argv = ['fit_workers.py', 'workers', 'float32', 'float32', 'no', 'arrays']\n"
        "runpy.run_path('fit_workers.py', run_name='__main__')\n"
    )
    with processes.started(2, [sys.executable, "-c", program]) as started:
        ended = processes.outputs(started)
    assert all(code != 0 for code, _, _ in ended.values())


# ---- keras-dfp train -----------------------------------------------------------------------------


def command(folder, *options, network="resnet20"):
    data = ["--data", str(folder / "data"), "--sync-batch-norm"] if network == "resnet20" else []
    return [sys.executable, "-m", "keras_dfp", "train", network, *data, "--batch-size", "12",
            "--holdout", "0.2", "--output", str(folder / "run"), *options]  # fmt: skip


def state(folder):
    with np.load(folder / "run" / "checkpoint.npz") as file:
        arrays = [file[name] for name in file.files if name != "state"]
        return json.loads(str(file["state"])), arrays


def train(count, folder, *options):
    with processes.started(count, command(folder, *options)) as started:
        ended = processes.outputs(started)
    for index, (code, output, errors) in ended.items():
        assert code == 0, errors[-3000:]
        assert index == 0 or not output
    return state(folder)


@pytest.fixture
def data(tmp_path):
    class_folders(tmp_path / "data", 20)
    return tmp_path


# Of the first loss: weights are equal, so only batch norm's sums over the 12 * 32 * 32 values of a
# channel differ, in the order in which they are added. A tree of them has 14 levels; of each, mean
# and variance have an error of 2**-24 at random, and so have 19 normalised layers, whose errors
# pass on with a gain of 1: four standard deviations. On integers such an error decides for some
# values to which mantissa they are rounded. If it did for all, each of 20 layers had another
# rounding error: of a unit of 2**-13 of the largest value, some 8 standard deviations, that is
# 8 * 2**-13 / sqrt(6) for two of them; the loss is a mean over 12 images: two standard deviations.
OF_FIRST = {
    "float32": 4 * np.sqrt(19 * 2 * 14) * 2**-24,
    "dfp16": 2 * np.sqrt(20) * 8 * 2**-13 / np.sqrt(6) / np.sqrt(12),
}
# Of what training moves the later ones by: weights differ by the share of their way by which
# gradients do. In float32 an error of d decides for a share d of each layer's values on which side
# of 0 they are, and whether a gradient passes: an error of sqrt(d) of it. On integers gradients are
# 1.6 % from float32's (docs/accuracy.md), and by sqrt(2) of that from each other.
OF_WAY = {"float32": np.sqrt(19 * OF_FIRST["float32"]), "dfp16": np.sqrt(2) * 0.016}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "dfp16"])
def test_train_on_one_two_and_three(data, policy):
    losses = {}
    # At a rate of 1e-9 nothing is learnt: how far are the losses moved?
    for name, count, rate in (("still", 1, 1e-9), (1, 1, 1e-3), (2, 2, 1e-3), (3, 3, 1e-3),
                              (5, 5, 1e-3)):  # fmt: skip
        folder = data / str(name)
        folder.mkdir()
        (folder / "data").symlink_to(data / "data")
        options = ["--policy", policy, "--epochs", "1", "--lr", str(rate)]
        progress, _ = train(count, folder, *options)
        losses[name] = np.array(progress["losses"])
        assert len(losses[name]) == 4
        assert progress["history"][0]["test_loss"] > 0
    way = np.abs(losses[1] - losses["still"])
    assert way[0] == 0 and way[-1] > 0.1
    tolerance = OF_FIRST[policy] * losses[1] + OF_WAY[policy] * way
    for count in (2, 3, 5):
        assert (np.abs(losses[count] - losses[1]) <= tolerance).all(), (losses, tolerance)


@pytest.mark.slow
def test_resume_with_other_numbers_of_workers(data):
    train(2, data, "--epochs", "1")
    for count in (3, 1, 2):
        # What is finished already, whoever comes.
        progress, _ = train(count, data, "--epochs", "1", "--resume")
        assert progress["step"] == 4


def steps_done(folder):
    try:
        return state(folder)[0]["step"]
    except (OSError, ValueError):
        return 0


@pytest.mark.slow
def test_ten_workers_killed_at_random(tmp_path):
    """Each time another is killed: the others end, name it, leave what is whole, and go on."""
    chance, seen = random.Random(0), 0
    options = ["--steps", "100000", "--checkpoint-steps", "1", "--gradient-exchange", "dfp16"]
    for turn in range(10):
        count = chance.choice([2, 3])
        victim = chance.randrange(count)
        resume = ["--resume"] if (tmp_path / "run" / "run.json").exists() else []
        with processes.started(
            count, command(tmp_path, *options, *resume, network="lenet")
        ) as started:
            deadline = time.monotonic() + processes.LIMIT
            while steps_done(tmp_path) <= seen and time.monotonic() < deadline:
                assert all(process.poll() is None for process in started.values())
                time.sleep(0.2)
            time.sleep(chance.random())
            started[victim].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            ended = processes.outputs(started)
        assert time.monotonic() - killed < ENDS_WITHIN
        for index, (code, _, errors) in ended.items():
            if index != victim:
                assert code == 1, (turn, errors)
                assert f"worker {victim} (127.0.0.1:" in errors, (turn, errors)
                assert "--resume" in errors
        done = steps_done(tmp_path)
        assert done > seen
        seen = done
    progress, arrays = state(tmp_path)
    assert len(progress["losses"]) == progress["step"] >= 10
    assert all(np.isfinite(array).all() for array in arrays)


@pytest.mark.slow
def test_one_is_interrupted(data):
    with processes.started(2, command(data, "--steps", "400", "--checkpoint-steps", "1")) as both:
        while not steps_done(data):
            assert all(process.poll() is None for process in both.values())
            time.sleep(0.2)
        both[1].send_signal(signal.SIGINT)
        ended = processes.outputs(both)
    assert [code for code, _, _ in ended.values()] == [130, 130]
    assert f"Stopped after step {steps_done(data)}; --resume goes on." in ended[0][2]


@pytest.mark.slow
def test_a_worker_that_never_starts(data):
    with processes.started(3, command(data, "--worker-timeout", "5"), absent=[1]) as started:
        ended = processes.outputs(started)
    for code, _, errors in ended.values():
        assert code == 1
        assert "Not all workers have started within 5 s" in errors
        assert "does not hear from worker 1 (127.0.0.1:" in errors


@pytest.mark.slow
def test_an_image_that_one_cannot_read(data):
    (data / "data" / "cat" / "000.png").write_bytes(b"no image")
    with processes.started(2, command(data, "--epochs", "1")) as started:
        ended = processes.outputs(started)
    assert all(code == 1 and "000.png" in errors for code, _, errors in ended.values())
    progress, _ = train(2, data, "--epochs", "1", "--resume", "--skip-bad-images")
    assert progress["step"] == 4


@pytest.mark.slow
def test_workers_that_differ(data):
    with processes.started(2, [sys.executable, "-c", DIFFERENT, str(data)]) as started:
        ended = processes.outputs(started)
    for code, _, errors in ended.values():
        assert code == 1
        assert "settings and data, but seed is 1 for worker 0" in errors
        assert "and 2 for worker 1" in errors


DIFFERENT = """
import json, os, sys
from keras_dfp.cli import main
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
folder = sys.argv[1]
main(["train", "resnet20", "--data", folder + "/data", "--batch-size", "12", "--output",
      folder + "/run", "--seed", str(index + 1)])
"""


# ---- Who the workers are -------------------------------------------------------------------------


def test_shares_are_the_whole():
    for count in (1, 2, 3, 7):
        for images in (7, 12, 13):
            shares = [
                range(images)[
                    workers.Workers(["h"] * count, i, tf.distribute.get_strategy()).share(images)
                ]
                for i in range(count)
            ]
            assert [image for share in shares for image in share] == list(range(images))
            assert {len(share) for share in shares} <= {images // count, images // count + 1}


def tf_config(*addresses, **task):
    return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", **task}})


@pytest.mark.parametrize(
    "config, what",
    [
        ("{", "it is no JSON: Expecting property name"),
        ("[]", "it is no object"),
        ('{"cluster": {"worker": ["a:1", "b:2"]}}', "its task must have the type worker"),
        ('{"cluster": {"ps": ["a:1"]}, "task": {}}', "workers, and nothing else"),
        ('{"cluster": {"worker": "a:1"}}', "its workers must be a list"),
        (tf_config("a:1", "b:2", index=2), "must be from 0 to 1"),
        (tf_config("a:1", "b:2", index=-1), "must be from 0 to 1"),
        (tf_config("a:1", "b:2", index="x"), "must be from 0 to 1"),
        (tf_config("a:1", "b:2", index=0.5), "must be from 0 to 1"),
        (tf_config("a:1", "b:2", index=0, type="chief"), "its task must have the type worker"),
        (tf_config("a:1", "a:1", index=0), "a:1 is there twice"),
        (tf_config("a", "b", index=0), "'a' is no host:port"),
        (tf_config("a:70000", "b:1", index=0), "'a:70000' is no host:port"),
        (tf_config(1, 2, index=0), "1 is no host:port"),
    ],
)
def test_wrong_tf_config(monkeypatch, config, what):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(RunError, match="TF_CONFIG must name the workers, each once") as caught:
        with workers.joined(1):
            pass
    assert what in str(caught.value)


def test_a_port_in_use(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setenv("TF_CONFIG", tf_config(address, "127.0.0.1:1", index=0))
        with pytest.raises(RunError, match=f"cannot listen at {address}: .* Choose another port"):
            with workers.joined(1):
                pass


@pytest.mark.parametrize("config", ["", "{}", '{"cluster": {}}'])
def test_without_others(monkeypatch, config):
    monkeypatch.setenv("TF_CONFIG", config)
    with workers.joined(1) as alone:
        assert (alone.count, alone.is_chief, alone.gathered(b"x")) == (1, True, [b"x"])


def test_the_sum_of_shares_is_the_reference(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SHARES],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=processes.LIMIT,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for shares, sums in json.loads(run.stdout.splitlines()[-1]):
        expected = reference.exchange([np.float32(share) for share in shares])
        for got in sums:
            np.testing.assert_array_equal(np.float32(got), expected)


# In three replicas, of shares in three orders; odd sizes, a NaN, zeros, values far apart.
SHARES = """
import itertools, json
import numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 3)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1", "CPU:2"])
from keras_dfp import exchange
random = np.random.default_rng(0)
def some(shape, *scales):
    return [(random.normal(size=shape) * scale).astype("float32") for scale in scales]
tensors = [some([3, 5], 1, 1, 1), some([7], 1, 1e-3, 1e3), some([2], 0, 0, 0), some([], 1, 2, 3),
           some([4], 1e-40, 1e-41, 0), some([4], 1, 1, 1)]
tensors[-1][1][2] = np.nan
@tf.function
def summed(*tables):
    def replica():
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        return exchange.summed([table[number] for table in tables], "dfp16")
    return strategy.run(replica)
results = []
for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
    outputs = summed(*[tf.stack([shares[i] for i in order]) for shares in tensors])
    results.append([strategy.experimental_local_results(output) for output in outputs])
print(json.dumps([
    [[share.tolist() for share in shares], [x.numpy().tolist() for r in results for x in r[i]]]
    for i, shares in enumerate(tensors)]))
"""
