"""Every kernel on every instruction set, compared with the contract bit for bit."""

import dataclasses
import itertools
import math
import threading
import time
import warnings

import numpy as np
import oracle
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import (
    ISAS,
    TOKEN,
    Case,
    Passes,
    assert_same_bits,
    exponents_of_rows,
    guarded,
    mantissas,
    one_exponent_each,
    running,
)

from keras_dfp import number, reference
from keras_dfp.native import extension, lib


@pytest.fixture(autouse=True)
def _restore():
    isa = extension.isa()
    yield
    extension.set_isa(isa)
    extension.set_threads(0)


# ---- Quantize ------------------------------------------------------------------------------------

TINY = np.float32(2.0**-149)
LARGEST = np.finfo(np.float32).max
SPECIAL = {
    "zeros": np.zeros(70, np.float32),
    "negative zeros": np.full(5, -0.0, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.float32(-3.7),
    "subnormals": np.arange(-40, 40, dtype=np.float32) * TINY,
    "one subnormal": np.array([TINY], np.float32),
    "largest": np.array([LARGEST, -LARGEST, 1, TINY, 0], np.float32),
    "powers of two": np.array([1.0, -0.5, 0.25, 2.0**-13, 2.0**-14], np.float32),
    "ties": np.arange(-9, 10, dtype=np.float32) / 2 + np.eye(1, 19, dtype=np.float32)[0] * 8191,
    "clamped": np.array([np.nextafter(np.float32(2), np.float32(0)), -1.99999], np.float32),
    "nan": np.array([1, np.nan, 2], np.float32),
    "infinity": np.array([1, -np.inf, 2], np.float32),
    "wide": (10.0 ** np.linspace(-44, 38, 500)).astype(np.float32),
}


def native_quantize(x, bits=14, rounding="nearest", exponent=None, step=None, **attributes):
    return lib.dfp_quantize(
        x=x,
        exponent=[] if exponent is None else [np.asarray(exponent, np.int32)],
        step=[] if step is None else [np.int64(step)],
        mantissa_bits=bits,
        rounding=rounding,
        **attributes,
    )


def check_quantize(x, bits, rounding, exponent=None, isas=ISAS, **noise_and_groups):
    q, e = reference.quantize(x, bits, rounding, exponent, **noise_and_groups)
    for isa in isas:
        extension.set_isa(isa)
        result = native_quantize(guarded(x), bits, rounding, exponent, **noise_and_groups)
        what = f"{isa}, {x.shape}, {bits} bits, {rounding}, {noise_and_groups}"
        np.testing.assert_array_equal(result.e, e, what)
        assert_same_bits(result.q, q, what)


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
@pytest.mark.parametrize("name", SPECIAL)
def test_quantize_special_values(rounding, name):
    for bits in (8, 12, 14, 15, 16):
        for exponent in (None, -163, -20, 0, 3, 121, 2**31 - 1, -(2**31) + 1, -(2**31)):
            check_quantize(SPECIAL[name], bits, rounding, exponent, seed=3, step=4)


def groups_of_floats(rng, shape, axes):
    """Groups of any magnitude: some of zeros or subnormals, some with a NaN or an infinity."""
    groups = math.prod(shape[:axes])
    x = rng.standard_normal((groups, math.prod(shape[axes:])))
    x *= 10.0 ** rng.uniform(-44, 37, (groups, 1))
    x = x.astype(np.float32)
    if x.size and groups > 1:
        for group in rng.integers(groups, size=-(-groups // 8)):
            special = ("zeros", "negative zeros", "subnormals", "nan", "infinity", "largest")
            values = SPECIAL[special[rng.integers(6)]]
            x[group, : values.size] = values[: x.shape[1]]
            if rng.random() < 0.5:
                x[group, values.size :] = 0
    return x.reshape(shape)


# With at most 80 elements a group is short; short ones are taken many at a time.
GROUPS = [
    *[(n, 1) for n in (1, 2, 2050)],
    *[(300, n) for n in (2, 3, 7, 8, 9, 16, 31, 32, 33, 63, 79, 80, 81, 100)],
    *[(2100, n) for n in (4, 31, 80, 81)],
    *[(0, 3), (4, 0), (0, 0), (3, 0, 2)],
    *[(1, 1), (1, 7), (1, 100), (2, 5000)],
    *[(3, 2, 5), (2, 3, 4, 2), (5, 1, 1)],
]


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
@pytest.mark.parametrize("shape", GROUPS)
def test_quantize_groups(rounding, shape):
    rng = np.random.default_rng(shape)
    for turn, axes in enumerate(range(len(shape) + 1)):
        extension.set_threads(1 + turn % 2, small=0)
        x = groups_of_floats(rng, shape, axes)
        check_quantize(x, 14, rounding, seed=-5, step=2**40, group_axes=axes)
        bits = int(rng.integers(8, 17))
        check_quantize(x, bits, rounding, tensor_id=9, step=7, group_axes=axes)
        given = rng.integers(-200, 140, shape[:axes], np.int32)
        for exponent in (-(2**31), 2**31 - 1, -(2**31) + 1, -252, 252):
            if given.size:
                given.flat[rng.integers(given.size)] = exponent
        check_quantize(x, bits, rounding, given, step=1, group_axes=axes)


# Tasks take pieces of groups beyond 524,288 elements, and beyond 131,072 where there are few.
LARGE = [
    (300_003,),
    (1, 300_003),
    (3, 140_001),
    (5, 140_001),
    (2, 600_001),
    (90_001, 7),
    (41, 9001),
]


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
@pytest.mark.parametrize("shape", LARGE)
def test_quantize_large(rounding, shape):
    axes = len(shape) - 1
    x = groups_of_floats(np.random.default_rng(1), shape, axes)
    noise = dict(seed=-5, tensor_id=9, step=2**40)
    q, e = reference.quantize(x, 14, rounding, **noise, group_axes=axes)
    x = guarded(x)
    for isa, threads in itertools.product(ISAS, (1, 2, 4)):
        with running(isa, threads):
            result = native_quantize(x, 14, rounding, **noise, group_axes=axes)
        np.testing.assert_array_equal(result.e, e, isa)
        assert_same_bits(result.q, q, f"{isa}, {threads} threads")


@pytest.mark.parametrize("shape", [(8_400_001,), (3, 2_800_032), (140_000, 64), (263_000, 33)])
def test_quantize_beyond_the_caches(shape):
    axes = len(shape) - 1
    x = groups_of_floats(np.random.default_rng(2), shape, axes)
    check_quantize(x, 14, "nearest", group_axes=axes)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32), max_size=40),
    st.integers(8, 16),
    st.sampled_from(["nearest", "truncate", "stochastic"]),
    st.one_of(st.none(), st.integers(-200, 200)),
)
def test_quantize_any_value(values, bits, rounding, exponent):
    check_quantize(np.array(values, np.float32), bits, rounding, exponent)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_quantize_any_group(data):
    groups, n = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 40))
    some = data.draw(st.lists(st.floats(width=32), min_size=1, max_size=50))
    x = np.resize(np.array(some, np.float32), (groups, n))
    exponent = data.draw(
        st.one_of(
            st.none(),
            st.lists(
                st.one_of(st.integers(-200, 200), st.integers(-(2**31), 2**31 - 1)),
                min_size=groups,
                max_size=groups,
            ),
        )
    )
    if exponent is not None:
        exponent = np.array(exponent, np.int32)
    rounding = data.draw(st.sampled_from(["nearest", "truncate", "stochastic"]))
    bits, step = data.draw(st.integers(8, 16)), data.draw(st.integers(0, 2**63 - 1))
    check_quantize(x, bits, rounding, exponent, step=step, group_axes=1)


def counted(x, q, e, bits):
    """What `counts` says, in float64: nonzero elements, those lost and those beyond the format."""
    e = np.asarray(e, np.int64).reshape(e.shape + (1,) * (x.ndim - e.ndim))
    magnitude = np.where(e == reference.NAN_EXPONENT, 0, np.abs(x.astype(np.float64)))
    limit = np.ldexp(float(reference.qmax(bits)), np.clip(e, -900, 900))
    parts = magnitude > 0, (magnitude > 0) & (q == 0), magnitude > limit
    return [int(part.sum()) for part in parts]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
def test_quantize_counts(isa, threads):
    rng = np.random.default_rng(0)
    with running(isa, threads):
        for shape in [(300_003,), (300, 7), (70, 100), (3, 140_001), (2, 600_001), (0, 3), (4, 0)]:
            axes = len(shape) - 1
            x = groups_of_floats(rng, shape, axes)
            near = np.asarray(reference.quantize(x, 14, group_axes=axes)[1])
            for bits in (8, 14, 16):
                # A few bits too small, and too large: elements are clamped, and lost.
                shift = rng.integers(-4, 20, near.shape)
                given = np.where(near == reference.NAN_EXPONENT, near, near + shift)
                for exponent in (None, given):
                    q, e, counts = native_quantize(
                        x, bits, "nearest", exponent, group_axes=axes, n_counts=1
                    )
                    expected = counted(x, q.numpy(), e.numpy(), bits)
                    assert counts[0].numpy().tolist() == expected, (shape, bits)


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_counts_at_the_ends_of_float32(isa):
    """Also where TensorFlow flushes subnormals: on the threads that run a graph's ops."""
    import tensorflow as tf

    with running(isa):
        for bits, exponent in itertools.product(
            (8, 14, 16), (-163, -150, -149, 100, 114, 121, 127)
        ):
            x = tf.constant(np.concatenate([SPECIAL["subnormals"], SPECIAL["largest"]]))
            q, e, counts = tf.function(
                lambda x, bits=bits, exponent=exponent: native_quantize(
                    x, bits, "nearest", exponent, n_counts=1
                )
            )(x)
            expected = counted(x.numpy(), q.numpy(), e.numpy(), bits)
            assert counts[0].numpy().tolist() == expected, (bits, exponent)


@pytest.fixture
def told():
    """What the handler of losses is told."""
    before, calls = extension.loss_handler, []
    extension.set_loss_handler(lambda *loss: calls.append((*loss, threading.current_thread())))
    yield calls
    extension.set_loss_handler(before)


def outlier(nonzero, lost, zeros=9):
    """A group with so many nonzero elements, of which so many are lost beside the largest."""
    x = np.zeros(nonzero + zeros, np.float32)
    x[:nonzero] = 1
    x[:lost] = -(2.0**-30)
    return x


def wait_for_main_thread():
    """Python hands what waits for its main thread over between two instructions of it."""
    for _ in range(1000):
        time.sleep(0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_loss_is_told_once(told, threads):
    extension.set_threads(threads)
    x = np.stack([outlier(100, 20), outlier(100, 75), outlier(100, 50), outlier(100, 0)])
    site = f"told once, {threads} threads#1"
    for _ in range(3):
        native_quantize(x, group_axes=1, site=site)
    wait_for_main_thread()
    assert told == [(site, 0.75, 100, threading.main_thread())]
    # Another site is another kernel.
    native_quantize(x, group_axes=1, site=site + "1")
    wait_for_main_thread()
    assert [loss[0] for loss in told] == [site, site + "1"]


@pytest.mark.parametrize("shape", [(1, 300_000), (2, 600_000), (3, 5000)])
def test_a_loss_of_a_large_group_is_told(told, shape):
    x = np.ones(shape, np.float32)
    x[-1, : shape[1] // 2 + 1] = 1e-9
    site = f"large {shape}"
    with running(extension.isa(), 2):
        native_quantize(x, group_axes=1, site=site)
    wait_for_main_thread()
    ((name, share, nonzero, _),) = told
    assert (name, nonzero) == (site, shape[1])
    assert share == pytest.approx(0.5, abs=1e-3)


def test_a_loss_is_told_wherever_its_group_lies(told):
    for n, lost in ((70, slice(27, 62)), (129, slice(40, 110)), (3000, slice(1000, 2600))):
        for group in range(30):
            x = np.ones((30, n), np.float32)
            x[group, lost] = 1e-9
            native_quantize(x, group_axes=1, site=f"{n} elements, group {group}")
        wait_for_main_thread()
        assert len(told) == 30 * [70, 129, 3000].index(n) + 30, n


def test_what_is_no_loss_is_not_told(told):
    few = outlier(63, 62)
    less_than_half = outlier(101, 50)
    of_one_piece = outlier(600_000, 200_000)
    zeros = outlier(64, 31, zeros=5000)
    nan = outlier(100, 99)
    nan[-1] = np.nan
    nothing = np.zeros(1000, np.float32)
    for i, x in enumerate((few, less_than_half, of_one_piece, zeros, nan, nothing)):
        native_quantize(x, site=f"no loss {i}")
    native_quantize(np.tile(few, (50, 1)), group_axes=1, site="no loss of short groups")
    native_quantize(outlier(1000, 999))  # without a site
    wait_for_main_thread()
    assert told == []
    native_quantize(outlier(64, 32), site="a loss")
    wait_for_main_thread()
    assert [loss[:3] for loss in told] == [("a loss", 0.5, 64)]


def test_a_loss_is_told_from_any_thread(told):
    import tensorflow as tf

    x = outlier(100, 80)
    thread = threading.Thread(target=native_quantize, args=(x,), kwargs=dict(site="of a thread"))
    thread.start()
    thread.join()
    tf.function(lambda x: native_quantize(x, site="of a graph").q)(tf.constant(x))
    wait_for_main_thread()
    assert {loss[0] for loss in told} == {"of a thread", "of a graph"}
    assert {loss[3] for loss in told} == {threading.main_thread()}


def test_losses_of_many_kernels_are_all_told(told):
    """No more than a few can wait; the others are told by the next run of their kernel."""
    x = outlier(100, 80)
    sites = {f"one of many {i}" for i in range(60)}

    def all_of_them():
        for site in sites:
            native_quantize(x, site=site)

    for _ in range(20):
        thread = threading.Thread(target=all_of_them)
        thread.start()
        thread.join()
        wait_for_main_thread()
    assert sorted(loss[0] for loss in told) == sorted(sites)


def test_a_warning_of_a_loss_may_be_an_error():
    before = extension.loss_handler
    extension.set_loss_handler(lambda site, share, nonzero: warnings.warn(site, stacklevel=1))
    try:
        with warnings.catch_warnings(), pytest.raises(UserWarning, match="an error"):
            warnings.simplefilter("error")
            native_quantize(outlier(100, 80), site="an error")
            wait_for_main_thread()
    finally:
        extension.set_loss_handler(before)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (dict(strides=(0, 1)), "strides and dilations must be positive and below 2..31; got 0"),
        (dict(strides=(1, 2**31)), "got 2147483648 and 1 in spatial dimension 1"),
        (dict(dilations=(2**62, 1)), "must be positive and below 2..31; got 1 and 4611686018"),
        (dict(explicit_paddings=(0, 0, 2**62, 0)), "explicit_paddings must be from 0 to 2..31 - 1"),
    ],
)
def test_attributes_out_of_range(attributes, message):
    defaults = dict(strides=(1, 1), dilations=(1, 1), explicit_paddings=(0,) * 4)
    with pytest.raises(Exception, match=message):
        lib.dfp_conv(
            x=np.ones((1, 6, 6, 2), np.int16), x_exponent=np.int32(0), x_token=TOKEN,
            w=np.ones((5, 1, 2, 2), np.int16), w_exponent=np.int32(0), w_token=TOKEN,
            padding="EXPLICIT", depthwise=False, **defaults | attributes,
        )  # fmt: skip


FAR = 2**31 - 1


@pytest.mark.parametrize(
    "case",
    [
        Case((6, 5), (2, 3), 2, 3, strides=(FAR, FAR - 1)),
        Case((6, 5), (2, 3), 16, 3, strides=(1, FAR)),
        Case((6, 4), (2, 3), 16, 3, dilations=(2**21, 2**21), padding="same"),
        # Strides, dilations and padding whose product is no int64, or is 0 or 1 as one.
        Case((4, 4, 4), (1, 2, 2), 2, 3, strides=(2**21,) * 3),
        Case((4, 3, 4), (1, 2, 2), 2, 3, strides=(FAR,) * 3),
        Case((2, 3, 4), (1, 2, 2), 5, 1, strides=(2**21,) * 3, depthwise=True),
        Case((4, 3, 4), (2, 2, 2), 2, 3, dilations=(2**21,) * 3, padding="same"),
        Case((4, 3, 4), (2, 2, 2), 32, 33, dilations=(2**30,) * 3, padding="same"),
        Case((1, 1, 2), (1, 1, 1), 3, 2, strides=(FAR,) * 3, padding=((FAR, FAR),) * 3),
    ],
    ids=str,
)
def test_sizes_far_beyond_the_image(case):
    rng = np.random.default_rng(0)
    shapes = case.input_shape, case.kernel_shape, oracle.output_shape(case)
    tensors = [mantissas(rng, shape, 14) for shape in shapes]
    passes = Passes(case, tensors, (-3, -4, -5), (14, 14, 14))
    for accumulation in ("exact", "spill"):
        truth = oracle.conv_passes(case, *tensors, (-3, -4, -5), (14, 14, 14), accumulation)
        for isa in ISAS:
            with running(isa, 2, small=0):
                results = passes(accumulation)
            for name, result, expected in zip(Passes.names, results, truth, strict=True):
                assert_same_bits(result, expected, f"{name}, {accumulation}, {isa}")


def test_empty_tensors_of_any_size():
    """What is not zero of their sizes multiplies to less than 2**61, or they are refused."""
    many = 2**40

    def matmul(a, b):
        operands = dict(a=tf.zeros(a, tf.int16), b=tf.zeros(b, tf.int16))
        others = dict(a_exponent=np.int32(0), a_token=TOKEN, b_exponent=np.int32(0), b_token=TOKEN)
        return lib.dfp_matmul(**operands, **others)

    def weight_gradient(*image):
        return lib.dfp_conv_backprop_filter(
            x=tf.zeros((0, *image, 2), tf.int16), x_exponent=np.int32(0), x_token=TOKEN,
            filter_sizes=np.int32([1, 1, 2, 3]),
            dy=tf.zeros((0, *image, 3), tf.int16), dy_exponent=np.int32(0), dy_token=TOKEN,
            strides=[1, 1], dilations=[1, 1], padding="SAME",
        )  # fmt: skip

    assert matmul((0, many), (many, 0)).shape == (0, 0)
    assert matmul((7, 0, many), (7, many, 0)).shape == (7, 0, 0)
    assert np.array_equal(weight_gradient(2**29, 2**29), np.zeros((1, 1, 2, 3)))
    for refused, message in (
        (lambda: matmul((0, many, many), (0, many, many)), "a must have sizes .* less than 2..61"),
        (lambda: matmul((many, 0), (0, many)), "the result .* larger than is supported"),
        (lambda: weight_gradient(2**30, 2**30), "x must have sizes .* less than 2..61; got shape"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            refused()


@pytest.mark.parametrize("e", [-200, -163, -149, -140, -12, 0, 100, 121, 2**31 - 1, -(2**31)])
def test_dequantize(e):
    q = np.array([0, 1, -1, 3, 8191, -8191, 32767, -32767], np.int16)
    y = lib.dfp_dequantize(q=q, e=np.int32(e), token=TOKEN)
    assert_same_bits(y, reference.dequantize(q, e))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(300, 7), (5, 3, 4), (3, 100_001), (1, 9), (0, 3), (4, 0), ()])
def test_dequantize_groups(threads, shape):
    rng = np.random.default_rng(0)
    q = mantissas(rng, shape, 16)
    with running(extension.isa(), threads):
        for axes, kind in itertools.product(range(len(shape) + 1), ("apart", "low", "high", "nan")):
            e = one_exponent_each(rng, shape[:axes], kind)
            y = lib.dfp_dequantize(q=q, e=e, token=TOKEN)
            assert_same_bits(y, reference.dequantize(q, e))


def test_dequantize_takes_exponents_of_groups():
    with pytest.raises(Exception, match="e must hold one .* that divides 6; got shape .4.") as info:
        lib.dfp_dequantize(q=np.zeros((2, 3), np.int16), e=np.zeros(4, np.int32), token=TOKEN)
    assert "DfpDequantize" in str(info.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(exponent=[np.int32(1)] * 200), "at most one tensor each"),
        (dict(exponent=[np.int32(1), np.int32(-5)]), "at most one tensor each"),
        (dict(step=[np.int64(1), np.int64(5)]), "at most one tensor each"),
        (dict(step=[np.int64([1, 2])]), "step must be a scalar"),
        (dict(exponent=[np.int32([1, 2])]), "exponent must hold one for each group"),
        (dict(exponent=[np.int32([1, 2, 3])], group_axes=1), "exponent must hold one for each"),
        (dict(exponent=[np.int32(1)], group_axes=1), "exponent must hold one for each group"),
        (dict(group_axes=3), "group_axes must be from 0 to the rank of x; got 3 and rank 2"),
        (dict(group_axes=-1), "group_axes"),
        (dict(n_counts=2), "n_counts must be 0 or 1"),
        (dict(mantissa_bits=17), "mantissa_bits must be from 8 to 16; got 17"),
    ],
)
def test_quantize_refuses(arguments, message):
    x = np.ones((4, 2), np.float32)
    with pytest.raises(Exception, match=message):
        lib.dfp_quantize(**{**dict(x=x, exponent=[], step=[]), **arguments})


def test_seeds():
    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    for seed in (None, 0, 7, -1, 2**32 + 5, -(2**63), 2**63 - 1, 2**64 - 1, np.int64(-9)):
        q, _ = reference.quantize(x, rounding="stochastic", seed=int(seed or 0))
        t = number.quantize(x, rounding="stochastic", seed=seed)
        assert_same_bits(t.mantissa, q, f"{seed}")
    for seed in (2**64, -(2**63) - 1, 10**30):
        with pytest.raises(ValueError, match=f"seed must be an int of 64 bits; got {seed}"):
            number.quantize(x, rounding="stochastic", seed=seed)
    with pytest.raises(TypeError):
        number.quantize(x, seed=1.5)


def test_quantize_does_not_depend_on_flush_modes():
    """TensorFlow flushes subnormals on its own threads, where a graph's ops run."""
    import tensorflow as tf

    x = tf.constant([TINY, -3 * TINY, 7 * TINY])
    for axes in (0, 1):
        q, e, _ = tf.function(lambda x, axes=axes: native_quantize(x, group_axes=axes))(x)
        expected = reference.quantize(x.numpy(), group_axes=axes)
        np.testing.assert_array_equal(q, expected[0])
        np.testing.assert_array_equal(e, expected[1])


# ---- Matrix products -----------------------------------------------------------------------------


EVERY_WAY = list(itertools.product((False, True), repeat=2))


def check_matmul(
    rng, batch, m, k, n, a_bits, b_bits, accumulation, kind, of_a=-3, of_b=-9, apart="same",
    isas=None, transposed=EVERY_WAY,
):  # fmt: skip
    """Compares a product with the reference: for exponents see `exponents_of_rows`."""
    a = mantissas(rng, (*batch, m, k), a_bits, kind)
    b = mantissas(rng, (*batch, k, n), b_bits, kind)
    options = dict(a_bits=a_bits, b_bits=b_bits, accumulation=accumulation)
    for ta, tb in transposed:
        operands, exponents = {}, []
        for name, q, t, which in (("a", a, ta, of_a), ("b", b, tb, of_b)):
            q = np.swapaxes(q, -1, -2) if t else q
            e, of_rows = exponents_of_rows(rng, q.shape, which, apart)
            operands |= {name: guarded(q), f"{name}_exponent": e, f"{name}_token": TOKEN}
            exponents.append(np.swapaxes(of_rows, -1, -2) if t else of_rows)
        expected = reference.matmul(a, exponents[0], b, exponents[1], **options)
        for isa in isas or [extension.isa()]:
            extension.set_isa(isa)
            y = lib.dfp_matmul(**operands, transpose_a=ta, transpose_b=tb, **options)
            what = f"{isa}, transposed {ta} {tb}, {options}, {kind}, {of_a} {of_b} {apart}"
            assert_same_bits(y, expected, what)


MATRICES = [
    ((), 1, 1, 1),
    ((), 3, 0, 4),
    ((), 0, 5, 4),
    ((2, 0), 3, 5, 4),
    ((), 5, 7, 3),
    ((3,), 17, 33, 9),
    ((2, 2), 8, 64, 32),
    ((), 100, 333, 65),
    ((), 97, 128, 200),
    ((), 31, 9001, 70),
]
# Threads, formats, mantissas; and whose exponents they are, and how far apart.
MATMULS = [
    (1, (14, 14), "random"),
    (2, (14, 14), "extreme"),
    (2, (16, 16), "extreme"),
    (1, (16, 16), "signs"),
    (2, (15, 15), "signs"),
    (1, (12, 12), "extreme"),
    (2, (8, 8), "extreme"),
    (1, (9, 9), "random"),
    (2, (14, 16), "extreme"),
    (1, (8, 15), "signs"),
    (2, (14, 14), "extreme", "row", -9, "apart"),
    (1, (16, 16), "signs", -3, "row", "near"),
    (4, (14, 16), "random", "row", "row", "near"),
    (2, (13, 14), "signs", "row", "row", "low"),
    (1, (14, 14), "random", "row", "row", "nan"),
    (2, (16, 16), "extreme", "row", "row", "high"),
    (2, (15, 9), "random", "matrix", "row", "apart"),
    (1, (8, 8), "extreme", "row", "matrix", "low"),
    (2, (10, 11), "signs", "matrix", "matrix", "nan"),
]


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize("batch, m, k, n", MATRICES)
def test_matmul(accumulation, batch, m, k, n):
    rng = np.random.default_rng(m + k + n)
    for threads, bits, kind, *exponents in MATMULS:
        extension.set_threads(threads, small=0)
        check_matmul(rng, batch, m, k, n, *bits, accumulation, kind, *exponents, isas=ISAS)


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
def test_matmul_of_groups_of_rows(accumulation):
    """Groups of an odd length: a pair of products may belong to two."""
    rng = np.random.default_rng(0)
    for of_a, of_b, rows in [
        ("49 rows", "49 rows", 5 * 49),
        ("49 rows", -9, 147),
        (-3, "7 rows", 7 * 36),
        ("3 rows", "5 rows", 15 * 11),
    ]:
        for batch, bits, apart in [((), 14, "near"), ((2,), 16, "nan"), ((3,), 9, "apart")]:
            extension.set_threads(2, small=0)
            check_matmul(
                *(rng, batch, rows, rows, rows, bits, bits, accumulation, "signs"),
                *(of_a, of_b, apart), isas=ISAS, transposed=[(True, False), (False, True)],
            )  # fmt: skip
    # Groups of matrices.
    for of_a, of_b in (("10 rows", "matrix"), ("20 rows", "6 rows"), ("row", "12 rows")):
        exponents = of_a, of_b, "near"
        check_matmul(rng, (4,), 5, 6, 7, 14, 14, accumulation, "random", *exponents, isas=ISAS,
                     transposed=[(False, False)])  # fmt: skip


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
def test_matmul_aligned_by_any_shift(accumulation):
    """By 0 to 40 bits, the largest mantissas of both signs too, in every format."""
    rng = np.random.default_rng(0)
    shifts = np.arange(123) % 41
    rng.shuffle(shifts)
    ea = (-shifts).astype(np.int32)
    for bits, kind in itertools.product(range(8, 17), ("extreme", "signs", "random")):
        a, b = mantissas(rng, (5, 123), bits, kind), mantissas(rng, (123, 37), bits, kind)
        options = dict(a_bits=bits, b_bits=bits, accumulation=accumulation)
        expected = reference.matmul(a, ea[np.newaxis], b, -7, **options)
        operands = dict(a=guarded(a.T), b=guarded(b), a_token=TOKEN, b_token=TOKEN)
        for isa in ISAS:
            with running(isa, 2, small=0):
                y = lib.dfp_matmul(
                    **operands, a_exponent=ea, b_exponent=np.int32(-7), transpose_a=True, **options
                )
                assert_same_bits(y, expected, f"{isa}, {bits} bits, {kind}")


@pytest.mark.parametrize("along", ["rows and columns", "products"])
def test_exponents_far_beyond_float32(along):
    """Sums overflow or become zeros of their sign, whichever products are left of them."""
    rng = np.random.default_rng(0)
    ends = [2**31 - 1, 2**31 - 4, 200_003, 200_000, 99_990, 300, 0]
    for e in (
        np.array(ends, np.int32),
        -np.array(ends, np.int32),
        np.array([*ends[:3], *ends[:4]]),
    ):
        e = e.astype(np.int32)
        a, b = rng.integers(-2, 3, (7, 7), np.int16), rng.integers(-2, 3, (7, 7), np.int16)
        transposed = along == "products"
        ea, eb = e[:, np.newaxis], e[:, np.newaxis]
        expected = reference.matmul(a, ea.T if transposed else ea, b, eb if transposed else eb.T)
        y = lib.dfp_matmul(
            a=a.T if transposed else a, a_exponent=e, a_token=TOKEN, transpose_a=transposed,
            b=b if transposed else b.T, b_exponent=e, b_token=TOKEN, transpose_b=not transposed,
        )  # fmt: skip
        assert_same_bits(y, expected, f"{e}")


@pytest.mark.parametrize("isa", ISAS)
def test_matmul_chain_of_odd_length(isa):
    """9 bits allow chains of 33,025 products: they end within a pair."""
    extension.set_isa(isa)
    for kind, exponents in (("extreme", ()), ("random", ("row", "row", "near"))):
        check_matmul(np.random.default_rng(0), (), 2, 70_001, 3, 9, 9, "spill", kind, *exponents)
        # A lies as the kernels read it, and the last chain is odd.
        check_matmul(np.random.default_rng(0), (), 2, 33_026, 3, 9, 9, "spill", kind, *exponents)
        check_matmul(np.random.default_rng(0), (), 9, 514, 3, 9, 16, "spill", kind, *exponents)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [131_073, 400_001])
def test_matmul_sums_beyond_what_an_accumulator_holds(isa, k):
    extension.set_isa(isa)
    for kind, exponents in (("extreme", ()), ("signs", ("row", "row", "near"))):
        check_matmul(np.random.default_rng(k), (), 3, k, 2, 16, 16, "exact", kind, *exponents)


@pytest.mark.slow
def test_matmul_sums_beyond_a_double():
    rng = np.random.default_rng(0)
    q = reference.qmax(16)
    k = 9_000_000
    for delta in range(8):
        a, b = mantissas(rng, (1, k), 16, "extreme"), mantissas(rng, (k, 1), 16, "extreme")
        a[0, :delta] -= 1
        total = k * q * q - delta * q
        y = lib.dfp_matmul(
            a=a, a_exponent=np.int32(0), a_token=TOKEN,
            b=b, b_exponent=np.int32(0), b_token=TOKEN, a_bits=16, b_bits=16,
        )  # fmt: skip
        assert_same_bits(y, reference.round_scaled(np.array([[total]], np.int64), 0))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize("exponents", [(-100, -60), (-163, -163), (121, 0), (121, 121), (-63, -63)])
def test_matmul_at_the_ends_of_float32(isa, accumulation, exponents):
    extension.set_isa(isa)
    rng = np.random.default_rng(5)
    check_matmul(rng, (), 9, 40, 33, 14, 14, accumulation, "random", *exponents)


def test_matmul_of_nan_is_nan():
    a = np.zeros((2, 3), np.int16)
    y = lib.dfp_matmul(
        a=a, a_exponent=np.int32(-(2**31)), a_token=TOKEN,
        b=a.T, b_exponent=np.int32(0), b_token=TOKEN,
    )  # fmt: skip
    assert np.isnan(y).all()


@pytest.mark.parametrize("isa", ISAS)
def test_empty_sums_of_nan_are_nan(isa):
    none, nan = np.zeros((2, 3, 0), np.int16), reference.NAN_EXPONENT
    rows = np.array([[0, nan, 0], [0, 0, 0]], np.int32)
    matrices = np.array([0, nan], np.int32)
    with running(isa):
        for ea, eb in ((rows, np.int32(0)), (rows, matrices), (matrices, rows), (matrices,) * 2):
            expected = reference.matmul(
                none, ea.reshape(*ea.shape, *(1,) * (3 - ea.ndim)),
                none.swapaxes(1, 2), eb.reshape(*eb.shape[:1], 1, -1) if eb.ndim else eb,
            )  # fmt: skip
            y = lib.dfp_matmul(
                a=none, a_exponent=ea, a_token=TOKEN, b=none, b_exponent=eb, b_token=TOKEN,
                transpose_b=True,
            )  # fmt: skip
            assert_same_bits(y, expected)


@pytest.mark.parametrize(
    ("a", "ea", "b", "eb", "message"),
    [
        ((3, 4), 2, (4, 5), (), "a_exponent must .* that divides 3; got shape .2."),
        ((3, 4), (), (4, 5), 8, "b_exponent must .* that divides 4; got shape .8."),
        ((2, 3, 4), (), (2, 4, 5), 0, "b_exponent must .* that divides 8; got shape .0."),
        ((2, 3, 4), (2, 1, 2), (2, 4, 5), (), "a_exponent must .* 6; got shape .2,1,2."),
        (
            (2, 3, 4),
            3,
            (2, 4, 5),
            (),
            "must be a part of a matrix, or .* got 3 of a_exponent for 2 matrices of 3",
        ),
    ],
)
def test_matmul_takes_exponents_of_groups(a, ea, b, eb, message):
    operands = dict(a=np.zeros(a, np.int16), a_exponent=np.zeros(ea, np.int32), a_token=TOKEN)
    operands |= dict(b=np.zeros(b, np.int16), b_exponent=np.zeros(eb, np.int32), b_token=TOKEN)
    with pytest.raises(Exception, match=message) as info:
        lib.dfp_matmul(**operands)
    assert "DfpMatmul" in str(info.value)


# ---- Convolutions --------------------------------------------------------------------------------


def check_conv(
    case, rng, x_bits, w_bits, dy_bits, accumulation, kind, exponents=(-5, -7, 2), isas=None
):
    """Compares the three passes with the reference.

    An exponent of x or dy may be an array, of groups of images, or a kind of `one_exponent_each`.
    """
    ex, ew, ed = (
        one_exponent_each(rng, case.batch, e) if isinstance(e, str) else np.asarray(e, np.int32)
        for e in exponents
    )
    of_x, of_dy = (np.repeat(e, case.batch // e.size) if e.ndim and e.size else e for e in (ex, ed))
    x = mantissas(rng, case.input_shape, x_bits, kind)
    w = mantissas(rng, case.kernel_shape, w_bits, kind)
    prefix = "depthwise_conv" if case.depthwise else "conv"
    options = dict(case.options, accumulation=accumulation)
    forward, back, across = (
        getattr(reference, prefix + suffix)
        for suffix in ("", "_input_gradient", "_weight_gradient")
    )
    y = forward(x, of_x, w, ew, x_bits=x_bits, w_bits=w_bits, **options)
    dy = mantissas(rng, y.shape, dy_bits, kind)
    expected = (
        y,
        back(dy, of_dy, w, ew, x.shape, dy_bits=dy_bits, w_bits=w_bits, **options),
        across(x, of_x, dy, of_dy, w.shape, x_bits=x_bits, dy_bits=dy_bits, **options),
    )
    passes = Passes(case, (x, w, dy), (ex, ew, ed), (x_bits, w_bits, dy_bits))
    for isa in isas or [extension.isa()]:
        extension.set_isa(isa)
        for name, result, truth in zip(Passes.names, passes(accumulation), expected, strict=True):
            what = f"{name}, {isa}, {accumulation}: {case} {passes.attributes} {kind} {exponents}"
            assert_same_bits(result, truth, what)


CASES = {
    "1x1": Case((5, 5), (1, 1), 8, 10),
    "1x1 odd channels": Case((5, 5), (1, 1), 7, 5),
    "1x1 strided": Case((6, 7), (1, 1), 8, 10, (2, 2)),
    "3x3 same": Case((7, 6), (3, 3), 8, 40, padding="same"),
    "3x3 valid": Case((7, 6), (3, 3), 5, 3),
    "3x3 same strided": Case((9, 8), (3, 3), 6, 9, (2, 2), padding="same"),
    "first layer": Case((20, 20), (7, 7), 3, 8, (2, 2), padding=((3, 3), (3, 3))),
    "dilated": Case((9, 9), (3, 3), 4, 6, dilations=(2, 3), padding="same"),
    "strided and dilated": Case((11, 12), (3, 4), 4, 6, (2, 3), (3, 2), padding="same"),
    "stride beyond kernel": Case((9, 9), (2, 2), 4, 6, (3, 4)),
    "stride divides dilation": Case((9, 9), (3, 3), 4, 6, (2, 2), (2, 4), padding="same"),
    "asymmetric padding": Case((6, 6), (3, 2), 4, 6, (2, 1), padding=((0, 3), (4, 1))),
    "padding beyond image": Case((2, 2), (3, 3), 3, 4, padding=((5, 4), (3, 6))),
    "even kernel": Case((6, 5), (4, 2), 3, 4, padding="same"),
    "causal": Case((9,), (3,), 4, 5, dilations=(2,), padding=((4, 0),)),
    "1d": Case((12,), (5,), 3, 7, (2,), padding="same"),
    "1d long": Case((300,), (40,), 1, 2, (7,)),
    "3d": Case((4, 5, 6), (2, 3, 3), 3, 5, (1, 2, 2), padding="same"),
    "3d dilated": Case((5, 5, 5), (2, 2, 3), 2, 3, dilations=(2, 1, 2)),
    "groups": Case((6, 6), (3, 3), 8, 12, groups=4, padding="same"),
    "odd groups": Case((6, 6), (3, 3), 9, 6, (2, 2), groups=3, padding="same"),
    "one channel": Case((9, 8), (3, 3), 1, 6, padding="same"),
    "one channel, many filters": Case((9, 8), (3, 2), 1, 40, (2, 1)),
    "one channel a group": Case((6, 6), (3, 3), 6, 12, groups=6, padding="same"),
    "1x1 groups": Case((5, 4), (1, 1), 8, 8, groups=2),
    "depthwise": Case((7, 6), (3, 3), 40, 1, depthwise=True, padding="same"),
    "depthwise multiplier": Case((7, 6), (3, 2), 5, 3, (2, 2), depthwise=True, padding="same"),
    "depthwise dilated": Case((9, 9), (3, 3), 9, 1, (1, 1), (2, 2), depthwise=True),
    "depthwise 7x7": Case((9, 9), (7, 7), 33, 1, depthwise=True, padding="same"),
    "depthwise vectors": Case((6, 9), (3, 3), 64, 1, (2, 1), depthwise=True, padding="same"),
    "depthwise overlap": Case((5, 6), (2, 3), 49, 1, depthwise=True, padding=((2, 0), (0, 3))),
    "depthwise many images": Case((5, 3), (3, 3), 80, 1, (2, 2), depthwise=True, batch=9),
    "depthwise long chains": Case((37, 35), (2, 2), 35, 1, depthwise=True, batch=3),
    "depthwise 1d": Case((9,), (3,), 6, 2, depthwise=True),
    "depthwise 3d": Case((4, 4, 5), (2, 2, 2), 3, 2, depthwise=True, padding="same"),
    "1-wide image": Case((9, 1), (3, 3), 4, 6, padding="same"),
    "one pixel": Case((1, 1), (1, 1), 130, 70, batch=1),
    "no batch": Case((5, 5), (3, 3), batch=0),
    "no output": Case((2, 5), (3, 3)),
    "many channels": Case((3, 3), (3, 3), 97, 67, padding="same"),
    "long K": Case((3, 2), (3, 3), 1030, 5, padding="same", batch=1),
    "many pixels": Case((70, 70), (2, 2), 3, 5, padding="same", batch=2),
    "prime everything": Case((13, 11), (5, 3), 7, 11, (3, 2), padding="same", batch=3),
    # Weight gradients whose taps share what is packed: blocks of rows from two images, of channels
    # of which the last is smaller, and channels of one group.
    "shared taps": Case((13, 22), (3, 3), 40, 6, padding="same", batch=5),
    "shared taps, dilated": Case((12, 36), (3, 2), 8, 33, dilations=(2, 3), batch=6),
    "shared taps, even dilation": Case((20, 30), (2, 3), 8, 5, dilations=(1, 2), padding="same"),
    "shared taps, groups": Case((9, 40), (5, 4), 32, 6, groups=2, padding="same", batch=4),
    "shared taps, column": Case((40, 16), (3, 1), 16, 9, padding=((3, 1), (0, 0)), batch=2),
    "shared taps, 1d": Case((700,), (4,), 8, 5, padding="same"),
    # Windows read from a copy of the image: parts of rows, blocks of several images, and runs of an
    # odd length, by kernel row and by tap.
    "windows, long rows": Case((4, 600), (3, 3), 4, 6, padding="same"),
    "windows, small images": Case((7, 9), (3, 3), 6, 34, padding="same", batch=20),
    "windows, odd rows": Case((40, 30), (3, 5), 3, 33, (2, 3), padding="same", batch=2),
    "windows, odd taps": Case((9, 30), (3, 3), 5, 6, dilations=(1, 2), padding="same"),
    "windows, wide padding": Case((12, 11), (3, 4), 6, 7, padding=((7, 8), (9, 5)), batch=3),
    # Images of an odd number of pixels: pairs of products belong to two, and tiles to several.
    "odd images": Case((7, 7), (3, 3), 4, 6, padding="same", batch=5),
    "odd images, 1x1": Case((7, 7), (1, 1), 64, 70, batch=4),
    "odd images, many channels": Case((9, 9), (3, 3), 64, 33, padding="same", batch=3),
    "odd images, groups": Case((5, 7), (3, 3), 64, 64, groups=2, padding="same", batch=3),
    "odd images, strided": Case((9, 9), (3, 3), 32, 64, (2, 2), batch=4),
    "odd images, strided 1x1": Case((8, 8), (1, 1), 64, 64, (3, 3), batch=3),
    "odd images, one channel": Case((6, 4), (2, 2), 1, 40, batch=5),
    "odd images, depthwise": Case((7, 7), (3, 3), 40, 1, depthwise=True, batch=5),
    "odd images, multiplier": Case((7, 7), (3, 3), 16, 2, (2, 2), depthwise=True, batch=5),
    "pixels": Case((1, 1), (1, 1), 70, 40, batch=83),
    "tiny images": Case((3,), (2,), 3, 5, padding="same", batch=83),
    "tiny images, depthwise": Case((3, 1), (2, 1), 3, 2, depthwise=True, batch=83),
}
# Bits, mantissas, and exponents of x and dy: one, or one for each image.
FORMATS = [
    (14, 14, 14, "random", -5, 2),
    (14, 14, 14, "extreme", -5, 2),
    (16, 16, 16, "extreme", -5, 2),
    (15, 15, 15, "signs", -5, 2),
    (8, 8, 8, "extreme", -5, 2),
    (14, 14, 14, "random", "near", "near"),
    (16, 16, 16, "extreme", "near", 2),
    (12, 12, 12, "extreme", -5, "apart"),
    (14, 14, 14, "signs", "apart", "nan"),
    (13, 9, 10, "random", "nan", "low"),
    (8, 16, 14, "signs", "low", "high"),
    (16, 15, 16, "signs", "high", "same"),
]


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize("name", CASES)
def test_conv(accumulation, name):
    rng = np.random.default_rng(len(name))
    for i, (*bits, kind, ex, ed) in enumerate(FORMATS):
        extension.set_threads((1, 2, 4)[i % 3], small=0)
        check_conv(CASES[name], rng, *bits, accumulation, kind, (ex, -7, ed), isas=ISAS)


@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize(
    "name",
    ["odd images", "odd images, many channels", "odd images, strided", "odd images, depthwise"],
)
def test_groups_of_images_share_an_exponent(accumulation, name):
    rng = np.random.default_rng(0)
    case = dataclasses.replace(CASES[name], batch=6)
    for ex, ed in ([[-5, -9], [2, 0, 4]], [-5, [1, -3]], [[0, 1, -2], 3]):
        exponents = np.array(ex), -7, np.array(ed)
        check_conv(case, rng, 14, 14, 14, accumulation, "random", exponents, isas=ISAS)


@pytest.mark.parametrize(
    ("exponents", "message"),
    [
        ((np.zeros(3), 0, 0), "DfpConv: x_exponent must .* divides 4; got shape .3."),
        ((np.zeros(8), 0, 0), "DfpConv: x_exponent must .* divides 4; got shape .8."),
        ((np.zeros(0), 0, 0), "DfpConv: x_exponent must .* divides 4; got shape .0."),
        ((0, np.zeros(2), 0), "DfpConv: w_exponent must .* divides 1; got shape .2."),
        ((0, 0, np.zeros(3)), "DfpConvBackpropInput: dy_exponent must .* divides 4; got shape .3."),
    ],
)
@pytest.mark.parametrize("depthwise", [False, True])
def test_convolutions_take_exponents_of_images(exponents, message, depthwise):
    case = Case((5, 5), (3, 3), 4, 4, batch=4, depthwise=depthwise)
    shapes = case.input_shape, case.kernel_shape, oracle.output_shape(case)
    tensors = [np.zeros(shape, np.int16) for shape in shapes]
    with pytest.raises(Exception, match=message):
        Passes(case, tensors, exponents, (14, 14, 14))("exact")


def test_weight_gradients_take_exponents_of_images():
    case = Case((5, 5), (3, 3), 4, 4, batch=4)
    shapes = case.input_shape, case.kernel_shape, oracle.output_shape(case)
    tensors = [np.zeros(shape, np.int16) for shape in shapes]
    for exponents, name in (((np.zeros(3), 0, 0), "x"), ((0, 0, np.zeros(3)), "dy")):
        passes = Passes(case, tensors, exponents, (14, 14, 14))
        with pytest.raises(Exception, match=f"{name}_exponent must .* divides 4; got shape .3."):
            lib.dfp_conv_backprop_filter(
                filter_sizes=passes.filter_sizes, **passes.x, **passes.dy, **passes.attributes
            )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize("name", ["3x3 same", "depthwise", "1x1", "groups"])
def test_conv_at_the_ends_of_float32(isa, accumulation, name):
    extension.set_isa(isa)
    ends = [(-90, -60, -70), (121, 100, 90), (-140, 2, 3), (-(2**31), 0, 0)]
    of_images = [([-90, 5], -60, [-70, 2]), ([121, -140], 10, [90, -100])]
    for exponents in [*ends, *of_images]:
        rng = np.random.default_rng(0)
        if exponents[0] == -(2**31):
            expected = np.nan
            case = CASES[name]
            x = np.zeros((1, 5, 5, case.channels), np.int16)
            inner = case.channels if case.depthwise else case.channels // case.groups
            w = np.ones((*case.kernel, inner, case.filters), np.int16)
            y = lib.dfp_conv(
                x=x, x_exponent=np.int32(-(2**31)), x_token=TOKEN,
                w=w, w_exponent=np.int32(0), w_token=TOKEN, **case.attributes,
            )  # fmt: skip
            np.testing.assert_array_equal(y, expected)
        else:
            check_conv(CASES[name], rng, 14, 14, 14, accumulation, "random", exponents)


@pytest.mark.parametrize("isa", ISAS)
def test_spilled_chains_longer_than_a_block(isa):
    """Formats of few bits chain whole kernel positions, also those of many channels."""
    extension.set_isa(isa)
    for bits in ((9, 9, 9), (8, 8, 8), (9, 8, 10)):
        for case in (Case((3, 1), (3, 1), 2, 11_176), Case((3, 1), (3, 1), 11_177, 2)):
            check_conv(case, np.random.default_rng(0), *bits, "spill", "signs")


@pytest.mark.parametrize("isa", ISAS)
def test_depthwise_long_rows(isa):
    """Longer than one call of a microkernel may sum, with operands of one sign."""
    extension.set_isa(isa)
    case = Case((70_001,), (2,), 33, 1, depthwise=True, batch=1)
    check_conv(case, np.random.default_rng(0), 16, 16, 16, "exact", "extreme")


@pytest.mark.parametrize("isa", ISAS)
def test_spilled_sums_of_images(isa):
    """Chains of a weight gradient go on from image to image, each with its own shift."""
    extension.set_isa(isa)
    for depthwise in (False, True):
        case = Case((9, 5), (2, 2), 5, 1 if depthwise else 7, batch=60, depthwise=depthwise)
        for bits in (8, 9, 14, 16):
            exponents = "near", -7, "near"
            check_conv(case, np.random.default_rng(0), *[bits] * 3, "spill", "signs", exponents)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_depthwise_results_beyond_the_caches(isa, strides):
    """Large enough, and aligned, to be stored past them."""
    extension.set_isa(isa)
    case = Case((44, 43), (3, 3), 48, 1, strides, depthwise=True, padding="same", batch=12)
    exponents = "nan", -7, "near"
    check_conv(case, np.random.default_rng(1), 14, 14, 14, "exact", "random", exponents)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("accumulation", ["exact", "spill"])
def test_matmul_results_beyond_the_caches(isa, accumulation):
    """Large enough, and aligned, to be stored past them."""
    rng = np.random.default_rng(0)
    a, b = mantissas(rng, (65_601, 5), 14), mantissas(rng, (5, 64), 14)
    rows, columns = one_exponent_each(rng, 65_601, "nan"), one_exponent_each(rng, 64)
    for ea, eb in ((np.int32(-3), np.int32(-9)), (rows, np.int32(-9)), (rows, columns)):
        expected = oracle.matmul(a, b, (ea.reshape(-1, 1), eb), (14, 14), accumulation)
        with running(isa, 2):
            y = lib.dfp_matmul(
                a=a, a_exponent=ea, a_token=TOKEN, b=b.T, b_exponent=eb, b_token=TOKEN,
                transpose_b=True, accumulation=accumulation,
            )  # fmt: skip
        assert_same_bits(y, expected)


BIASED = (
    "1x1 odd channels", "3x3 same", "first layer", "dilated", "odd groups", "3d", "no batch",
    "one channel, many filters", "many channels", "long K", "odd images, many channels",
    "depthwise multiplier", "tiny images",
)  # fmt: skip


CLIPS = {"none": np.asarray, "relu": tf.nn.relu, "relu6": tf.nn.relu6}


def some_biases(rng, n):
    """Some that clip, some that do not, and one that is no number."""
    bias = (4 * rng.standard_normal(n)).astype(np.float32)
    bias[: n // 8] = np.nan
    return bias


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", BIASED)
def test_a_bias_is_added_to_the_rounded_result(name, isa):
    """And the sum clipped, as TensorFlow does it."""
    case = CASES[name]
    rng = np.random.default_rng(3)
    x = mantissas(rng, case.input_shape, 14, "random")
    w = mantissas(rng, case.kernel_shape, 14, "random")
    exponents = one_exponent_each(rng, case.batch, "nan"), np.int32(-7), np.int32(0)
    passes = Passes(case, (x, w, np.zeros(0, np.int16)), exponents, (14, 14, 14))
    for accumulation in ("exact", "spill"):
        attributes = dict(passes.attributes, accumulation=accumulation)
        with running(isa, 2, small=0):
            y = lib.dfp_conv(**passes.x, **passes.w, **attributes).numpy()
            bias = some_biases(rng, y.shape[-1])
            for clip, clipped in CLIPS.items():
                result = lib.dfp_conv_bias(
                    **passes.x, **passes.w, bias=bias, clip=clip, **attributes
                )
                assert_same_bits(
                    result, np.asarray(clipped(y + bias)), f"{name}, {accumulation}, {clip}"
                )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (70, 64, 33), (3, 40_000, 65), (4, 0, 9)])
def test_a_bias_is_added_to_a_matrix_product(shape, isa):
    m, k, n = shape
    rng = np.random.default_rng(4)
    operands = dict(
        a=mantissas(rng, (2, m, k), 14, "random"), a_exponent=np.int32(-300), a_token=TOKEN,
        b=mantissas(rng, (2, k, n), 14, "random"), b_exponent=np.int32(170), b_token=TOKEN,
    )  # fmt: skip
    bias = some_biases(rng, n)
    for accumulation in ("exact", "spill"):
        with running(isa, 3, small=0):
            y = lib.dfp_matmul(**operands, accumulation=accumulation).numpy()
            for clip, clipped in CLIPS.items():
                result = lib.dfp_matmul_bias(
                    **operands, bias=bias, accumulation=accumulation, clip=clip
                )
                assert_same_bits(result, np.asarray(clipped(y + bias)), f"{accumulation}, {clip}")
    with pytest.raises(Exception, match=f"bias must have {n} elements; got {n + 1}"):
        lib.dfp_matmul_bias(**operands, bias=np.zeros(n + 1, np.float32))
