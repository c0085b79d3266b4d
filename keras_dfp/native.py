"""The compiled extension as TensorFlow ops, and the gradients of those ops.

One file has two roles. `keras_dfp._native` registers its ops with TensorFlow when it is loaded as
an op library, and is an ordinary Python module besides; TensorFlow must see it first. After
`import keras_dfp.native`, `lib.dfp_conv` and its kin are the raw ops and `extension` the module.

Between ops a tensor travels as an `Operand`: int16 mantissas and int32 exponents, which carry no
gradient in TensorFlow, and a token, which does. A token is a float32 tensor of the shape of the
mantissas, for whose gradient the tensor that was quantized is told: kernels never read it, and it
takes no memory, for all tokens are the same zeros.

A `ProductOp` is one native op: it is linear in each of its two factors, so the gradient of a
product is two other products. That closes the family, and gradients of any order exist (rounding
counts as the identity, the straight-through estimate).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_dfp import float32


def _load():
    spec = importlib.util.find_spec("keras_dfp._native")
    if spec is None:
        raise ImportError(
            "keras_dfp's compiled extension (keras_dfp._native) is not built. Install the package "
            "with `pip install .`, or run `python setup.py build_ext --inplace` in a clone."
        )
    try:
        library = tf.load_op_library(spec.origin)
    except tf.errors.OpError as error:
        raise ImportError(
            f"TensorFlow {tf.__version__} cannot load keras_dfp's compiled extension "
            f"{spec.origin}: {error.message}. Reinstall keras-dfp for this Python and machine."
        ) from error
    extension = importlib.import_module("keras_dfp._native")
    if not extension.is_registered():
        raise ImportError(
            f"TensorFlow {tf.__version__} does not take the ops of keras_dfp's compiled extension "
            f"{spec.origin}. Is this version of TensorFlow supported?"
        )
    return library, extension


lib, extension = _load()
_threads = 0


def follow_thread_setting():
    """Lets the kernels use as many threads as TensorFlow is told to use for one op."""
    global _threads
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    if threads != _threads:
        extension.set_threads(threads)
        _threads = threads


def known_shape(y, shape):
    """Returns y; a graph is told its shape, which C shape functions cannot see in attributes."""
    if not tf.executing_eagerly():
        y.set_shape(shape)
    return y


class Operand(NamedTuple):
    """A tensor as native ops take it: it stands for `q * 2**exponent`.

    There is one exponent, or one for each group of rows: as many as divide the rows (all axes of q
    but the last; images, of a convolution's input), in order.
    """

    q: tf.Tensor
    exponent: tf.Tensor
    token: tf.Tensor


class Sizes(NamedTuple):
    """The shape of a result where operands do not imply it: a tensor, and what is known of it."""

    tensor: tf.Tensor
    known: tf.TensorShape


def quantize(
    x,
    bits: int,
    rounding: str,
    tensor_id: int,
    group_axes: int = 0,
    site: str = "",
    fused: bool = True,
    role: str = "activation",
    watched: bool = True,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the mantissas of `x`, and exponents of the shape of its first `group_axes` axes.

    With `fused`, `fusion` may compute them in one pass with the steps that x comes from. With a
    `site`, the name of where this happens, `extension.take_numbers` gives the numbers of what is
    quantized, by its `role` (`"activation"`, `"weight"` or `"gradient"`); and if it is `watched`, a
    loss of much of a group is told to the handler of `extension.set_loss_handler`.

    Stochastic rounding draws the `step` of its noise from TensorFlow's random numbers: no state to
    keep, save or distribute, and `keras.utils.set_random_seed` makes it repeatable.
    """
    step = []
    if rounding == "stochastic":
        step = [tf.random.uniform([], maxval=tf.int64.max, dtype=tf.int64)]
    q, exponent, _ = lib.dfp_quantize(
        x=x,
        exponent=[],
        step=step,
        mantissa_bits=bits,
        rounding=rounding,
        tensor_id=tensor_id,
        group_axes=group_axes,
        site=site,
        role=role,
        watched=watched,
        n_counts=0,
        fused=fused,
    )
    note = getattr(_observer, "note", None)
    if note is not None:
        note(x, q, tensor_id, group_axes)
    return q, known_shape(exponent, x.shape[:group_axes])


_observer = threading.local()


@contextlib.contextmanager
def observed(note: Callable) -> Iterator[None]:
    """Calls `note(x, q, tensor_id, group_axes)` of what is quantized inside, on this thread."""
    _observer.note = note
    try:
        yield
    finally:
        _observer.note = None


def transpose(q, perm: Sequence[int]) -> tf.Tensor:
    """Returns mantissas with their axes in another order.

    As uint16: TensorFlow first asks oneDNN, which on CPUs without AVX-512, and where it does not
    know that the CPU has it, prints an error for int16.
    """
    return tf.bitcast(tf.transpose(tf.bitcast(q, tf.uint16), perm), tf.int16)


class Factor:
    """A factor of a product, as float32 and as integers; each is made when first asked for.

    Args:
        like: A tensor of the factor's shape.
        float32: Returns the factor as a float32 tensor.
        operand: Returns the factor as an `Operand`.
    """

    def __init__(self, like, float32: Callable, operand: Callable[[], Operand]):
        self._like = like
        self._float32 = float32
        self._operand = operand

    @classmethod
    def saved(cls, operand: Operand) -> Factor:
        """The factor that the forward pass quantized."""
        return cls(operand.q, lambda: lib.dfp_dequantize(*operand), lambda: operand)

    @classmethod
    def incoming(
        cls, dy, bits: int, rounding: str, group_axes: int, fused: bool, site: str
    ) -> Factor:
        """The gradient of an op's output: quantized once for all that reads it."""

        def operand():
            q, exponent = quantize(
                dy,
                bits,
                rounding,
                tensor_id=2,
                group_axes=group_axes,
                site=site,
                fused=fused,
                role="gradient",
                watched=False,
            )
            return Operand(q, exponent, lib.dfp_token(x=dy, q=q, shape=[]))

        return cls(dy, lambda: dy, operand)

    @property
    def rank(self) -> int:
        return self._like.shape.rank

    @property
    def sizes(self) -> Sizes:
        return Sizes(tf.shape(self._like), self._like.shape)

    @functools.cached_property
    def float32(self):
        return self._float32()

    @functools.cached_property
    def operand(self) -> Operand:
        return self._operand()


class ProductOp:
    """A native op that multiplies two tensors.

    Args:
        attrs: The attributes of the TensorFlow op.
    """

    # Which entries of `attrs` say in what arithmetic the gradient of each factor is computed.
    modes = ("input_gradient", "weight_gradient")
    # Which entry of `attrs` says how many bits the gradient of the result gets.
    output_bits: str

    def __init__(self, attrs: dict):
        self.attrs = attrs

    @property
    def gradient_names(self) -> tuple[str, str]:
        """What statistics call the gradient of each factor."""
        return self.modes

    def dfp(self, first: Operand, second: Operand) -> tf.Tensor:
        """Returns the product of two operands, computed on their integers."""
        raise NotImplementedError

    def float32(self, first, second) -> tf.Tensor:
        """Returns the product of two float32 tensors, computed by stock TensorFlow."""
        raise NotImplementedError

    def output_groups(self, first: Factor) -> int:
        """Returns how many leading axes of the output are samples, or rows of them."""
        return 1

    def _backward(self, first: Factor, second: Factor, dy: Factor):
        """Returns, for each factor, the product that is its gradient, and what it multiplies."""
        raise NotImplementedError

    def gradients(self, first: Factor, second: Factor, dy, wanted=(True, True)) -> list:
        """Returns the gradients of both factors, None where one is not wanted."""
        # A gather of the product's rows sends back IndexedSlices.
        dy = tf.convert_to_tensor(dy)
        groups = 0 if self.attrs["exponents"] == "tensor" else self.output_groups(first)
        attrs = self.attrs
        # Gradients of gradients are nobody's.
        site = attrs["site"] if attrs["product"] == "forward" else ""
        dy = Factor.incoming(
            dy, attrs[self.output_bits], attrs["rounding"], groups, attrs["fused"], site
        )
        results: list[tf.Tensor | None] = []
        for (product, a, b), mode, name, want in zip(
            self._backward(first, second, dy), self.modes, self.gradient_names, wanted, strict=True
        ):
            if not want:
                results.append(None)
            elif self.attrs[mode] == "dfp":
                product.attrs = {**product.attrs, "site": site, "product": name}
                results.append(product.dfp(a.operand, b.operand))
            else:
                results.append(product.float32(a.float32, b.float32))
        return results

    @classmethod
    def register_gradient(cls, op_type: str, first: int, second: int):
        """Registers the gradient of an op whose factors start at these inputs."""

        @tf.RegisterGradient(op_type)
        def gradient(op, dy, *_):
            has_bias = len(op.inputs) > second + 3
            if has_bias:
                dy = through_clip(op.get_attr("clip"), dy, op.outputs[0])
            factors = [Factor.saved(Operand(*op.inputs[i : i + 3])) for i in (first, second)]
            tokens = [first + 2, second + 2]
            # Only the eager tape says which gradients nobody reads; a graph prunes them.
            skipped = getattr(op, "skip_input_indices", None) or ()
            results = cls(_attrs(op, cls.names)).gradients(
                *factors, dy, wanted=[token not in skipped for token in tokens]
            )
            by_input = dict(zip(tokens, results, strict=True))
            if has_bias:
                by_input[second + 3] = channel_sums(dy)
            return [by_input.get(i) for i in range(len(op.inputs))]


_CLIP_GRADIENTS = {b"relu": tf.raw_ops.ReluGrad, b"relu6": tf.raw_ops.Relu6Grad}


def through_clip(clip: bytes, dy, features) -> tf.Tensor:
    """Returns the gradient of a ReLU or ReLU6, of `features`, its result or its input.

    Ops that clip are made by `fusion`, and differentiated where a function has come back as a
    graph: in a loaded SavedModel.
    """
    return _CLIP_GRADIENTS[clip](gradients=dy, features=features) if clip != b"none" else dy


def channel_sums(dy) -> tf.Tensor:
    """Returns the sums over all axes but the last, the gradient of a bias."""
    return lib.dfp_normalize_sums(parts=[dy], mask_map=[], mask_bits=[], norm=[]).doffset


def _attrs(op, names) -> dict:
    attrs = {name: op.get_attr(name) for name in names}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in attrs.items()}


_SHARED = (
    *("accumulation", "rounding", "input_gradient", "weight_gradient", "exponents", "fused"),
    *("site", "product"),
)


class Matmul(ProductOp):
    """`a @ b`, either of them transposed; shapes [..., M, K] and [..., K, N], no broadcasting."""

    names = ("a_bits", "b_bits", "dy_bits", "transpose_a", "transpose_b", "weight_first", *_SHARED)
    output_bits = "dy_bits"

    @property
    def gradient_names(self):
        return self.modes[::-1] if self.attrs["weight_first"] else self.modes

    def dfp(self, first, second):
        y = lib.dfp_matmul(*first, *second, **self.attrs)
        rows = first.q.shape[-1 if self.attrs["transpose_a"] else -2]
        columns = second.q.shape[-2 if self.attrs["transpose_b"] else -1]
        batch = first.q.shape[:-2].merge_with(second.q.shape[:-2])
        return known_shape(y, [*batch, rows, columns])

    def output_groups(self, first):
        return first.rank - 1

    def float32(self, first, second):
        attrs = self.attrs
        return tf.matmul(
            first, second, transpose_a=attrs["transpose_a"], transpose_b=attrs["transpose_b"]
        )

    def _backward(self, first, second, dy):
        bits_a, bits_b, bits_dy, ta, tb = (self.attrs[name] for name in self.names[:5])

        def times(a_bits, transpose_a, b_bits, transpose_b, dy_bits):
            changed = (a_bits, b_bits, dy_bits, transpose_a, transpose_b)
            return Matmul({**self.attrs, **dict(zip(self.names, changed, strict=False))})

        if ta:
            da = times(bits_b, tb, bits_dy, True, bits_a), second, dy
        else:
            da = times(bits_dy, False, bits_b, not tb, bits_a), dy, second
        if tb:
            db = times(bits_dy, True, bits_a, ta, bits_b), dy, first
        else:
            db = times(bits_a, not ta, bits_dy, False, bits_b), first, dy
        return da, db


class _Convolution(ProductOp):
    geometry = ("strides", "padding", "explicit_paddings", "dilations", "depthwise")
    names = ("x_bits", "w_bits", "dy_bits", *geometry, *_SHARED)

    def __init__(self, attrs: dict, sizes: Sizes | None = None):
        super().__init__(attrs)
        self.sizes = sizes
        self._geometry = {name: attrs[name] for name in self.geometry}


class Conv(_Convolution):
    """The convolution y of x with w."""

    output_bits = "dy_bits"

    def dfp(self, first, second):
        y = lib.dfp_conv(*first, *second, **self.attrs)
        return known_shape(y, self.output_shape(first.q.shape, second.q.shape))

    def output_shape(self, x: Sequence[int | None], w: Sequence[int | None]) -> list[int | None]:
        """Returns the shape of y for shapes of x and w; None where it is not known."""
        attrs = self.attrs
        spatial: list[int | None] = []
        for i, (size, taps) in enumerate(zip(x[1:-1], w[:-2], strict=True)):
            stride, padding = attrs["strides"][i], attrs["padding"]
            if size is None or taps is None:
                spatial.append(None)
            elif padding == "SAME":
                spatial.append(-(-size // stride))
            else:
                extra = sum(attrs["explicit_paddings"][2 * i : 2 * i + 2])
                reach = (taps - 1) * attrs["dilations"][i] + 1
                spatial.append((size + extra - reach) // stride + 1)
        channels = w[-1]
        if attrs["depthwise"] and channels is not None:
            channels = None if w[-2] is None else channels * w[-2]
        return [x[0], *spatial, channels]

    def float32(self, first, second):
        return float32.conv(first, second, **self._geometry)

    def _backward(self, first, second, dy):
        return (
            (ConvInputGradient(self.attrs, first.sizes), second, dy),
            (ConvFilterGradient(self.attrs, second.sizes), first, dy),
        )


class ConvInputGradient(_Convolution):
    """The gradient dx of a convolution's input, of shape `sizes`, from w and dy.

    It is the transposed convolution of dy with w, whose input is dy.
    """

    modes = ("weight_gradient", "input_gradient")
    output_bits = "x_bits"

    def dfp(self, first, second):
        y = lib.dfp_conv_backprop_input(self.sizes.tensor, *first, *second, **self.attrs)
        return known_shape(y, self.sizes.known)

    def float32(self, first, second):
        return float32.conv_input_gradient(self.sizes.tensor, first, second, **self._geometry)

    def _backward(self, first, second, dy):
        return (
            (ConvFilterGradient(self.attrs, first.sizes), dy, second),
            (Conv(self.attrs), dy, first),
        )


class ConvFilterGradient(_Convolution):
    """The gradient dw of a convolution's kernel, of shape `sizes`, from x and dy."""

    output_bits = "w_bits"

    def output_groups(self, first):
        return 0

    def dfp(self, first, second):
        y = lib.dfp_conv_backprop_filter(*first, self.sizes.tensor, *second, **self.attrs)
        return known_shape(y, self.sizes.known)

    def float32(self, first, second):
        return float32.conv_filter_gradient(first, self.sizes.tensor, second, **self._geometry)

    def _backward(self, first, second, dy):
        return (
            (ConvInputGradient(self.attrs, first.sizes), dy, second),
            (Conv(self.attrs), first, dy),
        )


Matmul.register_gradient("DfpMatmul", 0, 3)
Matmul.register_gradient("DfpMatmulBias", 0, 3)
Conv.register_gradient("DfpConv", 0, 3)
Conv.register_gradient("DfpConvBias", 0, 3)
ConvInputGradient.register_gradient("DfpConvBackpropInput", 1, 4)
ConvFilterGradient.register_gradient("DfpConvBackpropFilter", 0, 4)
tf.no_gradient("DfpQuantize")


@tf.RegisterGradient("DfpDequantize")
def _dequantize_gradient(op, dy):
    return None, None, dy


@tf.RegisterGradient("DfpToken")
def _token_gradient(op, dtoken):
    """Hands the gradient that the token stands for to x, in x's own layout.

    The shape of x is not asked of x itself, which need not be there.
    """
    x, _, *shape = op.inputs
    perm = list(op.get_attr("perm"))
    if shape:
        dtoken = tf.reshape(dtoken, tf.gather(shape[0], perm) if perm else shape[0])
    if perm:
        dtoken = tf.transpose(dtoken, sorted(range(len(perm)), key=perm.__getitem__))
    return dtoken, *[None] * (1 + len(shape))
