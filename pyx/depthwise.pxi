# Depthwise convolutions: sums of products of rows, channel by channel (dfp_terms). A depth
# multiplier is resolved first: `spread` lays the operand out so that every pass sees rows of equal
# length.

cdef enum:
    DW_PIXELS = 1024        # of a weight gradient summed by one call of the microkernel
    DW_CHANNELS = 256       # of a weight gradient computed by one task

cdef enum Pass:
    FORWARD
    INPUT_GRADIENT
    WEIGHT_GRADIENT

cdef struct Depthwise:
    Conv* conv
    Pass which
    const int16_t* a            # x, dy, x
    const int16_t* b            # w, w, dy
    float* out                  # y, dx, dw
    # How: filled in by depthwise_plan.
    int threads
    int64_t multiplier
    int64_t taps
    int64_t row                 # elements of a row that is summed
    int64_t segment, chain, batch_terms
    int64_t a_spread, b_spread, task_bytes      # bytes of scratch
    char* scratch


cdef void depthwise_plan(Depthwise* z, Conv* v, Pass which, const int16_t* a,
                         const int16_t* b, float* out) noexcept nogil:
    cdef int64_t limit = safe_chain(v.a_bits, v.b_bits, 0)
    cdef int64_t pixels = v.batch * volume(v.output), terms
    memset(z, 0, sizeof(Depthwise))
    z.conv, z.which, z.a, z.b, z.out = v, which, a, b, out
    z.multiplier = v.filters // max(v.channels, <int64_t>1)
    z.taps = volume(v.kernel)
    z.threads = team_size() if <double>pixels * v.filters * z.taps > SMALL else 1
    z.chain = limit
    z.row = v.channels if which == INPUT_GRADIENT else v.filters
    terms = z.taps * (z.multiplier if which == INPUT_GRADIENT else 1)
    if which == WEIGHT_GRADIENT:
        # Whole chains at a time, as many as make about DW_PIXELS terms.
        terms = limit * max(DW_PIXELS // limit, <int64_t>1) if v.spill else DW_PIXELS
        terms = max(min(terms, pixels), <int64_t>1)
    z.batch_terms = terms
    z.segment = terms
    if v.spill and not v.depthwise and which != WEIGHT_GRADIENT:
        # Grouped convolutions end their chains with each kernel position.
        z.segment = terms // max(z.taps, <int64_t>1)
    if z.multiplier > 1:
        if which == INPUT_GRADIENT:
            z.a_spread = round_up(pixels * v.filters * 2, ALIGN)
            z.b_spread = round_up(z.taps * v.filters * 2, ALIGN)
        else:
            z.a_spread = round_up(v.batch * volume(v.input) * v.filters * 2, ALIGN)
    z.task_bytes = round_up(2 * terms * sizeof(void*) + DW_CHANNELS * sizeof(int64_t), ALIGN)


cdef inline int64_t depthwise_bytes(Depthwise* z) noexcept nogil:
    return z.a_spread + z.b_spread + z.threads * z.task_bytes + ALIGN


cdef void depthwise_run(Depthwise* z, char* scratch) noexcept nogil:
    cdef Conv* v = z.conv
    cdef int64_t* rows = &v.input[0] if z.which == INPUT_GRADIENT else &v.output[0]
    z.scratch = <char*>round_up(<int64_t>scratch, ALIGN)
    if z.multiplier > 1:
        if z.which == INPUT_GRADIENT:
            spread(z.a, v.batch * volume(v.output), v.channels, z.multiplier, True,
                   <int16_t*>z.scratch)
            spread(z.b, z.taps, v.channels, z.multiplier, True,
                   <int16_t*>(z.scratch + z.a_spread))
            z.b = <int16_t*>(z.scratch + z.a_spread)
        else:
            spread(z.a, v.batch * volume(v.input), v.channels, z.multiplier, False,
                   <int16_t*>z.scratch)
        z.a = <int16_t*>z.scratch
        z.scratch += z.a_spread + z.b_spread
    if z.which == WEIGHT_GRADIENT:
        parallel_for(depthwise_weight_task, z,
                     z.taps * ((z.row + DW_CHANNELS - 1) // DW_CHANNELS), z.threads)
    else:
        parallel_for(depthwise_row_task, z, v.batch * rows[0] * rows[1], z.threads)


cdef void spread(const int16_t* source, int64_t pixels, int64_t channels, int64_t multiplier,
                 bint split, int16_t* to) noexcept nogil:
    """[pixel][c][m] -> [pixel][m][c] if `split`; else [pixel][c] -> [pixel][c][m], repeated."""
    cdef int64_t p, c, m
    for p in range(pixels):
        for c in range(channels):
            for m in range(multiplier):
                if split:
                    to[m * channels + c] = source[c * multiplier + m]
                else:
                    to[c * multiplier + m] = source[c]
        to += channels * multiplier
        source += channels * (multiplier if split else 1)


cdef inline void start_terms(Depthwise* z, dfp_terms* t, char* mine) noexcept nogil:
    t.x = <const int16_t**>mine
    t.w = t.x + z.batch_terms
    t.terms, t.segment, t.chain, t.n = z.batch_terms, z.segment, z.chain, z.row
    t.resume = False
    t.wide = <int64_t*>(t.w + z.batch_terms) if not z.conv.spill else NULL
    t.floats = <float*>(t.w + z.batch_terms) if z.conv.spill else NULL
    t.scale = scale_of(z.conv.exponent)


cdef inline int64_t reach(const Conv* v, int i, int64_t position, int64_t tap,
                          bint backward) noexcept nogil:
    """The pixel that a tap joins to a position (forward: of the output), or -1."""
    cdef int64_t at
    if backward:
        at = position + v.pad[i] - tap * v.dilation[i]
        if at < 0 or at % v.stride[i]:
            return -1
        at //= v.stride[i]
        return at if at < v.output[i] else -1
    at = position * v.stride[i] - v.pad[i] + tap * v.dilation[i]
    return at if 0 <= at < v.input[i] else -1


cdef void depthwise_row_task(void* work, int64_t i, int thread) noexcept nogil:
    """One row of y or dx."""
    cdef Depthwise* z = <Depthwise*>work
    cdef Conv* v = z.conv
    cdef bint back = z.which == INPUT_GRADIENT
    cdef int64_t* rows = &v.input[0] if back else &v.output[0]
    cdef int64_t* image = &v.output[0] if back else &v.input[0]
    cdef int64_t height = rows[1], depth = rows[0]
    cdef int64_t ph = i % height, pd = i // height % depth, item = i // height // depth
    cdef int64_t p, d, h, w, kd, kh, kw, m, tap, term
    cdef int64_t per_tap = z.multiplier if back else 1
    cdef dfp_terms t
    start_terms(z, &t, z.scratch + thread * z.task_bytes)
    for term in range(t.terms):
        t.w[term] = z.b + term * z.row
    for p in range(rows[2]):
        tap = 0
        for kd in range(v.kernel[0]):
            d = reach(v, 0, pd, kd, back)
            for kh in range(v.kernel[1]):
                h = reach(v, 1, ph, kh, back)
                for kw in range(v.kernel[2]):
                    w = reach(v, 2, p, kw, back)
                    for m in range(per_tap):
                        t.x[tap * per_tap + m] = NULL
                        if d >= 0 and h >= 0 and w >= 0:
                            t.x[tap * per_tap + m] = (
                                z.a + ((((item * image[0] + d) * image[1] + h) * image[2] + w)
                                       * per_tap + m) * z.row)
                    tap += 1
        t.y = z.out + (i * rows[2] + p) * z.row
        kernel.depthwise(&t)


cdef void depthwise_weight_task(void* work, int64_t i, int thread) noexcept nogil:
    """DW_CHANNELS channels of one kernel position of dw."""
    cdef Depthwise* z = <Depthwise*>work
    cdef const Conv* v = z.conv
    cdef int64_t tap = i % z.taps, c0 = i // z.taps * DW_CHANNELS
    cdef int64_t kw = tap % v.kernel[2], kh = tap // v.kernel[2] % v.kernel[1]
    cdef int64_t kd = tap // v.kernel[2] // v.kernel[1]
    cdef int64_t pixels = v.batch * volume(v.output)
    cdef int64_t p, first, count, k, d, h, w
    cdef dfp_terms t
    start_terms(z, &t, z.scratch + thread * z.task_bytes)
    t.n = min(<int64_t>DW_CHANNELS, z.row - c0)
    t.y = NULL
    first = 0
    while True:
        count = min(z.batch_terms, pixels - first)
        for k in range(count):
            p = first + k
            w = reach(v, 2, p % v.output[2], kw, False)
            p //= v.output[2]
            h = reach(v, 1, p % v.output[1], kh, False)
            p //= v.output[1]
            d = reach(v, 0, p % v.output[0], kd, False)
            p //= v.output[0]
            t.x[k] = NULL
            if d >= 0 and h >= 0 and w >= 0:
                t.x[k] = (z.a + (((p * v.input[0] + d) * v.input[1] + h) * v.input[2] + w) * z.row
                          + c0)
            t.w[k] = z.b + (first + k) * z.row + c0
        t.terms = count
        if first + count >= pixels:
            t.y = z.out + tap * z.row + c0
        kernel.depthwise(&t)
        t.resume = True
        first += count
        if first >= pixels:
            return
