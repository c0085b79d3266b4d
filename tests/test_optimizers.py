"""DFPSGD and DFPAdam: bits of the formula, results of Keras, and slots in half the memory."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.optimizers import SGD, Adam, AdamW, LossScaleOptimizer
from kernels import ISAS, assert_same_bits, running
from replicas import check_on_two

from keras_dfp import reference
from keras_dfp.native import lib
from keras_dfp.optimizers import DFPSGD, DFPAdam

RATE, STEP, SEED = np.float32(0.0371), 12345, 7
BETAS = {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}
SHAPES = [(), (0, 3), (5,), (64,), (3, 3, 7, 33), (4097, 33)]
# Of a step: op, number of slots, options.
STEPS = {
    "sgd": ("sgd", 0, {}),
    "decay": ("sgd", 0, {"decay": 0.01}),
    "momentum": ("sgd", 1, {"momentum": 0.9}),
    "nesterov": ("sgd", 1, {"momentum": 0.9, "nesterov": True, "decay": 0.01}),
    "adam": ("adam", 2, BETAS),
    "amsgrad": ("adam", 3, {**BETAS, "decay": 0.01}),
}


def tensors(shape, odd):
    """Weight, gradient, and three slots, of which two are not negative."""
    rng = np.random.default_rng(len(shape))
    spread = np.exp(3 * rng.standard_normal((5, *shape)))
    w, g, m, v, h = np.asarray(rng.standard_normal((5, *shape)) * spread, np.float32)
    if odd and w.size > 64:
        for x in (w, g, m, v, h):
            for value in (np.nan, np.inf, -np.inf, 1e-40, 3e38, 0):
                x.flat[rng.integers(x.size, size=3)] = value
            x.flat[-64:] = 0
    return w, g, [m, np.abs(v), np.abs(h)]


def step(kind, w, g, slots, exponents=()):
    """One of `STEPS` by the native op."""
    name, _, options = STEPS[kind]
    options = dict(options)
    options["weight_decay"] = options.pop("decay", 0.0)
    if name == "adam":
        options |= {f"renewal_{i}": 1 - options[f"beta_{i}"] for i in (1, 2)}
    op = getattr(lib, f"dfp_{name}")
    inputs = {"weight": w, "gradient": g, "slots": slots, "exponents": list(exponents)}
    return op(**inputs, rate=RATE, step=np.int64(STEP), seed=SEED, **options)


def expected_step(kind, w, g, slots):
    name, _, options = STEPS[kind]
    numbered = {"step": STEP} if name == "adam" else {}
    w, *slots = getattr(reference, name)(w, g, *slots, rate=RATE, **numbered, **options)
    return w, [slot for slot in slots if slot is not None]


# ---- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_has_the_bits_of_the_formula(kind, odd):
    slots_used = STEPS[kind][1]
    for shape in SHAPES:
        w, g, slots = tensors(shape, odd)
        expected, expected_slots = expected_step(kind, w, g, slots[:slots_used])
        for isa in ISAS:
            for threads in (1, 2):
                with running(isa, threads, small=0):
                    got = step(kind, w, g, slots[:slots_used])
                assert_same_bits(got.new_weight, expected, (isa, shape))
                for a, b in zip(got.new_slots, expected_slots, strict=True):
                    assert_same_bits(a, b, (isa, shape))


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
@pytest.mark.parametrize("kind", ["momentum", "adam", "amsgrad"])
def test_slots_in_dynamic_fixed_point_have_the_bits_of_the_formula(kind, odd):
    slots_used = STEPS[kind][1]
    for shape in SHAPES:
        w, g, slots = tensors(shape, odd)
        packed = [reference.pack_slot(x, SEED, i, 1) for i, x in enumerate(slots[:slots_used])]
        floats = [reference.unpack_slot(*x, i) for i, x in enumerate(packed)]
        expected, expected_slots = expected_step(kind, w, g, floats)
        repacked = [reference.pack_slot(x, SEED, i, STEP) for i, x in enumerate(expected_slots)]
        for isa in ISAS:
            with running(isa, 2, small=0):
                got = step(kind, w, g, *zip(*packed, strict=True))
            assert_same_bits(got.new_weight, expected, (isa, shape))
            for i, (q, e) in enumerate(repacked):
                assert_same_bits(got.new_slots[i], q, (isa, shape))
                assert_same_bits(got.new_exponents[i], e, (isa, shape))


def test_what_a_slot_becomes():
    x = np.float32([1.0, 1e-3, 1e-9, 0.0, *[0.5] * 60, 0.25])
    draws = [reference.unpack_slot(*reference.pack_slot(x, 0, 0, t), 0) for t in range(2000)]
    # Without bias, though the third is far below the grid.
    assert {*np.unique([d[2] for d in draws])} <= {0.0, np.float32(2**-14)}
    np.testing.assert_allclose(np.mean(draws, axis=0)[[0, 1, 3, 64]], [1, 1e-3, 0, 0.25], rtol=1e-3)
    # A second moment is never rounded to zero: weights are divided by its root.
    root = reference.unpack_slot(*reference.pack_slot(x, 0, 1, 0), 1)
    assert root[2] > 0 and root[3] == 0


def test_the_gradient_is_left_alone_where_others_hold_it():
    w, g, slots = tensors((40, 50), odd=False)
    held, before = tf.constant(g), g.copy()
    step("momentum", tf.constant(w), held, slots[:1])
    np.testing.assert_array_equal(held, before)

    @tf.function
    def twice(w, g, m):
        doubled = g * 2
        new = step("momentum", w, doubled, [m])
        return new.new_weight, doubled

    _, doubled = twice(w, g, slots[0])
    np.testing.assert_array_equal(doubled, 2 * g)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"g": (5, 4)}, r"DfpAdam: gradient and slots .* got gradient of shape \[5,4\] and weight"),
        ({"m": (20,)}, r"DfpAdam: .*got slots of shape \[20\] and weight of shape \[4,5\]"),
        ({"exponents": 2}, "exponents must have 1 elements; got 2"),
        ({"exponents": 1}, "slots must be int16 where there are exponents, and else float"),
        ({"slots": 1}, "there must be 2 to 3 slots, and exponents for all or none; got 1 and 0"),
    ],
)
def test_wrong_tensors(change, message):
    w = np.ones((4, 5), np.float32)
    g, m = (
        np.ones(change.get("g", w.shape), "float32"),
        np.ones(change.get("m", w.shape), "float32"),
    )
    slots, exponents = [m, w][: change.get("slots", 2)], []
    if "exponents" in change:
        exponents = [np.zeros(change["exponents"], np.int32)] * 2
        if change["exponents"] == 2:
            slots = [np.ones((4, 5), np.int16)] * 2
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        step("adam", w, g, slots, exponents)


# ---- as Keras's ----------------------------------------------------------------------------------


def stepped(optimizer, steps=6, sparse=False, dtype="float32", eager=False):
    """All variables after some steps with gradients that are given."""
    rng = np.random.default_rng(0)
    shapes = {"embeddings": (50, 7), "kernel": (3, 3, 5, 33), "bias": (33,), "gain": ()}
    variables = [
        keras.Variable(rng.standard_normal(shape), dtype=dtype, name=name)
        for name, shape in shapes.items()
    ]
    variables[1].constraint = keras.constraints.NonNeg()
    optimizer.build(variables)

    def apply(*gradients):
        gradients = [tf.cast(g, dtype) for g in gradients]
        if sparse:
            gradients[0] = tf.IndexedSlices(gradients[0][:4], [7, 3, 3, 49], [50, 7])
        optimizer.apply(gradients, variables)

    apply = apply if eager else tf.function(apply)
    for _ in range(steps):
        apply(*[0.1 * rng.standard_normal(v.shape) for v in variables])
    return [v.numpy() for v in (*variables, *optimizer.variables)]


def assert_all_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        if tolerance:
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.7)


OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.01},
    "clipnorm": {"clipnorm": 0.1},
    "clipvalue": {"clipvalue": 1e-3, "weight_decay": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "ema": {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 4},
    "accumulation": {"gradient_accumulation_steps": 2, "weight_decay": 0.01},
    "scaled": {"loss_scale_factor": 4.0},
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("options", OPTIONS)
def test_sgd_gives_keras_bits(options, momentum):
    options = {"nesterov": options == "decay", "momentum": momentum, **OPTIONS[options]}
    # Op by op: in a graph, TensorFlow's optimizer multiplies constants of Keras's ops first.
    theirs = stepped(SGD(schedule(), **options), eager=True)
    assert_all_same(stepped(DFPSGD(schedule(), **options)), theirs)


@pytest.mark.parametrize("options", [*OPTIONS, "amsgrad"])
def test_adam_gives_keras_results(options):
    options = OPTIONS.get(options, {"amsgrad": True})
    theirs = AdamW if "weight_decay" in options else Adam
    theirs = stepped(theirs(schedule(), **options))
    assert_all_same(stepped(DFPAdam(schedule(), **options)), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", [SGD, Adam])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}, {"clipnorm": 0.1}])
def test_sparse_gradients_give_keras_bits(cls, options):
    """Eagerly, as for SGD: what of a sparse gradient is summed, and when, is Keras's own way."""
    ours = {SGD: DFPSGD, Adam: DFPAdam}[cls]
    ours, theirs = (stepped(c(0.1, **options), sparse=True, eager=True) for c in (ours, cls))
    embeddings = [i for i, value in enumerate(ours) if value.shape == (50, 7)]
    assert len(embeddings) == 3 if cls is Adam else 1
    assert_all_same([ours[i] for i in embeddings], [theirs[i] for i in embeddings])


def test_sparse_gradients_and_slots_in_dynamic_fixed_point():
    sparse = stepped(DFPSGD(0.1, 0.9, slots="dfp16"), sparse=True)
    assert_all_same(sparse, stepped(SGD(0.1, 0.9), sparse=True)[:4] + sparse[4:], atol=1e-4)


def test_few_rows_of_a_table_are_few_rows():
    """A sparse gradient without slots touches its rows, and nothing else."""
    table = keras.Variable(np.ones((1000, 3), np.float32))
    optimizer = DFPSGD(1.0)
    optimizer.build([table])

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(tf.gather(table.value, [3, 3, 7]))
        optimizer.apply(tape.gradient(y, [table.value]), [table])

    ops = {op.type for op in train.get_concrete_function().graph.get_operations()}
    assert "ResourceScatterSub" in ops and "DfpSgd" not in ops
    train()
    assert table.numpy().sum(axis=1)[[2, 3, 7]].tolist() == [3, -3, 0]


def test_variables_are_excluded_from_decay():
    results = []
    for cls in (DFPSGD, SGD):
        optimizer = cls(0.1, weight_decay=0.1)
        optimizer.exclude_from_weight_decay(var_names=["bias", "embeddings"])
        results.append(stepped(optimizer, eager=True))
    assert_all_same(*results)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("slots", ["float32", "dfp16"])
def test_other_dtypes_are_updated_by_keras_and_it_says_so(dtype, slots):
    options = {"momentum": 0.9, "weight_decay": 0.01}
    with pytest.warns(UserWarning, match=rf"DFPSGD updates 'embed\w+' \({dtype}\).* Keras"):
        ours = stepped(DFPSGD(0.1, slots=slots, **options), dtype=dtype)
    assert_all_same(ours, stepped(SGD(0.1, **options), dtype=dtype))


def test_nothing_is_said_of_float32():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stepped(DFPSGD(0.1, 0.9, slots="dfp16"))


# ---- in a model ----------------------------------------------------------------------------------


def small_model():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(20, "relu"),
            keras.layers.Dense(4),
        ]
    )


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((24, 6)).astype("float32"), rng.integers(4, size=24)


def fitted(optimizer, epochs=3, model=None):
    """The weights of a model, and all variables of the optimizer, after some steps."""
    model = small_model() if model is None else model
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(True))
    model.fit(*data(), batch_size=8, shuffle=False, epochs=epochs, verbose=0)
    return [v.numpy() for v in (*model.weights, *optimizer.variables)]


@pytest.mark.slow
def test_loss_scale_optimizer():
    def scaled(inner):
        optimizer = LossScaleOptimizer(inner, initial_scale=2.0**126, dynamic_growth_steps=5)
        return fitted(optimizer, epochs=8), int(inner.iterations)

    (ours, steps), (theirs, _) = scaled(DFPSGD(0.1, 0.9)), scaled(SGD(0.1, 0.9))
    assert 0 < steps < 24  # Those that overflow are left out.
    assert_all_same(ours, theirs, rtol=1e-4, atol=1e-6)


def test_xla_falls_back():
    for optimizer in (DFPSGD(0.1), LossScaleOptimizer(DFPAdam(0.1))):
        model = small_model()
        with pytest.warns(UserWarning, match="jit_compile"):
            model.compile(optimizer, "mse", jit_compile=True)
        assert not model.jit_compile


@pytest.mark.parametrize("cls", [DFPSGD, DFPAdam])
def test_wrong_slots(cls):
    with pytest.raises(ValueError, match="slots must be 'float32' or 'dfp16'; got 'int8'"):
        cls(slots="int8")


# ---- saving; slots in dynamic fixed point --------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda: DFPSGD(schedule(), momentum=0.9, slots="dfp16"),
    "adam": lambda: DFPAdam(0.01, amsgrad=True, weight_decay=0.01, slots="dfp16"),
    "float32": lambda: DFPAdam(0.01),
}


@pytest.mark.parametrize(
    "name", ["adam", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "float32"))]
)
def test_saved_and_resumed_to_the_same_bits(name, tmp_path):
    keras.config.set_dtype_policy("dfp16")
    whole = fitted(OPTIMIZERS[name](), epochs=2)

    model, optimizer = small_model(), OPTIMIZERS[name]()
    fitted(optimizer, epochs=1, model=model)
    model.save(tmp_path / "model.keras")
    tf.train.Checkpoint(model=model, optimizer=optimizer).write(str(tmp_path / "checkpoint"))

    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(optimizer)
    assert loaded.optimizer.get_config() == optimizer.get_config()
    loaded.fit(*data(), batch_size=8, shuffle=False, epochs=1, verbose=0)
    assert_all_same([v.numpy() for v in (*loaded.weights, *loaded.optimizer.variables)], whole)

    model, optimizer = small_model(), OPTIMIZERS[name]()
    optimizer.build(model.trainable_variables)
    tf.train.Checkpoint(model=model, optimizer=optimizer).read(
        str(tmp_path / "checkpoint")
    ).assert_consumed()
    assert_all_same(fitted(optimizer, epochs=1, model=model), whole)


def test_slots_take_half_the_memory():
    def bytes_of(**options):
        optimizer = DFPAdam(**options)
        optimizer.build([keras.Variable(np.zeros((300, 700), np.float32))])
        return sum(v.numpy().nbytes for v in optimizer.variables if v.shape.rank)

    assert bytes_of() == 2 * 300 * 700 * 4
    assert bytes_of(slots="dfp16") == 2 * (300 * 700 * 2 + -(-300 * 700 // 64) * 4)


@pytest.mark.slow
@pytest.mark.parametrize("ours", [DFPSGD(0.05, 0.9, slots="dfp16"), DFPAdam(0.01, slots="dfp16")])
def test_slots_in_dynamic_fixed_point_train_as_well(ours):
    theirs = type(ours).from_config({**ours.get_config(), "slots": "float32"})
    losses = []
    for optimizer in (ours, theirs):
        model = small_model()
        weights = fitted(optimizer, epochs=20, model=model)
        losses.append((model.evaluate(*data(), verbose=0), weights[0]))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.02)
    assert not np.array_equal(losses[0][1], losses[1][1])


REPLICAS = """
import test_optimizers as t
from keras.optimizers import SGD
from keras_dfp.optimizers import DFPSGD, DFPAdam
def run(optimizer):
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model, optimizer = t.small_model(), optimizer()
        weights = t.fitted(optimizer, model=model)
    for v in (*model.trainable_variables, *optimizer.variables):
        a, *others = [x.numpy() for x in getattr(v.value, "values", [v.value])]
        assert all((a == other).all() for other in others), v.path
    return weights
decay = {"weight_decay": 0.01}
sgd = [run(lambda: cls(0.1, 0.9, **decay)) for cls in (DFPSGD, SGD)]
t.assert_all_same(*sgd, rtol=1e-5, atol=1e-7)
adam = [run(lambda: DFPAdam(0.01, slots=slots))[:4] for slots in ("dfp16", "float32")]
t.assert_all_same(*adam, atol=1e-3)
print("same")
"""


@pytest.mark.slow
def test_two_replicas():
    check_on_two(REPLICAS)
