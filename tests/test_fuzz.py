"""Every raw op with whatever it can be given: the right bits, or an error that says what is wrong.

Half of the calls are right: small, empty, huge in their strides and padding, with values and
exponents at all ends; they are compared with `reference` and `oracle`. In the other half something
is not: a shape, a type, an attribute, mantissas larger than their format allows. They may give an
error or a result, as long as the process lives. `make sanitize` runs this file too.
"""

import math

import numpy as np
import oracle
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernels import ISAS, TOKEN, Case, assert_same_bits, guarded, mantissas, running

from keras_dfp import reference
from keras_dfp.native import lib

FAR = 2**31 - 1  # the largest stride, dilation and padding
REFUSED = (tf.errors.OpError, ValueError, TypeError, OverflowError)
MOST = 20_000  # elements of a result

BITS = st.integers(8, 16)
KINDS = st.sampled_from(["random", "extreme", "signs", "zeros"])
ROUNDINGS = st.sampled_from(["nearest", "truncate", "stochastic"])
# One exponent or a few, at the ends of float32 and beyond.
EXPONENT = st.one_of(
    st.integers(-40, 40),
    st.integers(-330, 260),
    st.sampled_from([reference.NAN_EXPONENT, FAR, -FAR, -100_001]),
)
FLOATS = np.float32(
    [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.5, 6.0, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]
)


class Draw:
    """What a call is made of."""

    def __init__(self, data):
        self._data = data
        self.rng = np.random.default_rng(self(st.integers(0, 2**32)))

    def __call__(self, strategy):
        return self._data.draw(strategy)

    def one_of(self, *values):
        return self(st.sampled_from(values))

    def integer(self, low, high):
        return self(st.integers(low, high))

    def mantissas(self, shape, bits):
        kind = self(KINDS)
        q = mantissas(self.rng, shape, bits, kind)
        return guarded(q * 0 if kind == "zeros" else q)

    def exponents(self, *shapes):
        """An array of exponents of one of the shapes; all but one are near each other."""
        shape = self.one_of(*shapes)
        e = self.rng.integers(-20, 20, shape, np.int32)
        if e.size:
            e.flat[self.rng.integers(e.size)] = self(EXPONENT)
        return np.asarray(e, np.int32)

    def floats(self, *shape, special=True):
        """Mostly ordinary numbers, some of any size, and perhaps some that are none."""
        x = self.rng.standard_normal(shape)
        if special and self(st.booleans()):
            x *= 10.0 ** self.rng.uniform(-44, 38, shape)
            odd = self.rng.random(shape) < self.one_of(0.0, 0.02, 0.3)
            x = np.where(odd, self.rng.choice(FLOATS, shape), x)
        with np.errstate(over="ignore"):
            return np.asarray(x, np.float32)

    def shape(self, low, high, most=5):
        return tuple(self.one_of(0, 1, 2, 3, most) for _ in range(self.integer(low, high)))

    def step(self, rounding):
        return [self.integer(0, 2**63 - 1)] if rounding == "stochastic" else []


# ---- calls that are right, and what they give ----------------------------------------------------


def quantizing(draw, rank):
    how = dict(
        mantissa_bits=draw(BITS),
        rounding=draw(ROUNDINGS),
        group_axes=draw.integer(0, rank),
        seed=draw.one_of(0, 1, -1, 2**63 - 1, -(2**63)),
        tensor_id=draw.one_of(0, 7, -(2**63)),
    )
    return how, draw.step(how["rounding"])


def quantized(x, how, step):
    return reference.quantize(x, **how, step=step[0] if step else 0)


def quantize(draw):
    x = draw.floats(*draw.shape(0, 4, most=draw.one_of(8, 90)))
    how, step = quantizing(draw, x.ndim)
    given = [draw.exponents(x.shape[: how["group_axes"]])] if draw(st.booleans()) else []
    arguments = dict(
        x=guarded(x), exponent=given, step=step, n_counts=draw.integer(0, 1), **how,
        site=draw.one_of("", "somewhere"),
    )  # fmt: skip
    q, e = reference.quantize(x, **how, exponent=given[0] if given else None, step=(step or [0])[0])
    return arguments, {"q": q, "e": e}


def dequantize(draw):
    q = draw.mantissas(draw.shape(0, 4), 16)
    e = draw.exponents(*(q.shape[:axes] for axes in range(q.shape.rank + 1)))
    return dict(q=q, e=e, token=TOKEN), {"y": reference.dequantize(q.numpy(), e)}


def token(draw):
    shape = draw.shape(0, 3)
    arguments = dict(x=draw.floats(*shape), q=draw.mantissas(shape, 14), shape=[])
    return arguments, {"token": np.zeros(shape, np.float32)}


def geometry(draw):
    """A convolution; some of its sizes may be far beyond the image's."""
    rank = draw.integer(1, 3)
    wide = draw(st.booleans())
    depthwise = draw.integer(0, 3) == 0
    groups = 1 if depthwise else draw.one_of(1, 1, 1, 2, 3)
    far = st.sampled_from([1, 1, 1, 1, 2, 3, 2**21, 2**30, FAR] if wide else [1, 1, 1, 2, 3])
    padding = draw.one_of("valid", "same", "explicit")
    image, kernel, strides, dilations, pads = [], [], [], [], []
    for _ in range(rank):
        kernel.append(draw.one_of(1, 1, 2, 3))
        strides.append(draw(far))
        dilations.append(draw(far))
        reach = (kernel[-1] - 1) * dilations[-1] + 1
        image.append(draw.integer(1, 4 if rank == 3 else 7) + (reach if reach < 20 else 0))
        # Wide padding is walked through in long strides.
        most = draw.integer(0, 3) * min(strides[-1], FAR // 3)
        pads.append((draw.integer(0, min(most, FAR)), draw.integer(0, min(most + reach, FAR))))
        if padding == "explicit":
            missing = reach - image[-1] - sum(pads[-1])
            if missing > 0:
                pads[-1] = (min(FAR, pads[-1][0] + missing), pads[-1][1])
    return Case(
        image=tuple(image),
        kernel=tuple(kernel),
        channels=groups * draw.one_of(1, 2, 3, 5, 16, 35),
        filters=draw.integer(1, 3) if depthwise else groups * draw.one_of(1, 2, 3, 17, 33),
        strides=tuple(strides),
        dilations=tuple(dilations),
        padding=tuple(pads) if padding == "explicit" else padding,
        groups=groups,
        depthwise=depthwise,
        batch=draw.integer(0, 3),
    )


def possible(case):
    """Tells whether kernels fit their padded images, and results are small."""
    output = oracle.output_shape(case)
    options = case.options
    reach = [(k - 1) * d + 1 for k, d in zip(case.kernel, options["dilations"], strict=True)]
    fits = options["padding"] == "same" or all(output[1:-1])
    return fits and max(math.prod(output), math.prod(case.input_shape)) <= MOST and max(reach) < FAR


def biased(draw, arguments, n, truth):
    """Draws a bias for n columns, and a clip, and returns what they make of the result."""
    arguments["bias"] = draw.floats(n)
    arguments["clip"] = draw.one_of("none", "relu", "relu6")
    with np.errstate(all="ignore"):
        truth = truth + arguments["bias"]
    if arguments["clip"] != "none":
        truth = np.where(truth < 0, np.float32(0), truth)
    return np.where(truth > 6, np.float32(6), truth) if arguments["clip"] == "relu6" else truth


def convolution(which, bias=False):
    def draw_one(draw):
        case = geometry(draw)
        if not possible(case):
            case = Case((4, 5), (2, 3), strides=(FAR, 2**21))
        bits = [draw(BITS)] * 3 if draw(st.booleans()) else [draw(BITS) for _ in "xwd"]
        shapes = case.input_shape, case.kernel_shape, oracle.output_shape(case)
        x, w, dy = (draw.mantissas(s, b) for s, b in zip(shapes, bits, strict=True))
        per_image = [(), (case.batch,)] if case.batch else [()]
        ex, ew, ed = draw.exponents(*per_image), draw.exponents(()), draw.exponents(*per_image)
        accumulation = draw.one_of("exact", "spill")
        numpy = [t.numpy() for t in (x, w, dy)]
        truth = oracle.conv_passes(case, *numpy, (ex, ew, ed), bits, accumulation)[which]
        of_x = dict(x=x, x_exponent=ex, x_token=TOKEN)
        of_w = dict(w=w, w_exponent=ew, w_token=TOKEN)
        of_dy = dict(dy=dy, dy_exponent=ed, dy_token=TOKEN)
        arguments = [
            {**of_x, **of_w},
            {"input_sizes": np.int32(shapes[0]), **of_w, **of_dy},
            {**of_x, "filter_sizes": np.int32(shapes[1]), **of_dy},
        ][which]
        arguments |= dict(case.attributes, accumulation=accumulation)
        arguments |= dict(zip(("x_bits", "w_bits", "dy_bits"), bits, strict=True))
        if bias:
            truth = biased(draw, arguments, shapes[2][-1], truth)
        return arguments, {("y", "dx", "dw")[which]: truth}

    return draw_one


def matmul(bias=False):
    def draw_one(draw):
        batch = draw.one_of((), (), (2,), (2, 3), (0,))
        m, k, n = (draw.one_of(0, 1, 2, 5, 33, 70) for _ in "mkn")
        bits = draw(BITS), draw(BITS)
        ta, tb = draw(st.booleans()), draw(st.booleans())
        arguments, exponents, factors = {}, [], []
        for name, rows, columns, transposed, b in (
            ("a", m, k, ta, bits[0]),
            ("b", k, n, tb, bits[1]),
        ):
            stored = (*batch, columns, rows) if transposed else (*batch, rows, columns)
            q = draw.mantissas(stored, b)
            e = draw.exponents(*[(), batch, stored[:-1]][: 3 if math.prod(stored[:-1]) else 1])
            of_rows = e.reshape(e.shape + (1,) * (len(stored) - e.ndim))
            numpy = q.numpy()
            if transposed:
                numpy, of_rows = np.swapaxes(numpy, -1, -2), np.swapaxes(of_rows, -1, -2)
            arguments |= {name: q, f"{name}_exponent": e, f"{name}_token": TOKEN}
            exponents.append(of_rows)
            factors.append(numpy)
        accumulation = draw.one_of("exact", "spill")
        truth = reference.matmul(
            factors[0], exponents[0], factors[1], exponents[1],
            a_bits=bits[0], b_bits=bits[1], accumulation=accumulation,
        )  # fmt: skip
        arguments |= dict(a_bits=bits[0], b_bits=bits[1], transpose_a=ta, transpose_b=tb)
        arguments["accumulation"] = accumulation
        if bias:
            truth = biased(draw, arguments, n, truth)
        return arguments, {"y": truth}

    return draw_one


def rows_of_channels(draw):
    channels = draw.one_of(1, 2, 3, 8, 16, 24, 65)
    return (*draw.shape(1, 3, most=9), channels)


def parameters(draw, channels):
    offset, mean, variance, scale = (draw.floats(channels) for _ in range(4))
    return [offset, mean, abs(variance), scale]


def moments(draw):
    x = draw.floats(*rows_of_channels(draw))
    mean, variance = reference.moments(x)
    return dict(x=guarded(x)), {"mean": mean, "variance": variance}


def normalize(draw):
    shape = rows_of_channels(draw)
    x, epsilon = draw.floats(*shape), draw.one_of(0.0, 1e-3)
    activation = draw.one_of("none", "relu", "relu6", "silu")
    given = parameters(draw, shape[-1])[: draw.one_of(0, 1, 4)]
    residual = [draw.floats(*shape)] if draw(st.booleans()) else []
    how, step = quantizing(draw, len(shape))
    want_mask = shape[-1] % 8 == 0
    y = reference.normalize(
        x, *given, epsilon=epsilon, residual=residual[0] if residual else None,
        activation=activation,
    )  # fmt: skip
    q, e = quantized(y, how, step)
    arguments = dict(
        x=guarded(x), parameters=given, residual=residual, bounds=[], step=step,
        activation=activation, epsilon=epsilon, want_y=True, want_q=True, want_mask=want_mask,
        **how,
    )  # fmt: skip
    truth = {"y": y, "q": q, "e": e}
    if want_mask:
        truth["mask"] = np.packbits(y.ravel() > 0, bitorder="little")
    return arguments, truth


def gradient_inputs(draw):
    shape = rows_of_channels(draw)
    parts = [draw.floats(*shape) for _ in range(draw.integer(1, 8))]
    with np.errstate(all="ignore"):
        dy = parts[0]
        for part in parts[1:]:
            dy = dy + part
    arguments = dict(parts=parts, mask_map=[], mask_bits=[], epsilon=1e-3, mask_epsilon=1e-2)
    mask = draw.one_of("none", "map", "bits" if shape[-1] % 8 == 0 else "none")
    if mask == "map":
        mask_map = [draw.floats(*shape), *parameters(draw, shape[-1])][: draw.one_of(1, 2, 5)]
        activation = draw.one_of("relu", "relu6", "silu")
        arguments |= dict(mask_map=mask_map, activation=activation)
        before = reference.normalize(*mask_map, epsilon=1e-2)
        if activation == "silu":
            dy = reference.silu_gradient(dy, before)
        else:
            dy = reference.mask(dy, before, activation)
    if mask == "bits":
        bits = draw.rng.integers(0, 256, math.prod(shape) // 8, np.uint8)
        arguments["mask_bits"] = [bits]
        kept = np.unpackbits(bits, bitorder="little").reshape(shape).astype(np.float32)
        with np.errstate(all="ignore"):
            dy = dy * kept
    norm = []
    if draw(st.booleans()):
        norm = [draw.floats(*shape), *parameters(draw, shape[-1])[1:]]
    return arguments, dy, norm


def normalize_sums(draw):
    arguments, dy, norm = gradient_inputs(draw)
    doffset, dscale, sums = reference.normalize_sums(dy, *norm[:3], epsilon=1e-3)
    truth = {"doffset": doffset}
    if norm:
        truth |= {"dscale": dscale, "sums": sums}
    return dict(arguments, norm=norm[:3]), truth


def normalize_gradient(draw):
    arguments, dy, norm = gradient_inputs(draw)
    how, step = quantizing(draw, dy.ndim)
    sums, dx = [], dy
    if norm:
        if draw(st.booleans()):
            sums = [reference.normalize_sums(dy, *norm[:3], epsilon=1e-3)[2]]
        dx = reference.normalize_gradient(dy, *norm, 1e-3, *sums)
    q, e = quantized(dx, how, step)
    of_images = dy.ndim > 2 and how["group_axes"] == 1
    arguments |= dict(
        norm=norm, sums=sums, step=step, want_y=True, want_q=True, want_doffset=of_images, **how
    )
    return arguments, {"y": dx, "q": q, "e": e}


def optimizer_inputs(draw, n_slots):
    shape = draw.shape(0, 3, most=40)
    w, g = draw.floats(*shape), draw.floats(*shape)
    slots = [draw.floats(*shape) for _ in range(n_slots)]
    slots[1:] = map(abs, slots[1:])
    rate, decay, step = draw.one_of(0.0, 1e-3, 0.5), draw.one_of(0.0, 1e-2), draw.integer(1, 2000)
    arguments = dict(
        weight=w, gradient=g, rate=np.float32(rate), step=np.int64(step), weight_decay=decay,
        seed=draw.integer(0, 9),
    )  # fmt: skip
    if n_slots and draw(st.booleans()):
        packed = [reference.pack_slot(x, arguments["seed"], i, 1) for i, x in enumerate(slots)]
        slots = [reference.unpack_slot(*x, i) for i, x in enumerate(packed)]
        arguments |= dict(slots=[q for q, _ in packed], exponents=[e for _, e in packed])
    else:
        arguments |= dict(slots=slots, exponents=[])
    return arguments, slots, dict(rate=rate, decay=decay)


def optimizer_truth(arguments, w, slots):
    truth = {"new_weight": w}
    if arguments["exponents"]:
        step = int(arguments["step"])
        slots = [reference.pack_slot(x, arguments["seed"], i, step) for i, x in enumerate(slots)]
        truth["new_exponents"] = [e for _, e in slots]
        slots = [q for q, _ in slots]
    if slots:
        truth["new_slots"] = slots
    return truth


def sgd(draw):
    arguments, slots, same = optimizer_inputs(draw, draw.integer(0, 1))
    same |= dict(momentum=draw.one_of(0.5, 0.9) if slots else 0.0, nesterov=draw(st.booleans()))
    w, m = reference.sgd(arguments["weight"], arguments["gradient"], *slots, **same)
    arguments |= dict(momentum=same["momentum"], nesterov=same["nesterov"])
    return arguments, optimizer_truth(arguments, w, [m] if slots else [])


def adam(draw):
    arguments, slots, same = optimizer_inputs(draw, draw.integer(2, 3))
    betas = dict(beta_1=draw.one_of(0.0, 0.9), beta_2=draw.one_of(0.5, 0.999))
    same |= dict(betas, epsilon=draw.one_of(1e-7, 1.0), step=int(arguments["step"]))
    w, *new = reference.adam(arguments["weight"], arguments["gradient"], *slots, **same)
    arguments |= dict(betas, epsilon=same["epsilon"])
    arguments |= dict(renewal_1=1 - betas["beta_1"], renewal_2=1 - betas["beta_2"])
    return arguments, optimizer_truth(arguments, w, new[: len(slots)])


def response_inputs(draw):
    shape = rows_of_channels(draw)
    how = dict(radius=draw.integer(0, 7), bias=draw.one_of(0.0, 1.0, 2.0))
    how |= dict(alpha=draw.one_of(1e-4, 0.5), quarters=draw.integer(1, 4))
    return shape, draw.floats(*shape), how


def local_response(draw):
    _, x, how = response_inputs(draw)
    return dict(x=guarded(x), **how), {"y": reference.local_response(x, **how)}


def local_response_gradient(draw):
    shape, x, how = response_inputs(draw)
    dy = draw.floats(*shape)
    truth = reference.local_response_gradient(x, dy, **how)
    return dict(x=guarded(x), dy=guarded(dy), **how), {"dx": truth}


RIGHT = {
    "dfp_quantize": quantize,
    "dfp_dequantize": dequantize,
    "dfp_token": token,
    "dfp_conv": convolution(0),
    "dfp_conv_bias": convolution(0, bias=True),
    "dfp_conv_backprop_input": convolution(1),
    "dfp_conv_backprop_filter": convolution(2),
    "dfp_matmul": matmul(),
    "dfp_matmul_bias": matmul(bias=True),
    "dfp_moments": moments,
    "dfp_normalize": normalize,
    "dfp_normalize_sums": normalize_sums,
    "dfp_normalize_gradient": normalize_gradient,
    "dfp_local_response": local_response,
    "dfp_local_response_gradient": local_response_gradient,
    "dfp_sgd": sgd,
    "dfp_adam": adam,
}


# ---- calls that are wrong ------------------------------------------------------------------------

NUMBERS = [-(2**63), -(2**31), -9, -1, 0, 1, 2, 3, 7, 17, 33, 2**31 - 1, 2**31, 2**63 - 1]


def wrong(draw, arguments):
    """Changes one argument, or a few, to something else."""
    changed = dict(arguments)
    for _ in range(draw.integer(1, 3)):
        name = draw.one_of(*changed)
        changed[name] = replaced(draw, changed[name])
    return changed


def replaced(draw, value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return draw.one_of("nearest", "stochastic", "relu6", "SAME", "EXPLICIT", "spill", "x", "")
    if isinstance(value, float):
        return float(draw.one_of(0.0, -1.0, np.nan, np.inf, 1e38))
    if isinstance(value, int):
        return draw.one_of(*NUMBERS)
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], np.ndarray | tf.Tensor):
            others = [*value[1:], replaced(draw, value[0])]
            return draw.one_of([], [*value, value[0]], others)
        some = [draw.one_of(*NUMBERS) for _ in range(draw.integer(0, 7))]
        return draw.one_of(some, [*some[:1], *value[1:]], [*value, *some[:1]])
    return other_tensor(draw, np.asarray(value))


def other_tensor(draw, x):
    """Of another shape, or with values that it must not have."""
    what = draw.one_of("shape", "rank", "values", "values", "type")
    if what == "shape":
        return np.zeros([draw.one_of(0, 1, 2, n, n + 1) for n in x.shape], x.dtype)
    if what == "rank":
        return np.zeros(draw.shape(0, 7, most=2), x.dtype)
    if what == "type":
        return np.ones(x.shape, draw.one_of(np.int16, np.int32, np.float32, np.float64))
    if x.dtype.kind == "f":
        return draw.rng.choice(FLOATS, x.shape).astype(x.dtype)
    ends = np.iinfo(x.dtype)
    # Mantissas beyond their format, exponents beyond all bounds. A size may be asked for: it must
    # not be one that a machine tries to find room for.
    low, high = (-3, 9) if x.ndim == 1 and x.dtype == np.int32 else (ends.min, ends.max)
    y = draw.rng.integers(low, high, x.shape, x.dtype, endpoint=True)
    return draw.one_of(y, np.full_like(x, low), np.full_like(x, high))


# ---- the calls -----------------------------------------------------------------------------------


def call(draw, name, arguments):
    isa, threads = draw.one_of(*ISAS), draw.one_of(1, 2, 3)
    with running(isa, threads, small=draw.one_of(0, 8_000_000)):
        return getattr(lib, name)(**arguments), f"{name} on {isa}, {threads} threads"


def results_of(result, names):
    if len(names) == 1 and isinstance(result, tf.Tensor):
        return {names[0]: result}
    return {name: getattr(result, name) for name in names}


def assert_same(actual, expected, what):
    """NaNs are NaNs: which one it is may differ."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if expected.dtype.kind == "f":
        assert actual.shape == expected.shape, what
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(actual), nan, what)
        actual, expected = np.where(nan, 0, actual), np.where(nan, 0, expected)
    assert_same_bits(actual, expected, what)


def right_call(data, name):
    draw = Draw(data)
    arguments, truth = RIGHT[name](draw)
    result, what = call(draw, name, arguments)
    for output, value in results_of(result, list(truth)).items():
        expected = truth[output]
        pairs = (
            zip(value, expected, strict=True) if isinstance(value, list) else [(value, expected)]
        )
        for one, other in pairs:
            assert_same(one, other, f"{output} of {what}")


def wrong_call(data, name):
    draw = Draw(data)
    arguments = wrong(draw, RIGHT[name](draw)[0])
    try:
        result, _ = call(draw, name, arguments)
    except REFUSED:
        return
    for value in tf.nest.flatten(result):
        np.asarray(value).tobytes()  # all of it can be read


def shapeless_call(data, name):
    """Where no input has a shape, every output has an unknown one: TensorFlow refuses none."""
    arguments, _ = RIGHT[name](Draw(data))

    def shapeless(x):
        is_tensor = isinstance(x, np.ndarray | tf.Tensor)
        return tf.compat.v1.placeholder(x.dtype) if is_tensor else x

    with tf.Graph().as_default():
        unknown = tf.nest.map_structure(shapeless, arguments)
        tf.identity_n(tf.nest.flatten(getattr(lib, name)(**unknown)))


def fuzz(check, name, examples):
    given(st.data())(
        settings(
            deadline=None,
            derandomize=True,
            database=None,
            max_examples=examples,
            suppress_health_check=list(HealthCheck),
        )(lambda data: check(data, name))
    )()


def test_every_op_is_here():
    ops = {name for name in dir(lib) if name.startswith("dfp_") and not name.endswith("fallback")}
    assert {name.removesuffix("_eager") for name in ops} == set(RIGHT)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("check", [right_call, wrong_call])
@pytest.mark.parametrize(
    "examples", [20, pytest.param(-(-30_000 // len(RIGHT) // 2), marks=pytest.mark.slow)]
)
def test_fuzz(check, name, examples):
    fuzz(check, name, examples)


@pytest.mark.parametrize("name", RIGHT)
def test_shapes_nobody_knows(name):
    fuzz(shapeless_call, name, 3)
