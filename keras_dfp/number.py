"""The number format: dynamic fixed point, 16-bit mantissas and shared exponents."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import numpy as np

MANTISSA_BITS = range(8, 17)
ROUNDINGS = ("nearest", "truncate", "stochastic")
ACCUMULATIONS = ("exact", "spill")
EXPONENTS = ("sample", "tensor")
PRODUCTS = ("forward", "input_gradient", "weight_gradient")

# The exponent of a group that held a NaN or an infinity: everything computed from it is NaN.
NAN_EXPONENT = -(2**31)


def _one_of(name: str, value, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")
    return value


@dataclasses.dataclass(frozen=True)
class DFPFormat:
    """How a product is computed: the format of its operands and of its accumulation.

    Args:
        mantissa_bits: Bits of a mantissa, sign included, 8 to 16. Mantissas are always stored
            as int16 and lie in `[-qmax, qmax]`, `qmax = 2**(mantissa_bits - 1) - 1`.
        rounding: `"nearest"` (ties to even), `"truncate"` (toward zero) or `"stochastic"`.
        accumulation: `"exact"` (the integer sum is rounded once) or `"spill"` (the paper's:
            INT32 chains of a safe length, added in float32).
        products: Which of the products `"forward"`, `"input_gradient"` and `"weight_gradient"`
            run on integers; the others run in float32.
        exponents: `"sample"`: an operand has an exponent for every index of its leading axes that
            the product does not sum over (every row of a matrix, every image of a batch); or
            `"tensor"`: it has one, as in the paper. Variables always have one.
        fused: Whether operands may be computed in one pass with the batch norm, bias, residual sum
            and ReLU that they come from. It changes no bit.

    Raises:
        ValueError: If an argument is not one of the values above.

    Example:

    >>> DFPFormat().qmax
    8191
    """

    mantissa_bits: int = 14
    rounding: str = "nearest"
    accumulation: str = "exact"
    products: Sequence[str] = PRODUCTS
    exponents: str = "sample"
    fused: bool = True

    def __post_init__(self):
        bits = self.mantissa_bits
        if isinstance(bits, bool) or not isinstance(bits, int) or bits not in MANTISSA_BITS:
            raise ValueError(f"mantissa_bits must be an integer from 8 to 16; got {bits!r}.")
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("accumulation", self.accumulation, ACCUMULATIONS)
        _one_of("exponents", self.exponents, EXPONENTS)
        if not isinstance(self.fused, bool):
            raise ValueError(f"fused must be True or False; got {self.fused!r}.")
        if isinstance(self.products, str):
            raise ValueError(
                f"products must be a collection of names, such as ('forward',); got the string "
                f"{self.products!r}."
            )
        products = tuple(self.products)
        for product in products:
            _one_of("each of products", product, PRODUCTS)
        if not products:
            raise ValueError(
                "products must name at least one of "
                f"{', '.join(map(repr, PRODUCTS))}; got none. For none, use dtype='float32'."
            )
        # One spelling of each set, so that equal formats compare equal.
        object.__setattr__(self, "products", tuple(p for p in PRODUCTS if p in products))

    @property
    def qmax(self) -> int:
        """The largest mantissa: `2**(mantissa_bits - 1) - 1`."""
        return 2 ** (self.mantissa_bits - 1) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class DFPTensor:
    """A tensor in dynamic fixed point: it stands for `mantissa * 2**exponent`.

    Args:
        mantissa: int16 array of any shape.
        exponent: The exponent shared by all elements, an int; or int32 array, the exponent shared
            by those with one index of the leading axes. -2**31 marks elements of which one was a
            NaN or an infinity.
        mantissa_bits: Bits of a mantissa, sign included.
    """

    mantissa: np.ndarray
    exponent: int | np.ndarray
    mantissa_bits: int = 14

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mantissa.shape

    def dequantize(self) -> np.ndarray:
        """Returns `mantissa * 2**exponent` as a float32 array, rounded once where it must be."""
        from keras_dfp import native

        return native.lib.dfp_dequantize(
            q=self.mantissa, e=np.asarray(self.exponent, np.int32), token=np.zeros(0, np.float32)
        ).numpy()


def quantize(
    x,
    mantissa_bits: int = 14,
    rounding: str = "nearest",
    seed: int | None = None,
    group_axes: int = 0,
) -> DFPTensor:
    """Quantizes an array to dynamic fixed point.

    The exponent is the smallest with which the largest magnitude of `x` fits:
    `e = floor(log2(max|x|)) - (mantissa_bits - 2)`, and the mantissas are
    `clamp(round(x * 2**-e), -qmax, qmax)` (Das et al., 2018, section 3; see docs/numerics.md).

    Args:
        x: float32 array-like of any shape (float16, bfloat16 and integers that float32 holds
            exactly are converted; float64 is refused, because it would be rounded twice).
        mantissa_bits: Bits of a mantissa, sign included, 8 to 16.
        rounding: `"nearest"`, `"truncate"` or `"stochastic"`.
        seed: Seed of stochastic rounding, an int of 64 bits, signed or not, of which the low 32
            count; `None` means 0. The same seed gives the same result.
        group_axes: How many leading axes of `x` have an exponent for each of their indices: with
            1, every sample of a batch has its own; with 0, the array has one.

    Returns:
        A `DFPTensor`. Zeros have the exponent of the smallest float32; what shares an exponent
        with a NaN or an infinity has mantissas 0 and exponent -2**31, and everything computed from
        it is NaN.

    Raises:
        ValueError: If `mantissa_bits`, `rounding`, `seed` or `group_axes` is not allowed.
        TypeError: If `x` is float64 or another type that float32 does not hold exactly, or `seed`
            is not an int.

    Example:

    >>> t = keras_dfp.quantize([1.0, -0.5, 0.3])
    >>> t.mantissa, t.exponent
    (array([ 4096, -2048,  1229], dtype=int16), -12)
    """
    from keras_dfp import native

    DFPFormat(mantissa_bits=mantissa_bits, rounding=rounding)
    native.follow_thread_setting()
    seed = operator.index(seed or 0)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"quantize: seed must be an int of 64 bits; got {seed}.")
    x = _as_float32(x)
    if not 0 <= group_axes <= x.ndim:
        raise ValueError(
            f"quantize: group_axes must be from 0 to the rank of x, {x.ndim}; got {group_axes!r}."
        )
    q, e = native.lib.dfp_quantize(
        x=x,
        exponent=[],
        step=[],
        mantissa_bits=mantissa_bits,
        rounding=rounding,
        seed=seed & 0xFFFFFFFF,
        group_axes=group_axes,
        n_counts=0,
    )[:2]
    return DFPTensor(q.numpy(), e.numpy() if group_axes else int(e), mantissa_bits)


def _as_float32(x) -> np.ndarray:
    if isinstance(x, (int, float, list, tuple)):
        return np.asarray(x, np.float32)
    x = np.asarray(x)
    if x.dtype == np.float64 or (x.dtype != np.float32 and not np.can_cast(x.dtype, np.float32)):
        if str(x.dtype) != "bfloat16":
            raise TypeError(
                f"quantize: x has dtype {x.dtype}, which float32 does not hold exactly; "
                "convert it yourself first, e.g. x.astype('float32')."
            )
    return x.astype(np.float32)
