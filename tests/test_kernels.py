"""Every kernel on every instruction set, compared with the contract bit for bit."""

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import ISAS, TOKEN, Case, assert_same_bits, guarded, mantissas, running

from keras_dfp import reference
from keras_dfp.native import extension, lib


@pytest.fixture(autouse=True)
def _restore():
    isa = extension.isa()
    yield
    extension.set_isa(isa)
    extension.set_threads(0)


# ---- Quantise ------------------------------------------------------------------------------------

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


def native_quantize(x, bits, rounding, exponent=None, **noise):
    step = noise.pop("step", None)
    q, e = lib.dfp_quantize(
        x=x,
        exponent=[] if exponent is None else [np.int32(exponent)],
        step=[] if step is None else [np.int64(step)],
        mantissa_bits=bits,
        rounding=rounding,
        **noise,
    )
    return q.numpy(), int(e)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
@pytest.mark.parametrize("name", SPECIAL)
def test_quantize_special_values(isa, rounding, name):
    extension.set_isa(isa)
    x = SPECIAL[name]
    for bits in (8, 12, 14, 15, 16):
        for exponent in (None, -163, -20, 0, 3, 121, 2**31 - 1, -(2**31) + 1, -(2**31)):
            expected = reference.quantize(x, bits, rounding, exponent, seed=3, step=4)
            q, e = native_quantize(x, bits, rounding, exponent, seed=3, step=4)
            np.testing.assert_array_equal(q, expected[0])
            assert e == expected[1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
def test_quantize_large(isa, threads, rounding):
    extension.set_isa(isa)
    extension.set_threads(threads)
    # More than one thread's share of 131,072.
    x = np.random.default_rng(1).standard_normal(300_003).astype(np.float32)
    expected = reference.quantize(x, 14, rounding, seed=-5, tensor_id=9, step=2**40)
    q, e = native_quantize(x, 14, rounding, seed=-5, tensor_id=9, step=2**40)
    np.testing.assert_array_equal(q, expected[0])
    assert e == expected[1]


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_beyond_the_caches(isa):
    extension.set_isa(isa)
    x = np.random.default_rng(2).standard_normal(8_400_001).astype(np.float32)
    expected = reference.quantize(x)
    q, e = native_quantize(x, 14, "nearest")
    np.testing.assert_array_equal(q, expected[0])
    assert e == expected[1]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32), max_size=40),
    st.integers(8, 16),
    st.sampled_from(["nearest", "truncate", "stochastic"]),
    st.one_of(st.none(), st.integers(-200, 200)),
)
def test_quantize_any_value(values, bits, rounding, exponent):
    x = np.array(values, np.float32)
    expected = reference.quantize(x, bits, rounding, exponent)
    q, e = native_quantize(x, bits, rounding, exponent)
    np.testing.assert_array_equal(q, expected[0])
    assert e == expected[1]


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
            padding="EXPLICIT", depthwise=False, n_statistics=0, **defaults | attributes,
        )  # fmt: skip


def test_strides_far_beyond_the_image():
    case = Case((6, 5), (2, 3), 2, 3, strides=(2**31 - 1, 2**31 - 2))
    check_conv(case, np.random.default_rng(0), 14, 14, 14, "exact", "random")


@pytest.mark.parametrize("e", [-200, -163, -149, -140, -12, 0, 100, 121, 2**31 - 1, -(2**31)])
def test_dequantize(e):
    q = np.array([0, 1, -1, 3, 8191, -8191, 32767, -32767], np.int16)
    y = lib.dfp_dequantize(q=q, e=np.int32(e), token=TOKEN)
    assert_same_bits(y, reference.dequantize(q, e))


def test_quantize_takes_one_exponent_and_one_step():
    with pytest.raises(Exception, match="at most one scalar"):
        lib.dfp_quantize(x=np.ones(4, np.float32), exponent=[np.int32(1)] * 200, step=[])
    with pytest.raises(Exception, match="scalar"):
        lib.dfp_quantize(x=np.ones(4, np.float32), exponent=[np.int32([1, 2])], step=[])
    with pytest.raises(Exception, match="at most one scalar"):
        lib.dfp_quantize(x=np.ones(4, np.float32), exponent=[np.int32(1), np.int32(-5)], step=[])


def test_quantize_does_not_depend_on_flush_modes():
    """TensorFlow flushes subnormals on its own threads, where a graph's ops run."""
    import tensorflow as tf

    x = tf.constant([TINY, -3 * TINY, 7 * TINY])
    q, e = tf.function(lambda x: lib.dfp_quantize(x=x, exponent=[], step=[]))(x)
    expected = reference.quantize(x.numpy())
    np.testing.assert_array_equal(q, expected[0])
    assert int(e) == expected[1]


# ---- Matrix products -----------------------------------------------------------------------------


def check_matmul(rng, batch, m, k, n, a_bits, b_bits, accumulation, kind, ea=-3, eb=-9):
    a = mantissas(rng, (*batch, m, k), a_bits, kind)
    b = mantissas(rng, (*batch, k, n), b_bits, kind)
    options = dict(a_bits=a_bits, b_bits=b_bits, accumulation=accumulation)
    expected = reference.matmul(a, ea, b, eb, **options)
    for transpose_a in (False, True):
        for transpose_b in (False, True):
            y = lib.dfp_matmul(
                a=guarded(np.swapaxes(a, -1, -2) if transpose_a else a),
                a_exponent=np.int32(ea),
                a_token=TOKEN,
                b=guarded(np.swapaxes(b, -1, -2) if transpose_b else b),
                b_exponent=np.int32(eb),
                b_token=TOKEN,
                transpose_a=transpose_a,
                transpose_b=transpose_b,
                **options,
            )
            assert_same_bits(y, expected)


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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize("batch, m, k, n", MATRICES)
def test_matmul(isa, accumulation, batch, m, k, n):
    extension.set_isa(isa)
    rng = np.random.default_rng(m + k + n)
    for threads, (a_bits, b_bits), kind in [
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
    ]:
        extension.set_threads(threads, small=0)
        check_matmul(rng, batch, m, k, n, a_bits, b_bits, accumulation, kind)


@pytest.mark.parametrize("isa", ISAS)
def test_matmul_chain_of_odd_length(isa):
    """9 bits allow chains of 33,025 products: they end within a pair."""
    extension.set_isa(isa)
    for kind in ("extreme", "random"):
        check_matmul(np.random.default_rng(0), (), 2, 70_001, 3, 9, 9, "spill", kind)
        # A lies as the kernels read it, and the last chain is odd.
        check_matmul(np.random.default_rng(0), (), 2, 33_026, 3, 9, 9, "spill", kind)
        check_matmul(np.random.default_rng(0), (), 9, 514, 3, 9, 16, "spill", kind)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [131_073, 400_001])
def test_matmul_sums_beyond_what_an_accumulator_holds(isa, k):
    extension.set_isa(isa)
    for kind in ("extreme", "signs"):
        check_matmul(np.random.default_rng(k), (), 3, k, 2, 16, 16, "exact", kind)


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


# ---- Convolutions --------------------------------------------------------------------------------


def check_conv(case, rng, x_bits, w_bits, dy_bits, accumulation, kind, exponents=(-5, -7, 2)):
    """Compares the three passes with the reference."""
    ex, ew, ed = exponents
    x = mantissas(rng, case.input_shape, x_bits, kind)
    w = mantissas(rng, case.kernel_shape, w_bits, kind)
    prefix = "depthwise_conv" if case.depthwise else "conv"
    options = dict(case.options, accumulation=accumulation)
    expected = getattr(reference, prefix)(x, ex, w, ew, x_bits=x_bits, w_bits=w_bits, **options)
    dy = mantissas(rng, expected.shape, dy_bits, kind)
    attributes = dict(
        case.attributes, accumulation=accumulation, x_bits=x_bits, w_bits=w_bits, dy_bits=dy_bits
    )
    x_in = dict(x=x, x_exponent=np.int32(ex), x_token=TOKEN)
    w_in = dict(w=w, w_exponent=np.int32(ew), w_token=TOKEN)
    dy_in = dict(dy=dy, dy_exponent=np.int32(ed), dy_token=TOKEN)

    y, statistics = lib.dfp_conv(**x_in, **w_in, **attributes, n_statistics=4)
    assert_same_bits(y, expected)
    if expected.size:
        stated = reference.channel_statistics(expected)
        for value, name in zip(statistics, ["sum", "sum_of_squares", "min", "max"], strict=True):
            assert_same_bits(value, stated[name].astype(np.float64))

    dx = lib.dfp_conv_backprop_input(
        input_sizes=np.array(x.shape, np.int32), **w_in, **dy_in, **attributes
    )
    assert_same_bits(
        dx,
        getattr(reference, prefix + "_input_gradient")(
            dy, ed, w, ew, x.shape, dy_bits=dy_bits, w_bits=w_bits, **options
        ),
    )
    dw = lib.dfp_conv_backprop_filter(
        filter_sizes=np.array(w.shape, np.int32), **x_in, **dy_in, **attributes
    )
    assert_same_bits(
        dw,
        getattr(reference, prefix + "_weight_gradient")(
            x, ex, dy, ed, w.shape, x_bits=x_bits, dy_bits=dy_bits, **options
        ),
    )


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
}
FORMATS = [
    (14, 14, 14, "random"),
    (14, 14, 14, "extreme"),
    (16, 16, 16, "extreme"),
    (15, 15, 15, "signs"),
    (12, 12, 12, "extreme"),
    (8, 8, 8, "extreme"),
    (8, 16, 14, "signs"),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize("name", CASES)
def test_conv(isa, accumulation, name):
    extension.set_isa(isa)
    rng = np.random.default_rng(len(name))
    for i, (x_bits, w_bits, dy_bits, kind) in enumerate(FORMATS):
        extension.set_threads(1 + i % 2, small=0)
        check_conv(CASES[name], rng, x_bits, w_bits, dy_bits, accumulation, kind)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("accumulation", ["exact", "spill"])
@pytest.mark.parametrize("name", ["3x3 same", "depthwise", "1x1", "groups"])
def test_conv_at_the_ends_of_float32(isa, accumulation, name):
    extension.set_isa(isa)
    for exponents in [(-90, -60, -70), (121, 100, 90), (-140, 2, 3), (-(2**31), 0, 0)]:
        rng = np.random.default_rng(0)
        if exponents[0] == -(2**31):
            expected = np.nan
            case = CASES[name]
            x = np.zeros((1, 5, 5, case.channels), np.int16)
            inner = case.channels if case.depthwise else case.channels // case.groups
            w = np.ones((*case.kernel, inner, case.filters), np.int16)
            y, _ = lib.dfp_conv(
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
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_depthwise_results_beyond_the_caches(isa, strides):
    """Large enough, and aligned, to be stored past them."""
    extension.set_isa(isa)
    case = Case((44, 43), (3, 3), 48, 1, strides, depthwise=True, padding="same", batch=12)
    check_conv(case, np.random.default_rng(1), 14, 14, 14, "exact", "random")


def check_statistics(x, x_exponent, w, w_exponent):
    y, statistics = lib.dfp_conv(
        x=x, x_exponent=np.int32(x_exponent), x_token=TOKEN, w=w, w_exponent=np.int32(w_exponent),
        w_token=TOKEN, n_statistics=4, strides=(1, 1), dilations=(1, 1),
    )  # fmt: skip
    stated = reference.channel_statistics(y.numpy())
    for value, expected in zip(statistics, stated.values(), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_statistics_of_nan_and_infinity(isa):
    extension.set_isa(isa)
    x = np.zeros((2, 3, 3, 41), np.int16)
    x[1, 2, 0, :40] = 8191
    w = np.eye(41, dtype=np.int16)[np.newaxis, np.newaxis]
    for exponent in (-(2**31), 120, 0):
        check_statistics(x, exponent, w, 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
def test_statistics_of_several_blocks(isa, threads):
    rng = np.random.default_rng(0)
    x, w = mantissas(rng, (2, 64, 63, 3), 14), mantissas(rng, (1, 1, 3, 50), 14)
    with running(isa, threads, small=0):
        check_statistics(x, -9, w, -8)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("accumulation", ["exact", "spill"])
def test_matmul_results_beyond_the_caches(isa, accumulation):
    """Large enough, and aligned, to be stored past them."""
    rng = np.random.default_rng(0)
    a, b = mantissas(rng, (65_601, 5), 14), mantissas(rng, (5, 64), 14)
    expected = oracle.matmul(a, b, -12, (14, 14), accumulation)
    with running(isa, 2):
        y = lib.dfp_matmul(
            a=a, a_exponent=np.int32(-3), a_token=TOKEN, b=b, b_exponent=np.int32(-9),
            b_token=TOKEN, accumulation=accumulation,
        )  # fmt: skip
    assert_same_bits(y, expected)
