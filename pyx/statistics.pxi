# Per-channel sum, sum of squares, minimum and maximum of a convolution's output, for batch norm and
# for the next quantisation. Sums are doubles in a fixed order, so they have one result everywhere:
# one partial per row of an image, pixel by pixel; the partials are added in row order.

cdef struct Statistics:
    const float* y
    int64_t rows, width, channels
    int64_t bytes
    double* sums                # [rows][2][channels]
    float* bounds               # [rows][2][channels]


cdef void statistics_plan(Statistics* s, const float* y, int64_t rows, int64_t width,
                          int64_t channels) noexcept nogil:
    s.y, s.rows, s.width, s.channels = y, rows, width, channels
    s.bytes = rows * channels * 2 * (sizeof(double) + sizeof(float)) + ALIGN


cdef void statistics_run(Statistics* s, char* scratch, double* total, double* squares,
                         double* least, double* most) noexcept nogil:
    """An image without pixels has sums 0, minimum +Inf and maximum -Inf."""
    cdef int64_t r, c
    cdef double* sums
    cdef float* bounds
    s.sums = <double*>round_up(<int64_t>scratch, ALIGN)
    s.bounds = <float*>(s.sums + s.rows * s.channels * 2)
    parallel_for(statistics_task, s, s.rows,
                 team_size() if s.rows * s.width * s.channels > SMALL else 1)
    for c in range(s.channels):
        total[c] = squares[c] = 0.0
        least[c], most[c] = INFINITY, -INFINITY
    for r in range(s.rows):
        sums = s.sums + r * s.channels * 2
        bounds = s.bounds + r * s.channels * 2
        for c in range(s.channels):
            total[c] += sums[c]
            squares[c] += sums[s.channels + c]
            least[c] = lesser(least[c], bounds[c])
            most[c] = -lesser(-most[c], -bounds[s.channels + c])
    for c in range(s.channels):
        # A zero is +0, whichever zero came first.
        least[c] += 0.0
        most[c] += 0.0


cdef inline double lesser(double a, double b) noexcept nogil:
    """The smaller one; NaN if there is one."""
    return a if a < b or a != a else b


cdef void statistics_task(void* work, int64_t r, int thread) noexcept nogil:
    cdef Statistics* s = <Statistics*>work
    cdef int64_t n = s.channels, p, c
    cdef const float* y = s.y + r * s.width * n
    cdef double* sums = s.sums + r * n * 2
    cdef float* bounds = s.bounds + r * n * 2
    cdef double v
    for c in range(n):
        sums[c] = sums[n + c] = 0.0
        bounds[c], bounds[n + c] = INFINITY, -INFINITY
    for p in range(s.width):
        for c in range(n):
            v = y[p * n + c]
            sums[c] += v
            sums[n + c] += v * v
            bounds[c] = <float>lesser(bounds[c], v)
            bounds[n + c] = <float>-lesser(-bounds[n + c], -v)
