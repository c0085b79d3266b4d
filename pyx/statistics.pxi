# Per-channel sum, sum of squares, minimum and maximum of a convolution's output, for batch norm and
# for the next quantisation. Sums are doubles in a fixed order, so they have one result everywhere:
# one partial per row of an image, pixel by pixel; the partials are added in row order.

cdef enum:
    STATISTICS_BLOCK = 65536    # elements of y a task reads, about: 10 us of work
    STATISTICS_CHANNELS = 128   # whose partials one task adds

cdef struct Statistics:
    const float* y
    int64_t rows, width, channels
    int64_t block               # rows of a task
    int threads
    int64_t bytes
    double* sums                # [rows][2][channels]
    float* bounds               # [threads][2][channels]
    double* total
    double* squares


cdef void statistics_plan(Statistics* s, const float* y, int64_t rows, int64_t width,
                          int64_t channels) noexcept nogil:
    s.y, s.rows, s.width, s.channels = y, rows, width, channels
    # Reading a value takes as long as 64 products.
    s.threads = team_size() if 64 * rows * width * channels > SMALL else 1
    s.block = max(STATISTICS_BLOCK // max(width * channels, <int64_t>1), <int64_t>1)
    s.bytes = channels * 2 * (rows * sizeof(double) + s.threads * sizeof(float)) + ALIGN


cdef void statistics_run(Statistics* s, char* scratch, double* total, double* squares,
                         double* least, double* most) noexcept nogil:
    """An image without pixels has sums 0, minimum +Inf and maximum -Inf."""
    cdef int64_t n = s.channels, c
    cdef int i
    cdef float* bounds
    s.sums = <double*>round_up(<int64_t>scratch, ALIGN)
    s.bounds = <float*>(s.sums + s.rows * n * 2)
    s.total, s.squares = total, squares
    for c in range(s.threads * 2 * n):
        s.bounds[c] = INFINITY if c // n % 2 == 0 else -INFINITY
    parallel_for(statistics_task, s, (s.rows + s.block - 1) // s.block, s.threads)
    parallel_for(add_partials_task, s, (n + STATISTICS_CHANNELS - 1) // STATISTICS_CHANNELS,
                 s.threads if 64 * s.rows * n > SMALL else 1)
    for c in range(n):
        least[c], most[c] = INFINITY, -INFINITY
        for i in range(s.threads):
            bounds = s.bounds + i * 2 * n
            least[c] = min(least[c], <double>bounds[c])
            most[c] = max(most[c], <double>bounds[n + c])
        # A zero is +0, whichever zero came first.
        least[c] += 0.0
        most[c] += 0.0
        if squares[c] != squares[c]:
            # Only a NaN makes it one: squares of infinities are +Inf.
            least[c] = most[c] = NAN


cdef void statistics_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Statistics* s = <Statistics*>work
    cdef int64_t r, n = s.channels
    for r in range(i * s.block, min(s.rows, (i + 1) * s.block)):
        kernel.statistics(s.y + r * s.width * n, s.width, n, s.sums + r * n * 2,
                          s.bounds + thread * n * 2)


cdef void add_partials_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Statistics* s = <Statistics*>work
    cdef int64_t first = i * STATISTICS_CHANNELS
    cdef int64_t n = min(<int64_t>STATISTICS_CHANNELS, s.channels - first)
    kernel.add_rows(s.sums + first, s.rows, s.channels * 2, n, s.total + first)
    kernel.add_rows(s.sums + s.channels + first, s.rows, s.channels * 2, n, s.squares + first)
