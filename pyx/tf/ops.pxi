# The TensorFlow ops: definition, static shapes, attributes and kernel of each. What an op means is
# said in docs/numerics.md; tokens are inputs for the sake of gradients and are never read.

# ---- static shapes -------------------------------------------------------------------------------

cdef void same_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    cdef TF_ShapeHandle* x = tf.NewShapeHandle()
    tf.ShapeInferenceContextGetInput(c, 0, x, st)
    tf.ShapeInferenceContextSetOutput(c, 0, x, st)
    tf.DeleteShapeHandle(x)


cdef void quantize_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    """How many axes the exponents have, an attribute says, which a C shape function cannot read:
    keras_dfp.native sets it."""
    cdef TF_ShapeHandle* unknown = tf.NewShapeHandle()
    same_shape(c, st)
    tf.ShapeInferenceContextSetOutput(c, 1, unknown, st)
    tf.DeleteShapeHandle(unknown)


cdef void unknown_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    """Of a token, whose gradient has the shape of the tensor it stands for."""
    cdef TF_ShapeHandle* unknown = tf.NewShapeHandle()
    tf.ShapeInferenceContextSetOutput(c, 0, unknown, st)
    tf.DeleteShapeHandle(unknown)


cdef void conv_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    """Batch and rank are known here; the rest follows from attributes, which a C shape function
    cannot read: keras_dfp.ops sets it."""
    cdef TF_ShapeHandle* x = tf.NewShapeHandle()
    cdef TF_ShapeHandle* w = tf.NewShapeHandle()
    cdef TF_ShapeHandle* unknown = tf.NewShapeHandle()
    cdef TF_ShapeHandle* n = tf.NewShapeHandle()
    cdef int64_t rank
    tf.ShapeInferenceContextGetInput(c, 0, x, st)
    tf.ShapeInferenceContextGetInput(c, 3, w, st)
    if tf.ShapeInferenceContextRankKnown(c, x) and tf.ShapeInferenceContextRankKnown(c, w):
        rank = tf.ShapeInferenceContextRank(c, x)
        if tf.ShapeInferenceContextRank(c, w) != rank or rank < 3 or rank > 5:
            tf.SetStatus(st, TF_INVALID_ARGUMENT, "DfpConv: x must be [batch, spatial.., channels] "
                         "and w [spatial.., channels, filters], both of rank 3, 4 or 5")
        else:
            tf.ShapeInferenceContextSubshape(c, x, 0, 1, n, st)
            tf.ShapeInferenceContextWithRank(c, unknown, rank - 1, unknown, st)
            tf.ShapeInferenceContextConcatenateShapes(c, n, unknown, unknown, st)
    if tf.GetCode(st) == TF_OK:
        tf.ShapeInferenceContextSetOutput(c, 0, unknown, st)
    tf.DeleteShapeHandle(x)
    tf.DeleteShapeHandle(w)
    tf.DeleteShapeHandle(unknown)
    tf.DeleteShapeHandle(n)


cdef void matmul_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    cdef TF_ShapeHandle* a = tf.NewShapeHandle()
    cdef TF_ShapeHandle* y = tf.NewShapeHandle()
    cdef TF_ShapeHandle* matrix = tf.NewShapeHandle()
    tf.ShapeInferenceContextGetInput(c, 0, a, st)
    if tf.ShapeInferenceContextRankKnown(c, a):
        tf.ShapeInferenceContextSubshape(
            c, a, 0, max(<int64_t>0, tf.ShapeInferenceContextRank(c, a) - 2), y, st)
        tf.ShapeInferenceContextWithRank(c, matrix, 2, matrix, st)
        tf.ShapeInferenceContextConcatenateShapes(c, y, matrix, y, st)
    if tf.GetCode(st) == TF_OK:
        tf.ShapeInferenceContextSetOutput(c, 0, y, st)
    tf.DeleteShapeHandle(a)
    tf.DeleteShapeHandle(y)
    tf.DeleteShapeHandle(matrix)


cdef void rank_of(TF_ShapeInferenceContext* c, int input, TF_Status* st) noexcept nogil:
    """Only the rank of a gradient is known here: its shape is the value of a tensor."""
    cdef TF_ShapeHandle* like = tf.NewShapeHandle()
    cdef TF_ShapeHandle* y = tf.NewShapeHandle()
    tf.ShapeInferenceContextGetInput(c, input, like, st)
    if tf.ShapeInferenceContextRankKnown(c, like):
        tf.ShapeInferenceContextWithRank(c, y, tf.ShapeInferenceContextRank(c, like), y, st)
    tf.ShapeInferenceContextSetOutput(c, 0, y, st)
    tf.DeleteShapeHandle(like)
    tf.DeleteShapeHandle(y)


cdef void conv_input_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    rank_of(c, 1, st)


cdef void conv_filter_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    rank_of(c, 0, st)


# ---- DfpQuantize, DfpDequantize, DfpToken --------------------------------------------------------

cdef void* quantize_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef Attrs* a = <Attrs*>calloc(1, sizeof(Attrs))
    cdef TF_Status* st = tf.NewStatus()
    cdef char rounding
    a.a_bits = int_attr(k, "mantissa_bits", st)
    a.seed = int_attr(k, "seed", st)
    a.tensor_id = int_attr(k, "tensor_id", st)
    a.group_axes = int_attr(k, "group_axes", st)
    a.n_counts = int_attr(k, "n_counts", st)
    text_attr(k, "site", a.site, sizeof(a.site), st)
    if tf.GetCode(st) == TF_OK and not 0 <= a.n_counts <= 1:
        tf.SetStatus(st, TF_INVALID_ARGUMENT, "n_counts must be 0 or 1")
    rounding = first_letter(k, "rounding", st)
    a.rounding = STOCHASTIC if rounding == c"s" else TRUNCATE if rounding == c"t" else NEAREST
    check_bits(a.a_bits, "mantissa_bits", st)
    finish_create(k, st)
    return a


cdef void check_bits(int64_t bits, const char* name, TF_Status* st) noexcept nogil:
    cdef char text[100]
    if tf.GetCode(st) == TF_OK and not 8 <= bits <= 16:
        snprintf(text, sizeof(text), "%s must be from 8 to 16; got %lld", name, <long long>bits)
        tf.SetStatus(st, TF_INVALID_ARGUMENT, text)


cdef void finish_create(TF_OpKernelConstruction* k, TF_Status* st) noexcept nogil:
    if tf.GetCode(st) != TF_OK:
        tf.OpKernelConstruction_Failure(k, st)
    tf.DeleteStatus(st)


cdef void quantize_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Attrs* a = <Attrs*>attrs
    cdef Call c
    cdef Quantize z
    cdef Shape shape
    cdef Shape other
    cdef int64_t three = 3
    cdef int64_t* counts = NULL
    cdef int i, n, exponents = 0, steps = 0
    cdef char text[300]
    cdef void* data
    open_call(&c, "DfpQuantize", context)
    z.x = <float*>get_input(&c, 0, "x", &shape)
    z.bits, z.rounding = <int>a.a_bits, a.rounding
    z.key[0], z.key[1] = <uint32_t>a.seed, <uint32_t>a.tensor_id
    z.given, z.step = NULL, 0
    if ok(&c) and not 0 <= a.group_axes <= shape.rank:
        snprintf(text, sizeof(text), "group_axes must be from 0 to the rank of x; got %lld and "
                 "rank %d", <long long>a.group_axes, shape.rank)
        fail(&c, text)
    if ok(&c):
        z.groups = elements(shape.dim, <int>a.group_axes)
        z.n = elements(shape.dim + a.group_axes, shape.rank - <int>a.group_axes)
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
                z.step = <uint64_t>(<int64_t*>data)[0]
                steps += 1
                if other.rank != 0:
                    fail(&c, "step must be a scalar")
    if exponents > 1 or steps > 1:
        fail(&c, "exponent and step must hold at most one tensor each")
    if ok(&c):
        z.q = <int16_t*>set_output(&c, 0, TF_INT16, shape.dim, shape.rank)
        z.e = <int32_t*>set_output(&c, 1, TF_INT32, shape.dim, <int>a.group_axes)
        if a.n_counts:
            counts = <int64_t*>set_output(&c, 2, TF_INT64, &three, 1)
    z.counting, z.watching = a.n_counts, a.site[0] and not a.told
    z.group_counts = NULL
    z.by_pieces = ok(&c) and in_pieces(&z)
    if z.by_pieces and (z.counting or z.watching):
        z.group_counts = <int64_t*>get_scratch(&c, z.groups * 3 * sizeof(int64_t))
    if ok(&c):
        quantize(&z)
        if counts != NULL:
            memcpy(counts, z.counts, sizeof(z.counts))
        if z.watching and much_is_lost(z.worst):
            a.told = tell_loss(a.site, z.worst)
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


cdef void token_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Call c
    cdef int64_t none = 0
    open_call(&c, "DfpToken", context)
    set_output(&c, 0, TF_FLOAT, &none, 1)
    close_call(&c)


# ---- DfpMatmul -----------------------------------------------------------------------------------

cdef void product_attrs(TF_OpKernelConstruction* k, Attrs* a, const char* a_bits,
                        const char* b_bits, TF_Status* st) noexcept nogil:
    a.a_bits = int_attr(k, a_bits, st)
    a.b_bits = int_attr(k, b_bits, st)
    a.spill = first_letter(k, "accumulation", st) == c"s"
    check_bits(a.a_bits, a_bits, st)
    check_bits(a.b_bits, b_bits, st)


cdef void* matmul_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef Attrs* a = <Attrs*>calloc(1, sizeof(Attrs))
    cdef TF_Status* st = tf.NewStatus()
    product_attrs(k, a, "a_bits", "b_bits", st)
    a.transpose_a = bool_attr(k, "transpose_a", st)
    a.transpose_b = bool_attr(k, "transpose_b", st)
    finish_create(k, st)
    return a


cdef void fail_shapes(Call* c, const char* message, const char* name1, const Shape* s1,
                      const char* name2, const Shape* s2) noexcept nogil:
    cdef char text[600]
    cdef char dims1[150]
    cdef char dims2[150]
    snprintf(text, sizeof(text), "%s; got %s of shape %s and %s of shape %s", message,
             name1, dfp_shape_text(s1.rank, s1.dim, dims1, sizeof(dims1)),
             name2, dfp_shape_text(s2.rank, s2.dim, dims2, sizeof(dims2)))
    fail(c, text)


cdef void matmul_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Attrs* t = <Attrs*>attrs
    cdef Call c
    cdef Gemm g
    cdef Shape a
    cdef Shape b
    cdef Shape y
    cdef int i
    cdef Operand ea, eb
    cdef char* scratch
    cdef char* room = NULL
    memset(&g, 0, sizeof(g))
    open_call(&c, "DfpMatmul", context)
    g.a.data = <int16_t*>get_input(&c, 0, "a", &a)
    g.b.data = <int16_t*>get_input(&c, 3, "b", &b)
    if ok(&c) and (a.rank < 2 or a.rank != b.rank):
        fail_shapes(&c, "a and b must be matrices, or batches of them, of the same rank",
                    "a", &a, "b", &b)
    if ok(&c):
        g.batch = elements(a.dim, a.rank - 2)
        y.rank = a.rank
        for i in range(a.rank - 2):
            y.dim[i] = a.dim[i]
            if a.dim[i] != b.dim[i]:
                fail_shapes(&c, "the batch dimensions of a and b differ", "a", &a, "b", &b)
        g.m = a.dim[a.rank - (1 if t.transpose_a else 2)]
        g.k = a.dim[a.rank - (2 if t.transpose_a else 1)]
        g.n = b.dim[b.rank - (2 if t.transpose_b else 1)]
        y.dim[y.rank - 2], y.dim[y.rank - 1] = g.m, g.n
        if b.dim[b.rank - (1 if t.transpose_b else 2)] != g.k:
            fail_shapes(&c, "the inner dimensions of a and b differ (after transposition)",
                        "a", &a, "b", &b)
    g.c = <float*>set_output(&c, 0, TF_FLOAT, y.dim, y.rank) if ok(&c) else NULL
    matrix_exponents(&c, 1, "a_exponent", &a, g.batch, &ea)
    matrix_exponents(&c, 4, "b_exponent", &b, g.batch, &eb)
    if ok(&c) and (ea.count > 1 or eb.count > 1):
        room = get_scratch(&c, exponent_bytes(g.batch, g.k))
    if ok(&c):
        resolve_exponents(&g.exponents, g.batch, &ea, g.m, t.transpose_a, &eb, g.n,
                          not t.transpose_b, g.k, t.b_bits, room)
        if g.exponents.all == NAN_EXPONENT:
            fill_nan(g.c, elements(y.dim, y.rank))
        else:
            g.a_bits, g.b_bits, g.spill = t.a_bits, t.b_bits + g.exponents.shifts.more, t.spill
            matmul_plan(&g, t.transpose_a, t.transpose_b)
            scratch = get_scratch(&c, scratch_bytes(&g))
            if ok(&c):
                gemm_run(&g, scratch)
    close_call(&c)


cdef void matrix_exponents(Call* c, int i, const char* name, const Shape* shape, int64_t batch,
                           Operand* out) noexcept nogil:
    """Those of a batch of matrices: for each group of matrices, or of rows of a matrix."""
    cdef int64_t rows
    cdef char text[300]
    if not ok(c):
        return
    rows = shape.dim[shape.rank - 2]
    get_exponents(c, i, name, batch * rows, out)
    if ok(c) and batch * rows and rows % out.per and out.per % rows:
        snprintf(text, sizeof(text), "the rows that share an exponent must be a part of a matrix, "
                 "or whole matrices; got %lld of %s for %lld matrices of %lld rows",
                 <long long>out.count, name, <long long>batch, <long long>rows)
        fail(c, text)


cdef inline void fill_nan(float* y, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        y[i] = NAN


# ---- DfpConv, DfpConvBackpropInput, DfpConvBackpropFilter ----------------------------------------

cdef void* conv_create_with(TF_OpKernelConstruction* k, const char* a_bits, const char* b_bits,
                            bint statistics) noexcept nogil:
    cdef Attrs* a = <Attrs*>calloc(1, sizeof(Attrs))
    cdef TF_Status* st = tf.NewStatus()
    cdef char padding
    cdef int i, dilations, pads
    cdef char text[300]
    product_attrs(k, a, a_bits, b_bits, st)
    a.rank = list_attr(k, "strides", a.stride, 3, st)
    dilations = list_attr(k, "dilations", a.dilation, 3, st)
    pads = list_attr(k, "explicit_paddings", a.explicit, 6, st)
    padding = first_letter(k, "padding", st)
    a.padding = SAME if padding == c"S" else EXPLICIT if padding == c"E" else VALID
    a.depthwise = bool_attr(k, "depthwise", st)
    a.n_statistics = int_attr(k, "n_statistics", st) if statistics else 0
    if tf.GetCode(st) == TF_OK:
        text[0] = 0
        if a.rank < 1 or dilations != a.rank:
            snprintf(text, sizeof(text), "strides and dilations must have one entry per spatial "
                     "dimension, 1 to 3; got %d and %d", a.rank, dilations)
        elif pads != (2 * a.rank if a.padding == EXPLICIT else 0):
            snprintf(text, sizeof(text), "explicit_paddings must have two entries per spatial "
                     "dimension with padding 'EXPLICIT', else none; got %d", pads)
        elif a.n_statistics != 0 and a.n_statistics != 4:
            snprintf(text, sizeof(text), "n_statistics must be 0 or 4; got %lld",
                     <long long>a.n_statistics)
        for i in range(a.rank):
            if not (1 <= a.stride[i] <= MOST and 1 <= a.dilation[i] <= MOST):
                snprintf(text, sizeof(text), "strides and dilations must be positive and below "
                         "2**31; got %lld and %lld in spatial dimension %d",
                         <long long>a.stride[i], <long long>a.dilation[i], i)
            if a.padding == EXPLICIT and not (0 <= a.explicit[2 * i] <= MOST
                                              and 0 <= a.explicit[2 * i + 1] <= MOST):
                snprintf(text, sizeof(text), "explicit_paddings must be from 0 to 2**31 - 1")
        if text[0]:
            tf.SetStatus(st, TF_INVALID_ARGUMENT, text)
    finish_create(k, st)
    return a


cdef void* conv_create(TF_OpKernelConstruction* k) noexcept nogil:
    return conv_create_with(k, "x_bits", "w_bits", True)


cdef void* conv_input_create(TF_OpKernelConstruction* k) noexcept nogil:
    return conv_create_with(k, "dy_bits", "w_bits", False)


cdef void* conv_filter_create(TF_OpKernelConstruction* k) noexcept nogil:
    return conv_create_with(k, "x_bits", "dy_bits", False)


cdef void conv_geometry(Call* c, const Attrs* t, const Shape* x, const Shape* w, Shape* y,
                        Conv* v) noexcept nogil:
    """Fills in the convolution of an input and a kernel of these shapes, and its output's shape."""
    cdef int i, d, n = t.rank
    cdef int64_t reach, total, filters, inner
    cdef char text[400]
    memset(v, 0, sizeof(Conv))
    y.rank = n + 2
    if ok(c) and (x.rank != n + 2 or w.rank != n + 2):
        fail_shapes(c, "the input must be [batch, spatial.., channels] and the kernel "
                    "[spatial.., channels, filters], with as many spatial dimensions as strides",
                    "input", x, "kernel", w)
    if not ok(c):
        return
    v.depthwise = t.depthwise
    v.batch, v.channels = x.dim[0], x.dim[n + 1]
    inner, filters = w.dim[n], w.dim[n + 1]
    if t.depthwise:
        if inner != v.channels:
            fail_shapes(c, "a depthwise kernel must have as many channels as the input",
                        "input", x, "kernel", w)
        v.filters, v.groups = inner * filters, max(v.channels, <int64_t>1)
    else:
        if v.channels == 0 and inner == 0:
            v.groups = 1
        elif inner == 0 or v.channels % inner:
            fail_shapes(c, "the input's channels must be a multiple of the kernel's",
                        "input", x, "kernel", w)
            return
        else:
            v.groups = v.channels // inner
        v.filters = filters
        if v.groups == 0 or filters % v.groups:
            fail_shapes(c, "the number of filters must be a multiple of the number of groups, "
                        "the input's channels over the kernel's", "input", x, "kernel", w)
    for i in range(3):
        v.input[i] = v.output[i] = v.kernel[i] = v.stride[i] = v.dilation[i] = 1
    y.dim[0], y.dim[n + 1] = v.batch, v.filters
    for i in range(n):
        d = 3 - n + i
        v.input[d], v.kernel[d] = x.dim[i + 1], w.dim[i]
        v.stride[d], v.dilation[d] = t.stride[i], t.dilation[i]
        if not 1 <= v.kernel[d] <= MOST:
            fail_shapes(c, "the kernel must not be empty, nor reach over 2**31 pixels", "input", x,
                        "kernel", w)
            return
        reach = (v.kernel[d] - 1) * v.dilation[d] + 1
        if t.padding == SAME:
            v.output[d] = (v.input[d] + v.stride[d] - 1) // v.stride[d]
            total = max(<int64_t>0, (v.output[d] - 1) * v.stride[d] + reach - v.input[d])
            v.pad[d] = total // 2
        else:
            total = 0
            if t.padding == EXPLICIT:
                v.pad[d] = t.explicit[2 * i]
                total = t.explicit[2 * i] + t.explicit[2 * i + 1]
            total += v.input[d] - reach + v.stride[d]
            if total < 0 and v.batch * v.channels > 0:
                snprintf(text, sizeof(text), "the kernel reaches over %lld pixels, more than the "
                         "padded input's %lld in spatial dimension %d", <long long>reach,
                         <long long>(total + reach - v.stride[d]), i)
                fail_shapes(c, text, "input", x, "kernel", w)
                return
            v.output[d] = max(<int64_t>0, total) // v.stride[d]
        y.dim[i + 1] = v.output[d]


cdef void check_output(Call* c, const Shape* dy, const Shape* expected) noexcept nogil:
    cdef int i
    cdef bint same = dy.rank == expected.rank
    if not ok(c):
        return
    for i in range(dy.rank):
        same = same and dy.dim[i] == expected.dim[i]
    if not same:
        fail_shapes(c, "dy must have the shape of the convolution's output", "dy", dy,
                    "output", expected)


cdef void sizes_input(Call* c, int i, const char* name, Shape* out) noexcept nogil:
    """A shape given as a vector of int32."""
    cdef Shape shape
    cdef int32_t* data = <int32_t*>get_input(c, i, name, &shape)
    cdef char text[200]
    cdef int d
    if ok(c) and (shape.rank != 1 or shape.dim[0] > MAX_RANK):
        snprintf(text, sizeof(text), "%s must be a vector, a shape", name)
        fail(c, text)
    if ok(c):
        out.rank = <int>shape.dim[0]
        for d in range(out.rank):
            out.dim[d] = data[d]
            if data[d] < 0:
                snprintf(text, sizeof(text), "%s must not be negative", name)
                fail(c, text)


cdef void image_exponents(Call* c, const Conv* v, Pass which, const Operand* a,
                          const Operand* b, Exponents* x) noexcept nogil:
    """Those of a pass. Its rows or, of a weight gradient, its products, are counted in images."""
    cdef char* room = NULL
    cdef int64_t along_k = v.batch if which == WEIGHT_GRADIENT else 1
    if a.count > 1 or b.count > 1:
        room = get_scratch(c, exponent_bytes(1, v.batch))
    if not ok(c):
        return
    resolve_exponents(x, 1, a, v.batch, which == WEIGHT_GRADIENT, b, 1, which == WEIGHT_GRADIENT,
                      along_k, v.b_bits, room)
    # What holds for the only item, holds for all groups of channels.
    x.all, x.items = item_exponent(x, 0), NULL
    x.row.item = x.shifts.item = 0


cdef void run_conv(Call* c, const Attrs* t, Conv* v, Pass which, const int16_t* a,
                   const Operand* ea, const int16_t* b, const Operand* eb, float* out,
                   int64_t n) noexcept nogil:
    cdef Depthwise z
    cdef Gemm g
    cdef char* scratch
    cdef int64_t phase[3]
    if not ok(c) or n == 0:
        return
    v.a_bits, v.b_bits, v.spill = t.a_bits, t.b_bits, t.spill
    image_exponents(c, v, which, ea, eb, &v.exponents)
    if not ok(c):
        return
    v.b_bits += v.exponents.shifts.more
    if v.exponents.all == NAN_EXPONENT:
        fill_nan(out, n)
    elif v.batch * volume(v.output) == 0 or v.channels == 0 or v.filters == 0:
        clear_images(v, which, out, n)
    elif by_channel(v, which):
        depthwise_plan(&z, v, which, a, b, out)
        scratch = get_scratch(c, depthwise_bytes(&z))
        if ok(c):
            depthwise_run(&z, scratch)
    elif which == INPUT_GRADIENT:
        for phase[0] in range(min(v.stride[0], v.input[0])):
            for phase[1] in range(min(v.stride[1], v.input[1])):
                for phase[2] in range(min(v.stride[2], v.input[2])):
                    input_gradient_plan(v, &g, phase, a, b, out)
                    scratch = get_scratch(c, scratch_bytes(&g))
                    if not ok(c):
                        return
                    gemm_run(&g, scratch)
                    tf.DeleteTensor(c.held[c.held_count - 1])
                    c.held_count -= 1
    else:
        if which == FORWARD:
            forward_plan(v, &g, a, b, out)
        else:
            weight_gradient_plan(v, &g, a, b, out)
        scratch = get_scratch(c, scratch_bytes(&g))
        if ok(c):
            gemm_run(&g, scratch)


cdef void clear_images(const Conv* v, Pass which, float* out, int64_t n) noexcept nogil:
    """Empty sums are zero, or NaN."""
    cdef int64_t i
    memset(out, 0, n * sizeof(float))
    if which != WEIGHT_GRADIENT and v.batch:
        n //= v.batch
        for i in range(v.batch):
            if row_exponent(&v.exponents, 0, i) == NAN_EXPONENT:
                fill_nan(out + i * n, n)


cdef void conv_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Attrs* t = <Attrs*>attrs
    cdef Call c
    cdef Conv v
    cdef Shape x
    cdef Shape w
    cdef Shape y
    cdef const int16_t* qx
    cdef const int16_t* qw
    cdef Operand ex, ew
    cdef float* out
    open_call(&c, "DfpConv", context)
    qx = <int16_t*>get_input(&c, 0, "x", &x)
    qw = <int16_t*>get_input(&c, 3, "w", &w)
    conv_geometry(&c, t, &x, &w, &y, &v)
    get_exponents(&c, 1, "x_exponent", v.batch, &ex)
    get_exponents(&c, 4, "w_exponent", 1, &ew)
    out = <float*>set_output(&c, 0, TF_FLOAT, y.dim, y.rank) if ok(&c) else NULL
    run_conv(&c, t, &v, FORWARD, qx, &ex, qw, &ew, out, elements(y.dim, y.rank) if ok(&c) else 0)
    if t.n_statistics:
        conv_statistics(&c, &v, out)
    close_call(&c)


cdef void conv_statistics(Call* c, const Conv* v, const float* y) noexcept nogil:
    cdef Statistics s
    cdef int i
    cdef char* scratch
    cdef double* out[4]
    for i in range(4):
        out[i] = <double*>set_output(c, 1 + i, TF_DOUBLE, &v.filters, 1)
    statistics_plan(&s, y, v.batch * v.output[0] * v.output[1], v.output[2], v.filters)
    scratch = get_scratch(c, s.bytes)
    if ok(c):
        statistics_run(&s, scratch, out[0], out[1], out[2], out[3])


cdef void conv_input_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Attrs* t = <Attrs*>attrs
    cdef Call c
    cdef Conv v
    cdef Shape x
    cdef Shape w
    cdef Shape y
    cdef Shape dy
    cdef const int16_t* qw
    cdef const int16_t* qdy
    cdef Operand ew, edy
    cdef float* out
    open_call(&c, "DfpConvBackpropInput", context)
    sizes_input(&c, 0, "input_sizes", &x)
    qw = <int16_t*>get_input(&c, 1, "w", &w)
    qdy = <int16_t*>get_input(&c, 4, "dy", &dy)
    conv_geometry(&c, t, &x, &w, &y, &v)
    check_output(&c, &dy, &y)
    get_exponents(&c, 2, "w_exponent", 1, &ew)
    get_exponents(&c, 5, "dy_exponent", v.batch, &edy)
    out = <float*>set_output(&c, 0, TF_FLOAT, x.dim, x.rank) if ok(&c) else NULL
    run_conv(&c, t, &v, INPUT_GRADIENT, qdy, &edy, qw, &ew, out,
             elements(x.dim, x.rank) if ok(&c) else 0)
    close_call(&c)


cdef void conv_filter_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Attrs* t = <Attrs*>attrs
    cdef Call c
    cdef Conv v
    cdef Shape x
    cdef Shape w
    cdef Shape y
    cdef Shape dy
    cdef const int16_t* qx
    cdef const int16_t* qdy
    cdef Operand ex, edy
    cdef float* out
    open_call(&c, "DfpConvBackpropFilter", context)
    qx = <int16_t*>get_input(&c, 0, "x", &x)
    sizes_input(&c, 3, "filter_sizes", &w)
    qdy = <int16_t*>get_input(&c, 4, "dy", &dy)
    conv_geometry(&c, t, &x, &w, &y, &v)
    check_output(&c, &dy, &y)
    get_exponents(&c, 1, "x_exponent", v.batch, &ex)
    get_exponents(&c, 5, "dy_exponent", v.batch, &edy)
    out = <float*>set_output(&c, 0, TF_FLOAT, w.dim, w.rank) if ok(&c) else NULL
    run_conv(&c, t, &v, WEIGHT_GRADIENT, qx, &ex, qdy, &edy, out,
             elements(w.dim, w.rank) if ok(&c) else 0)
    close_call(&c)


# ---- registration --------------------------------------------------------------------------------

cdef extern from *:
    """
    #define DFP_OPERAND(name) name ": int16", name "_exponent: int32", name "_token: float"
    #define DFP_PRODUCT_ATTRS  \\
        "accumulation: {'exact', 'spill'} = 'exact'",  \\
        "rounding: {'nearest', 'truncate', 'stochastic'} = 'nearest'",  \\
        "input_gradient: {'dfp', 'float32'} = 'dfp'",  \\
        "weight_gradient: {'dfp', 'float32'} = 'dfp'",  \\
        "exponents: {'sample', 'tensor'} = 'sample'"
    #define DFP_CONV_ATTRS  \\
        "x_bits: int >= 8 = 14", "w_bits: int >= 8 = 14", "dy_bits: int >= 8 = 14",  \\
        "strides: list(int)", "padding: {'VALID', 'SAME', 'EXPLICIT'} = 'VALID'",  \\
        "explicit_paddings: list(int) = []", "dilations: list(int)", "depthwise: bool = false",  \\
        DFP_PRODUCT_ATTRS

    typedef struct {
        const char *name;
        const char *inputs[8];
        const char *outputs[4];
        const char *attrs[20];
    } dfp_op_def;

    static const dfp_op_def dfp_ops[] = {
        {"DfpQuantize",
         {"x: float", "exponent: n_exponent * int32", "step: n_step * int64"},
         {"q: int16", "e: int32", "counts: n_counts * int64"},
         {"mantissa_bits: int >= 8 = 14",
          "rounding: {'nearest', 'truncate', 'stochastic'} = 'nearest'",
          "seed: int = 0", "tensor_id: int = 0",
          "group_axes: int >= 0 = 0", "site: string = ''", "n_counts: int >= 0 = 0",
          "n_exponent: int >= 0 = 0", "n_step: int >= 0 = 0"}},
        {"DfpDequantize", {"q: int16", "e: int32", "token: float"}, {"y: float"}, {0}},
        {"DfpToken", {"x: float"}, {"token: float"}, {"perm: list(int) = []"}},
        {"DfpMatmul", {DFP_OPERAND("a"), DFP_OPERAND("b")}, {"y: float"},
         {"a_bits: int >= 8 = 14", "b_bits: int >= 8 = 14", "dy_bits: int >= 8 = 14",
          "transpose_a: bool = false", "transpose_b: bool = false", DFP_PRODUCT_ATTRS}},
        {"DfpConv", {DFP_OPERAND("x"), DFP_OPERAND("w")},
         {"y: float", "statistics: n_statistics * double"},
         {DFP_CONV_ATTRS, "n_statistics: int >= 0 = 0"}},
        {"DfpConvBackpropInput", {"input_sizes: int32", DFP_OPERAND("w"), DFP_OPERAND("dy")},
         {"dx: float"}, {DFP_CONV_ATTRS}},
        {"DfpConvBackpropFilter",
         {DFP_OPERAND("x"), "filter_sizes: int32", DFP_OPERAND("dy")},
         {"dw: float"}, {DFP_CONV_ATTRS}},
    };
    """
    ctypedef struct dfp_op_def:
        const char* name
        const char** inputs
        const char** outputs
        const char** attrs
    const dfp_op_def* dfp_ops


cdef void register_op(int i, shape_fn shape, create_fn create, compute_fn compute,
                      TF_Status* st) noexcept nogil:
    cdef const dfp_op_def* op = &dfp_ops[i]
    cdef TF_OpDefinitionBuilder* b = tf.NewOpDefinitionBuilder(op.name)
    cdef delete_fn delete = NULL
    cdef int k
    if create != NULL:
        delete = free
    k = 0
    while op.inputs[k] != NULL:
        tf.OpDefinitionBuilderAddInput(b, op.inputs[k])
        k += 1
    k = 0
    while op.outputs[k] != NULL:
        tf.OpDefinitionBuilderAddOutput(b, op.outputs[k])
        k += 1
    k = 0
    while op.attrs[k] != NULL:
        tf.OpDefinitionBuilderAddAttr(b, op.attrs[k])
        k += 1
    tf.OpDefinitionBuilderSetShapeInferenceFunction(b, shape)
    tf.RegisterOpDefinition(b, st)
    if tf.GetCode(st) == TF_OK:
        tf.RegisterKernelBuilder(op.name, tf.NewKernelBuilder(
            op.name, "CPU", create, compute, delete), st)


cdef bint register_all() noexcept nogil:
    """Registers every op; the order is that of dfp_ops."""
    cdef TF_Status* st = tf.NewStatus()
    cdef bint good
    register_op(0, quantize_shape, quantize_create, quantize_compute, st)
    register_op(1, same_shape, NULL, dequantize_compute, st)
    register_op(2, unknown_shape, NULL, token_compute, st)
    register_op(3, matmul_shape, matmul_create, matmul_compute, st)
    register_op(4, conv_shape, conv_create, conv_compute, st)
    register_op(5, conv_input_shape, conv_input_create, conv_input_compute, st)
    register_op(6, conv_filter_shape, conv_filter_create, conv_filter_compute, st)
    good = tf.GetCode(st) == TF_OK
    tf.DeleteStatus(st)
    return good
