"""The native core of keras-dfp: kernels on int16 mantissas, and the TensorFlow ops made of them.

One file, two roles. `tf.load_op_library` opens it first: its constructor registers the ops through
TensorFlow's C API. Imported as a module after that, it answers questions about itself. The parts,
from the machine up:

    cpu         instruction sets and microkernels (microkernels/)
    threads     the only door to OpenMP
    quantize    float32 <-> mantissas and exponent
    pack        from tensors into the microkernels' layout
    exponents   of a product: where they differ
    gemm        the blocked product
    digits      the same on int8 tiles (AMX)
    conv        the three passes of a convolution as such products
    depthwise   and of a depthwise one, as sums of rows
    statistics  of a convolution's output
    tf/         the C API, and the ops
"""

import os
import time

from cython.parallel cimport parallel, prange
from libc.math cimport INFINITY, NAN, ldexp
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strcmp

include "cpu.pxi"
include "threads.pxi"
include "quantize.pxi"
include "pack.pxi"
include "exponents.pxi"
include "gemm.pxi"
include "digits.pxi"
include "conv.pxi"
include "depthwise.pxi"
include "statistics.pxi"
include "tf/api.pxi"
include "tf/call.pxi"
include "tf/losses.pxi"
include "tf/ops.pxi"

# As in api.pxi: no initialiser, the constructor runs before the module's initialisation.
cdef bint registered

cdef extern from *:
    """
    static void __attribute__((constructor)) dfp_on_load(void);
    #if defined(__clang__)
    #define DFP_COMPILER "clang " __clang_version__
    #else
    #define DFP_COMPILER "gcc " __VERSION__
    #endif
    """
    const char* DFP_COMPILER
    const int _OPENMP


cdef void on_load "dfp_on_load"() noexcept nogil:
    global registered
    choose_kernel(NULL)
    dfp_watch_forks()
    dfp_watch_losses()
    if load_api():
        registered = register_all()


def is_registered():
    """Returns whether the ops were registered with the TensorFlow of this process."""
    return bool(registered)


def build_info():
    """Returns the compiler and the OpenMP version this file was built with, as a dict."""
    return {"compiler": DFP_COMPILER.decode(), "openmp": _OPENMP}


def cpu_features():
    """Returns the names of the instruction sets this CPU has, of those keras-dfp asks for."""
    return [dfp_isas[i].name.decode() for i in range(DFP_ISAS) if dfp_isas[i].supported()]


if os.environ.get("KERAS_DFP_ISA"):
    try:
        set_isa(os.environ["KERAS_DFP_ISA"])
    except ValueError as error:
        raise ValueError(f"KERAS_DFP_ISA: {error}") from None
