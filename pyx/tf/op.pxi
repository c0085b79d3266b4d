# What defines a TensorFlow op: its signature, static shapes, attributes and kernel. Each file of
# ops registers its own; what an op means is said in docs/numerics.md. Tokens are inputs for the
# sake of gradients and are never read.

# ---- registration --------------------------------------------------------------------------------

cdef extern from *:
    """
    #define DFP_OPERAND(name) name ": int16; " name "_exponent: int32; " name "_token: float"
    #define DFP_PRODUCT_ATTRS  \\
        "accumulation: {'exact', 'spill'} = 'exact'; "  \\
        "rounding: {'nearest', 'truncate', 'stochastic'} = 'nearest'; "  \\
        "input_gradient: {'dfp', 'float32'} = 'dfp'; "  \\
        "weight_gradient: {'dfp', 'float32'} = 'dfp'; "  \\
        "exponents: {'sample', 'tensor'} = 'sample'; fused: bool = true; "  \\
        "site: string = ''; "  \\
        "product: {'forward', 'input_gradient', 'weight_gradient'} = 'forward'"
    #define DFP_CLIP_ATTR "clip: {'none', 'relu', 'relu6'} = 'none'"
    #define DFP_QUANTIZE_ATTRS  \\
        "mantissa_bits: int >= 8 = 14; "  \\
        "rounding: {'nearest', 'truncate', 'stochastic'} = 'nearest'; "  \\
        "seed: int = 0; tensor_id: int = 0; group_axes: int >= 0 = 0; "  \\
        "site: string = ''; role: {'activation', 'weight', 'gradient'} = 'activation'; "  \\
        "watched: bool = true"
    """

ctypedef void (*add_fn)(TF_OpDefinitionBuilder*, const char*) noexcept nogil


cdef void register_op(const char* name, const char* signature, shape_fn shape, create_fn create,
                      compute_fn compute, TF_Status* st) noexcept nogil:
    """Registers an op and its kernel; `signature` is "inputs -> outputs | attributes", each part a
    list separated by semicolons."""
    cdef TF_OpDefinitionBuilder* b = tf.NewOpDefinitionBuilder(name)
    cdef add_fn add = tf.OpDefinitionBuilderAddInput
    cdef delete_fn delete = NULL
    cdef char part[200]
    cdef int n = 0
    cdef const char* at = signature
    if create != NULL:
        delete = free
    while True:
        if at[0] == c";" or at[0] == c"|" or at[0] == 0 or (at[0] == c"-" and at[1] == c">"):
            while n and part[n - 1] == c" ":
                n -= 1
            part[n] = 0
            if n:
                add(b, part)
            n = 0
            if at[0] == 0:
                break
            if at[0] == c"-":
                add = tf.OpDefinitionBuilderAddOutput
                at += 1
            elif at[0] == c"|":
                add = tf.OpDefinitionBuilderAddAttr
        elif (n or at[0] != c" ") and n < <int>sizeof(part) - 1:
            part[n] = at[0]
            n += 1
        at += 1
    tf.OpDefinitionBuilderSetShapeInferenceFunction(b, shape)
    tf.RegisterOpDefinition(b, st)
    if tf.GetCode(st) == TF_OK:
        tf.RegisterKernelBuilder(
            name, tf.NewKernelBuilder(name, "CPU", create, compute, delete), st)


# ---- static shapes -------------------------------------------------------------------------------

# A new handle is no shape, not even an unknown one: as an output it fails every `IdentityN` that
# reads it, and there is one in every optimizer. An output whose shape may be unknown is first set
# to that. It is where Python's `set_shape` is lost: in a graph that is called as a function.

cdef void same_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    """The first output has the first input's shape; Python sets the others'."""
    cdef TF_ShapeHandle* x = tf.NewShapeHandle()
    tf.ShapeInferenceContextSetUnknownShape(c, st)
    tf.ShapeInferenceContextGetInput(c, 0, x, st)
    tf.ShapeInferenceContextSetOutput(c, 0, x, st)
    tf.DeleteShapeHandle(x)


cdef void rank_of(TF_ShapeInferenceContext* c, int input, TF_Status* st) noexcept nogil:
    """Only the rank of a gradient is known here: its shape is the value of a tensor."""
    cdef TF_ShapeHandle* like = tf.NewShapeHandle()
    cdef TF_ShapeHandle* y = tf.NewShapeHandle()
    tf.ShapeInferenceContextSetUnknownShape(c, st)
    tf.ShapeInferenceContextGetInput(c, input, like, st)
    if tf.ShapeInferenceContextRankKnown(c, like):
        tf.ShapeInferenceContextWithRank(c, y, tf.ShapeInferenceContextRank(c, like), y, st)
        tf.ShapeInferenceContextSetOutput(c, 0, y, st)
    tf.DeleteShapeHandle(like)
    tf.DeleteShapeHandle(y)


# ---- attributes, errors --------------------------------------------------------------------------

cdef void check_bits(int64_t bits, const char* name, TF_Status* st) noexcept nogil:
    cdef char text[100]
    if tf.GetCode(st) == TF_OK and not 8 <= bits <= 16:
        snprintf(text, sizeof(text), "%s must be from 8 to 16; got %lld", name, <long long>bits)
        tf.SetStatus(st, TF_INVALID_ARGUMENT, text)


cdef void finish_create(TF_OpKernelConstruction* k, TF_Status* st) noexcept nogil:
    if tf.GetCode(st) != TF_OK:
        tf.OpKernelConstruction_Failure(k, st)
    tf.DeleteStatus(st)


cdef void product_attrs(TF_OpKernelConstruction* k, Attrs* a, const char* a_bits,
                        const char* b_bits, TF_Status* st) noexcept nogil:
    a.a_bits = int_attr(k, a_bits, st)
    a.b_bits = int_attr(k, b_bits, st)
    a.spill = first_letter(k, "accumulation", st) == c"s"
    product_site_attrs(k, a, st)
    check_bits(a.a_bits, a_bits, st)
    check_bits(a.b_bits, b_bits, st)


cdef Clip clip_attr(TF_OpKernelConstruction* k, const char* name, TF_Status* st) noexcept nogil:
    cdef Clip clip
    cdef char text[32]
    text_attr(k, name, text, sizeof(text), st)
    clip.low, clip.high = -INFINITY, INFINITY
    if text[0] == c"r":
        clip.low = 0
        if text[4] == c"6":
            clip.high = 6
    return clip


cdef void bias_attrs(TF_OpKernelConstruction* k, Attrs* a) noexcept nogil:
    """Of a product that adds a bias."""
    cdef TF_Status* st = tf.NewStatus()
    a.bias = True
    a.clip = clip_attr(k, "clip", st)
    finish_create(k, st)


cdef void fail_shapes(Call* c, const char* message, const char* name1, const Shape* s1,
                      const char* name2, const Shape* s2) noexcept nogil:
    cdef char text[600]
    cdef char dims1[150]
    cdef char dims2[150]
    snprintf(text, sizeof(text), "%s; got %s of shape %s and %s of shape %s", message,
             name1, dfp_shape_text(s1.rank, s1.dim, dims1, sizeof(dims1)),
             name2, dfp_shape_text(s2.rank, s2.dim, dims2, sizeof(dims2)))
    fail(c, text)


cdef inline bint same_dims(const Shape* a, const Shape* b) noexcept nogil:
    return a.rank == b.rank and memcmp(a.dim, b.dim, a.rank * sizeof(int64_t)) == 0


cdef inline void fill_nan(float* y, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        y[i] = NAN


cdef const void* sized_input(Call* c, int i, const char* name, int64_t size) noexcept nogil:
    """An input that must have so many elements."""
    cdef Shape shape
    cdef char text[200]
    cdef const void* data = get_input(c, i, name, &shape)
    if ok(c) and elements(shape.dim, shape.rank) != size:
        snprintf(text, sizeof(text), "%s must have %lld elements; got %lld", name,
                 <long long>size, <long long>elements(shape.dim, shape.rank))
        fail(c, text)
    return data
