"""The numbers of training steps: what ops measure, against NumPy; the callback, its files; runs."""

import collections
import csv
import gc
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from kernels import running
from replicas import check_on_two

import keras_dfp
from keras_dfp import reference
from keras_dfp.backend.losses import paths_of, site_of
from keras_dfp.callbacks import DFPStatistics, NonFinite, NonFiniteError
from keras_dfp.cli import main
from keras_dfp.native import extension, lib
from keras_dfp.statistics import COLUMNS, read_table
from keras_dfp.training.run import Run
from keras_dfp.training.settings import Settings

L = keras.layers
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TIMES = ("forward_ms", "input_gradient_ms", "weight_gradient_ms")


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    extension.look_at_numbers(False, False)
    extension.take_numbers()
    extension.take_nonfinite()


def looked_at(function):
    """Returns what ops measured in a call, by site and role or product, and what it returned."""
    extension.take_numbers()
    extension.look_at_numbers(True, True)
    try:
        result = function()
    finally:
        extension.look_at_numbers(False, False)
    operands, products, dropped = extension.take_numbers()
    assert dropped == 0
    return {entry[:2]: entry[2:] for entry in operands}, {e[:2]: e[2:] for e in products}, result


# ---- against NumPy -------------------------------------------------------------------------------


def measured(x, q, e, bits):
    """What there is to measure, by the contract of `reference`."""
    e = np.asarray(e).reshape(-1)
    shape = e.size, x.size // max(e.size, 1)
    groups = x.reshape(shape).astype(np.float64), q.reshape(shape)
    finite = e != reference.NAN_EXPONENT
    x, q = (part[finite] for part in groups)
    scale = np.ldexp(1.0, e[finite])[:, None]
    there = np.abs(x) > 0
    return (
        int(there.sum()),
        int((there & (q == 0)).sum()),
        int((np.abs(x) > reference.qmax(bits) * scale).sum()),
        (x**2).sum(),
        ((x - q * scale) ** 2).sum(),
        int((~finite).sum()),
        dict(collections.Counter(e[finite][there.any(axis=1)].tolist())),
    )


def special(rng, shape):
    """Groups of all sizes: normal, subnormal, zero, with NaN, infinity and the largest float."""
    x = rng.standard_normal(shape).astype(np.float32)
    x *= np.exp2(rng.integers(-120, 120, (shape[0], 1))).astype(np.float32)
    x[rng.random(shape) < 0.1] = 0
    x[rng.random(shape) < 0.1] *= np.float32(2.0**-14)
    kinds = [0, 2.0**-149, -(2.0**-130), np.finfo(np.float32).max, np.nan, -np.inf]
    for row, value in zip(rng.permutation(shape[0])[: len(kinds)], kinds, strict=False):
        x[row, : None if value == 0 else 1] = value
    return x


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_measured_is_what_numpy_says(threads):
    rng = np.random.default_rng(threads)
    # Groups in one go and in pieces, of odd lengths; none, and empty ones.
    shapes = [(300, 7), (70, 100), (3, 140_001), (2, 600_001), (9, 20_000), (0, 3), (4, 0)]
    with running(extension.isa(), threads):
        for shape in shapes:
            x = special(rng, shape) if all(shape) else np.zeros(shape, np.float32)
            for bits, rounding, axes in [
                (14, "nearest", 1),
                (8, "truncate", 1),
                (16, "nearest", 0),
            ]:
                how = dict(mantissa_bits=bits, rounding=rounding, group_axes=axes, watched=False)
                found, _, ours = looked_at(
                    lambda x=x, how=how: lib.dfp_quantize(
                        x, [], [], site="here", role="gradient", **how
                    )
                )
                off = lib.dfp_quantize(x, [], [], **how)
                with np.errstate(invalid="ignore", over="ignore"):
                    q, e = reference.quantize(x, bits, rounding, group_axes=axes)
                for one in (ours, off):
                    np.testing.assert_array_equal(one.q, q)
                    np.testing.assert_array_equal(one.e, e)
                ((key, (calls, *numbers)),) = found.items()
                expected = measured(x, q, e, bits)
                assert (key, calls) == (("here", 2), 1)
                assert (*numbers[:3], *numbers[5:]) == (*expected[:3], *expected[5:])
                np.testing.assert_allclose(numbers[3:5], expected[3:5], rtol=1e-12)


def test_exponents_that_are_given_clamp_and_lose():
    x = np.array([[1, -3, 1e9, 0], [1e-9, 1, 2, 5]], np.float32)
    e = np.array([-13, 400], np.int32)
    how = dict(site="given", watched=False, group_axes=1, mantissa_bits=14)
    found, _, _ = looked_at(lambda: lib.dfp_quantize(x, [e], [], **how))
    # Of exponents out of reach the nearest are counted.
    assert found["given", 0][1:4] == (7, 4, 3)
    assert found["given", 0][-1] == {-13: 1, 255: 1}


def test_the_first_tensor_that_is_not_finite_is_named():
    x = np.ones((5, 7, 3), np.float32)
    x[3, 2, 1] = np.inf
    with running(extension.isa(), 2):
        for axes in (0, 1, 2):
            for role, number in (("activation", 0), ("weight", 1), ("gradient", 2)):
                extension.look_at_numbers(False, True)
                lib.dfp_quantize(np.ones(3, np.float32), [], [], site="good")
                lib.dfp_quantize(x, [], [], group_axes=axes)  # of no site
                lib.dfp_quantize(x, [], [], group_axes=axes, site="bad", role=role)
                lib.dfp_quantize(x, [], [], group_axes=axes, site="worse")
                assert extension.take_nonfinite() == ("bad", number, 3, 5)
                assert extension.take_nonfinite() is None
    assert extension.take_numbers() == ([], [], 0)


def test_all_threads_add_to_the_same_numbers():
    x = np.ones((4, 100), np.float32)

    def work():
        for _ in range(50):
            lib.dfp_quantize(x, [], [], group_axes=1, site="shared")

    def run():
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    found, _, _ = looked_at(run)
    assert found["shared", 0] == (200, 80_000, 0, 0, 80_000.0, 0.0, 0, {-12: 800})


@pytest.mark.slow
def test_there_is_room_for_many_layers_and_no_more():
    extension.look_at_numbers(True, False)
    for number in range(8200):
        lib.dfp_quantize(np.ones(1, np.float32), [], [], site=f"layer {number}")
    operands, _, dropped = extension.take_numbers()
    assert (len(operands), dropped) == (8192, 8)


# ---- models --------------------------------------------------------------------------------------


class KernelFirst(L.Layer):
    """Multiplies its weight by its input, and not its input by its weight."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(5, shape[-2]), name="kernel")

    def call(self, x):
        return keras.ops.matmul(self.kernel, x)


def network(rest):
    """Convolutions, plain, transposed and depthwise, that can be fused; attention, a recurrence."""
    x = keras.Input((8, 8, 4))
    h = L.Conv2D(8, 3, padding="same", use_bias=False, name="first")(x)
    h = L.ReLU()(L.BatchNormalization()(h))
    skip = h
    h = L.Conv2D(8, 3, padding="same", name="second")(h)
    h = L.ReLU()(L.Add()([h, skip]))
    h = L.DepthwiseConv2D(3, name="depthwise")(h)
    h = L.Conv2DTranspose(4, 2, strides=2, name="transposed")(h)
    h = L.Reshape((12, 48))(h)
    h = KernelFirst(name="kernel_first")(h)
    if rest:
        h = L.MultiHeadAttention(2, 4, name="attention")(h, h)
        h = L.GRU(6, name="gru")(h)
    return keras.Model(x, L.Dense(3, name="last")(L.Flatten()(h)))


def batch(samples=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((samples, 8, 8, 4)).astype(np.float32), rng.integers(0, 3, samples)


def prepared(rest=False, **how):
    keras.utils.set_random_seed(1)
    keras_dfp.set_policy("dfp16")
    model = network(rest)
    model.compile(keras.optimizers.SGD(0.01), LOSS, **how)
    return model


def by_layer(found):
    return {(path, kind): rest for (site, kind), rest in found.items() for path in paths_of(site)}


CONVOLUTIONS = ["first", "second", "depthwise", "transposed", "kernel_first", "last"]
REST = ["gru/gru_cell", "attention"]
REST += [f"attention/{name}" for name in ("query", "key", "value", "attention_output")]


@pytest.mark.parametrize("rest", [False, True])
def test_fused_and_eager_steps_have_the_same_numbers(rest):
    model, (x, y) = prepared(rest), map(tf.constant, batch())

    def step():
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        return tape.gradient(loss, model.trainable_variables)

    graph = tf.function(step)
    off = graph()
    assert extension.take_numbers() == ([], [], 0)
    eager, fused = looked_at(step), looked_at(graph)
    for one, other in zip(off, fused[2], strict=True):
        np.testing.assert_array_equal(one, other)
    layers = CONVOLUTIONS + REST * rest
    for operands, products, _ in (eager, fused):
        assert by_layer(operands).keys() == {
            (path, role) for path in layers for role in range(3)
        } - {("attention", 1)}
        assert by_layer(products).keys() | {("first", 1)} == {
            (path, product) for path in layers for product in range(3)
        }
        assert all(nanoseconds > 0 for _, nanoseconds in products.values())
    # Nobody asks for the gradient of the images, and a graph knows.
    assert ("first", 1) not in by_layer(fused[1])
    for key, (_, *numbers, exponents) in by_layer(eager[0]).items() if not rest else ():
        _, *others, other_exponents = by_layer(fused[0])[key]
        assert (numbers, exponents) == (pytest.approx(others, rel=1e-12), other_exponents), key


def test_a_kernel_that_comes_first_has_the_weight_gradient():
    keras_dfp.set_policy("dfp16")
    x = keras.Input((4, 6))
    model = keras.Model(x, KernelFirst(name="kernel_first")(x))
    variables = model.trainable_variables

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            y = model(x)
        return y, tape.gradient(y, variables)

    operands, products, _ = looked_at(lambda: step(tf.ones((2, 4, 6))))
    assert set(by_layer(products)) == {("kernel_first", 0), ("kernel_first", 2)}
    assert {key: rest[1] for key, rest in by_layer(operands).items()} == {
        ("kernel_first", 0): 48, ("kernel_first", 1): 20, ("kernel_first", 2): 60
    }  # fmt: skip


def test_no_bit_changes():
    x, y = batch(16)
    weights = []
    layers = ["first", "gru_cell", "attention", "kernel_first"]
    # Two steps with, two without.
    for callbacks in ([], [DFPStatistics(2, compare=layers)]):
        model = prepared(rest=True)
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


# ---- the callback --------------------------------------------------------------------------------


def rows_of(path, times=False):
    """The table of a file without what the clock says."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == COLUMNS
    return [tuple(row) for row in rows[1:] if times or row[3] not in TIMES]


@pytest.mark.parametrize("eagerly", [False, True])
def test_fit_writes_the_table_and_tensorboard(tmp_path, eagerly):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    x, y = batch(32)
    model = prepared(run_eagerly=eagerly)
    statistics = DFPStatistics(3, tmp_path, layers=["first", "k*_first"])
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[statistics])
    rows = rows_of(tmp_path / "statistics.csv", times=True)
    assert [int(step) for step in dict.fromkeys(row[0] for row in rows)] == [3, 6]
    assert {row[1] for row in rows} == {"first", "kernel_first"}
    of_first = {row[2:4]: float(row[4]) for row in rows if row[:2] == ("6", "first")}
    assert {tensor for tensor, _ in of_first} == {"activation", "weight", "gradient"}
    for tensor in ("activation", "weight", "gradient"):
        least, median, largest = (
            of_first[tensor, f"exponent_{which}"] for which in ("least", "median", "largest")
        )
        assert least <= median <= largest
        assert 50 < of_first[tensor, "snr_db"] < 100
        assert of_first[tensor, "nonfinite"] == of_first[tensor, "clamped"] == 0
        assert 0 <= of_first[tensor, "lost"] < 0.1
    weight = model.get_layer("first").kernel
    assert of_first["weight", "exponent_least"] == np.floor(np.log2(np.abs(weight).max())) - 12
    assert of_first["activation", "forward_ms"] > 0
    assert of_first["weight", "weight_gradient_ms"] > 0
    assert statistics.latest.worst().startswith("worst ")
    events = EventAccumulator(str(tmp_path / "statistics")).Reload()
    assert {"snr_db/gradient/first", "exponents/activation/first"} <= set(events.Tags()["tensors"])


def test_what_goes_on_has_no_gap(tmp_path):
    """As one run, one that was killed after its last checkpoint, which tore a line."""
    x, y = batch(64)

    def fit(model, folder, first, last):
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).skip(first).take(last - first)
        model.fit(data, verbose=0, callbacks=[DFPStatistics(2, folder, layers=["first", "last"])])

    fit(prepared(), tmp_path / "whole", 0, 8)
    model = prepared()
    fit(model, tmp_path / "killed", 0, 4)
    table = tmp_path / "killed" / "statistics.csv"
    with open(table, "a") as file:
        file.write("6,first,weight,lost,0.5\n6,first,weight,snr_")
    fit(model, tmp_path / "killed", 4, 8)
    assert rows_of(table) == rows_of(tmp_path / "whole" / "statistics.csv")
    assert list(read_table(table))[-1][0] == 8


@pytest.mark.parametrize(
    "text, what",
    [("epoch,loss\n1,2\n", "its columns"), (",".join(COLUMNS) + "\n1,2\n1,a,b,c,2\n", "line 2")],
)
def test_another_file_is_not_overwritten(tmp_path, text, what):
    (tmp_path / "statistics.csv").write_text(text)
    with pytest.raises(ValueError, match=what):
        prepared().fit(*batch(), verbose=0, callbacks=[DFPStatistics(1, tmp_path)])
    assert (tmp_path / "statistics.csv").read_text() == text


def test_steps_that_run_at_once_are_looked_at_together():
    model = prepared(steps_per_execution=4)
    statistics = DFPStatistics(3, layers="last")
    steps = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: steps.append(statistics.latest.step)
    )
    model.fit(*batch(64), batch_size=4, verbose=0, callbacks=[statistics, note])
    assert steps == [4, 8, 12, 16]
    # Of the weight, one exponent in each of four steps.
    assert sum(statistics.latest.operands["last", "weight"].exponents.values()) == 4


def test_what_callers_do_wrong():
    for every in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="every must be"):
            DFPStatistics(every)
    with pytest.raises(TypeError, match="compare must be"):
        DFPStatistics(compare=[3])
    with pytest.warns(UserWarning, match="no step with numbers: every=100"):
        prepared().fit(*batch(), verbose=0, callbacks=[DFPStatistics()])
    wrong = "compare: 'frist' matches no layer on integers. Did you mean: first?"
    with pytest.warns(UserWarning, match=re.escape(wrong)):
        prepared().fit(*batch(), verbose=0, callbacks=[DFPStatistics(1, compare=["frist", "l*"])])
    with pytest.warns(UserWarning, match=r"layers: 'x\*' matches no layer .* There are: .*first, "):
        prepared().fit(*batch(), verbose=0, callbacks=[DFPStatistics(1, layers="x*")])


def test_layers_that_are_gone_are_forgotten():
    layer = L.Dense(3, dtype="dfp16", name="short_lived")
    layer(np.ones((2, 4), np.float32))
    site = site_of(layer)
    assert paths_of(site) == ["short_lived"]
    del layer
    gc.collect()
    assert paths_of(site) == []


def test_a_tensor_that_is_not_finite_is_named_once():
    x, y = batch(32)
    x[19, 3, 3, 3] = np.nan
    model = prepared()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(
            x, y, batch_size=8, shuffle=False, epochs=2, verbose=0, callbacks=[DFPStatistics(5)]
        )
    told = [str(w.message) for w in caught if "holds NaN" in str(w.message)]
    assert told == [
        "keras_dfp: layer 'first': an input of its forward pass holds NaN or infinity "
        "(activation, step 3, sample 3 of 8)."
    ]


def test_fit_stops_before_others_save(tmp_path):
    x, y = batch(32)
    x[19, 3, 3, 3] = np.inf
    model = prepared()
    saved = keras.callbacks.ModelCheckpoint(tmp_path / "{batch}.weights.h5", save_freq=1,
                                            save_weights_only=True)  # fmt: skip
    callbacks = [DFPStatistics(stop_on_nonfinite=True), saved]
    with pytest.raises(NonFiniteError) as error:
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=callbacks)
    what = error.value.what
    assert (what.layer, what.tensor, what.step) == ("first", "activation", 3)
    assert (what.sample, what.samples) == (3, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.weights.h5", "2.weights.h5"]
    # The switch is off again.
    looked = prepared()
    looked.fit(*batch(), verbose=0)
    assert extension.take_numbers() == ([], [], 0)


def test_weights_and_gradients_that_are_not_finite():
    x, y = batch()
    model = prepared()
    model.get_layer("second").kernel.assign(np.full((3, 3, 8, 8), np.nan))
    with pytest.warns(UserWarning, match=r"'second': its weight holds .* \(weight, step 1\)"):
        model.fit(x, y, verbose=0, callbacks=[DFPStatistics(1)])
    model = prepared()
    model.compile("sgd", lambda y, z: keras.ops.log(0.0 * z[:, 0]))
    with pytest.warns(UserWarning, match=r"'last': the gradient of .* \(gradient, step 1, sample"):
        model.fit(x, y, verbose=0, callbacks=[DFPStatistics(1)])


@pytest.mark.parametrize("eagerly", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_layer_against_float32_is_as_audited(eagerly):
    x, y = batch()
    names = ["first", "transposed", "attention", "kernel_first", "gru/gru_cell", "last"]
    expected = collections.defaultdict(list)
    for row in keras_dfp.audit(prepared(rest=True), x, y).rows:
        errors = row["output"], row["input_gradient"], row["weight_gradient"]
        expected[row["path"]].append(errors)
    statistics = DFPStatistics(1, compare=names)
    model = prepared(rest=True, run_eagerly=eagerly)
    model.fit(x, y, shuffle=False, verbose=0, callbacks=[statistics])
    compared = 0
    for path in names:
        for number, tensor in enumerate(("output", "activation", "weight")):
            error = statistics.latest.values.get((path, tensor, "error"))
            if (path, tensor) != ("attention", "weight"):
                assert 1e-6 < error < 1e-3, (path, tensor)
            # What a layer multiplies in several ways has a row for each in the audit.
            if len(expected[path]) == 1 and error is not None:
                assert error == pytest.approx(expected[path][0][number], rel=0.05), (path, tensor)
                compared += 1
    assert compared >= 12


@pytest.mark.slow
def test_replicas_of_one_process():
    check_on_two(
        """
import numpy as np
import keras_dfp
from keras_dfp.callbacks import DFPStatistics
keras_dfp.set_policy("dfp16")
x = np.random.default_rng(1).random((16, 8, 8, 3), np.float32)
y, found = np.arange(16) % 3, []
for strategy in (tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), None):
    keras.utils.set_random_seed(1)
    with strategy.scope() if strategy else tf.name_scope(""):
        model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="c"),
                                  keras.layers.Flatten(), keras.layers.Dense(3, name="d")],
                                 name="m")
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    statistics = DFPStatistics(1, compare=["c", "d"])
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[statistics])
    found.append(statistics.latest)
two, one = found
assert two.values.keys() == one.values.keys(), two.values.keys() ^ one.values.keys()
for key in one.operands:
    if key[1] == "activation":
        assert two.operands[key].nonzero == one.operands[key].nonzero, key
        assert two.operands[key].exponents == one.operands[key].exponents, key
for key, value in one.values.items():
    # Each replica has a weight gradient of its own; of ratios, two and their mean.
    if key[2] == "error" and key[1] != "weight":
        assert abs(two.values[key] / value - 1) < 0.25, (key, two.values[key], value)
print("same")
"""
    )


def test_what_the_page_says(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "observability.md").read_text()
    monkeypatch.chdir(tmp_path)
    x, y = batch()
    scope = dict(keras_dfp=keras_dfp, model=prepared(), x=x, y=y, batches=[(x, y)])
    scope["train_step"] = scope["model"].train_on_batch
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    for block in blocks:
        if "pandas" not in block:
            exec(block.replace("every=100", "every=1"), scope)
    assert len(blocks) >= 4
    assert {row[0] for row in read_table(tmp_path / "logs" / "statistics.csv")} == {1}
    commands = re.findall(r"^keras-dfp ([^#\n]+)", page, re.M)
    assert len(commands) >= 2
    for command in commands:
        assert CliRunner().invoke(main, [*command.split(), "--help"]).exit_code == 0, command
    assert str(NonFinite("conv2", "activation", 512, 3, 64)) in page


# ---- runs ----------------------------------------------------------------------------------------


def digits():
    return Settings.of("lenet", "digits", steps=20)


def test_a_run_that_goes_on_has_no_gap(tmp_path, monkeypatch):
    settings = digits()

    class Killed(Exception):
        pass

    def kill(self):
        if self.progress.step == 16:
            raise Killed
        save(self)

    save = Run.save
    run = Run(settings, tmp_path, settings.find_data())
    monkeypatch.setattr(Run, "save", kill)
    with pytest.raises(Killed):
        run.train(checkpoint_steps=8, statistics=5)
    monkeypatch.undo()
    with open(tmp_path / "statistics.csv", "a") as file:
        file.write("20,lenet/conv2d,wei")
    run = Run(settings, tmp_path, settings.find_data(), resume=True)
    assert run.progress.step == 8
    run.train(statistics=5)
    steps = collections.defaultdict(list)
    for step, *what, _ in read_table(tmp_path / "statistics.csv"):
        steps[step].append(what)
    assert list(steps) == [5, 10, 15, 20]
    assert len(steps[5]) > 60
    assert all(sorted(rows) == sorted(steps[5]) for rows in steps.values())


def test_a_run_stops_with_the_checkpoint_from_before(tmp_path):
    command = ["train", "lenet", "--steps", "40", "--lr", "1e12", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(main, [*command, "--stop-on-nonfinite", "--checkpoint-steps", "1"])
    assert result.exit_code == 1
    (message,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert "holds NaN or infinity" in message and "'lenet/" in message
    with np.load(tmp_path / "run" / "checkpoint.npz") as file:
        arrays = [file[name] for name in file.files if name != "state"]
    assert all(np.isfinite(array).all() for array in arrays)
    result = CliRunner().invoke(main, [*command[:6], "--policy", "float32", "--statistics", "5"])
    assert result.exit_code == 2 and "there are none" in result.output


def test_a_command_compares_layers(tmp_path):
    folder = tmp_path / "run"
    command = ["train", "lenet", "--steps", "4", "--output", str(folder)]
    result = CliRunner().invoke(main, [*command, "--compare", "dense"])
    assert result.exit_code == 2 and "--compare needs --statistics N" in result.output
    result = CliRunner().invoke(main, [*command, "--statistics", "5"])
    assert result.exit_code == 2 and "and the run has 4: choose at most that" in result.output
    wrong = [*command, "--statistics", "2", "--compare", "conv", "--compare", "dens"]
    result = CliRunner().invoke(main, wrong)
    assert result.exit_code == 1
    message = "--compare 'conv', 'dens' match no layer on integers. Did you mean: "
    assert message in result.output and "dense" in result.output.partition(message)[2]
    # Nothing is left of it, so that the right command needs no other folder.
    assert not list(folder.glob("*"))
    right = [*command, "--statistics", "2", "--compare", "dense", "--checkpoint-steps", "1"]
    assert CliRunner().invoke(main, [*right]).exit_code == 0
    found = collections.defaultdict(dict)
    for step, layer, tensor, quantity, value in read_table(folder / "statistics.csv"):
        if quantity == "error":
            found[step, layer.rpartition("/")[2]][tensor] = float(value)
    assert list(found) == [(2, "dense"), (4, "dense")]
    for errors in found.values():
        assert errors.keys() == {"output", "activation", "weight"}
        assert all(1e-6 < error < 1e-2 for error in errors.values())


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "statistics.csv",
            b"x\xff\0",
            "is no table of statistics, or spoiled at line 1: .* Move it",
        ),
        ("statistics", b"", "Cannot write TensorBoard's files to .*statistics: .*irectory"),
    ],
)
def test_what_is_in_the_way_is_said_in_a_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    command = ["train", "lenet", "--steps", "4", "--statistics", "2", "--output", str(tmp_path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert re.match(f"Error: .*{message}", result.output.splitlines()[-1])
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.slow
def test_a_command_killed_at_any_moment_goes_on_without_a_gap(tmp_path):
    train = [sys.executable, "-m", "keras_dfp", "train", "lenet", "--steps", "150", "--statistics",
             "7", "--checkpoint-steps", "10", "--deterministic", "--output"]  # fmt: skip
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([*train, tmp_path / "whole"], check=True, **quiet)
    killed = tmp_path / "killed"
    for size in (3_000, 20_000, 60_000):
        process = subprocess.Popen([*train, killed, "--resume"], **quiet)
        while process.poll() is None and not (
            (killed / "checkpoint.npz").exists()
            and (killed / "statistics.csv").exists()
            and (killed / "statistics.csv").stat().st_size > size
        ):
            pass
        process.kill()
        process.wait()
    subprocess.run([*train, killed, "--resume"], check=True, **quiet)
    assert rows_of(killed / "statistics.csv") == rows_of(tmp_path / "whole" / "statistics.csv")
