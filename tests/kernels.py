"""The kernels under test: every instruction set this machine has, and how to run one of them."""

import contextlib
import ctypes
import dataclasses
import math
import mmap

import numpy as np
import tensorflow as tf

from keras_dfp import reference
from keras_dfp.native import extension, lib


def _available():
    return [entry["name"] for entry in extension.isas() if entry["available"]]


NATIVE = _available()
# Where the CPU has no AMX, its instructions are emulated: the bits are the same.
extension.emulate_amx()
ISAS = _available()
THREADS = (1, 2, 3, 4)
TOKEN = np.zeros(0, np.float32)


@contextlib.contextmanager
def running(isa, threads=0, **settings):
    """Runs kernels on this instruction set and so many threads; `settings` as of set_threads."""
    before = extension.isa()
    extension.set_isa(isa)
    extension.set_threads(threads, **settings)
    try:
        yield
    finally:
        extension.set_isa(before)
        extension.set_threads(0)


def mantissas(rng, shape, bits, kind="random"):
    """Random mantissas, or extreme ones: all of the largest magnitude."""
    q = reference.qmax(bits)
    if kind == "extreme":
        return np.full(shape, q, np.int16)
    if kind == "signs":
        return (rng.choice([-q, q], shape)).astype(np.int16)
    return rng.integers(-q, q, shape, np.int16, endpoint=True)


def one_exponent_each(rng, shape, kind="apart"):
    """Random exponents of groups, int32: `kind` says how far apart they are.

    "same", "near" (a sum is shifted by a few bits), "apart" (by up to 40, so that nothing is left),
    or one that is very "low", very "high" or "nan" among others that are apart.
    """
    low, high = {"same": (-9, -9), "near": (-16, -12)}.get(kind, (-30, 10))
    e = rng.integers(low, high, shape, np.int32, endpoint=True)
    odd = {"low": -300, "high": 90, "nan": reference.NAN_EXPONENT}.get(kind)
    if odd is not None and e.size:
        e.flat[rng.integers(e.size)] = odd
    return e


def exponents_of_rows(rng, shape, which, apart):
    """Exponents of an operand of this shape, as it is stored.

    `which` have one: each "matrix", each "row", "49 rows" together; or it is that of all of them.
    Returns them, and those of all rows.
    """
    *batch, rows, _ = shape
    if isinstance(which, int):
        return np.int32(which), np.full((1,) * len(shape), which)
    of = {"matrix": batch, "row": (*batch, rows)}.get(which)
    if of is None:
        of = (math.prod(shape[:-1]) // int(which.split()[0]),)
    e = one_exponent_each(rng, of, apart)
    if e.size in (0, 1):
        return e, e.reshape((1,) * len(shape) if e.size else (*batch, rows, 1))
    each = np.repeat(e, math.prod(shape[:-1]) // e.size)
    return e, each.reshape(*batch, rows, 1)


def guarded(array):
    """Returns an array as a tensor that ends where memory ends: to read past it is a fault."""
    if not array.size:
        return tf.constant(array)
    room = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    no_access = 0
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, no_access)
    held = np.frombuffer(memory, array.dtype, array.size, room - array.nbytes)
    held[:] = array.ravel()
    return tf.experimental.dlpack.from_dlpack(held.reshape(array.shape).__dlpack__())


def assert_same_bits(actual, expected, what=""):
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    view = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[actual.itemsize]
    if not np.array_equal(actual.view(view), expected.view(view)):
        np.testing.assert_array_equal(actual.view(view), expected.view(view), what)


@dataclasses.dataclass(frozen=True)
class Case:
    """A convolution; `image` and `kernel` give the spatial dimensions."""

    image: tuple
    kernel: tuple
    channels: int = 4
    filters: int = 6  # of all groups; the multiplier of a depthwise convolution
    strides: tuple = ()
    dilations: tuple = ()
    padding: object = "valid"
    groups: int = 1
    depthwise: bool = False
    batch: int = 2

    @property
    def options(self):
        ones = (1,) * len(self.image)
        return dict(
            strides=self.strides or ones, dilations=self.dilations or ones, padding=self.padding
        )

    @property
    def attributes(self):
        options = self.options
        explicit = not isinstance(self.padding, str)
        options["padding"] = "EXPLICIT" if explicit else self.padding.upper()
        options["explicit_paddings"] = list(np.ravel(self.padding)) if explicit else []
        return dict(options, depthwise=self.depthwise)

    @property
    def input_shape(self):
        return (self.batch, *self.image, self.channels)

    @property
    def kernel_shape(self):
        inner = self.channels if self.depthwise else self.channels // self.groups
        return (*self.kernel, inner, self.filters)


class Passes:
    """The three passes of a case on given mantissas, as the native ops compute them.

    Args:
        case: The case.
        tensors: Mantissas of x, w and dy.
        exponents: Their exponents: of each one, or, but for w, one for each image.
        bits: Their formats.
    """

    names = ("y", "dx", "dw")

    def __init__(self, case, tensors, exponents, bits):
        self.x, self.w, self.dy = (
            {name: guarded(q), f"{name}_exponent": np.asarray(e, np.int32), f"{name}_token": TOKEN}
            for name, q, e in zip(("x", "w", "dy"), tensors, exponents, strict=True)
        )
        formats = zip(("x_bits", "w_bits", "dy_bits"), bits, strict=True)
        self.attributes = {**case.attributes, **dict(formats)}
        self.input_sizes = np.array(tensors[0].shape, np.int32)
        self.filter_sizes = np.array(tensors[1].shape, np.int32)

    def __call__(self, accumulation):
        """Returns y, dx and dw."""
        return tuple(self.one_by_one(accumulation))

    def one_by_one(self, accumulation):
        """Yields y, dx and dw, each computed when it is asked for."""
        attributes = dict(self.attributes, accumulation=accumulation)
        yield lib.dfp_conv(**self.x, **self.w, **attributes)
        yield lib.dfp_conv_backprop_input(
            input_sizes=self.input_sizes, **self.w, **self.dy, **attributes
        )
        yield lib.dfp_conv_backprop_filter(
            filter_sizes=self.filter_sizes, **self.x, **self.dy, **attributes
        )
