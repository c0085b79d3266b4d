"""The public products: every bit against the reference, in every mode TensorFlow runs them in."""

import dataclasses
import importlib.machinery
import importlib.util
import itertools
import resource
import weakref
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dfp import contraction, convolution, native, ops, reference
from keras_dfp.number import DFPFormat
from keras_dfp.operand import loop_step
from keras_dfp.operand import operand as make_operand

FORWARD_ONLY = DFPFormat(products=("forward",))


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def uneven(*shape, seed=0):
    """Random numbers whose rows have sizes of their own, from 2**-6 to 2**6."""
    rows = np.random.default_rng([7, seed, *shape]).integers(-6, 6, shape[:-1], endpoint=True)
    return np.ldexp(random(*shape, seed=seed), rows[..., np.newaxis])


def same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def run(function, *arrays, fmt=None, dy=None):
    """Returns the result of an op, a gradient `dy` for it, and the gradients of its arguments."""
    tensors = [tf.constant(x) for x in arrays]
    with ops.format_scope(fmt or DFPFormat()), tf.GradientTape() as tape:
        tape.watch(tensors)
        y = function(*tensors)
    if dy is None:
        dy = uneven(*y.shape, seed=99) if y.shape.rank else random(seed=99)
    return y, dy, tape.gradient(y, tensors, output_gradients=tf.constant(dy))


def quantized(x, fmt, groups=0):
    """Mantissas and exponents; every index of the `groups` leading axes has its own exponent."""
    groups = groups if fmt.exponents == "sample" else 0
    return reference.quantize(x, fmt.mantissa_bits, fmt.rounding, group_axes=groups)


def channels_first(x):
    return np.moveaxis(x, -1, 1)


FORMATS = [
    DFPFormat(),
    DFPFormat(accumulation="spill"),
    DFPFormat(exponents="tensor"),
    DFPFormat(mantissa_bits=16, accumulation="spill", exponents="tensor"),
    DFPFormat(mantissa_bits=9, rounding="truncate"),
]


def short(fmt):
    """What of a format is not the default."""
    default = dataclasses.asdict(DFPFormat())
    fields = dataclasses.asdict(fmt).items()
    return ",".join(f"{name}={value}" for name, value in fields if value != default[name]) or "dfp"


# Input and kernel (without groups: channels in = kernel's channels), and the arguments.
CONVOLUTIONS = [
    ((2, 9, 3), (3, 3, 5), {}),
    ((2, 9, 4), (4, 2, 6), {"padding": "same", "strides": 2}),
    ((2, 7, 6, 35), (3, 2, 35, 5), {"padding": "same"}),
    ((2, 7, 6, 3), (3, 3, 3, 4), {"strides": (2, 1)}),
    ((1, 9, 8, 4), (3, 2, 2, 6), {"dilation_rate": (2, 3), "padding": "same"}),
    ((2, 4, 5, 6, 2), (2, 3, 2, 2, 3), {"padding": "same", "strides": (2, 1, 2)}),
]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("fmt", FORMATS, ids=short)
@pytest.mark.parametrize(("x_shape", "w_shape", "arguments"), CONVOLUTIONS)
def test_conv_is_the_reference(x_shape, w_shape, arguments, fmt, data_format):
    x, w = uneven(*x_shape), random(*w_shape, seed=1)
    first = data_format == "channels_first"
    layout = channels_first if first else np.asarray
    y, dy, (dx, dw) = run(
        lambda x, w: ops.conv(x, w, data_format=data_format, **arguments), layout(x), w, fmt=fmt
    )

    bits = fmt.mantissa_bits
    geometry = {
        "strides": arguments.get("strides", 1),
        "padding": arguments.get("padding", "valid"),
        "dilations": arguments.get("dilation_rate", 1),
        "accumulation": fmt.accumulation,
    }
    qx, qw = quantized(x, fmt, 1), quantized(w, fmt)
    qdy = quantized(np.moveaxis(dy, 1, -1) if first else dy, fmt, 1)
    same_bits(y, layout(reference.conv(*qx, *qw, x_bits=bits, w_bits=bits, **geometry)))
    expected = reference.conv_input_gradient(
        *qdy, *qw, x_shape, dy_bits=bits, w_bits=bits, **geometry
    )
    same_bits(dx, layout(expected))
    same_bits(
        dw,
        reference.conv_weight_gradient(*qx, *qdy, w_shape, x_bits=bits, dy_bits=bits, **geometry),
    )


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("fmt", FORMATS[:3], ids=short)
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "arguments"),
    [
        ((2, 9, 3), (3, 3, 2), {"strides": 2}),
        ((2, 7, 6, 5), (3, 3, 5, 1), {"padding": "same", "strides": (1, 2)}),
        ((2, 9, 8, 2), (3, 2, 2, 3), {"dilation_rate": 2, "strides": 2, "padding": "same"}),
    ],
)
def test_depthwise_conv_is_the_reference(x_shape, w_shape, arguments, fmt, data_format):
    x, w = uneven(*x_shape), random(*w_shape, seed=1)
    first = data_format == "channels_first"
    layout = channels_first if first else np.asarray
    y, dy, (dx, dw) = run(
        lambda x, w: ops.depthwise_conv(x, w, data_format=data_format, **arguments),
        layout(x),
        w,
        fmt=fmt,
    )

    geometry = {
        "strides": arguments.get("strides", 1),
        "padding": arguments.get("padding", "valid"),
        "dilations": arguments.get("dilation_rate", 1),
        "accumulation": fmt.accumulation,
    }
    qx, qw = quantized(x, fmt, 1), quantized(w, fmt)
    qdy = quantized(np.moveaxis(dy, 1, -1) if first else dy, fmt, 1)
    same_bits(y, layout(reference.depthwise_conv(*qx, *qw, **geometry)))
    same_bits(dx, layout(reference.depthwise_conv_input_gradient(*qdy, *qw, x_shape, **geometry)))
    same_bits(dw, reference.depthwise_conv_weight_gradient(*qx, *qdy, w_shape, **geometry))


def test_separable_conv_quantizes_between_its_two_convolutions():
    x, d, p = uneven(2, 7, 6, 3), random(3, 3, 3, 2, seed=1), random(1, 1, 6, 4, seed=2)
    fmt = DFPFormat()
    y, dy, (dx, dd, dp) = run(lambda x, d, p: ops.separable_conv(x, d, p, padding="same"), x, d, p)

    qx, qdy, qd, qp = (
        quantized(x, fmt, 1),
        quantized(dy, fmt, 1),
        quantized(d, fmt),
        quantized(p, fmt),
    )
    qm = quantized(reference.depthwise_conv(*qx, *qd, padding="same"), fmt, 1)
    same_bits(y, reference.conv(*qm, *qp))
    same_bits(dp, reference.conv_weight_gradient(*qm, *qdy, p.shape))
    dm = reference.conv_input_gradient(*qdy, *qp, (2, 7, 6, 6))
    qdm = quantized(dm, fmt, 1)
    same_bits(dx, reference.depthwise_conv_input_gradient(*qdm, *qd, x.shape, padding="same"))
    same_bits(dd, reference.depthwise_conv_weight_gradient(*qx, *qdm, d.shape, padding="same"))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("fmt", FORMATS[:3], ids=short)
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "arguments"),
    [
        ((2, 5, 3), (3, 4, 3), {"strides": 2, "output_padding": 1}),
        ((2, 4, 5, 3), (3, 2, 4, 3), {"strides": 2, "padding": "same"}),
        ((2, 4, 5, 3), (1, 2, 2, 3), {"strides": (3, 2)}),
        ((2, 4, 3, 3), (3, 3, 2, 3), {"strides": 2, "dilation_rate": 2}),
        ((1, 3, 2, 4, 2), (2, 3, 3, 5, 2), {"padding": "same", "strides": (1, 2, 1)}),
    ],
)
def test_conv_transpose_is_the_gradient_of_a_convolution(
    x_shape, w_shape, arguments, fmt, data_format
):
    x, w = uneven(*x_shape), random(*w_shape, seed=1)
    first = data_format == "channels_first"
    layout = channels_first if first else np.asarray
    y, dy, (dx, dw) = run(
        lambda x, w: ops.conv_transpose(x, w, data_format=data_format, **arguments),
        layout(x),
        w,
        fmt=fmt,
    )
    stock = keras.ops.conv_transpose(x, w, data_format="channels_last", **arguments)
    assert y.shape == layout(stock).shape

    geometry = {
        "strides": arguments.get("strides", 1),
        "padding": arguments.get("padding", "valid"),
        "dilations": arguments.get("dilation_rate", 1),
        "accumulation": fmt.accumulation,
    }
    qx, qw = quantized(x, fmt, 1), quantized(w, fmt)
    qdy = quantized(np.moveaxis(dy, 1, -1) if first else dy, fmt, 1)
    same_bits(y, layout(reference.conv_input_gradient(*qx, *qw, stock.shape, **geometry)))
    same_bits(dx, layout(reference.conv(*qdy, *qw, **geometry)))
    same_bits(dw, reference.conv_weight_gradient(*qdy, *qx, w_shape, **geometry))


# ---- contractions --------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS, ids=short)
def test_matmul_is_the_reference(fmt):
    a, b = uneven(7, 70), random(70, 5, seed=1)
    bits, accumulation = fmt.mantissa_bits, fmt.accumulation
    y, dy, (da, db) = run(ops.matmul, a, b, fmt=fmt)
    (qa, ea), (qb, eb), (qdy, edy) = quantized(a, fmt, 1), quantized(b, fmt), quantized(dy, fmt, 1)

    def expected(*operands):
        return reference.matmul(*operands, a_bits=bits, b_bits=bits, accumulation=accumulation)

    rows = (7, 1) if fmt.exponents == "sample" else ()
    ea, edy = ea.reshape(rows), edy.reshape(rows)
    same_bits(y, expected(qa, ea, qb, eb))
    same_bits(da, expected(qdy, edy, qb.T, eb))
    same_bits(db, expected(qa.T, ea.T, qdy, edy))


class Numbers(NamedTuple):
    """A tensor in dynamic fixed point, its axes labelled; e has a size of 1 where it is shared."""

    labels: tuple
    q: np.ndarray
    e: np.ndarray

    @classmethod
    def of(cls, x, labels, fmt, groups, order=None):
        """Quantizes with an exponent for every index of `groups`, the first labels of `order`."""
        order = labels if order is None else order
        assert tuple(order[: len(groups)]) == tuple(groups)
        perm = [labels.index(n) for n in order]
        q, e = quantized(np.transpose(x, perm).copy(), fmt, len(groups))
        back = [order.index(n) for n in labels]
        e = e.reshape(e.shape + (1,) * (len(labels) - e.ndim)).astype(np.int64)
        return cls(tuple(labels), q.transpose(back), e.transpose(back))

    def exponents(self, labels):
        """Returns the exponents so that they broadcast over axes with these labels."""
        own = [n for n in labels if n in self.labels]
        e = self.e.transpose([self.labels.index(n) for n in own])
        return np.expand_dims(e, [i for i, n in enumerate(labels) if n not in own])


def product(first, second, out):
    """The product of two `Numbers` as docs/numerics.md has it: the second is aligned, with a bit
    more (no format here has 16)."""
    every = [*out, *dict.fromkeys(n for n in first.labels + second.labels if n not in out)]
    summed = tuple(range(len(out), len(every)))
    e = np.zeros((1,) * len(every), np.int64)
    along = e
    for operand in (first, second):
        exponents = operand.exponents(every)
        if any(exponents.shape[axis] > 1 for axis in summed):
            along = along + exponents
        else:
            e = e + exponents
    most = along.max(axis=summed, keepdims=True)
    shift = most - along
    more = int(shift.any())
    foreign = tuple(i for i, n in enumerate(every) if n not in second.labels)
    own = [n for n in every if n in second.labels]
    shift = shift.squeeze(foreign).transpose([own.index(n) for n in second.labels])
    number = {n: i for i, n in enumerate(every)}
    sums = np.einsum(
        first.q.astype(np.int64),
        [number[n] for n in first.labels],
        reference.align(second.q.astype(np.int64) << more, shift),
        [number[n] for n in second.labels],
        list(range(len(out))),
    )
    return reference.round_scaled(np.asarray(sums), (most + e - more).squeeze(summed))


def contraction_truth(a, a_labels, b, b_labels, out, dy, fmt, *, known=True):
    """Returns y, da and db of a contraction.

    Args:
        a: The first tensor.
        a_labels: A label for every axis; an axis of size 1 fits any size of the same label.
        b: The second tensor.
        b_labels: Likewise.
        out: The labels of y.
        dy: The gradient of y.
        fmt: The format; its sums are exact.
        known: Whether sizes of 1 are known while tracing. If not, elements are repeated, and
            gradients come summed in float32.
    """
    sides = []
    for x, labels, other, theirs in ((a, a_labels, b, b_labels), (b, b_labels, a, a_labels)):
        groups = list(itertools.takewhile(lambda n: n in out, labels))
        numbers = Numbers.of(x, list(labels), fmt, groups)
        sizes = dict(zip(theirs, other.shape, strict=True))
        thin = [n for n, size in zip(labels, x.shape, strict=True) if size == 1 < sizes.get(n, 1)]
        axes = tuple(labels.index(n) for n in thin)
        if known:
            kept = tuple(n for n in labels if n not in thin)
            numbers = Numbers(kept, numbers.q.squeeze(axes), numbers.e.squeeze(axes))
        else:
            for n, axis in zip(thin, axes, strict=True):
                numbers = numbers._replace(q=np.repeat(numbers.q, sizes[n], axis))
        sides.append((numbers, groups, axes))
    (first, _, _), (second, groups, _) = sides
    y = product(first, second, out)

    # dy is a matrix, or a batch of them, with an exponent for every row.
    batch = [n for n in out if n in first.labels and n in second.labels]
    rows = [n for n in out if n in first.labels and n not in batch]
    columns = [n for n in out if n in second.labels and n not in batch]
    # Its rows are the free axes of the factor that the first of them belongs to.
    free = next((n for n in out if n not in batch), None)
    swapped = free in columns and bool(rows or set(groups) & set(columns))
    if swapped:
        (second, groups, _), (first, _, _) = sides
        rows, columns = columns, rows
    dys = Numbers.of(dy, list(out), fmt, [*batch, *rows], [*batch, *rows, *columns])

    # The second factor is aligned. Which one that is follows from how the tensors lie in memory.
    summed = [n for n in first.labels if n not in out]
    upright = [*batch, *rows, *summed] != list(first.labels) == [*batch, *summed, *rows]
    left = product(second, dys, first.labels) if upright else product(dys, second, first.labels)
    transposed = any(n in columns for n in groups)
    right = product(dys, first, second.labels) if transposed else product(first, dys, second.labels)

    gradients = []
    for x, (_, _, axes), gradient in zip(
        (a, b), sides, (right, left) if swapped else (left, right), strict=True
    ):
        summed = gradient if known else gradient.sum(axis=axes, keepdims=True)
        gradients.append(summed.reshape(x.shape))
    return y, *gradients


def matmul_labels(a, b):
    """Returns NumPy's rule for matmul as labels of a, b and the result."""
    a_labels = [*range(-a.ndim, -2), *["row"] * (a.ndim > 1), "sum"]
    b_labels = [*range(-b.ndim, -2), "sum", *["column"] * (b.ndim > 1)]
    batch = range(-max(a.ndim, b.ndim), -2)
    return a_labels, b_labels, [*batch, *["row"] * (a.ndim > 1), *["column"] * (b.ndim > 1)]


MATMUL_SHAPES = [
    ((3,), (3,)),
    ((3,), (3, 4)),
    ((2, 3), (3,)),
    ((5, 2, 3), (3, 4)),
    ((6, 5, 2, 3), (3,)),
    ((3,), (5, 3, 4)),
    ((2, 3), (5, 3, 4)),
    ((5, 2, 3), (5, 3, 4)),
    ((1, 2, 3), (5, 3, 4)),
    ((5, 2, 3), (1, 3, 4)),
    ((6, 1, 2, 3), (5, 3, 4)),
    ((1, 5, 2, 3), (6, 1, 3, 4)),
]


ONE_OR_MANY = [DFPFormat(), DFPFormat(exponents="tensor")]


@pytest.mark.parametrize("fmt", ONE_OR_MANY, ids=short)
@pytest.mark.parametrize(("a_shape", "b_shape"), MATMUL_SHAPES)
def test_matmul_broadcasts_like_numpy_and_sums_gradients_exactly(a_shape, b_shape, fmt):
    a, b = uneven(*a_shape), uneven(*b_shape, seed=1)
    y, dy, (da, db) = run(ops.matmul, a, b, fmt=fmt)
    a_labels, b_labels, out = matmul_labels(a, b)
    expected = contraction_truth(a, a_labels, b, b_labels, out, dy, fmt)
    assert expected[0].shape == np.matmul(a, b).shape
    for actual, truth in zip((y, da, db), expected, strict=True):
        same_bits(actual, truth)


def test_a_matrix_times_many_is_one_gemm():
    graph = traced(ops.matmul, [4, 5, 6, 7], [7, 8])
    assert [node.shape.rank for node in outputs(graph, "DfpMatmul")] == [2]


@pytest.mark.parametrize("fmt", ONE_OR_MANY, ids=short)
@pytest.mark.parametrize(
    ("a_shape", "b_shape", "labels"),
    [
        ((2, 3), (3, 4), "ab,bc->ac"),
        ((5, 2, 3), (6, 3, 4), "abk,ckd->abcd"),
        ((2, 3), (3,), "ab,b->a"),
        ((3,), (), "a,->a"),
        ((), (), ",->"),
    ],
)
def test_dot(a_shape, b_shape, labels, fmt):
    a, b = (np.asarray(random(*shape, seed=i)) for i, shape in enumerate((a_shape, b_shape)))
    y, dy, gradients = run(ops.dot, a, b, fmt=fmt)
    terms, out = labels.split("->")
    assert y.shape == np.dot(a, b).shape
    expected = contraction_truth(a, terms.split(",")[0], b, terms.split(",")[1], out, dy, fmt)
    for actual, truth in zip((y, *gradients), expected, strict=True):
        same_bits(actual, truth)


@pytest.mark.parametrize("fmt", ONE_OR_MANY, ids=short)
@pytest.mark.parametrize(
    ("a_shape", "b_shape", "axes", "labels"),
    [
        ((2, 3), (3, 4), 1, "ab,bc->ac"),
        ((2, 3, 4), (3, 4, 5), 2, "abc,bcd->ad"),
        ((2, 3), (4,), 0, "ab,c->abc"),
        ((2, 3, 4), (4, 3, 5), [[2, 1], [0, 1]], "abc,cbd->ad"),
        ((2, 3, 4), (4, 3, 5), (-1, 0), "abc,cde->abde"),
        ((3, 2, 4), (5, 3), (0, 1), "kab,ck->abc"),
    ],
)
def test_tensordot(a_shape, b_shape, axes, labels, fmt):
    a, b = uneven(*a_shape), uneven(*b_shape, seed=1)
    y, dy, gradients = run(lambda a, b: ops.tensordot(a, b, axes), a, b, fmt=fmt)
    terms, out = labels.split("->")
    assert y.shape == np.tensordot(a, b, axes).shape
    expected = contraction_truth(a, terms.split(",")[0], b, terms.split(",")[1], out, dy, fmt)
    for actual, truth in zip((y, *gradients), expected, strict=True):
        same_bits(actual, truth)


@pytest.mark.parametrize("exponents", ["sample", "tensor"])
def test_spilled_sums_follow_the_contracted_axes_of_the_first_operand(exponents):
    fmt = DFPFormat(accumulation="spill", exponents=exponents)
    a, b = uneven(3, 9, 2, 11), random(11, 4, 9, seed=1)
    (qa, ea), (qb, eb) = quantized(a, fmt, 1), quantized(b, fmt)
    left = qa.transpose(0, 2, 1, 3).reshape(6, 99)
    right = qb.transpose(2, 0, 1).reshape(99, 4)
    rows = np.broadcast_to(ea.reshape(-1, 1), (3, 2)).reshape(6, 1)
    expected = reference.matmul(left, rows, right, eb, accumulation="spill").reshape(3, 2, 4)
    with ops.format_scope(fmt):
        same_bits(ops.einsum("akcm,mdk->acd", a, b), expected)
        same_bits(ops.einsum("akcm,mdk->dac", a, b), expected.transpose(2, 0, 1))
        same_bits(ops.tensordot(a, b, [[1, 3], [2, 0]]), expected)


@st.composite
def contractions(draw):
    """Subscripts of two operands, neither repeating a label, and shapes that fit them."""
    labels = "abcde"
    sizes = {label: draw(st.integers(1, 3)) for label in labels}
    first, second = (
        draw(st.permutations(draw(st.lists(st.sampled_from(labels), unique=True, max_size=4))))
        for _ in range(2)
    )
    known = sorted({*first, *second})
    out = draw(
        st.permutations(draw(st.lists(st.sampled_from(known), unique=True)) if known else [])
    )
    subscripts = f"{''.join(first)},{''.join(second)}->{''.join(out)}"
    return subscripts, *(tuple(sizes[label] for label in side) for side in (first, second))


@pytest.mark.parametrize("fmt", ONE_OR_MANY, ids=short)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=contractions())
def test_every_einsum_of_two_operands_is_exact(fmt, case):
    subscripts, a_shape, b_shape = case
    a, b = (uneven(*x, seed=i) if x else np.float32(1.7) for i, x in enumerate((a_shape, b_shape)))
    y, dy, gradients = run(lambda a, b: ops.einsum(subscripts, a, b), a, b, fmt=fmt)
    check_einsum(subscripts, a, b, y, dy, gradients, fmt)


def check_einsum(subscripts, a, b, y, dy, gradients, fmt):
    terms, out = subscripts.split("->")
    first, second = terms.split(",")
    if set(first) - set(second) - set(out) or set(second) - set(first) - set(out):
        # A label summed in one operand alone: its gradient is broadcast, in float32.
        truth = [forward_truth(a, first, b, second, out, fmt)]
    else:
        truth = contraction_truth(np.asarray(a), first, np.asarray(b), second, out, dy, fmt)
    for actual, expected in zip((y, *gradients), truth, strict=False):
        same_bits(actual, expected)


def forward_truth(a, first, b, second, out, fmt):
    sides = []
    for x, labels in ((a, first), (b, second)):
        groups = list(itertools.takewhile(lambda n: n in out, labels))
        sides.append(Numbers.of(np.asarray(x), list(labels), fmt, groups))
    return product(*sides, list(out))


@pytest.mark.parametrize("fmt", ONE_OR_MANY, ids=short)
@pytest.mark.parametrize(
    ("subscripts", "a_shape", "b_shape"),
    [
        # Exponents lie in another order than the rows that they belong to.
        ("abk,kc->bac", (3, 4, 5), (5, 6)),
        ("abk,kc->cba", (3, 4, 5), (5, 6)),
        ("abck,kd->cabd", (2, 3, 4, 5), (5, 6)),
        ("abk,bkc->bac", (3, 4, 5), (4, 5, 6)),
        ("abk,bkc->abc", (3, 4, 5), (4, 5, 6)),
        # Fewer axes have exponents than there are rows, and the batch is not where they begin.
        ("akbc,bkd->bacd", (3, 5, 4, 2), (4, 5, 6)),
        ("akb,kbc->bac", (3, 5, 4), (5, 4, 6)),
        ("kab,kc->abc", (5, 3, 4), (5, 6)),
        # The columns have exponents of their own.
        ("ak,ck->ac", (3, 5), (6, 5)),
        ("ka,ck->ac", (5, 3), (6, 5)),
        ("ak,cdk->acd", (3, 5), (6, 2, 5)),
        ("ak,ckd->acd", (3, 5), (6, 5, 2)),
        ("ak,dkc->acd", (3, 5), (2, 5, 6)),
        ("bak,cbk->bac", (2, 3, 5), (6, 2, 5)),
        ("oi,bi->bo", (6, 5), (3, 5)),
        ("ot,btd->bod", (6, 5), (3, 5, 4)),
        # Attention: scores, and what they weigh.
        ("aecd,abcd->acbe", (2, 6, 3, 4), (2, 5, 3, 4)),
        ("acbe,aecd->abcd", (2, 3, 5, 6), (2, 6, 3, 4)),
        # Outer products.
        ("a,b->ab", (3,), (4,)),
        ("ab,c->cab", (3, 4), (2,)),
        ("ab,b->ab", (3, 4), (4,)),
        # Summed over in one operand alone.
        ("abk,c->ac", (3, 4, 5), (6,)),
        ("ab,ack->ac", (3, 4), (3, 2, 5)),
    ],
)
def test_einsum_knows_which_exponent_belongs_to_which_row(subscripts, a_shape, b_shape, fmt):
    a, b = uneven(*a_shape), uneven(*b_shape, seed=1)
    y, dy, gradients = run(lambda a, b: ops.einsum(subscripts, a, b), a, b, fmt=fmt)
    check_einsum(subscripts, a, b, y, dy, gradients, fmt)

    unknown = [tf.TensorSpec([None] * x.ndim) for x in (a, b)]
    graph = tf.function(
        lambda a, b: run_in_graph(lambda a, b: ops.einsum(subscripts, a, b), a, b, dy),
        input_signature=unknown,
    )
    with ops.format_scope(fmt):
        y, gradients = graph(a, b)
    check_einsum(subscripts, a, b, y, dy, gradients, fmt)


@pytest.mark.parametrize("fmt", ONE_OR_MANY, ids=short)
@pytest.mark.parametrize(
    ("subscripts", "labels", "shapes"),
    [
        ("...ab,...bc->...ac", "zab,zbc->zac", [(6, 2, 3), (6, 3, 4)]),
        ("...ab,...bc->...ac", "zab,zbc->zac", [(1, 2, 3), (6, 3, 4)]),
        ("...ab,...bc->...ac", "zab,zbc->zac", [(6, 2, 3), (1, 3, 4)]),
        ("...ab,bc->a...c", "yzab,bc->ayzc", [(5, 6, 2, 3), (3, 4)]),
        ("a...,...->a...", "ayz,yz->ayz", [(2, 3, 4), (3, 4)]),
        ("ba,bc", "ba,bc->ac", [(3, 2), (3, 4)]),
        (" ij , jk -> ik ", "ij,jk->ik", [(2, 3), (3, 4)]),
    ],
)
def test_einsum_takes_ellipses_and_implicit_outputs(subscripts, labels, shapes, fmt):
    a, b = (uneven(*shape, seed=i) for i, shape in enumerate(shapes))
    y, dy, gradients = run(lambda a, b: ops.einsum(subscripts, a, b), a, b, fmt=fmt)
    check_einsum(labels, a, b, y, dy, gradients, fmt)


@pytest.mark.parametrize(
    ("subscripts", "shapes"),
    [
        ("zb,ba", [(2, 3), (3, 4)]),
        ("b,a", [(2,), (3,)]),
        ("ba", [(2, 3)]),
        ("z...,...b", [(2,), (3,)]),
        ("...ca,ab", [(2, 5, 3), (3, 4)]),
        ("zj,jk,kb", [(2, 3), (3, 4), (4, 5)]),
    ],
)
def test_implicit_einsums_order_their_results_as_keras_does(subscripts, shapes):
    operands = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    y, stock = ops.einsum(subscripts, *operands), keras.ops.einsum(subscripts, *operands)
    assert y.shape == stock.shape
    np.testing.assert_allclose(y, stock, atol=5e-3)


def test_einsum_of_other_than_two_operands_and_of_diagonals():
    a, b, c = random(3, 3, 2), random(3, 4, seed=1), random(4, 5, seed=2)
    same_bits(ops.einsum("iij->ji", a), np.einsum("iij->ji", a))
    diagonal = np.ascontiguousarray(np.einsum("iij->ij", a))
    same_bits(ops.einsum("iij,ik->jk", a, b), ops.einsum("ij,ik->jk", diagonal, b))
    left = ops.einsum("ij,ik->jk", diagonal, b)
    same_bits(ops.einsum("ij,ik,kl->lj", diagonal, b, c), ops.einsum("jk,kl->lj", left, c))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("known", [(), ("query",), ("key",)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_counts_heads_that_tracing_does_not_know(kv_heads, known, masked):
    q, k, v = random(2, 5, 4, 8), random(2, 7, kv_heads, 8), random(2, 7, kv_heads, 8, seed=2)
    mask = random(2, 1, 5, 7) < 1 if masked else None
    heads = [4 if "query" in known else None, *[kv_heads if "key" in known else None] * 2]
    graph = tf.function(
        lambda q, k, v: ops.dot_product_attention(q, k, v, mask=mask),
        input_signature=[tf.TensorSpec([None, None, n, None]) for n in heads],
    )
    same_bits(graph(q, k, v), ops.dot_product_attention(q, k, v, mask=mask).numpy())


def test_heads_that_do_not_fit_are_refused_when_they_are_counted():
    unknown = tf.TensorSpec([None] * 4)
    graph = tf.function(ops.dot_product_attention, input_signature=[unknown] * 3)
    for heads, kv_heads in ((4, 3), (2, 4)):
        keys = random(2, 7, kv_heads, 8)
        with pytest.raises(tf.errors.InvalidArgumentError, match="heads of `query` must be a mult"):
            graph(random(2, 5, heads, 8), keys, keys)


def test_no_mantissas_are_transposed_as_int16():
    """TensorFlow's oneDNN prints an error for that where a CPU, or its caller, has no AVX-512."""

    @tf.function
    def everything(x, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            attention = ops.dot_product_attention(x, x, x)
            y = ops.conv(attention, w, data_format="channels_first")
            total = tf.reduce_sum(y) + tf.reduce_sum(ops.einsum("abcd,ebfd->efac", x, x))
        return total, tape.gradient(total, [x, w])

    graph = everything.get_concrete_function(
        tf.TensorSpec([2, 4, 5, 6]), tf.TensorSpec([3, 3, 4, 2])
    ).graph
    transposed = [op.inputs[0].dtype for op in graph.get_operations() if op.type == "Transpose"]
    assert tf.uint16 in transposed and tf.int16 not in transposed


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", ["plain", "causal", "mask", "bias"])
def test_dot_product_attention_is_close_to_float32(kv_heads, case):
    q, k, v = random(2, 5, 4, 8), random(2, 7, kv_heads, 8), random(2, 7, kv_heads, 8, seed=2)
    arguments = {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"mask": random(2, 1, 5, 7) > -1},
        "bias": {"bias": random(1, 4, 5, 7), "scale": 0.3},
    }[case]
    dy = random(2, 5, 4, 8, seed=9)
    y, _, gradients = run(lambda *x: ops.dot_product_attention(*x, **arguments), q, k, v, dy=dy)
    repeated = [np.repeat(x, 4 // kv_heads, axis=2) for x in (k, v)]
    expected, _, stock = run(
        lambda *x: keras.ops.dot_product_attention(*x, **arguments), q, *repeated, dy=dy
    )
    np.testing.assert_allclose(y, expected, atol=2e-3)
    np.testing.assert_allclose(gradients[0], stock[0], atol=5e-3)
    for ours, theirs in zip(gradients[1:], stock[1:], strict=True):
        summed = np.reshape(theirs, (2, 7, kv_heads, -1, 8)).sum(3)
        np.testing.assert_allclose(ours, summed, atol=5e-3)


# ---- which products run on integers --------------------------------------------------------------

CALLS = {
    "matmul": (ops.matmul, (5, 6), (6, 4)),
    "conv": (lambda x, w: ops.conv(x, w, padding="same"), (2, 5, 6, 4), (3, 3, 4, 2)),
    "grouped": (lambda x, w: ops.conv(x, w, strides=2), (2, 5, 6, 4), (3, 3, 2, 6)),
    "dilated": (lambda x, w: ops.conv(x, w, dilation_rate=2), (2, 5, 6, 4), (2, 2, 4, 3)),
    "depthwise": (lambda x, w: ops.depthwise_conv(x, w, 2, "same"), (2, 5, 6, 4), (3, 3, 4, 2)),
    "transposed": (lambda x, w: ops.conv_transpose(x, w, 2), (2, 5, 6, 4), (3, 3, 2, 4)),
    "first layout": (
        lambda x, w: ops.conv(x, w, data_format="channels_first"),
        (2, 4, 5, 6),
        (3, 3, 4, 2),
    ),
    "swapped": (lambda a, b: ops.einsum("ab,bc->ca", a, b), (5, 6), (6, 4)),
}
PRODUCTS = ("forward", "input_gradient", "weight_gradient")
SUBSETS = [s for n in (1, 2) for s in itertools.combinations(PRODUCTS, n)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("products", SUBSETS, ids="+".join)
def test_the_other_products_are_float32(call, products):
    function, a_shape, b_shape = CALLS[call]
    a, b = random(*a_shape), random(*b_shape, seed=1)
    y, dy, (da, db) = run(function, a, b)
    mixed_y, _, mixed = run(function, a, b, fmt=DFPFormat(products=products), dy=dy)
    results = zip(PRODUCTS, (y, da, db), (mixed_y, *mixed), strict=True)
    for name, integers, result in results:
        np.testing.assert_allclose(result, integers, atol=2e-3 * np.abs(integers).max())
        assert np.array_equal(result, integers) == (name in products), name


@pytest.mark.parametrize("fmt", ONE_OR_MANY, ids=short)
@pytest.mark.parametrize("products", [("input_gradient",), ("weight_gradient",), PRODUCTS[1:]])
@pytest.mark.parametrize(
    ("subscripts", "a_shape", "b_shape"),
    [
        ("abk,kc->abc", (3, 4, 5), (5, 6)),
        ("abk,kc->cba", (3, 4, 5), (5, 6)),
        ("akbc,bkd->bacd", (3, 5, 4, 2), (4, 5, 6)),
        ("abk,abck->abc", (3, 4, 5), (3, 4, 2, 5)),
        ("ak,dkc->acd", (3, 5), (2, 5, 6)),
    ],
)
def test_what_float32_multiplies_forward_is_quantized_backward(
    subscripts, a_shape, b_shape, products, fmt
):
    a, b = uneven(*a_shape), uneven(*b_shape, seed=1)
    fmt = dataclasses.replace(fmt, products=products)
    y, dy, gradients = run(lambda a, b: ops.einsum(subscripts, a, b), a, b, fmt=fmt)
    np.testing.assert_allclose(y, np.einsum(subscripts, a, b), rtol=1e-4, atol=1e-4)
    terms, out = subscripts.split("->")
    truth = contraction_truth(a, terms.split(",")[0], b, terms.split(",")[1], out, dy, fmt)
    for name, actual, expected in zip(PRODUCTS[1:], gradients, truth[1:], strict=True):
        if name in products:
            same_bits(actual, expected)


# ---- gradients -----------------------------------------------------------------------------------


def squares(function, x, w, **tape):
    with tf.GradientTape(**tape) as t:
        t.watch([x, w])
        loss = tf.reduce_sum(tf.square(function(x, w)))
    return t.gradient(loss, [x, w])


def in_while_loop(function):
    def looped(x, w):
        y = tf.zeros(function(x, w).shape)
        return tf.while_loop(lambda i, _: i < 1, lambda i, y: (i + 1, y + function(x, w)), (0, y))[
            1
        ]

    return looped


def in_cond(function):
    return lambda x, w: tf.cond(tf.norm(x) < 1e9, lambda: function(x, w), lambda: function(x, -w))


def under(format_, function):
    """Fixes the format, since a gradient may call the function again outside of the scope."""

    def scoped(*args):
        with ops.format_scope(format_):
            return function(*args)

    return scoped


MODES = {
    "graph": lambda f: tf.function(lambda x, w: squares(f, x, w)),
    "persistent tape": lambda f: lambda x, w: squares(f, x, w, persistent=True),
    "function in a tape": lambda f: lambda x, w: squares(tf.function(f), x, w),
    "function in a persistent tape": lambda f: (
        lambda x, w: squares(tf.function(f), x, w, persistent=True)
    ),
    "unknown batch": lambda f: tf.function(
        lambda x, w: squares(f, x, w),
        input_signature=[tf.TensorSpec([None, 6]), tf.TensorSpec([6, 4])],
    ),
    "unknown sizes": lambda f: tf.function(
        lambda x, w: squares(f, x, w),
        input_signature=[tf.TensorSpec([None, None]), tf.TensorSpec([None, None])],
    ),
    "eager while_loop": lambda f: lambda x, w: squares(in_while_loop(f), x, w),
    "while_loop": lambda f: tf.function(lambda x, w: squares(in_while_loop(f), x, w)),
    "while_loop, persistent tape": lambda f: tf.function(
        lambda x, w: squares(in_while_loop(f), x, w, persistent=True)
    ),
    "cond": lambda f: tf.function(lambda x, w: squares(in_cond(f), x, w)),
    "cond, persistent tape": lambda f: tf.function(
        lambda x, w: squares(in_cond(f), x, w, persistent=True)
    ),
    "recompute_grad": lambda f: tf.function(lambda x, w: squares(tf.recompute_grad(f), x, w)),
    "keras.remat": lambda f: lambda x, w: squares(keras.remat(f), x, w),
}


@pytest.mark.parametrize("fmt", [DFPFormat(), DFPFormat(products=("weight_gradient",))], ids=repr)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_do_not_depend_on_how_tensorflow_runs(mode, fmt):
    if "forward" not in fmt.products:
        if mode == "unknown sizes":
            pytest.skip("stock float32 products differ in their last bits")
        if mode == "cond, persistent tape":
            pytest.skip("TensorFlow fails on any tf.custom_gradient there")
    function = under(fmt, ops.matmul)
    x, w = tf.constant(random(5, 6)), tf.constant(random(6, 4, seed=1))
    expected = squares(function, x, w)
    for actual, gradient in zip(MODES[mode](function)(x, w), expected, strict=True):
        same_bits(actual, gradient)


@pytest.mark.parametrize("call", CALLS)
def test_unknown_sizes(call):
    function, a_shape, b_shape = CALLS[call]
    a, b = random(*a_shape), random(*b_shape, seed=1)
    kernel = b_shape if len(b_shape) > 2 else [None] * len(b_shape)
    channels = 1 if call == "first layout" else -1
    unknown = [None] * len(a_shape)
    unknown[channels] = a_shape[channels] if len(a_shape) > 2 else None
    graph = tf.function(
        lambda a, b: (y := function(a, b), tf.gradients(y, [a, b])),
        input_signature=[tf.TensorSpec(unknown), tf.TensorSpec(kernel)],
        autograph=False,
    )
    y, (da, db) = graph(a, b)
    ones = np.ones(y.shape, np.float32)
    expected_y, _, (expected_da, expected_db) = run(function, a, b, dy=ones)
    same_bits(y, expected_y)
    same_bits(da, expected_da)
    same_bits(db, expected_db)


@pytest.mark.parametrize("fmt", ONE_OR_MANY, ids=short)
@pytest.mark.parametrize(("a_shape", "b_shape"), MATMUL_SHAPES)
def test_matmul_broadcasts_unknown_sizes(a_shape, b_shape, fmt):
    a, b = uneven(*a_shape), uneven(*b_shape, seed=1)
    dy = uneven(*np.matmul(a, b).shape, seed=99) if np.matmul(a, b).shape else random(seed=99)
    specs = [tf.TensorSpec([None] * x.ndim) for x in (a, b)]
    graph = tf.function(lambda a, b: run_in_graph(ops.matmul, a, b, dy), input_signature=specs)
    with ops.format_scope(fmt):
        y, gradients = graph(a, b)
    a_labels, b_labels, out = matmul_labels(a, b)
    truth = contraction_truth(a, a_labels, b, b_labels, out, dy, fmt, known=False)
    same_bits(y, truth[0])
    for actual, expected, x in zip(gradients, truth[1:], (a, b), strict=True):
        if 1 in x.shape:  # what was repeated is summed in float32
            largest = np.abs(expected).max()
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * largest)
        else:
            same_bits(actual, expected)


def run_in_graph(function, a, b, dy):
    with tf.GradientTape() as tape:
        tape.watch([a, b])
        y = function(a, b)
    return y, tape.gradient(y, [a, b], output_gradients=tf.constant(dy))


def second_order(function, x, w, inner=lambda f: f):
    gradients = inner(lambda x, w: squares(function, x, w))
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        total = sum(tf.reduce_sum(tf.square(g)) for g in gradients(x, w))
    return tape.gradient(total, [x, w])


@pytest.mark.parametrize("products", [PRODUCTS, ("forward",), ("input_gradient",)], ids="+".join)
@pytest.mark.parametrize("call", CALLS)
def test_second_order_gradients(call, products, monkeypatch):
    function, a_shape, b_shape = CALLS[call]
    x, w = tf.constant(random(*a_shape)), tf.constant(random(*b_shape, seed=1))
    with ops.format_scope(DFPFormat(products=products)):
        eager = second_order(function, x, w)
        graph = tf.function(lambda x, w: second_order(function, x, w))(x, w)

    def in_float32(op, fmt, product, first, second):
        return product.float32(first.float32(), second.float32())

    monkeypatch.setattr(contraction, "multiply", in_float32)
    monkeypatch.setattr(convolution, "multiply", in_float32)
    expected = second_order(function, x, w)
    for results in (eager, graph):
        for actual, exact in zip(results, expected, strict=True):
            np.testing.assert_allclose(actual, exact, atol=2e-3 * np.abs(exact).max())


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_gather_of_rows_is_differentiable(mode):
    def gradient(x, w):
        return squares(lambda x, w: tf.gather(ops.matmul(x, w), [1, 1, 3]), x, w)

    x, w = tf.constant(random(5, 6)), tf.constant(random(6, 4, seed=1))
    dx, dw = (tf.function(gradient) if mode == "graph" else gradient)(x, w)
    assert np.all(dx[0] == 0) and np.any(dx[1] != 0) and np.any(dw != 0)


BOUNDARIES = {
    "function": lambda f: lambda x, w: second_order(tf.function(f), x, w),
    "gradient in a function": lambda f: lambda x, w: second_order(f, x, w, inner=tf.function),
    "while_loop": lambda f: tf.function(lambda x, w: second_order(in_while_loop(f), x, w)),
    "cond": lambda f: tf.function(lambda x, w: second_order(in_cond(f), x, w)),
}


@pytest.mark.parametrize("call", ["matmul", "grouped"])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_second_order_gradients_pass_boundaries(boundary, call):
    function, a_shape, b_shape = CALLS[call]
    x, w = tf.constant(random(*a_shape)), tf.constant(random(*b_shape, seed=1))
    expected = second_order(function, x, w)
    for actual, exact in zip(BOUNDARIES[boundary](function)(x, w), expected, strict=True):
        np.testing.assert_allclose(actual, exact, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize(("call", "mode"), [("matmul", "eager"), ("depthwise", "graph")])
def test_loops_that_tensorflow_makes(call, mode):
    """Each sample has exponents of its own: a call for all gives what a call for each does."""
    function, a_shape, b_shape = CALLS[call]
    x, w = tf.constant(random(*a_shape)), tf.constant(random(*b_shape, seed=1))

    def of_each(x, w):
        return tf.vectorized_map(lambda sample: function(sample[None], w)[0], x)

    def total_of_jacobian(function):
        def total(x, w):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x, w)
            return tape.batch_jacobian(y, x)

        return total

    def compare(x, w):
        y, gradients = of_each(x, w), squares(of_each, x, w)
        return y, gradients, squares(total_of_jacobian(function), x, w)[1]

    y, gradients, jacobian = (tf.function(compare) if mode == "graph" else compare)(x, w)
    same_bits(y, function(x, w))
    for actual, exact in zip(gradients, squares(function, x, w), strict=True):
        np.testing.assert_allclose(actual, exact, atol=2e-3 * np.abs(exact).max())

    # The Jacobian is what the function makes of each unit vector.
    units = tf.reshape(tf.eye(int(np.prod(a_shape[1:]))), [-1, *a_shape[1:]])
    exact = a_shape[0] * squares(function, units, w)[1]
    np.testing.assert_allclose(jacobian, exact, atol=2e-3 * np.abs(exact).max())


@pytest.mark.parametrize(("call", "mode"), [("matmul", "graph"), ("conv", "eager")])
def test_forward_mode(call, mode):
    function, a_shape, b_shape = CALLS[call]
    x, w = tf.constant(random(*a_shape)), tf.constant(random(*b_shape, seed=1))
    tangent = tf.constant(random(*b_shape, seed=2))

    def jvp(x, w):
        with tf.autodiff.ForwardAccumulator(w, tangent) as accumulator:
            y = function(x, w)
        return accumulator.jvp(y)

    actual = (tf.function(jvp) if mode == "graph" else jvp)(x, w)
    expected = function(x, tangent)
    np.testing.assert_allclose(actual, expected, atol=2e-3 * np.abs(expected).max())


def test_a_token_takes_no_memory():
    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()

    q = tf.zeros([2**22], tf.int16)
    before = resident()
    tokens = [native.lib.dfp_token(x=tf.zeros([0]), q=q, shape=[]) for _ in range(64)]
    assert resident() - before < 2**24  # of 2**30 bytes
    assert tokens[-1].shape == [2**22] and not np.any(tokens[-1])


# ---- one currency --------------------------------------------------------------------------------


def traced(function, *shapes):
    specs = [tf.TensorSpec(shape) for shape in shapes]
    return tf.function(function, autograph=False).get_concrete_function(*specs).graph


def outputs(graph, op_type):
    return [op.outputs[0] for op in graph.get_operations() if op.type == op_type]


def count(graph, op_type):
    """Counts nodes, those of the graph's loops, branches and functions included."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    return sum(node.op == op_type for node in nodes)


def test_a_tensor_is_quantized_once_for_all_its_consumers():
    def attention(x, q, k, v):
        with tf.GradientTape() as tape:
            tape.watch([x, q, k, v])
            y = tf.add_n([ops.matmul(x, w) for w in (q, k, v)])
        return tape.gradient(y, [x, q, k, v])

    graph = traced(attention, [None, 5, 8], [8, 4], [8, 4], [8, 4])
    # x, three kernels, and the gradient of each projection for both of its uses.
    assert count(graph, "DfpQuantize") == 1 + 3 + 3
    assert count(graph, "DfpMatmul") == 3 * 3


def test_an_eager_tensor_keeps_no_mantissas():
    x, w = tf.constant(random(5, 6)), tf.constant(random(6, 4))
    before = ops.matmul(x, w)
    same_bits(ops.matmul(x, w), before)
    mantissas = weakref.ref(make_operand(x, DFPFormat()).q)
    assert mantissas() is None


def test_an_eager_tensor_is_rounded_with_new_noise_in_every_use():
    x, w = random(8, 6), random(6, 3, seed=1)
    fmt = DFPFormat(mantissa_bits=8, rounding="stochastic")
    keras.utils.set_random_seed(0)
    with ops.format_scope(fmt):
        x_tensor, w_tensor = tf.constant(x), tf.constant(w)
        draws = np.array([ops.matmul(x_tensor, w_tensor) for _ in range(1000)])
    # The noise of one draw, divided by the root of their number: without new noise, 30 times it.
    error = np.abs(draws.mean(0) - x @ w).max()
    assert error < 5 * draws.std(0).max() / np.sqrt(len(draws))
    assert draws.std(0).min() > 0


def test_a_function_takes_no_mantissas_from_the_graph_that_traced_it():
    w = tf.Variable(random(6, 6))
    captured = []

    @tf.function
    def inner(x):
        captured.append(tf.compat.v1.get_default_graph())
        return ops.matmul(x, w)

    def looped(x):
        @loop_step
        def step(y):
            return inner(y) + 0 * ops.matmul(y, w)

        step(x)
        return tf.while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, step(y)), (0, x))[1]

    x = tf.constant(random(6, 6, seed=1))
    expected = ops.matmul(ops.matmul(x, w), w)
    same_bits(tf.function(looped)(x), expected)
    same_bits(tf.function(lambda x: looped(x))(x), expected)
    same_bits(inner(inner(x)), expected)
    for graph in captured:
        assert not any(external.dtype == tf.int16 for external, _ in graph.captures)


def test_tensors_are_quantized_outside_the_loops_and_branches_that_use_them():
    def loops(x, w):
        def body(i, y):
            return i + 1, y + ops.matmul(x, w) + ops.matmul(2 * x, w)

        x = x + 1
        x *= tf.while_loop(lambda i, _: i < 3, body, (0, x))[1]
        return tf.cond(x[0, 0] > 0, lambda: ops.matmul(x, w), lambda: ops.matmul(w, x))

    graph = traced(loops, [6, 6], [6, 6])
    # w and each x here, and once more where the first factor, which has an exponent for every row,
    # becomes the second, which has one; inside, only what was computed inside.
    assert len(outputs(graph, "DfpQuantize")) == 3 + 2
    assert count(graph, "DfpQuantize") == 3 + 2 + 1


def test_variables_are_quantized_where_they_are_read_but_once_for_all_steps_of_a_loop():
    w = tf.Variable(random(6, 6))

    def looped(x, wrap=lambda step: step):
        @wrap
        def step(y):
            return y + ops.matmul(x, w)

        return tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, step(y)), (0, step(x)))[1]

    def stepped(x):
        return looped(x, loop_step)

    def gradient(function, x):
        with tf.GradientTape() as tape:
            y = function(x)
        return tape.gradient(y, w)

    # x, and w before the loop; in the loop, w again.
    assert count(traced(looped, [6, 6]), "DfpQuantize") == 3
    assert count(traced(stepped, [6, 6]), "DfpQuantize") == 2
    x = tf.constant(random(6, 6, seed=1))
    for f in (stepped, tf.function(looped), tf.function(stepped)):
        same_bits(f(x), looped(x))
        same_bits(gradient(f, x), gradient(looped, x))


def test_a_variable_may_change_between_two_uses():
    w = tf.Variable(random(6, 6))
    x = tf.constant(random(6, 6, seed=1))

    @tf.function
    def before_and_after(x):
        first = ops.matmul(x, w)
        w.assign(2 * w)
        return first, ops.matmul(x, w)

    first, second = before_and_after(x)
    same_bits(second, 2 * first)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_costs_no_product(frozen):
    def gradient(*operands):
        with tf.GradientTape() as tape:
            tape.watch(operands[1 - frozen])
            y = ops.conv(*operands)
        return tape.gradient(y, operands[1 - frozen])

    graph = traced(gradient, [None, 5, 5, 3], [3, 3, 3, 4])
    unused = ("DfpConvBackpropInput", "DfpConvBackpropFilter")[frozen]
    assert count(graph, unused) == 0
    assert count(graph, "DfpConv") == 1


# ---- the format ----------------------------------------------------------------------------------


def test_the_innermost_format_holds():
    assert ops.current_format() == DFPFormat()
    with ops.format_scope(DFPFormat(mantissa_bits=12)), ops.format_scope(FORWARD_ONLY):
        assert ops.current_format() is FORWARD_ONLY
    assert ops.current_format() == DFPFormat()


def test_the_default_format_is_asked_for(monkeypatch):
    monkeypatch.setattr(ops, "default_format", lambda: FORWARD_ONLY)
    assert ops.current_format() is FORWARD_ONLY


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_stochastic_rounding_follows_the_seed(mode):
    function = under(DFPFormat(mantissa_bits=8, rounding="stochastic"), ops.matmul)
    x, w = random(5, 6), random(6, 4, seed=1)

    def draw(seed):
        keras.utils.set_random_seed(seed)
        multiply = tf.function(function) if mode == "graph" else function
        return [multiply(tf.constant(x), tf.constant(w)).numpy() for _ in range(2)]

    first, again, other = draw(1), draw(1), draw(2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


def test_the_kernels_use_as_many_threads_as_tensorflow_is_told(monkeypatch):
    for threads in (1, 0):
        monkeypatch.setattr(
            tf.config.threading, "get_intra_op_parallelism_threads", lambda n=threads: n
        )
        ops.matmul(random(2, 2), random(2, 2))
        assert native._threads == threads
        assert threads == 0 or native.extension.threads() == threads


# ---- symbolic tensors ----------------------------------------------------------------------------


def test_symbolic_tensors_make_functional_models(tmp_path):
    x = keras.Input((6, 6, 3))
    kernel, pointwise = random(3, 3, 3, 4), random(4, 2, seed=1)
    with ops.format_scope(DFPFormat(mantissa_bits=9)):
        y = ops.conv(x, kernel, padding="same")
        z = ops.einsum("bhwc,cd->bhwd", y, pointwise)
        values = random(2, 6, 6, 3)
        expected = ops.einsum("bhwc,cd->bhwd", ops.conv(values, kernel, padding="same"), pointwise)
    assert y.shape == (None, 6, 6, 4) and z.shape == (None, 6, 6, 2)
    model = keras.Model(x, z)
    same_bits(model.predict(values, verbose=0), expected)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    same_bits(loaded.predict(values, verbose=0), expected)


def test_every_op_takes_symbolic_tensors():
    x, v = keras.Input((6, 6, 4)), keras.Input((6,))
    same = {"padding": "same"}
    assert ops.depthwise_conv(x, random(3, 3, 4, 2), **same).shape == (None, 6, 6, 8)
    separable = ops.separable_conv(x, random(3, 3, 4, 2), random(1, 1, 8, 3), **same)
    assert separable.shape == (None, 6, 6, 3)
    assert ops.conv_transpose(x, random(3, 3, 2, 4), 2, **same).shape == (None, 12, 12, 2)
    assert ops.matmul(v, random(6, 5)).shape == (None, 5)
    assert ops.dot(v, random(6, 5)).shape == (None, 5)
    assert ops.tensordot(v, random(6, 5), 1).shape == (None, 5)
    assert ops.dot_product_attention(x, x, x).shape == (None, 6, 6, 4)


# ---- unusual values and shapes -------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("call", CALLS)
def test_nonfinite_values_make_their_sample_nan(call, bad):
    function, a_shape, b_shape = CALLS[call]
    rows = (lambda y: np.moveaxis(y, 1, 0)) if call == "swapped" else np.asarray
    a, b = random(*a_shape), random(*b_shape, seed=1)
    clean, dy, (clean_da, _) = run(function, a, b)
    a[1].flat[3] = bad
    y, _, (da, db) = run(function, a, b, dy=dy)
    assert np.isnan(rows(y)[1]).all() and np.isnan(db).all()
    same_bits(np.delete(rows(y), 1, axis=0), np.delete(rows(clean), 1, axis=0))
    same_bits(da, clean_da)

    a = random(*a_shape)
    dy[1].flat[3] = bad
    _, _, (da, db) = run(function, a, b, dy=dy)
    if call == "swapped":  # the rows of y are the columns of b
        assert np.isnan(da).all() and np.isnan(db[:, 1]).all()
    else:
        assert np.isnan(da[1]).all() and np.isnan(db).all()
        same_bits(np.delete(da, 1, axis=0), np.delete(clean_da, 1, axis=0))

    with ops.format_scope(DFPFormat(exponents="tensor")):
        a[1].flat[3] = bad
        assert np.isnan(function(a, b)).all()


@pytest.mark.parametrize(
    ("function", "a_shape", "b_shape", "shape"),
    [
        (ops.matmul, (0, 3), (3, 4), (0, 4)),
        (ops.matmul, (2, 0), (0, 4), (2, 4)),
        (ops.matmul, (5, 2, 3), (3, 0), (5, 2, 0)),
        (ops.matmul, (0, 2, 3), (0, 3, 4), (0, 2, 4)),
        (lambda a, b: ops.einsum("abc,cd->bd", a, b), (0, 2, 3), (3, 4), (2, 4)),
        (ops.conv, (0, 5, 5, 3), (3, 3, 3, 4), (0, 3, 3, 4)),
        (ops.conv, (2, 5, 5, 3), (3, 3, 3, 0), (2, 3, 3, 0)),
        (lambda x, w: ops.conv(x, w, padding="same"), (2, 0, 5, 3), (3, 3, 3, 4), (2, 0, 5, 4)),
        (ops.depthwise_conv, (0, 5, 5, 3), (3, 3, 3, 2), (0, 3, 3, 6)),
        (ops.conv_transpose, (0, 5, 5, 3), (3, 3, 4, 3), (0, 7, 7, 4)),
    ],
)
def test_empty_tensors(function, a_shape, b_shape, shape):
    y, _, (da, db) = run(function, random(*a_shape), random(*b_shape))
    same_bits(y, np.zeros(shape, np.float32))
    same_bits(da, np.zeros(a_shape, np.float32))
    same_bits(db, np.zeros(b_shape, np.float32))


X, W = np.zeros((2, 6, 6, 4), np.float32), np.zeros((3, 3, 4, 6), np.float32)
BAD_CALLS = {
    "rank": (ops.conv, (X[0, 0], W), "conv.*rank.*(6, 4)"),
    "kernel rank": (ops.conv, (X, W[0]), "conv.*`kernel`"),
    "channels": (ops.conv, (X, W[:, :, :3]), "conv.*4 channels.*(3, 3, 3, 6)"),
    "groups": (ops.conv, (X, W[:, :, :2, :5]), "conv.*filters"),
    "strides": (ops.conv, (X, W, 0), "conv.*`strides`.*at least 1"),
    "number of strides": (ops.conv, (X, W, (1, 2, 3)), "`strides`.*2 ints"),
    "dilation": (ops.conv, (X, W, 1, "same", None, 0), "`dilation_rate`"),
    "stride and dilation": (ops.conv, (X, W, 2, "same", None, 2), "must not both"),
    "padding": (ops.conv, (X, W, 1, "causal"), "`padding`.*'causal'"),
    "data format": (ops.conv, (X, W, 1, "same", "NHWC"), "`data_format`.*'NHWC'"),
    "large kernel": (ops.conv, (X[:, :2], W), "larger than the input"),
    "depthwise 3D": (
        ops.depthwise_conv,
        (np.zeros((1, 3, 3, 3, 2), np.float32), np.zeros((1, 1, 1, 2, 1), np.float32)),
        "depthwise_conv.*rank 3 to 4",
    ),
    "depthwise channels": (ops.depthwise_conv, (X, W[:, :, :2]), "depthwise_conv.*4 channels"),
    "pointwise kernel": (ops.separable_conv, (X, W[..., :1], W), "`pointwise_kernel`.*sizes of 1"),
    "pointwise channels": (
        ops.separable_conv,
        (X, W[..., :1], W[:1, :1, :3]),
        "`pointwise_kernel`.*channels",
    ),
    "transposed channels": (ops.conv_transpose, (X, W), "conv_transpose.*takes 6"),
    "negative output padding": (
        ops.conv_transpose,
        (X, W.swapaxes(2, 3), 2, "valid", -1),
        "`output_padding`",
    ),
    "large output padding": (
        ops.conv_transpose,
        (X, W.swapaxes(2, 3), 2, "same", 2),
        "`output_padding` must lie from 0 to 1",
    ),
    "matmul": (ops.matmul, (X[0, 0], X[0, 0]), r"x1 of shape \(6, 4\) and x2 of shape \(6, 4\)"),
    "matmul scalar": (ops.matmul, (np.float32(1), X), "matmul: `x1`.*at least one axis"),
    "matmul batch": (ops.matmul, (np.zeros((2, 3, 4), "f"), np.zeros((3, 4, 5), "f")), "axis 0"),
    "dot": (ops.dot, (X[0, 0], X[0, 0]), "dot: x1 of shape"),
    "tensordot": (ops.tensordot, (X, W, 1), "tensordot: x1 of shape"),
    "tensordot axes": (ops.tensordot, (X, W, 7), "`axes`.*7"),
    "tensordot pairs": (ops.tensordot, (X, W, [[0, 1], [0]]), "`axes`"),
    "subscripts": (ops.einsum, ("ab,bc->ac", X, W), "term 0 does not fit"),
    "number of terms": (ops.einsum, ("ab,bc->ac", X), "2 terms for 1 operands"),
    "unknown output": (ops.einsum, ("a,b->c", X[0, 0, 0], X[0, 0, 0]), "output must name"),
    "repeated output": (ops.einsum, ("a,b->aa", X[0, 0, 0], X[0, 0, 0]), "each once"),
    "lost ellipsis": (ops.einsum, ("...a,ab->b", X[0, 0], W[0, 0]), "needs '...'"),
    "einsum sizes": (ops.einsum, ("ab,bc->ac", X[0, 0], X[0, 0]), r"operands\[0\] of shape"),
    "attention rank": (ops.dot_product_attention, (X[0], X[0], X[0]), "rank 4"),
    "attention heads": (ops.dot_product_attention, (X, X[:, :, :5], X[:, :, :5]), "multiple"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case):
    function, arguments, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32"])
@pytest.mark.parametrize("function", [ops.matmul, ops.dot, ops.tensordot])
def test_other_dtypes_are_refused(function, dtype):
    x = tf.zeros((2, 2), dtype)
    with pytest.raises(TypeError, match=rf"{function.__name__}: `x2`.*{dtype}.*\(2, 2\)"):
        function(tf.zeros((2, 2)), x)


def test_sparse_tensors_are_refused():
    with pytest.raises(TypeError, match="`x1` must be a dense tensor"):
        ops.matmul(tf.sparse.from_dense(tf.eye(2)), tf.eye(2))


def test_results_of_2_to_the_31_elements_are_refused():
    a, b = np.zeros((2**16, 0), np.float32), np.zeros((0, 2**15), np.float32)
    with pytest.raises(ValueError, match="matmul.*2147483648 elements"):
        ops.matmul(a, b)
    x = np.zeros((1, 1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="conv_transpose.*elements"):
        ops.conv_transpose(x, np.zeros((1, 1, 1, 1), np.float32), strides=2**16)


def test_sizes_that_do_not_fit_at_run_time_are_an_invalid_argument():
    unknown = tf.TensorSpec([None, None])
    with pytest.raises(tf.errors.InvalidArgumentError, match="DfpMatmul"):
        tf.function(ops.matmul, input_signature=[unknown, unknown])(tf.eye(2), tf.eye(3))


def test_xla_is_refused_by_name():
    with pytest.raises(RuntimeError, match="keras_dfp.ops.matmul.*jit_compile"):
        tf.function(ops.matmul, jit_compile=True)(tf.eye(2), tf.eye(2))


def test_options_of_other_backends_are_refused():
    for option in ({"flash_attention": True}, {"attn_logits_soft_cap": 1.0}):
        with pytest.raises(ValueError, match="not available"):
            ops.dot_product_attention(X, X, X, **option)
    with pytest.raises(TypeError, match="unexpected"):
        ops.einsum("ab,bc->ac", tf.eye(2), tf.eye(2), precision="high")


# ---- loading the extension -----------------------------------------------------------------------


def test_a_missing_or_broken_extension_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="not built.*pip install"):
        native._load()
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    spec = importlib.machinery.ModuleSpec("keras_dfp._native", None, origin=str(broken))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match="cannot load.*_native.so"):
        native._load()


def test_a_gradient_of_unknown_rank():
    x, w = tf.constant(random(4, 5)), tf.constant(random(5, 3))

    @tf.function
    def gradient(x, w):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ops.matmul(x, w)
            z = tf.py_function(lambda y: 2 * y, [y], tf.float32)
        return tape.gradient(z, x)

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = ops.matmul(x, w)
    np.testing.assert_array_equal(gradient(x, w), tape.gradient(y, x, tf.fill([4, 3], 2.0)))


def test_a_variable_has_one_exponent_in_a_call_without_state():
    class Tied(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(6, shape[-1]))

        def call(self, x):
            return keras.ops.einsum("bd,vd->bv", x, self.w)

    layer = Tied(dtype="dfp16")
    x = random(4, 5)
    layer.build(x.shape)
    layer.w.assign(random(6, 5) * np.exp2(np.arange(0, -12, -2)).reshape(6, 1))
    y, _ = layer.stateless_call([tf.constant(layer.w.numpy())], [], x)
    np.testing.assert_array_equal(y, layer(x))
