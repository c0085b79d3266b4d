# What quantizing did to a tensor, measured after it is done: docs/observability.md.
#
# A second pass over what was quantized, only in steps that are looked at. It is cut up in the same
# way whatever the number of threads, and sums are added in order: they have one result.

cdef enum:
    EXPONENTS = 512             # that are told apart: from -256 on; others count as the nearest

cdef struct Measures:
    int64_t counts[3]           # as by dfp_kernel.count, of finite groups
    double signal, noise        # sums of x**2 and of (x - q * 2**e)**2 of finite groups
    int64_t nonfinite           # groups that are not
    int64_t exponents[EXPONENTS]    # how many finite groups that are not all zero have each

cdef struct Measuring:
    Quantize* z
    Measures* to
    int64_t pieces, piece       # of a group, and their elements
    int64_t block               # groups of a task
    double* sums                # of each task: signal and noise
    int64_t* nonzero            # elements of each group

cdef extern from *:
    """
    enum { DFP_LANES = 8 };

    /* Adds the sums of x**2 and (x - q * scale)**2: in lanes, so that they can be vectors. */
    static void dfp_noise(const float *x, const int16_t *q, int64_t n, double scale, double *sums) {
        double signal[DFP_LANES] = {0}, noise[DFP_LANES] = {0};
        int64_t i = 0;
        for (; i + DFP_LANES <= n; i += DFP_LANES)
            for (int j = 0; j < DFP_LANES; j++) {
                const double v = x[i + j], d = v - q[i + j] * scale;
                signal[j] += v * v;
                noise[j] += d * d;
            }
        for (int j = 0; i < n; i++, j++) {
            const double v = x[i], d = v - q[i] * scale;
            signal[j] += v * v;
            noise[j] += d * d;
        }
        for (int j = 0; j < DFP_LANES; j++) sums[0] += signal[j], sums[1] += noise[j];
    }
    """
    void dfp_noise(const float* x, const int16_t* q, int64_t n, double scale,
                   double* sums) noexcept nogil


cdef void measure_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Measuring* m = <Measuring*>work
    cdef Quantize* z = m.z
    cdef float space[COMPUTED]
    cdef int64_t counts[3]
    cdef int64_t group = i // m.pieces * m.block, first = i % m.pieces * m.piece
    cdef int64_t end = min(group + m.block, z.groups), at, stop, part
    while group < end:
        if z.e[group] != NAN_EXPONENT:
            memset(counts, 0, sizeof(counts))
            count_group(z, group, first, min(m.piece, z.n - first), counts)
            add_counts(m.to.counts, counts)
            dfp_atomic_add(m.nonzero + group, counts[0])
            at = group * z.n + first
            stop = at + min(m.piece, z.n - first)
            while at < stop:
                part = min(<int64_t>COMPUTED, stop - at)
                dfp_noise(values(z, at, part, space), z.q + at, part, scale_of(z.e[group]),
                          m.sums + 2 * i)
                at += part
        group += 1


cdef bint measure(Quantize* z, Measures* to) noexcept nogil:
    """Adds to `to` what became of what z has quantized; False if there is no memory for it."""
    cdef Measuring m
    cdef int64_t g, i, tasks
    if z.groups == 0 or z.n == 0:
        return True
    m.z, m.to = z, to
    m.pieces = (z.n + QUANTIZE_CHUNK - 1) // QUANTIZE_CHUNK
    m.piece = (z.n + m.pieces - 1) // m.pieces
    m.block = max(<int64_t>1, QUANTIZE_CHUNK // z.n)
    tasks = (z.groups + m.block - 1) // m.block * m.pieces
    m.sums = <double*>calloc(2 * tasks + z.groups, sizeof(double))
    if m.sums == NULL:
        return False
    m.nonzero = <int64_t*>(m.sums + 2 * tasks)
    parallel_for(measure_task, &m, tasks, team_size())
    for i in range(tasks):
        to.signal += m.sums[2 * i]
        to.noise += m.sums[2 * i + 1]
    for g in range(z.groups):
        if z.e[g] == NAN_EXPONENT:
            to.nonfinite += 1
        elif m.nonzero[g]:
            to.exponents[max(0, min(EXPONENTS - 1, z.e[g] + EXPONENTS // 2))] += 1
    free(m.sums)
    return True


cdef int64_t first_nonfinite(Quantize* z) noexcept nogil:
    """The first element that is not finite, or -1; it costs a look at the exponents if there is
    none."""
    cdef float space[COMPUTED]
    cdef const float* x
    cdef int64_t g, at, part, i
    for g in range(z.groups):
        if z.e[g] == NAN_EXPONENT:
            at = g * z.n
            while at < (g + 1) * z.n:
                part = min(<int64_t>COMPUTED, (g + 1) * z.n - at)
                x = values(z, at, part, space)
                for i in range(part):
                    if dfp_bits(x[i]) & 0x7fffffffu >= 0x7f800000u:
                        return at + i
                at += part
            # Bounds may overflow where no element does.
            return g * z.n
    return -1
