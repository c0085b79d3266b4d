# DfpQuantize, DfpDequantize, DfpToken.

cdef void register_quantize(TF_Status* st) noexcept nogil:
    register_op(
        "DfpQuantize", QUANTIZE_SIGNATURE, same_shape, quantize_create, quantize_compute, st)
    register_op("DfpDequantize", "q: int16; e: int32; token: float -> y: float", same_shape, NULL,
                dequantize_compute, st)
    register_op("DfpToken", "x: float; q: int16; shape: n_shape * int32 -> token: float | "
                "perm: list(int) = []; n_shape: int >= 0 = 0", token_shape, NULL, token_compute, st)


cdef extern from *:
    """
    #define DFP_QUANTIZE_SIGNATURE  \\
        "x: float; exponent: n_exponent * int32; step: n_step * int64 -> "  \\
        "q: int16; e: int32; counts: n_counts * int64 | " DFP_QUANTIZE_ATTRS "; "  \\
        "n_counts: int >= 0 = 0; n_exponent: int >= 0 = 0; n_step: int >= 0 = 0; fused: bool = true"
    """
    const char* QUANTIZE_SIGNATURE "DFP_QUANTIZE_SIGNATURE"


cdef void quantize_attrs(TF_OpKernelConstruction* k, Attrs* a, TF_Status* st) noexcept nogil:
    cdef char rounding
    a.a_bits = int_attr(k, "mantissa_bits", st)
    a.seed = int_attr(k, "seed", st)
    a.tensor_id = int_attr(k, "tensor_id", st)
    a.group_axes = int_attr(k, "group_axes", st)
    site_attrs(k, a, st)
    a.watched = bool_attr(k, "watched", st)
    rounding = first_letter(k, "rounding", st)
    a.rounding = STOCHASTIC if rounding == c"s" else TRUNCATE if rounding == c"t" else NEAREST
    check_bits(a.a_bits, "mantissa_bits", st)


cdef void* quantize_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef Attrs* a = <Attrs*>calloc(1, sizeof(Attrs))
    cdef TF_Status* st = tf.NewStatus()
    quantize_attrs(k, a, st)
    a.n_counts = int_attr(k, "n_counts", st)
    if tf.GetCode(st) == TF_OK and not 0 <= a.n_counts <= 1:
        tf.SetStatus(st, TF_INVALID_ARGUMENT, "n_counts must be 0 or 1")
    finish_create(k, st)
    return a


cdef void find_groups(Call* c, const Attrs* a, const Shape* shape, Quantize* z) noexcept nogil:
    """What shares an exponent."""
    cdef char text[300]
    if ok(c) and not 0 <= a.group_axes <= shape.rank:
        snprintf(text, sizeof(text), "group_axes must be from 0 to the rank of x; got %lld and "
                 "rank %d", <long long>a.group_axes, shape.rank)
        fail(c, text)
    if ok(c):
        z.groups = elements(shape.dim, <int>a.group_axes)
        z.n = elements(shape.dim + a.group_axes, shape.rank - <int>a.group_axes)


cdef void quantize_and_tell(Attrs* a, Quantize* z, const Shape* shape) noexcept nogil:
    """Quantizes, tells once if much is lost, and more to those who look."""
    quantize(z)
    if z.watching and much_is_lost(z.worst):
        a.told = tell_loss(a.site, z.worst)
    look(a, z, shape)


cdef void quantize_call(Call* c, const Attrs* a, Quantize* z, const Shape* shape, int output,
                        const void* step) noexcept nogil:
    """Fills in how, and where to: the outputs `output` and the next. What is quantized, and its
    groups, are there already."""
    z.bits, z.rounding = <int>a.a_bits, a.rounding
    z.key[0], z.key[1] = <uint32_t>a.seed, <uint32_t>a.tensor_id
    if ok(c):
        z.step = (<const uint64_t*>step)[0] if step != NULL else 0
        z.q = <int16_t*>set_output(c, output, TF_INT16, shape.dim, shape.rank)
        z.e = <int32_t*>set_output(c, output + 1, TF_INT32, shape.dim, <int>a.group_axes)
    z.counting, z.watching = a.n_counts, a.site[0] and a.watched and not a.told
    z.by_pieces = ok(c) and in_pieces(z)
    if z.by_pieces and (z.counting or z.watching):
        z.group_counts = <int64_t*>get_scratch(c, z.groups * 3 * sizeof(int64_t))


cdef void quantize_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Attrs* a = <Attrs*>attrs
    cdef Call c
    cdef Quantize z
    cdef Shape shape
    cdef Shape other
    cdef int64_t three = 3
    cdef int64_t* counts = NULL
    cdef int i, n, exponents = 0, steps = 0
    cdef void* data
    cdef const void* step = NULL
    memset(&z, 0, sizeof(z))
    open_call(&c, "DfpQuantize", context)
    z.x = <float*>get_input(&c, 0, "x", &shape)
    find_groups(&c, a, &shape, &z)
    # Both lists are optional and hold at most one tensor; what they are is seen by their type, and
    # an exponent (int32) comes before a step (int64).
    n = tf.NumInputs(context)
    for i in range(1, n):
        if exponents > 1 or steps > 1:
            break
        data = get_input(&c, i, "exponent or step", &other)
        if ok(&c):
            if tf.TensorType(c.held[c.held_count - 1]) == TF_INT32:
                z.given = <int32_t*>data
                exponents += 1
                if elements(other.dim, other.rank) != z.groups:
                    fail(&c, "exponent must hold one for each group")
            else:
                step = data
                steps += 1
                if other.rank != 0:
                    fail(&c, "step must be a scalar")
    if exponents > 1 or steps > 1:
        fail(&c, "exponent and step must hold at most one tensor each")
    quantize_call(&c, a, &z, &shape, 0, step)
    if ok(&c) and a.n_counts:
        counts = <int64_t*>set_output(&c, 2, TF_INT64, &three, 1)
    if ok(&c):
        quantize_and_tell(a, &z, &shape)
        if counts != NULL:
            memcpy(counts, z.counts, sizeof(z.counts))
    close_call(&c)


cdef void dequantize_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Call c
    cdef Shape shape
    cdef int16_t* q
    cdef Operand e
    cdef float* y = NULL
    open_call(&c, "DfpDequantize", context)
    q = <int16_t*>get_input(&c, 0, "q", &shape)
    get_exponents(&c, 1, "e", elements(shape.dim, shape.rank) if ok(&c) else 0, &e)
    if ok(&c):
        y = <float*>set_output(&c, 0, TF_FLOAT, shape.dim, shape.rank)
    if ok(&c):
        dequantize(q, e.e, e.count, elements(shape.dim, shape.rank), y)
    close_call(&c)


# ---- tokens --------------------------------------------------------------------------------------

cdef extern from *:
    """
    #include <sys/mman.h>

    static void *dfp_zero_pages[64];

    /* Read-only zeros, at least `bytes` of them, that take up addresses and no memory: the system
       maps them all to one page. They stay, for the next who asks. NULL if addresses ran out. */
    static void *dfp_zeros(size_t bytes) {
        int k = 16;
        while (k < 62 && ((size_t)1 << k) < bytes) k++;
        void *known = __atomic_load_n(&dfp_zero_pages[k], __ATOMIC_ACQUIRE);
        if (known) return known;
        void *made = mmap(NULL, (size_t)1 << k, PROT_READ,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (made == MAP_FAILED) return NULL;
        if (__atomic_compare_exchange_n(&dfp_zero_pages[k], &known, made, 0, __ATOMIC_ACQ_REL,
                                        __ATOMIC_ACQUIRE))
            return made;
        munmap(made, (size_t)1 << k);
        return known;
    }
    """
    void* dfp_zeros(size_t bytes) noexcept nogil


cdef void keep(void* data, size_t size, void* argument) noexcept nogil:
    """Frees nothing."""


cdef void token_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    cdef TF_ShapeHandle* q = tf.NewShapeHandle()
    tf.ShapeInferenceContextGetInput(c, 1, q, st)
    tf.ShapeInferenceContextSetOutput(c, 0, q, st)
    tf.DeleteShapeHandle(q)


cdef void token_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    """Zeros of the shape of q. TensorFlow writes into no memory that an op has not allocated."""
    cdef Call c
    cdef Shape shape
    cdef TF_Tensor* token
    cdef void* zeros
    cdef int64_t bytes
    open_call(&c, "DfpToken", context)
    get_input(&c, 1, "q", &shape)
    if ok(&c):
        bytes = elements(shape.dim, shape.rank) * size_of(TF_FLOAT)
        zeros = dfp_zeros(bytes)
        if zeros == NULL:
            fail(&c, "the process may not have as many addresses as its tensors need (ulimit -v)")
        else:
            token = hold(&c, tf.NewTensor(
                TF_FLOAT, shape.dim, shape.rank, zeros, bytes, keep, NULL))
            if token != NULL:
                tf.SetOutput(context, 0, token, c.status)
    close_call(&c)
