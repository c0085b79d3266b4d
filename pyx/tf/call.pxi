# What every TensorFlow kernel needs: inputs and outputs that are released at the end, scratch, and
# errors that say op, argument, what was received and what would be right.

cdef enum:
    MAX_RANK = 16
    MAX_HELD = 32
    MOST = 2147483647       # of a kernel's size, stride, dilation or padding: products of two fit

cdef struct Shape:
    int rank
    int64_t dim[MAX_RANK]

# One run of a kernel.
cdef struct Call:
    const char* op
    TF_OpKernelContext* context
    TF_Status* status
    int held_count
    TF_Tensor* held[MAX_HELD]
    bint failed
    float_env env               # the thread's own: between open_call and close_call, the default

cdef extern from *:
    """
    #include <stdarg.h>
    #include <stdio.h>

    /* "[2,3,4]" */
    static const char *dfp_shape_text(int rank, const int64_t *dim, char *out, size_t size) {
        size_t at = (size_t)snprintf(out, size, "[");
        for (int i = 0; i < rank && at < size; i++)
            at += (size_t)snprintf(out + at, size - at, i ? ",%lld" : "%lld", (long long)dim[i]);
        if (at < size) snprintf(out + at, size - at, "]");
        return out;
    }
    """
    const char* dfp_shape_text(int rank, const int64_t* dim, char* out, size_t size) noexcept nogil

cdef extern from *:
    """
    /* TensorFlow's allocators hand memory on from an op to the next, on whatever thread, under
       locks that ThreadSanitizer does not see. All that an op did happens before what another one
       does with memory that it gets after that. */
    #if defined(__has_feature)
    #if __has_feature(thread_sanitizer)
    void __tsan_acquire(void *);
    void __tsan_release(void *);
    static char dfp_memory;
    #define DFP_TAKE_OVER() __tsan_acquire(&dfp_memory)
    #define DFP_HAND_ON() __tsan_release(&dfp_memory)
    #endif
    #endif
    #ifndef DFP_HAND_ON
    #define DFP_TAKE_OVER() ((void)0)
    #define DFP_HAND_ON() ((void)0)
    #endif
    """
    void take_over "DFP_TAKE_OVER"() noexcept nogil
    void hand_on "DFP_HAND_ON"() noexcept nogil


cdef void open_call(Call* c, const char* op, TF_OpKernelContext* context) noexcept nogil:
    c.op, c.context, c.status = op, context, tf.NewStatus()
    c.held_count, c.failed, c.env = 0, False, dfp_float_default()
    take_over()


cdef void close_call(Call* c) noexcept nogil:
    cdef int i
    if c.failed or tf.GetCode(c.status) != TF_OK:
        tf.OpKernelContext_Failure(c.context, c.status)
    hand_on()
    for i in range(c.held_count):
        tf.DeleteTensor(c.held[i])
    tf.DeleteStatus(c.status)
    dfp_float_restore(c.env)


cdef inline bint ok(Call* c) noexcept nogil:
    return not c.failed and tf.GetCode(c.status) == TF_OK


cdef void fail(Call* c, const char* message) noexcept nogil:
    cdef char text[700]
    if ok(c):
        snprintf(text, sizeof(text), "%s: %s", c.op, message)
        tf.SetStatus(c.status, TF_INVALID_ARGUMENT, text)
        c.failed = True


cdef inline TF_Tensor* hold(Call* c, TF_Tensor* t) noexcept nogil:
    """Has it released in the end. There is room for all that an op has and takes."""
    if t == NULL:
        return t
    if c.held_count == MAX_HELD:
        tf.DeleteTensor(t)
        fail(c, "more tensors than it has room for")
        return NULL
    c.held[c.held_count] = t
    c.held_count += 1
    return t


cdef void* get_input(Call* c, int i, const char* name, Shape* shape) noexcept nogil:
    """Input i's data, and its shape if `shape` is not NULL."""
    cdef TF_Tensor* t = NULL
    cdef char text[200]
    cdef int d
    if not ok(c):
        return NULL
    tf.GetInput(c.context, i, &t, c.status)
    if hold(c, t) == NULL:
        return NULL
    if shape != NULL:
        shape.rank = tf.NumDims(t)
        if shape.rank > MAX_RANK:
            snprintf(text, sizeof(text), "%s has %d dimensions; at most %d are supported",
                     name, shape.rank, MAX_RANK)
            fail(c, text)
            return NULL
        for d in range(shape.rank):
            shape.dim[d] = tf.Dim(t, d)
        check_sizes(c, name, shape)
    return tf.TensorData(t)


cdef void check_sizes(Call* c, const char* name, const Shape* shape) noexcept nogil:
    """Those of an empty tensor may be anything; here their products stay within an int64."""
    cdef char text[400]
    cdef char dims[200]
    if ok(c) and elements(shape.dim, shape.rank) < 0:
        snprintf(text, sizeof(text), "%s must have sizes that are not negative and multiply, but "
                 "for zeros, to less than 2**61; got shape %s", name,
                 dfp_shape_text(shape.rank, shape.dim, dims, sizeof(dims)))
        fail(c, text)


cdef void get_exponents(Call* c, int i, const char* name, int64_t rows,
                        Operand* out) noexcept nogil:
    """The exponents of an operand whose rows number so many: as many as divide them, in order."""
    cdef Shape shape
    cdef char text[400]
    cdef char dims[200]
    out.e = <const int32_t*>get_input(c, i, name, &shape)
    if not ok(c):
        return
    out.count = elements(shape.dim, shape.rank)
    if rows == 0 or out.count == 1:
        # Nothing is looked up where there are no rows.
        out.per = max(rows, <int64_t>1)
        if out.count != 1:
            out.e, out.count = &no_exponent, 1
    elif out.count == 0 or rows % out.count:
        snprintf(text, sizeof(text), "%s must hold one exponent, or one for each group of rows: a "
                 "number that divides %lld; got shape %s", name, <long long>rows,
                 dfp_shape_text(shape.rank, shape.dim, dims, sizeof(dims)))
        fail(c, text)
    else:
        out.per = rows // out.count


cdef int32_t no_exponent


cdef inline int64_t elements(const int64_t* dim, int rank) noexcept nogil:
    """The number of elements, or -1 if a dimension is negative or those that are not zero multiply
    to 2**61 or more: so the product of any of them is safe."""
    cdef int64_t n = 1
    cdef bint empty = False
    cdef int i
    for i in range(rank):
        if dim[i] < 0:
            return -1
        if dim[i] == 0:
            empty = True
        elif n > ((<int64_t>1 << 61) - 1) // dim[i]:
            return -1
        else:
            n *= dim[i]
    return 0 if empty else n


cdef inline int64_t size_of(int dtype) noexcept nogil:
    return 8 if dtype == TF_DOUBLE or dtype == TF_INT64 else 2 if dtype == TF_INT16 else 4


cdef void* set_output(Call* c, int i, int dtype, const int64_t* dim, int rank) noexcept nogil:
    cdef char text[400]
    cdef char dims[200]
    cdef int64_t n = elements(dim, rank)
    if not ok(c):
        return NULL
    if n < 0:
        snprintf(text, sizeof(text), "the result would have shape %s, larger than is supported",
                 dfp_shape_text(rank, dim, dims, sizeof(dims)))
        fail(c, text)
        return NULL
    cdef TF_Tensor* t = hold(
        c, tf.AllocateOutput(c.context, i, dtype, dim, rank, n * size_of(dtype), c.status))
    take_over()
    return tf.TensorData(t) if t != NULL else NULL


cdef extern from *:
    """
    static int64_t dfp_most_scratch;
    static void dfp_note_scratch(int64_t bytes) {
        int64_t most = __atomic_load_n(&dfp_most_scratch, __ATOMIC_RELAXED);
        while (bytes > most &&
               !__atomic_compare_exchange_n(&dfp_most_scratch, &most, bytes, 1, __ATOMIC_RELAXED,
                                            __ATOMIC_RELAXED)) {}
    }
    static int64_t dfp_take_most_scratch(void) {
        return __atomic_exchange_n(&dfp_most_scratch, 0, __ATOMIC_RELAXED);
    }
    """
    void dfp_note_scratch(int64_t bytes) noexcept nogil
    int64_t dfp_take_most_scratch() noexcept nogil


def most_scratch():
    """Returns the bytes of the largest scratch that an op took since this was asked last."""
    return dfp_take_most_scratch()


cdef char* get_scratch(Call* c, int64_t bytes) noexcept nogil:
    cdef TF_AllocatorAttributes where
    cdef TF_Tensor* t
    if not ok(c):
        return NULL
    dfp_note_scratch(bytes)
    where.struct_size = sizeof(TF_AllocatorAttributes)
    where.on_host = 1
    t = hold(c, tf.AllocateTemp(c.context, TF_UINT8, &bytes, 1, &where, c.status))
    take_over()
    return <char*>tf.TensorData(t) if t != NULL else NULL


cdef void give_back_scratch(Call* c) noexcept nogil:
    """Gives back the last that was got, before the op ends."""
    hand_on()
    c.held_count -= 1
    tf.DeleteTensor(c.held[c.held_count])


# ---- attributes ----------------------------------------------------------------------------------

cdef enum Padding:
    VALID
    SAME
    EXPLICIT

cdef struct Attrs:
    int64_t a_bits, b_bits          # of the two operands in the order of the op's inputs
    bint spill
    bint bias                       # is there one, after the operands,
    Clip clip                       # of what it is added to?
    Rounding rounding               # of DfpQuantize
    int64_t seed, tensor_id, group_axes, n_counts
    char site[200]                  # whose numbers these are, or empty
    int kind                        # of them, see statistics.pxi
    bint watched                    # is a loss to be told?
    int told                        # has it been?
    bint transpose_a, transpose_b   # of DfpMatmul
    int rank                        # of the convolutions: spatial dimensions
    int64_t stride[3]
    int64_t dilation[3]
    int64_t explicit[6]
    Padding padding
    bint depthwise


cdef inline int64_t int_attr(TF_OpKernelConstruction* k, const char* name,
                             TF_Status* st) noexcept nogil:
    cdef int64_t v = 0
    if tf.GetCode(st) == TF_OK:
        tf.OpKernelConstruction_GetAttrInt64(k, name, &v, st)
    return v


cdef inline float float_attr(TF_OpKernelConstruction* k, const char* name,
                             TF_Status* st) noexcept nogil:
    cdef float v = 0
    if tf.GetCode(st) == TF_OK:
        tf.OpKernelConstruction_GetAttrFloat(k, name, &v, st)
    return v


cdef inline bint bool_attr(TF_OpKernelConstruction* k, const char* name,
                           TF_Status* st) noexcept nogil:
    cdef unsigned char v = 0
    if tf.GetCode(st) == TF_OK:
        tf.OpKernelConstruction_GetAttrBool(k, name, &v, st)
    return v != 0


cdef inline char first_letter(TF_OpKernelConstruction* k, const char* name,
                              TF_Status* st) noexcept nogil:
    cdef char text[32]
    text[0] = 0
    if tf.GetCode(st) == TF_OK:
        tf.OpKernelConstruction_GetAttrString(k, name, text, 32, st)
    return text[0]


cdef void text_attr(TF_OpKernelConstruction* k, const char* name, char* text, int size,
                    TF_Status* st) noexcept nogil:
    """Reads a string, cut off where there is no more room."""
    cdef int32_t n = 0, total = 0
    memset(text, 0, size)
    if tf.GetCode(st) == TF_OK:
        tf.OpKernelConstruction_GetAttrSize(k, name, &n, &total, st)
    if tf.GetCode(st) == TF_OK and total > 0:
        tf.OpKernelConstruction_GetAttrString(k, name, text, min(total, size - 1), st)


cdef int list_attr(TF_OpKernelConstruction* k, const char* name, int64_t* values, int most,
                   TF_Status* st) noexcept nogil:
    """Reads a list of at most `most` integers and returns its length."""
    cdef int32_t n = 0, total = 0
    cdef char text[200]
    if tf.GetCode(st) != TF_OK:
        return 0
    tf.OpKernelConstruction_GetAttrSize(k, name, &n, &total, st)
    if tf.GetCode(st) == TF_OK and n > most:
        snprintf(text, sizeof(text), "%s must have at most %d entries; got %d", name, most, n)
        tf.SetStatus(st, TF_INVALID_ARGUMENT, text)
    if tf.GetCode(st) == TF_OK and n > 0:
        tf.OpKernelConstruction_GetAttrInt64List(k, name, values, n, st)
    return n
