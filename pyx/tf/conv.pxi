# DfpConv, DfpConvBackpropInput, DfpConvBackpropFilter; DfpConvBias, which fusion puts in the place
# of a DfpConv where a bias is added (it has no gradient).

cdef void register_conv(TF_Status* st) noexcept nogil:
    register_op("DfpConv", CONV_SIGNATURE, conv_shape, conv_create, conv_compute, st)
    register_op("DfpConvBias", CONV_BIAS_SIGNATURE, conv_shape, conv_bias_create, conv_compute, st)
    register_op("DfpConvBackpropInput", CONV_INPUT_SIGNATURE, conv_input_shape, conv_input_create,
                conv_input_compute, st)
    register_op("DfpConvBackpropFilter", CONV_FILTER_SIGNATURE, conv_filter_shape,
                conv_filter_create, conv_filter_compute, st)


cdef extern from *:
    """
    #define DFP_CONV_ATTRS  \\
        "x_bits: int >= 8 = 14; w_bits: int >= 8 = 14; dy_bits: int >= 8 = 14; "  \\
        "strides: list(int); padding: {'VALID', 'SAME', 'EXPLICIT'} = 'VALID'; "  \\
        "explicit_paddings: list(int) = []; dilations: list(int); depthwise: bool = false; "  \\
        DFP_PRODUCT_ATTRS
    #define DFP_CONV_SIGNATURE  \\
        DFP_OPERAND("x") "; " DFP_OPERAND("w") " -> y: float | " DFP_CONV_ATTRS
    #define DFP_CONV_BIAS_SIGNATURE  \\
        DFP_OPERAND("x") "; " DFP_OPERAND("w") "; bias: float -> y: float | " DFP_CONV_ATTRS  \\
        "; " DFP_CLIP_ATTR
    #define DFP_CONV_INPUT_SIGNATURE  \\
        "input_sizes: int32; " DFP_OPERAND("w") "; " DFP_OPERAND("dy") " -> dx: float | "  \\
        DFP_CONV_ATTRS
    #define DFP_CONV_FILTER_SIGNATURE  \\
        DFP_OPERAND("x") "; filter_sizes: int32; " DFP_OPERAND("dy") " -> dw: float | "  \\
        DFP_CONV_ATTRS
    """
    const char* CONV_SIGNATURE "DFP_CONV_SIGNATURE"
    const char* CONV_BIAS_SIGNATURE "DFP_CONV_BIAS_SIGNATURE"
    const char* CONV_INPUT_SIGNATURE "DFP_CONV_INPUT_SIGNATURE"
    const char* CONV_FILTER_SIGNATURE "DFP_CONV_FILTER_SIGNATURE"


cdef void conv_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    """Batch and rank are known here; the rest follows from attributes, which a C shape function
    cannot read: keras_dfp.ops sets it."""
    cdef TF_ShapeHandle* x = tf.NewShapeHandle()
    cdef TF_ShapeHandle* w = tf.NewShapeHandle()
    cdef TF_ShapeHandle* unknown = tf.NewShapeHandle()
    cdef TF_ShapeHandle* n = tf.NewShapeHandle()
    cdef int64_t rank
    tf.ShapeInferenceContextSetUnknownShape(c, st)
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


cdef void conv_input_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    rank_of(c, 1, st)


cdef void conv_filter_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    rank_of(c, 0, st)


cdef void* conv_create_with(TF_OpKernelConstruction* k, const char* a_bits,
                            const char* b_bits) noexcept nogil:
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
    if tf.GetCode(st) == TF_OK:
        text[0] = 0
        if a.rank < 1 or dilations != a.rank:
            snprintf(text, sizeof(text), "strides and dilations must have one entry per spatial "
                     "dimension, 1 to 3; got %d and %d", a.rank, dilations)
        elif pads != (2 * a.rank if a.padding == EXPLICIT else 0):
            snprintf(text, sizeof(text), "explicit_paddings must have two entries per spatial "
                     "dimension with padding 'EXPLICIT', else none; got %d", pads)
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
    return conv_create_with(k, "x_bits", "w_bits")


cdef void* conv_bias_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef Attrs* a = <Attrs*>conv_create(k)
    bias_attrs(k, a)
    return a


cdef void* conv_input_create(TF_OpKernelConstruction* k) noexcept nogil:
    return conv_create_with(k, "dy_bits", "w_bits")


cdef void* conv_filter_create(TF_OpKernelConstruction* k) noexcept nogil:
    return conv_create_with(k, "x_bits", "dy_bits")


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
        check_sizes(c, name, out)


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
        if v.bias != NULL and v.filters:
            add_bias_in_place(out, n // v.filters, v.filters, v.bias, &v.clip)
    elif by_channel(v):
        depthwise_plan(&z, v, which, a, b, out)
        scratch = get_scratch(c, depthwise_bytes(&z))
        if ok(c):
            depthwise_run(&z, scratch)
            if v.bias != NULL:
                add_bias_in_place(out, n // v.filters, v.filters, v.bias, &v.clip)
    elif which == INPUT_GRADIENT:
        for phase[0] in range(min(v.stride[0], v.input[0])):
            for phase[1] in range(min(v.stride[1], v.input[1])):
                for phase[2] in range(min(v.stride[2], v.input[2])):
                    input_gradient_plan(v, &g, phase, a, b, out)
                    scratch = get_scratch(c, scratch_bytes(&g))
                    if not ok(c):
                        return
                    gemm_run(&g, scratch)
                    give_back_scratch(c)
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
    cdef int64_t start
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
    start = time_if_looking(t)
    qx = <int16_t*>get_input(&c, 0, "x", &x)
    qw = <int16_t*>get_input(&c, 3, "w", &w)
    conv_geometry(&c, t, &x, &w, &y, &v)
    get_exponents(&c, 1, "x_exponent", v.batch, &ex)
    get_exponents(&c, 4, "w_exponent", 1, &ew)
    if t.bias:
        v.bias = <const float*>sized_input(&c, 6, "bias", v.filters)
        v.clip = t.clip
    out = <float*>set_output(&c, 0, TF_FLOAT, y.dim, y.rank) if ok(&c) else NULL
    run_conv(&c, t, &v, FORWARD, qx, &ex, qw, &ew, out, elements(y.dim, y.rank) if ok(&c) else 0)
    add_time(t, start)
    close_call(&c)


cdef void conv_input_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Attrs* t = <Attrs*>attrs
    cdef int64_t start
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
    start = time_if_looking(t)
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
    add_time(t, start)
    close_call(&c)


cdef void conv_filter_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Attrs* t = <Attrs*>attrs
    cdef int64_t start
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
    start = time_if_looking(t)
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
    add_time(t, start)
    close_call(&c)
