# Which microkernels there are, and which one runs.

cdef extern from "microkernels/table.h" nogil:
    ctypedef struct dfp_tile:
        const int16_t* a
        int64_t row_stride, pair_stride, rows
        const int64_t* starts
        const int64_t* runs
        int64_t run
        const int16_t* soon
        const int16_t* b
        int64_t pairs, segment, chain
        bint resume
        int32_t* acc
        float* c
        int64_t ldc
        const float* row_scale
        const float* column_scale
        const float* bias
        float low, high
        bint stream
    ctypedef struct dfp_patch:
        const int16_t** x
        int64_t terms, n, items, rows, pixels
        int64_t x_item, x_row, x_step, y_item, y_row, y_step
        int64_t chain
        int64_t fresh, fresh_end
        const int16_t** w
        float* y
        const double* scale
        bint careful, stream
        const int16_t* dy
        int64_t** sums
    ctypedef struct dfp_terms:
        const int16_t** x
        const int16_t** w
        int64_t terms, segment, chain, n
        bint resume
        float* sums
        float* y
        double scale
    ctypedef struct dfp_digit_tile:
        const int8_t* a
        int64_t a_plane
        const int64_t* a_step
        const int8_t* b
        int64_t b_plane, b_step, b_half
        int64_t steps
        int products
        bint resume
        int32_t* sums
    ctypedef struct dfp_digit_rows:
        const int32_t* sums
        float* c
        const int64_t* row
        int64_t next, rows, cols
        const float* row_scale
        const float* column_scale
        const float* bias
        float low, high
        int products
        bint stream
    ctypedef struct dfp_digits:
        void (*open)() noexcept nogil
        void (*close)() noexcept nogil
        void (*lines)(const int16_t*, int64_t, int, int8_t*, int64_t, int64_t) noexcept nogil
        void (*lines_of_rows)(const int16_t**, int64_t, int64_t, int, int8_t*,
                              int64_t) noexcept nogil
        void (*columns_of_rows)(const int16_t**, int64_t, int64_t, bint, int, int8_t*, int64_t,
                                int64_t) noexcept nogil
        void (*columns)(const int16_t*, bint, int, int8_t*, int64_t) noexcept nogil
        void (*columns_sliding)(const int16_t**, int64_t, int64_t, int64_t, int, int8_t*, int64_t,
                                int64_t, int64_t) noexcept nogil
        void (*multiply)(const dfp_digit_tile*, dfp_digit_rows*) noexcept nogil
        void (*finish)(dfp_digit_rows*) noexcept nogil
        void (*finish_transposed)(const dfp_digit_rows*, int64_t) noexcept nogil
    ctypedef struct dfp_map:
        const float* x
        const float* residual
        const float* center
        const float* scale
        const float* offset
        float low, high
        bint silu
        int64_t n
    enum: DFP_PARTS
    ctypedef struct dfp_gradient:
        const float* parts[8]
        int n_parts
        const uint8_t* bits
        dfp_map mask
        bint self
        const float* x
        const float* center
        const float* a
        const float* b
        const float* c
        int64_t n
    ctypedef struct dfp_response:
        int64_t n, radius
        float bias, alpha, slope
        int quarters
    ctypedef struct dfp_update:
        const float* w
        const float* g
        const float* m
        const float* v
        const float* h
        float* w_to
        float* m_to
        float* v_to
        float* h_to
        float rate, decay, momentum
        bint nesterov
        float alpha, renewal, renewal2, epsilon
    const int DFP_SHORT, DFP_SLOT_BLOCK
    const int DFP_DIGIT_TILE, DFP_DIGIT_STEP, DFP_DIGIT_K_3, DFP_DIGIT_K_4
    ctypedef void (*dfp_multiply)(const dfp_tile*) noexcept nogil
    ctypedef struct dfp_kernel:
        const char* isa
        int mr, nr
        dfp_multiply exact, spill, exact_narrow, spill_narrow
        uint32_t (*absmax_bits)(const float*, int64_t) noexcept nogil
        void (*quantize)(const float*, int64_t, float, float, float, bint, bint,
                         int16_t*) noexcept nogil
        void (*exponents)(const float*, int64_t, int64_t, int, int32_t*) noexcept nogil
        void (*quantize_groups)(const float*, int64_t, int64_t, const int32_t*, float, bint,
                                int16_t*) noexcept nogil
        void (*stochastic)(const float*, int64_t, int64_t, int64_t, const int32_t*, double,
                           const uint32_t*, uint64_t, int16_t*) noexcept nogil
        void (*count)(const float*, const int16_t*, int64_t, uint32_t, int64_t*) noexcept nogil
        int64_t (*zeros)(const int16_t*, int64_t) noexcept nogil
        void (*sample)(const float*, const int16_t*, int64_t, int64_t*) noexcept nogil
        void (*align)(const int16_t*, int64_t, int, int16_t*) noexcept nogil
        void (*align_rows)(const int16_t**, int64_t, int64_t, const int*, int16_t*,
                           const int16_t**) noexcept nogil
        void (*align_pairs)(int16_t*, int64_t, int, int) noexcept nogil
        void (*interleave)(const int16_t*, const int16_t*, int64_t, int64_t, int64_t, int, int64_t,
                           int16_t*) noexcept nogil
        void (*copy_rows)(const int16_t*, int64_t, int64_t, int64_t, int16_t*,
                          int64_t) noexcept nogil
        void (*depthwise_patch)(const dfp_patch*) noexcept nogil
        void (*depthwise_dots)(const dfp_patch*) noexcept nogil
        void (*depthwise_spill)(const dfp_terms*) noexcept nogil
        void (*map)(const dfp_map*, int64_t, int64_t, float*) noexcept nogil
        void (*positive_bits)(const float*, int64_t, uint8_t*) noexcept nogil
        void (*gradient)(const dfp_gradient*, int64_t, int64_t, float*) noexcept nogil
        void (*channel_sums)(const float*, const float*, const float*, int64_t, int64_t,
                             double*) noexcept nogil
        void (*moments)(const float*, int64_t, int64_t, double*, float*) noexcept nogil
        void (*add_rows)(const double*, int64_t, int64_t, int64_t, double*) noexcept nogil
        void (*response)(const dfp_response*, const float*, const float*, int64_t, float*,
                         float*) noexcept nogil
        void (*sgd)(const dfp_update*, int64_t) noexcept nogil
        void (*adam)(const dfp_update*, int64_t) noexcept nogil
        void (*unpack_slot)(const int16_t*, const int32_t*, int64_t, bint, float*) noexcept nogil
        void (*pack_slot)(float*, int64_t, bint, int64_t, const uint32_t*, uint64_t, int16_t*,
                          int32_t*) noexcept nogil
        int64_t (*peak)(int64_t) noexcept nogil
        const dfp_digits* digits
    ctypedef struct dfp_isa:
        const char* name
        const dfp_kernel* kernel
        int (*supported)() noexcept nogil
    const dfp_isa* dfp_isas
    const int DFP_ISAS
    float dfp_round(int64_t sum, double scale) noexcept

cdef extern from *:
    """
    #ifdef DFP_HAS_AMX
    #define DFP_EMULATE_AMX() amx_emulate()
    #else
    #define DFP_EMULATE_AMX() ((void)0)
    #endif
    """
    void DFP_EMULATE_AMX() noexcept nogil

# The kernel in use. Set when the library is loaded; without an initialiser, because the module's
# own initialisation comes after the constructor and would reset it.
cdef const dfp_kernel* kernel


cdef bint usable(const dfp_isa* isa) noexcept nogil:
    return isa.kernel != NULL and isa.supported()


cdef bint choose_kernel(const char* wanted) noexcept nogil:
    """Takes the wanted kernel, or the best one if `wanted` is NULL; False if there is none."""
    global kernel
    cdef int i
    for i in range(DFP_ISAS):
        if usable(&dfp_isas[i]) and (wanted == NULL or strcmp(dfp_isas[i].name, wanted) == 0):
            kernel = dfp_isas[i].kernel
            return True
    return False


def isa():
    """Returns the name of the instruction set whose kernels are in use."""
    return kernel.isa.decode()


def isas():
    """Returns what is known of every instruction set, the best first, as a list of dicts."""
    found = []
    for i in range(DFP_ISAS):
        if dfp_isas[i].kernel == NULL:
            reason = "the compiler that built keras-dfp does not know it"
        elif not dfp_isas[i].supported():
            reason = "this CPU does not have it"
        else:
            reason = ""
        found.append({
            "name": dfp_isas[i].name.decode(),
            "compiled": dfp_isas[i].kernel != NULL,
            "available": not reason,
            "reason": reason,
        })
    return found


def set_isa(name):
    """Switches to the kernels of another instruction set, for tests and benchmarks.

    Raises:
        ValueError: If this machine cannot run it.
    """
    wanted = name.encode()
    if not choose_kernel(wanted):
        raise ValueError(
            f"The instruction set {name!r} is not available; available here: "
            + ", ".join(entry["name"] for entry in isas() if entry["available"]) + "."
        )


def emulate_amx():
    """Makes the kernels of AMX run on a CPU without AMX, by emulating its instructions: the same
    bits, thousands of times slower. For tests; needs AVX-512-VNNI."""
    DFP_EMULATE_AMX()


def peak():
    """Returns the products per second of one core that does nothing but multiply-accumulate with
    the instruction set in use: the best of ten runs, the roof of every kernel."""
    cdef int64_t products, rounds = 100000
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        products = kernel.peak(rounds)
        best = max(best, products / (time.perf_counter() - start))
    return best
