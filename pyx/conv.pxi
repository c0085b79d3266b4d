# The three passes of a convolution, each as the product (gemm.pxi) or the sum of rows
# (depthwise.pxi) that it is. Tensors are NDHWC; kernels DHWIO, or DHWCM when depthwise.

cdef enum Pass:
    FORWARD
    INPUT_GRADIENT
    WEIGHT_GRADIENT

cdef struct Conv:
    int64_t batch
    int64_t input[3]            # spatial sizes: depth, height, width
    int64_t output[3]
    int64_t kernel[3]
    int64_t stride[3]
    int64_t dilation[3]
    int64_t pad[3]              # before
    int64_t channels, filters   # of all groups; depthwise: filters = channels * multiplier
    int64_t groups
    bint depthwise
    int64_t a_bits, b_bits      # of the pass's two operands, b aligned
    Exponents exponents         # of the pass; rows and products are counted in images
    const float* bias           # of the output, or NULL
    Clip clip
    bint spill


cdef inline bint by_channel(const Conv* v) noexcept nogil:
    """Groups of one channel are a depthwise convolution; a single channel is a product."""
    return v.depthwise or (v.channels > 1 and v.groups == v.channels)


cdef inline void gemm_of(const Conv* v, Gemm* g, const int16_t* a, const int16_t* b,
                         float* c) noexcept nogil:
    memset(g, 0, sizeof(Gemm))
    g.a_bits, g.b_bits, g.spill = v.a_bits, v.b_bits, v.spill
    g.exponents = v.exponents
    g.batch = v.groups
    g.a.data, g.b.data, g.c.data = a, b, c


cdef inline void forward_window(const Conv* v, Window* w, int64_t channels,
                                bint even) noexcept nogil:
    """Positions are output pixels; the image is the input."""
    cdef int i
    for i in range(3):
        w.positions[i], w.step[i] = v.output[i], v.stride[i]
        w.taps[i], w.tap_step[i] = v.kernel[i], v.dilation[i]
        w.offset[i], w.size[i] = -v.pad[i], v.input[i]
    w.pixel, w.channels = v.channels, channels
    w.padded = round_up(channels, 2) if even else channels


cdef inline bint is_matrix(const Window* w) noexcept nogil:
    """One tap on every pixel: the rows of A are the pixels as they lie."""
    cdef int i
    for i in range(3):
        if (w.taps[i] != 1 or w.step[i] != 1 or w.offset[i] != 0
                or w.positions[i] != w.size[i]):
            return False
    return w.channels % 2 == 0 and w.channels == w.padded


cdef inline void rows_of_window(Gemm* g) noexcept nogil:
    g.a.kind = ROWS if is_matrix(&g.a.window) else PATCHES
    g.a.ld = g.a.window.pixel
    g.exponents.row.per *= volume(g.a.window.positions)
    g.k = volume(g.a.window.taps) * g.a.window.padded


cdef void forward_plan(const Conv* v, Gemm* g, const int16_t* x, const int16_t* w,
                       float* y) noexcept nogil:
    """y[pixel, f] = sum of x[window(pixel), (tap, c)] * w[(tap, c), f]"""
    cdef int64_t channels = v.channels // v.groups, filters = v.filters // v.groups
    cdef int i
    gemm_of(v, g, x, w, y)
    forward_window(v, &g.a.window, channels, v.spill)
    rows_of_window(g)
    g.m, g.n = v.batch * volume(v.output), filters
    g.a_batch, g.b_batch, g.c.batch, g.c.ld = channels, filters, filters, v.filters
    g.c.bias, g.c.bias_batch, g.c.clip = v.bias, filters, v.clip
    g.b.k_stride, g.b.n_stride = v.filters, 1
    g.b.channels, g.b.padded = channels, g.a.window.padded
    g.b.tap_stride = channels * v.filters
    for i in range(3):
        g.b.taps[i], g.b.first[i], g.b.jump[i], g.b.size[i] = v.kernel[i], 0, 1, v.kernel[i]
    gemm_plan(g)


cdef void input_gradient_plan(const Conv* v, Gemm* g, const int64_t* phase, const int16_t* dy,
                              const int16_t* w, float* dx) noexcept nogil:
    """dx[pixel, c] = sum of dy[window(pixel), (tap, f)] * w[(tap, c), f]

    Input pixels p = phase (modulo stride) are reached by the same kernel positions k, those with
    p + pad - k * dilation = stride * o; in that phase the gradient is a window over dy with step
    1, whose taps lie at kernel positions first, first + jump, ...
    """
    cdef int64_t channels = v.channels // v.groups, filters = v.filters // v.groups
    cdef int64_t first, jump, reach
    cdef Window* a = &g.a.window
    cdef int i
    gemm_of(v, g, dy, w, dx)
    for i in range(3):
        jump = v.stride[i] // gcd(v.stride[i], v.dilation[i])
        first = 0
        while (first < min(jump, v.kernel[i])
               and (phase[i] + v.pad[i] - first * v.dilation[i]) % v.stride[i]):
            first += 1
        reach = phase[i] + v.pad[i] - first * v.dilation[i]
        a.positions[i] = (v.input[i] - phase[i] + v.stride[i] - 1) // v.stride[i]
        a.step[i], a.size[i] = 1, v.output[i]
        # No kernel position reaches a phase that dilation or stride jumps over.
        a.taps[i] = 0
        if first < jump:
            a.taps[i] = max(<int64_t>0, (v.kernel[i] - first + jump - 1) // jump)
        a.offset[i] = reach // v.stride[i]
        if reach < 0 and reach % v.stride[i]:
            a.offset[i] = 0         # only where there are no taps
        a.tap_step[i] = -(jump * v.dilation[i] // v.stride[i])
        if not v.spill:
            # In no particular order, so in the image's: neighbours are gathered in one go.
            a.offset[i] += (a.taps[i] - 1) * a.tap_step[i]
            a.tap_step[i] = -a.tap_step[i]
            first, jump = first + (a.taps[i] - 1) * jump, -jump
        g.b.taps[i], g.b.first[i], g.b.jump[i], g.b.size[i] = a.taps[i], first, jump, v.kernel[i]
        g.c.rows.positions[i], g.c.rows.step[i] = a.positions[i], v.stride[i]
        g.c.rows.offset[i], g.c.rows.size[i] = phase[i], v.input[i]
    a.pixel, a.channels = v.filters, filters
    a.padded = round_up(filters, 2) if v.spill else filters
    rows_of_window(g)
    g.c.scattered = not all_one(v.stride)
    g.m, g.n = v.batch * volume(a.positions), channels
    g.a_batch, g.b_batch, g.c.batch, g.c.ld = filters, filters, channels, v.channels
    g.b.k_stride, g.b.n_stride = 1, v.filters
    g.b.channels, g.b.padded = filters, a.padded
    g.b.tap_stride = channels * v.filters
    gemm_plan(g)


cdef void weight_gradient_plan(const Conv* v, Gemm* g, const int16_t* x, const int16_t* dy,
                               float* dw) noexcept nogil:
    """dw[(tap, c), f] = sum over pixels of x[window(pixel), (tap, c)] * dy[pixel, f]"""
    cdef int64_t channels = v.channels // v.groups, filters = v.filters // v.groups
    gemm_of(v, g, x, dy, dw)
    forward_window(v, &g.a.window, channels, False)
    g.a.kind = PATCHES_T
    g.m, g.n, g.k = volume(v.kernel) * channels, filters, v.batch * volume(v.output)
    if is_matrix(&g.a.window):
        g.a.kind, g.a.ld = COLUMNS, v.channels
    g.a_batch, g.b_batch, g.c.batch, g.c.ld = channels, filters, filters, v.filters
    g.exponents.shifts.per *= volume(v.output)
    matrix_b(&g.b, g.k, v.filters, 1)
    gemm_plan(g)


cdef inline void matrix_b(BSource* b, int64_t k, int64_t k_stride, int64_t n_stride) noexcept nogil:
    cdef int i
    b.k_stride, b.n_stride, b.channels, b.padded = k_stride, n_stride, k, max(k, <int64_t>1)
    for i in range(3):
        b.taps[i] = b.size[i] = b.jump[i] = 1


cdef void matmul_plan(Gemm* g, bint transpose_a, bint transpose_b) noexcept nogil:
    """C[m, n] = sum of A[m, k] * B[k, n]; the caller has set the data, m, n, k and the format."""
    cdef int i
    cdef Window* w = &g.a.window
    g.a_batch, g.b_batch, g.c.batch, g.c.ld = g.m * g.k, g.k * g.n, g.m * g.n, g.n
    if transpose_a:
        g.a.kind, g.a.ld = COLUMNS, g.m
    elif g.k % 2 == 0:
        g.a.kind, g.a.ld = ROWS, g.k
    else:
        # Rows of odd length end within a pair: they are packed, as patches of one tap.
        g.a.kind = PATCHES
        for i in range(3):
            w.positions[i] = w.size[i] = w.step[i] = w.taps[i] = w.tap_step[i] = 1
        w.positions[2] = w.size[2] = g.m
        w.pixel = w.channels = w.padded = g.k
    if transpose_b:
        matrix_b(&g.b, g.k, 1, g.k)
    else:
        matrix_b(&g.b, g.k, g.n, 1)
    gemm_plan(g)
