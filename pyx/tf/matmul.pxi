# DfpMatmul; DfpMatmulBias, which fusion puts in its place where a bias is added (it has no
# gradient).

cdef void register_matmul(TF_Status* st) noexcept nogil:
    register_op("DfpMatmul", MATMUL_SIGNATURE, matmul_shape, matmul_create, matmul_compute, st)
    register_op("DfpMatmulBias", MATMUL_BIAS_SIGNATURE, matmul_shape, matmul_bias_create,
                matmul_compute, st)


cdef extern from *:
    """
    #define DFP_MATMUL_ATTRS  \\
        "a_bits: int >= 8 = 14; b_bits: int >= 8 = 14; dy_bits: int >= 8 = 14; "  \\
        "transpose_a: bool = false; transpose_b: bool = false; weight_first: bool = false; "  \\
        DFP_PRODUCT_ATTRS
    #define DFP_MATMUL_SIGNATURE  \\
        DFP_OPERAND("a") "; " DFP_OPERAND("b") " -> y: float | " DFP_MATMUL_ATTRS
    #define DFP_MATMUL_BIAS_SIGNATURE  \\
        DFP_OPERAND("a") "; " DFP_OPERAND("b") "; bias: float -> y: float | " DFP_MATMUL_ATTRS  \\
        "; " DFP_CLIP_ATTR
    """
    const char* MATMUL_SIGNATURE "DFP_MATMUL_SIGNATURE"
    const char* MATMUL_BIAS_SIGNATURE "DFP_MATMUL_BIAS_SIGNATURE"


cdef void matmul_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    cdef TF_ShapeHandle* a = tf.NewShapeHandle()
    cdef TF_ShapeHandle* y = tf.NewShapeHandle()
    cdef TF_ShapeHandle* matrix = tf.NewShapeHandle()
    tf.ShapeInferenceContextSetUnknownShape(c, st)
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


cdef void* matmul_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef Attrs* a = <Attrs*>calloc(1, sizeof(Attrs))
    cdef TF_Status* st = tf.NewStatus()
    product_attrs(k, a, "a_bits", "b_bits", st)
    a.transpose_a = bool_attr(k, "transpose_a", st)
    a.transpose_b = bool_attr(k, "transpose_b", st)
    finish_create(k, st)
    return a


cdef void* matmul_bias_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef Attrs* a = <Attrs*>matmul_create(k)
    bias_attrs(k, a)
    return a


cdef void matmul_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Attrs* t = <Attrs*>attrs
    cdef int64_t start
    cdef Call c
    cdef Gemm g
    cdef Shape a
    cdef Shape b
    cdef Shape y
    cdef int i
    cdef int64_t n = 0
    cdef Operand ea, eb
    cdef char* scratch
    cdef char* room = NULL
    memset(&g, 0, sizeof(g))
    open_call(&c, "DfpMatmul", context)
    start = time_if_looking(t)
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
    g.c.data = <float*>set_output(&c, 0, TF_FLOAT, y.dim, y.rank) if ok(&c) else NULL
    matrix_exponents(&c, 1, "a_exponent", &a, g.batch, &ea)
    matrix_exponents(&c, 4, "b_exponent", &b, g.batch, &eb)
    if t.bias:
        g.c.bias = <const float*>sized_input(&c, 6, "bias", g.n)
        g.c.clip = t.clip
    if ok(&c):
        n = elements(y.dim, y.rank)
    if n and (ea.count > 1 or eb.count > 1):
        room = get_scratch(&c, exponent_bytes(g.batch, g.k))
    if ok(&c) and n:
        resolve_exponents(&g.exponents, g.batch, &ea, g.m, t.transpose_a, &eb, g.n,
                          not t.transpose_b, g.k, t.b_bits, room)
        if g.exponents.all == NAN_EXPONENT:
            fill_nan(g.c.data, n)
        else:
            g.a_bits, g.b_bits, g.spill = t.a_bits, t.b_bits + g.exponents.shifts.more, t.spill
            matmul_plan(&g, t.transpose_a, t.transpose_b)
            scratch = get_scratch(&c, scratch_bytes(&g))
            if ok(&c):
                gemm_run(&g, scratch)
    add_time(t, start)
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
