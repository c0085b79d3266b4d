"""The native core of keras-dfp: kernels on int16 mantissas, and the TensorFlow ops made of them.

One file, two roles. `tf.load_op_library` opens it first: its constructor registers the ops through
TensorFlow's C API. Imported as a module after that, it answers questions about itself. The parts,
from the machine up:

    cpu         instruction sets and microkernels (microkernels/)
    threads     the only door to OpenMP
    sizes       arithmetic of sizes
    quantize    float32 <-> mantissas and exponent
    pack        from tensors into the microkernels' layout
    exponents   of a product: where they differ
    gemm        the blocked product: what is asked, blocks, sums
    pairs       its driver on pairs of int16
    digits      and on int8 tiles (AMX)
    plan        which of them
    conv        the three passes of a convolution as such products
    depthwise   and of a depthwise one, as sums of rows
    channels    passes over rows of channels: batch norm, ReLU, sums
    response    local response normalisation
    statistics  what quantizing did to a tensor
    update      a step of an optimizer
    tf/         the C API, and one file for each kind of op
"""

import os
import time

from cython.parallel cimport parallel
from libc.math cimport INFINITY, NAN, ldexp, sqrt
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset, strcmp

include "cpu.pxi"
include "threads.pxi"
include "sizes.pxi"
include "quantize.pxi"
include "channels.pxi"
include "statistics.pxi"
include "pack.pxi"
include "exponents.pxi"
include "gemm.pxi"
include "pairs.pxi"
include "digits.pxi"
include "plan.pxi"
include "conv.pxi"
include "depthwise.pxi"
include "response.pxi"
include "update.pxi"
include "tf/api.pxi"
include "tf/call.pxi"
include "tf/losses.pxi"
include "tf/statistics.pxi"
include "tf/op.pxi"
include "tf/quantize.pxi"
include "tf/normalize.pxi"
include "tf/matmul.pxi"
include "tf/conv.pxi"
include "tf/response.pxi"
include "tf/optimizer.pxi"

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


cdef bint register_all() noexcept nogil:
    cdef TF_Status* st = tf.NewStatus()
    cdef bint good
    register_quantize(st)
    register_normalize(st)
    register_matmul(st)
    register_conv(st)
    register_response(st)
    register_optimizer(st)
    good = tf.GetCode(st) == TF_OK
    tf.DeleteStatus(st)
    return good


cdef void on_load "dfp_on_load"() noexcept nogil:
    global registered
    choose_kernel(NULL)
    dfp_open_team(open_region)
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
