# DfpMoments, DfpNormalize, DfpNormalizeSums, DfpNormalizeGradient: batch norm, biases, residual
# sums, ReLU and SiLU, forward and backward. What a step gives as float32, the same op gives as
# mantissas when steps are fused (keras_dfp.fusion). So most inputs are optional, lists of none or
# one, and outputs are empty unless an attribute wants them.

cdef void register_normalize(TF_Status* st) noexcept nogil:
    register_op("DfpMoments", "x: float -> mean: float; variance: float; bounds: float",
                channels_shape, NULL, moments_compute, st)
    register_op("DfpNormalize", NORMALIZE_SIGNATURE, computed_shape, normalize_create,
                normalize_compute, st)
    register_op("DfpNormalizeSums", SUMS_SIGNATURE, channels_shape, sums_create, sums_compute, st)
    register_op("DfpNormalizeGradient", GRADIENT_SIGNATURE, computed_shape, gradient_create,
                gradient_compute, st)


cdef extern from *:
    """
    #define DFP_STEP_ATTRS  \\
        "activation: {'none', 'relu', 'relu6', 'silu'} = 'none'; epsilon: float = 0"
    #define DFP_NORMALIZE_SIGNATURE  \\
        "x: float; parameters: n_parameters * float; residual: n_residual * float; "  \\
        "bounds: n_bounds * float; step: n_step * int64 -> "  \\
        "y: float; q: int16; e: int32; mask: uint8 | "  \\
        DFP_STEP_ATTRS "; " DFP_QUANTIZE_ATTRS "; training: bool = false; fused: bool = true; "  \\
        "n_parameters: int >= 0 = 0; n_residual: int >= 0 = 0; n_bounds: int >= 0 = 0; "  \\
        "n_step: int >= 0 = 0; want_y: bool = true; want_q: bool = false; want_mask: bool = false"
    #define DFP_GRADIENT_INPUTS  \\
        "parts: n_parts * float; mask_map: n_mask_map * float; mask_bits: n_mask_bits * uint8; "  \\
        "norm: n_norm * float"
    #define DFP_GRADIENT_ATTRS  \\
        DFP_STEP_ATTRS "; mask_epsilon: float = 0; n_parts: int >= 1; "  \\
        "n_mask_map: int >= 0 = 0; "  \\
        "n_mask_bits: int >= 0 = 0; n_norm: int >= 0 = 0"
    #define DFP_SUMS_SIGNATURE  \\
        DFP_GRADIENT_INPUTS " -> doffset: float; dscale: float; sums: double | "  \\
        DFP_GRADIENT_ATTRS
    #define DFP_GRADIENT_SIGNATURE  \\
        DFP_GRADIENT_INPUTS "; sums: n_sums * double; step: n_step * int64 -> "  \\
        "y: float; q: int16; e: int32; doffset: float | "  \\
        DFP_GRADIENT_ATTRS "; " DFP_QUANTIZE_ATTRS "; n_sums: int >= 0 = 0; "  \\
        "n_step: int >= 0 = 0; want_y: bool = true; want_q: bool = false; "  \\
        "want_doffset: bool = false; fused: bool = true"
    """
    const char* NORMALIZE_SIGNATURE "DFP_NORMALIZE_SIGNATURE"
    const char* SUMS_SIGNATURE "DFP_SUMS_SIGNATURE"
    const char* GRADIENT_SIGNATURE "DFP_GRADIENT_SIGNATURE"

cdef struct NormalizeAttrs:
    Attrs quantize
    float epsilon, mask_epsilon
    Clip clip
    bint silu
    bint want_y, want_q, want_mask, want_doffset
    # How many tensors each list has.
    int parameters, residual, bounds, step
    int parts, mask_map, mask_bits, norm, sums


# Outputs that are not wanted are inferred as if they were: nobody asks.

cdef void channels_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    """Two outputs of a value for each channel, and one of any shape."""
    cdef TF_ShapeHandle* x = tf.NewShapeHandle()
    cdef TF_ShapeHandle* n = tf.NewShapeHandle()
    cdef int64_t rank
    tf.ShapeInferenceContextSetUnknownShape(c, st)
    tf.ShapeInferenceContextGetInput(c, 0, x, st)
    tf.ShapeInferenceContextWithRank(c, n, 1, n, st)
    if tf.ShapeInferenceContextRankKnown(c, x):
        rank = tf.ShapeInferenceContextRank(c, x)
        if rank:
            tf.ShapeInferenceContextSubshape(c, x, rank - 1, rank, n, st)
    tf.ShapeInferenceContextSetOutput(c, 0, n, st)
    tf.ShapeInferenceContextSetOutput(c, 1, n, st)
    tf.DeleteShapeHandle(x)
    tf.DeleteShapeHandle(n)


cdef void computed_shape(TF_ShapeInferenceContext* c, TF_Status* st) noexcept nogil:
    """Float and mantissas of the first input's shape, and two outputs of any shape."""
    cdef TF_ShapeHandle* x = tf.NewShapeHandle()
    tf.ShapeInferenceContextSetUnknownShape(c, st)
    tf.ShapeInferenceContextGetInput(c, 0, x, st)
    tf.ShapeInferenceContextSetOutput(c, 0, x, st)
    tf.ShapeInferenceContextSetOutput(c, 1, x, st)
    tf.DeleteShapeHandle(x)


cdef inline Channels channels_of(const Shape* x) noexcept nogil:
    cdef Channels c
    c.n = x.dim[x.rank - 1]
    c.images = x.dim[0] if x.rank > 2 else 1
    c.pixels = elements(x.dim + 1, x.rank - 2) if x.rank > 2 else x.dim[0]
    return c


cdef int count_attr(TF_OpKernelConstruction* k, const char* name, int64_t allowed,
                    TF_Status* st) noexcept nogil:
    """The length of a list; bit i of `allowed` says whether it may be i."""
    cdef int64_t n = int_attr(k, name, st)
    cdef char text[100]
    if tf.GetCode(st) == TF_OK and not (0 <= n < 16 and allowed >> n & 1):
        snprintf(text, sizeof(text), "%s must not be %lld", name, <long long>n)
        tf.SetStatus(st, TF_INVALID_ARGUMENT, text)
    return <int>n


cdef void step_attrs(TF_OpKernelConstruction* k, NormalizeAttrs* a, TF_Status* st) noexcept nogil:
    a.clip = clip_attr(k, "activation", st)
    a.silu = first_letter(k, "activation", st) == c"s"
    a.epsilon = float_attr(k, "epsilon", st)


cdef void wants(TF_OpKernelConstruction* k, NormalizeAttrs* a, TF_Status* st) noexcept nogil:
    a.want_y = bool_attr(k, "want_y", st)
    a.want_q = bool_attr(k, "want_q", st)


cdef void* normalize_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef NormalizeAttrs* a = <NormalizeAttrs*>calloc(1, sizeof(NormalizeAttrs))
    cdef TF_Status* st = tf.NewStatus()
    quantize_attrs(k, &a.quantize, st)
    step_attrs(k, a, st)
    a.parameters = count_attr(k, "n_parameters", 0b10011, st)
    a.residual = count_attr(k, "n_residual", 0b11, st)
    a.bounds = count_attr(k, "n_bounds", 0b11, st)
    a.step = count_attr(k, "n_step", 0b11, st)
    wants(k, a, st)
    a.want_mask = bool_attr(k, "want_mask", st)
    finish_create(k, st)
    return a


cdef void gradient_attrs(TF_OpKernelConstruction* k, NormalizeAttrs* a,
                         TF_Status* st) noexcept nogil:
    step_attrs(k, a, st)
    a.mask_epsilon = float_attr(k, "mask_epsilon", st)
    a.parts = count_attr(k, "n_parts", 0b111111110, st)
    a.mask_map = count_attr(k, "n_mask_map", 0b100111, st)
    a.mask_bits = count_attr(k, "n_mask_bits", 0b11, st)


cdef void* sums_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef NormalizeAttrs* a = <NormalizeAttrs*>calloc(1, sizeof(NormalizeAttrs))
    cdef TF_Status* st = tf.NewStatus()
    gradient_attrs(k, a, st)
    a.norm = count_attr(k, "n_norm", 0b1001, st)
    finish_create(k, st)
    return a


cdef void* gradient_create(TF_OpKernelConstruction* k) noexcept nogil:
    cdef NormalizeAttrs* a = <NormalizeAttrs*>calloc(1, sizeof(NormalizeAttrs))
    cdef TF_Status* st = tf.NewStatus()
    quantize_attrs(k, &a.quantize, st)
    gradient_attrs(k, a, st)
    a.norm = count_attr(k, "n_norm", 0b10001, st)
    a.sums = count_attr(k, "n_sums", 0b11 if a.norm else 0b1, st)
    a.want_doffset = bool_attr(k, "want_doffset", st)
    a.step = count_attr(k, "n_step", 0b11, st)
    wants(k, a, st)
    finish_create(k, st)
    return a


# ---- inputs --------------------------------------------------------------------------------------

cdef void check_rank(Call* c, const char* name, const Shape* x) noexcept nogil:
    cdef char text[100]
    if ok(c) and x.rank < 2:
        snprintf(text, sizeof(text), "%s must be [batch, .., channels]; got rank %d", name, x.rank)
        fail(c, text)


cdef const float* like_input(Call* c, int i, const char* name, const Shape* x) noexcept nogil:
    """An input that must have the shape of x."""
    cdef Shape shape
    cdef const float* data = <const float*>get_input(c, i, name, &shape)
    if ok(c) and not same_dims(&shape, x):
        fail_shapes(c, "tensors that are added or masked must have the same shape (fused=False "
                    "allows others)", name, &shape, "the first", x)
    return data


cdef void map_input(Call* c, const NormalizeAttrs* a, float epsilon, const float* x, int i,
                    int parameters, int64_t n, dfp_map* m) noexcept nogil:
    """A map of x whose parameters begin at input i: offset, mean, variance, scale."""
    cdef const float* p[4]
    cdef char* room
    cdef int j
    for j in range(4):
        p[j] = NULL
        if j < parameters:
            p[j] = <const float*>sized_input(c, i + j, "parameter", n)
    room = get_scratch(c, map_bytes(n))
    if ok(c):
        set_map(m, x, n, p[0], p[1], p[2], p[3], epsilon, room)
        m.low, m.high, m.silu = a.clip.low, a.clip.high, a.silu


cdef void gradient_inputs(Call* c, const NormalizeAttrs* a, Shape* shape,
                          dfp_gradient* g) noexcept nogil:
    """The parts and the mask; `shape` becomes theirs."""
    cdef int i, at = a.parts
    cdef int64_t n, total
    memset(g, 0, sizeof(dfp_gradient))
    g.n_parts = a.parts
    g.parts[0] = <const float*>get_input(c, 0, "parts", shape)
    check_rank(c, "parts", shape)
    if not ok(c):
        return
    for i in range(1, a.parts):
        g.parts[i] = like_input(c, i, "parts", shape)
    n, total = shape.dim[shape.rank - 1], elements(shape.dim, shape.rank)
    g.n = period_of(n)
    if a.mask_map:
        map_input(c, a, a.mask_epsilon, like_input(c, at, "mask_map", shape), at + 1,
                  a.mask_map - 1, n, &g.mask)
        if g.mask.high == INFINITY:
            g.mask.high = NAN
    elif a.mask_bits:
        if n % 8:
            fail(c, "a mask of bits needs a multiple of 8 channels")
        g.bits = <const uint8_t*>sized_input(c, at, "mask_bits", total // 8)


# ---- kernels -------------------------------------------------------------------------------------

cdef void moments_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef Call c
    cdef Shape x
    cdef ChannelSums s
    cdef double* total
    cdef float* mean
    cdef float* variance
    cdef char* scratch
    cdef int64_t dims[3]
    memset(&s, 0, sizeof(s))
    open_call(&c, "DfpMoments", context)
    s.x = <const float*>get_input(&c, 0, "x", &x)
    check_rank(&c, "x", &x)
    if ok(&c):
        s.shape, s.sums = channels_of(&x), 2
        dims[0], dims[1], dims[2] = s.shape.images, 2, s.shape.n
        mean = <float*>set_output(&c, 0, TF_FLOAT, &s.shape.n, 1)
        variance = <float*>set_output(&c, 1, TF_FLOAT, &s.shape.n, 1)
        s.bounds = <float*>set_output(&c, 2, TF_FLOAT, dims, 3)
        total = <double*>get_scratch(&c, 2 * s.shape.n * sizeof(double))
        sums_plan(&s, total)
        scratch = get_scratch(&c, s.bytes)
        if ok(&c) and s.shape.n:
            sums_run(&s, scratch)
            moments_of(total, s.shape.n, s.shape.images * s.shape.pixels, mean, variance)
    close_call(&c)


cdef void* wanted_output(Call* c, bint wanted, int i, int dtype, const int64_t* dim,
                         int rank) noexcept nogil:
    """Output i's data; NULL, and an empty output, if it is not wanted."""
    cdef int64_t none = 0
    if wanted:
        return set_output(c, i, dtype, dim, rank)
    set_output(c, i, dtype, &none, 1)
    return NULL


cdef void write_computed(Call* c, NormalizeAttrs* a, const Shape* shape, Quantize* z, int step,
                         const float* bounds) noexcept nogil:
    """Writes what z computes to the first outputs: as float32, as mantissas, or both."""
    cdef Attrs* t = &a.quantize
    cdef Apply whole
    if not ok(c):
        return
    z.kept = <float*>wanted_output(c, a.want_y, 0, TF_FLOAT, shape.dim, shape.rank)
    if not a.want_q:
        wanted_output(c, False, 1, TF_INT16, NULL, 0)
        wanted_output(c, False, 2, TF_INT32, NULL, 0)
        whole.map, whole.gradient, whole.y, whole.positive = z.map, z.gradient, z.kept, z.positive
        whole.total = elements(shape.dim, shape.rank)
        if ok(c) and whole.total and (a.want_y or a.want_mask):
            apply(&whole)
        return
    find_groups(c, t, shape, z)
    quantize_call(c, t, z, shape, 1, sized_input(c, step, "step", 1) if a.step else NULL)
    if not ok(c):
        return
    if bounds != NULL and z.n:
        z.trusted = exponents_of_bounds(z, bounds, shape.dim[shape.rank - 1])
    if z.kept == NULL and not z.by_pieces and not z.trusted and z.n > DFP_SHORT:
        z.threads = <int>min(<int64_t>team_size(), z.groups)
        z.space = <float*>get_scratch(c, z.threads * z.n * sizeof(float))
    if ok(c):
        quantize_and_tell(t, z, shape)


cdef void normalize_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef NormalizeAttrs* a = <NormalizeAttrs*>attrs
    cdef Call c
    cdef Shape x
    cdef Quantize z
    cdef dfp_map m
    cdef const float* data
    cdef const float* bounds = NULL
    cdef int i = 1 + a.parameters
    cdef int64_t n, bytes
    cdef Channels shape
    memset(&z, 0, sizeof(z))
    open_call(&c, "DfpNormalize", context)
    data = <const float*>get_input(&c, 0, "x", &x)
    check_rank(&c, "x", &x)
    if ok(&c):
        shape = channels_of(&x)
        n = shape.n
        map_input(&c, a, a.epsilon, data, 1, a.parameters, n, &m)
        if a.residual:
            m.residual = like_input(&c, i, "residual", &x)
        i += a.residual
        z.map = &m
        if a.bounds:
            bounds = <const float*>sized_input(&c, i, "bounds", shape.images * 2 * n)
            if (a.want_y or a.want_mask or a.residual or a.quantize.group_axes != 1
                    or x.rank == 2):
                fail(&c, "bounds are for images whose mantissas alone are wanted")
        i += a.bounds
        bytes = elements(x.dim, x.rank) // 8
        if a.want_mask and n % 8:
            fail(&c, "a mask of bits needs a multiple of 8 channels")
        if ok(&c):
            z.positive = <uint8_t*>wanted_output(&c, a.want_mask, 3, TF_UINT8, &bytes, 1)
        write_computed(&c, a, &x, &z, i, bounds)
    close_call(&c)


cdef void sums_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef NormalizeAttrs* a = <NormalizeAttrs*>attrs
    cdef Call c
    cdef Shape dy
    cdef ChannelSums s
    cdef dfp_gradient g
    cdef int at = a.parts + a.mask_map + a.mask_bits
    cdef int64_t n, i
    cdef int64_t dims[2]
    cdef float* doffset
    cdef float* dscale = NULL
    cdef double* total
    cdef const float* variance = NULL
    cdef char* scratch
    memset(&s, 0, sizeof(s))
    open_call(&c, "DfpNormalizeSums", context)
    gradient_inputs(&c, a, &dy, &g)
    if ok(&c):
        s.shape, s.sums, s.gradient = channels_of(&dy), 2 if a.norm else 1, &g
        n = s.shape.n
        doffset = <float*>set_output(&c, 0, TF_FLOAT, &n, 1)
        if a.norm:
            s.x = like_input(&c, at, "x", &dy)
            s.center = <const float*>sized_input(&c, at + 1, "mean", n)
            variance = <const float*>sized_input(&c, at + 2, "variance", n)
        dims[0], dims[1] = 2, n
        dscale = <float*>wanted_output(&c, a.norm, 1, TF_FLOAT, &n, 1)
        total = <double*>wanted_output(&c, a.norm, 2, TF_DOUBLE, dims, 2)
        if not a.norm:
            total = <double*>get_scratch(&c, n * sizeof(double))
        sums_plan(&s, total)
        scratch = get_scratch(&c, s.bytes)
        if ok(&c) and n:
            sums_run(&s, scratch)
            for i in range(n):
                doffset[i] = <float>total[i]
                if a.norm:
                    dscale[i] = <float>(
                        total[n + i] * inverse_deviation(variance[i], a.epsilon))
    close_call(&c)


cdef void gradient_compute(void* attrs, TF_OpKernelContext* context) noexcept nogil:
    cdef NormalizeAttrs* a = <NormalizeAttrs*>attrs
    cdef Call c
    cdef Shape dy
    cdef Quantize z
    cdef dfp_gradient g
    cdef int at = a.parts + a.mask_map + a.mask_bits
    cdef int64_t n
    cdef const float* x
    cdef const float* p[3]
    cdef const double* sums = NULL
    cdef char* room
    cdef float* doffset = NULL
    cdef int64_t parts = 0, i
    cdef Channels shape
    memset(&z, 0, sizeof(z))
    open_call(&c, "DfpNormalizeGradient", context)
    gradient_inputs(&c, a, &dy, &g)
    if ok(&c) and a.norm:
        shape = channels_of(&dy)
        n = shape.n
        x = like_input(&c, at, "x", &dy)
        p[0] = <const float*>sized_input(&c, at + 1, "mean", n)
        p[1] = <const float*>sized_input(&c, at + 2, "variance", n)
        p[2] = <const float*>sized_input(&c, at + 3, "scale", n)
        if a.sums:
            sums = <const double*>sized_input(&c, at + 4, "sums", 2 * n)
        room = get_scratch(&c, gradient_bytes(n))
        if ok(&c):
            set_gradient(&g, x, n, shape.images * shape.pixels, p[0], p[1], p[2], sums, a.epsilon,
                         room)
            # The same tensors: of batch norm and the ReLU after it.
            g.self = (a.mask_map == 5 and x == g.mask.x
                      and memcmp(p[0], g.mask.center, n * sizeof(float)) == 0)
    z.gradient = &g
    if ok(&c):
        shape = channels_of(&dy)
        n = shape.n
        parts = shape.images * sum_blocks(shape.pixels)
        doffset = <float*>wanted_output(&c, a.want_doffset, 3, TF_FLOAT, &n, 1)
        if a.want_doffset:
            if not a.want_q or a.quantize.group_axes != 1 or dy.rank == 2 or n > COMPUTED:
                fail(&c, "doffset is for images of at most 4096 channels, and beside mantissas")
            z.channels = n
            z.partial = <double*>get_scratch(&c, (parts + 1) * n * sizeof(double))
    write_computed(&c, a, &dy, &z, at + a.norm + a.sums, NULL)
    if ok(&c) and a.want_doffset and n:
        kernel.add_rows(z.partial, parts, n, n, z.partial + parts * n)
        for i in range(n):
            doffset[i] = <float>z.partial[parts * n + i]
    close_call(&c)
