# Passes over rows of channels: batch norm, biases, residual sums, ReLU and SiLU, their gradients
# (numerics.md, "Batch norm"). What is computed element by element is a dfp_map or a dfp_gradient,
# which quantize.pxi can write as mantissas; sums over pixels are here.
#
# Sums are doubles in a fixed order: an image's pixels in blocks of SUM_PIXELS, each from zero and
# pixel by pixel; the blocks are added in order, image by image.

# What a ReLU leaves: 0 to infinity, or to 6.
cdef struct Clip:
    float low, high

# Below -0, a SiLU stays above -0.27847; above 0 it rises, but for errors of a unit or two of its
# last place (both looked at for every float, in test_normalization.py).
cdef float SILU_LEAST = 0.2785

cdef enum:
    SILU_ERROR = 16
    SUM_CHANNELS = 128          # whose partials one task adds
    SUM_WORK = 65536            # elements a task reads, about
    SUM_COMPUTED = 2048         # elements it computes at a time: they and others stay in the cache
    MAP_CHANNELS = 64           # fewer are repeated: inner loops of so many

# A tensor [.., C] as images of pixels; of a matrix, all rows are one image.
cdef struct Channels:
    int64_t images, pixels, n


cdef inline int64_t period_of(int64_t n) noexcept nogil:
    """Channels after which parameters repeat themselves in a map: n, or a multiple of it."""
    return n if n >= MAP_CHANNELS or n == 0 else (MAP_CHANNELS + n - 1) // n * n


cdef inline double inverse_deviation(float variance, float epsilon) noexcept nogil:
    return 1.0 / sqrt(<double>variance + <double>epsilon)


cdef void repeat_channels(float* to, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n, period_of(n)):
        to[i] = to[i - n]


# ---- parameters ----------------------------------------------------------------------------------

cdef inline int64_t map_bytes(int64_t n) noexcept nogil:
    return 3 * period_of(n) * sizeof(float)


cdef void set_map(dfp_map* m, const float* x, int64_t n, const float* offset, const float* mean,
                  const float* variance, const float* scale, float epsilon,
                  char* room) noexcept nogil:
    """A map with room of map_bytes; `offset` alone is a bias, and may be NULL too."""
    cdef int64_t period = period_of(n), i
    cdef float* to = <float*>room
    memset(m, 0, sizeof(dfp_map))
    m.x, m.n, m.low, m.high = x, period, -INFINITY, INFINITY
    if offset == NULL:
        return
    memcpy(to, offset, n * sizeof(float))
    repeat_channels(to, n)
    m.offset = to
    if mean == NULL:
        return
    memcpy(to + period, mean, n * sizeof(float))
    for i in range(n):
        to[2 * period + i] = <float>(
            <double>scale[i] * inverse_deviation(variance[i], epsilon))
    repeat_channels(to + period, n)
    repeat_channels(to + 2 * period, n)
    m.center, m.scale = to + period, to + 2 * period


cdef inline int64_t gradient_bytes(int64_t n) noexcept nogil:
    return 4 * period_of(n) * sizeof(float)


cdef void set_gradient(dfp_gradient* g, const float* x, int64_t n, int64_t pixels,
                       const float* mean, const float* variance, const float* scale,
                       const double* sums, float epsilon, char* room) noexcept nogil:
    """That of batch norm, of statistics that are those of `pixels` (with their sums) or given."""
    cdef int64_t period = period_of(n), i
    cdef float* a = <float*>room
    cdef float* b = a + period
    cdef float* c = b + period
    cdef float* center = c + period
    cdef double r, s
    for i in range(n):
        r = inverse_deviation(variance[i], epsilon)
        s = <double>scale[i] * r
        a[i], center[i] = <float>s, mean[i]
        if sums != NULL:
            b[i] = <float>(-s * r * r * (sums[n + i] / pixels))
            c[i] = <float>(-s * (sums[i] / pixels))
    repeat_channels(a, n)
    repeat_channels(center, n)
    g.x, g.a, g.center, g.b, g.c = x, a, center, NULL, NULL
    if sums != NULL:
        repeat_channels(b, n)
        repeat_channels(c, n)
        g.b, g.c = b, c


# ---- sums over pixels ----------------------------------------------------------------------------

cdef struct ChannelSums:
    Channels shape
    const float* x              # whose moments are wanted, or what the gradient is multiplied by
    const float* center         # less this; NULL for sums of the gradient alone
    dfp_gradient* gradient      # or NULL, for moments
    int sums                    # of a channel: 1 or 2
    float* bounds               # [images][2][n] of x, or NULL
    # How.
    int threads
    int64_t blocks, task        # of an image; of a task
    int64_t space               # elements that a thread computes at a time
    int64_t bytes
    double* partial             # [images * blocks][sums][n]
    float* low_high             # [images * blocks][2][n]
    float* computed             # [threads][space]
    double* total               # [sums][n]


cdef void sums_plan(ChannelSums* s, double* total) noexcept nogil:
    cdef int64_t n = s.shape.n, parts
    s.total = total
    s.threads = pass_threads(<double>s.shape.images * s.shape.pixels * n)
    s.blocks = sum_blocks(s.shape.pixels)
    s.task = max(<int64_t>1, SUM_WORK // max(
        min(s.shape.pixels, <int64_t>SUM_PIXELS) * n, <int64_t>1))
    parts = s.shape.images * s.blocks
    s.space = max(<int64_t>SUM_COMPUTED, n) if s.gradient != NULL else 0
    s.bytes = (parts * n * s.sums * sizeof(double) + 3 * ALIGN
               + s.threads * s.space * sizeof(float))
    if s.gradient == NULL:
        s.bytes += parts * n * 2 * sizeof(float)


cdef void sums_run(ChannelSums* s, char* scratch) noexcept nogil:
    cdef int64_t parts = s.shape.images * s.blocks, n = s.shape.n
    s.partial = <double*>round_up(<int64_t>scratch, ALIGN)
    s.low_high = <float*>(s.partial + parts * n * s.sums)
    s.computed = s.low_high
    parallel_for(sum_task, s, (parts + s.task - 1) // s.task, s.threads)
    parallel_for(add_partials_task, s, (n * s.sums + SUM_CHANNELS - 1) // SUM_CHANNELS,
                 s.threads if 64 * parts * n > SMALL else 1)
    if s.bounds != NULL:
        parallel_for(join_bounds_task, s, s.shape.images, 1)


cdef void sum_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef ChannelSums* s = <ChannelSums*>work
    cdef int64_t n = s.shape.n, block, end = min((i + 1) * s.task, s.shape.images * s.blocks)
    cdef int64_t first, count, part, c
    cdef double* sums
    cdef float* bounds
    cdef float* computed = s.computed + thread * s.space
    cdef const float* x = NULL
    for block in range(i * s.task, end):
        first = block % s.blocks * SUM_PIXELS
        count = min(<int64_t>SUM_PIXELS, s.shape.pixels - first)
        first += block // s.blocks * s.shape.pixels
        sums = s.partial + block * n * s.sums
        memset(sums, 0, n * s.sums * sizeof(double))
        if s.gradient == NULL:
            bounds = s.low_high + block * n * 2
            for c in range(n):
                bounds[c], bounds[n + c] = INFINITY, -INFINITY
            kernel.moments(s.x + first * n, count, n, sums, bounds)
            continue
        while count > 0:
            part = min(count, max(<int64_t>1, s.space // n))
            kernel.gradient(s.gradient, first * n, part * n, computed)
            if s.center != NULL:
                x = s.x + first * n
            kernel.channel_sums(computed, x, s.center, part, n, sums)
            first += part
            count -= part


cdef void add_partials_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef ChannelSums* s = <ChannelSums*>work
    cdef int64_t first = i * SUM_CHANNELS, all = s.shape.n * s.sums
    kernel.add_rows(s.partial + first, s.shape.images * s.blocks, all,
                    min(<int64_t>SUM_CHANNELS, all - first), s.total + first)


cdef void join_bounds_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef ChannelSums* s = <ChannelSums*>work
    cdef int64_t n = s.shape.n, block, c
    cdef float* to = s.bounds + i * 2 * n
    cdef const float* part
    for c in range(n):
        to[c], to[n + c] = INFINITY, -INFINITY
    for block in range(i * s.blocks, (i + 1) * s.blocks):
        part = s.low_high + block * 2 * n
        for c in range(n):
            to[c] = min(to[c], part[c])
            to[n + c] = max(to[n + c], part[n + c])


cdef void moments_of(const double* sums, int64_t n, int64_t pixels, float* mean,
                     float* variance) noexcept nogil:
    cdef int64_t c
    cdef double m, v
    for c in range(n):
        m = sums[c] / pixels
        v = sums[n + c] / pixels - m * m
        mean[c] = <float>m
        # A NaN stays.
        variance[c] = <float>(0.0 if v < 0 else v)


cdef bint exponents_of_bounds(Quantize* z, const float* bounds, int64_t n) noexcept nogil:
    """The exponents of a map of images whose channels lie within bounds, and whether they are sure:
    every step of a map is monotone, so its extremes are those of x, but for a SiLU, see below."""
    cdef dfp_map m = z.map[0], top
    cdef int64_t block, i, k, count, image
    cdef float space[COMPUTED]
    cdef float highest
    cdef uint32_t most
    m.silu = False
    set_map(&top, &highest, 1, NULL, NULL, NULL, NULL, 0, NULL)
    top.silu = True
    for image in range(z.groups):
        most = 0
        highest = -INFINITY
        m.x = bounds + image * 2 * n
        # Lows and highs of all channels, each in its place: a multiple of the period at a time.
        for block in range((2 * n + COMPUTED - 1) // COMPUTED):
            i = block * COMPUTED
            count = min(<int64_t>COMPUTED, 2 * n - i)
            kernel.map(&m, i, count, space)
            most = max(most, kernel.absmax_bits(space, count))
            for k in range(count if z.map.silu else 0):
                highest = max(highest, space[k])
        if z.map.silu and most < 0x7f800000u:
            kernel.map(&top, 0, 1, space)
            most = kernel.absmax_bits(space, 1)
            if space[0] < SILU_LEAST or floor_log2(most) != floor_log2(most + SILU_ERROR):
                return False
        z.e[image] = exponent_of(z, image, most)
    return True


# ---- element by element --------------------------------------------------------------------------

# A map or a gradient written as float32, and whether it is positive: either, or both.
cdef struct Apply:
    const dfp_map* map          # or NULL, and
    const dfp_gradient* gradient
    int64_t total
    float* y                    # or NULL
    uint8_t* positive           # or NULL


cdef void apply_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Apply* a = <Apply*>work
    cdef int64_t first = i * SUM_WORK, end = min(a.total, first + SUM_WORK), n
    cdef float space[COMPUTED]
    cdef float* to
    while first < end:
        # While it is in the nearest cache.
        n = min(<int64_t>COMPUTED, end - first)
        to = a.y + first if a.y != NULL else &space[0]
        if a.map != NULL:
            kernel.map(a.map, first, n, to)
        else:
            kernel.gradient(a.gradient, first, n, to)
        if a.positive != NULL:
            kernel.positive_bits(to, n, a.positive + first // 8)
        first += n


cdef void apply(Apply* a) noexcept nogil:
    parallel_for(apply_task, a, (a.total + SUM_WORK - 1) // SUM_WORK, pass_threads(a.total))


cdef inline float clipped(float v, const Clip* to) noexcept nogil:
    """NaN stays NaN."""
    v = to.low if v < to.low else v
    return to.high if v > to.high else v


cdef void add_bias_in_place(float* y, int64_t rows, int64_t n, const float* bias,
                            const Clip* clip) noexcept nogil:
    """For results that no product computes: empty sums, and those of single channels."""
    cdef int64_t r, c
    for r in range(rows):
        for c in range(n):
            y[r * n + c] = clipped(y[r * n + c] + bias[c], clip)
