# float32 -> (mantissas, exponents) and back: numerics.md, "From float32".
#
# The tensor is `groups` groups of n elements, with an exponent each. A task reads some of them for
# their largest values and, while they are in a cache, writes their mantissas; of groups too large,
# or too few for all threads, it takes pieces: all are read first, then all are written.
#
# What is quantized need not lie in memory: it may be computed as it is read, block by block in the
# nearest cache, by a map or a gradient of channels.pxi. The floats may be kept besides; else a task
# keeps those of a group, and pieces are computed twice.

cdef enum Rounding:
    NEAREST
    TRUNCATE
    STOCHASTIC

cdef enum:
    NAN_EXPONENT = -2147483647 - 1
    QUANTIZE_CHUNK = 131072     # a task's elements, at least: 20 us of work
    QUANTIZE_GROUP = 524288     # of a group that stays in a cache while it is read twice
    TELLING = 64                # elements that are not zero, fewer of which tell nothing
    SAMPLED = 8192              # elements, from which on a sample tells where to look closer
    COMPUTED = 4096             # elements that are computed at a time: 16 KB
    SUM_PIXELS = 128            # of a partial sum

cdef struct Quantize:
    const float* x              # or NULL, and one of
    const dfp_map* map
    const dfp_gradient* gradient
    float* kept                 # where what is computed is written besides, or NULL
    float* space                # or where a thread of so many keeps that of a group, or NULL
    int threads
    uint8_t* positive           # and whether it is positive, as by dfp_kernel.positive_bits
    double* partial             # and its sums, if groups are images of `channels`: for every
    int64_t channels            # SUM_PIXELS pixels, see channels.pxi
    int64_t groups, n
    int bits
    Rounding rounding
    const int32_t* given        # the exponents, if they are, but where x is not finite
    bint trusted                # are they in `e`, and right?
    uint32_t key[2]
    uint64_t step
    int16_t* q
    int32_t* e
    # What is counted, as by dfp_kernel.count: for the tensor, and for each group where groups are
    # taken in pieces. Those who only watch look closer at what is suspect.
    bint counting, watching
    int64_t counts[3]
    int64_t* group_counts
    uint64_t worst              # the group that lost most, see `weigh`
    bint by_pieces              # are groups taken in pieces? as `in_pieces` said
    # The state of a run.
    int64_t pieces, piece       # of a group, and their elements
    int64_t block               # groups of a task
    bint stream


cdef inline int qmax_of(int64_t bits) noexcept nogil:
    return (1 << (bits - 1)) - 1


cdef inline int clamp_exponent(int32_t e) noexcept nogil:
    """Beyond +-252 every element clamps, or rounds to what it rounds to there."""
    return max(-252, min(252, e))


cdef inline int32_t exponent_of(const Quantize* z, int64_t group, uint32_t most) noexcept nogil:
    """The exponent of a group from the bits of its largest magnitude."""
    if most >= 0x7f800000u:
        return NAN_EXPONENT
    if z.given != NULL:
        return z.given[group]
    return floor_log2(max(most, 1u)) - (z.bits - 2)


cdef inline void compute(const Quantize* z, int64_t at, int64_t n, float* to) noexcept nogil:
    if z.map != NULL:
        kernel.map(z.map, at, n, to)
    else:
        kernel.gradient(z.gradient, at, n, to)


cdef inline const float* values(const Quantize* z, int64_t at, int64_t n,
                                float* space) noexcept nogil:
    """Elements `at` to at + n; at most COMPUTED of them where they are computed."""
    if z.x != NULL:
        return z.x + at
    if z.kept == NULL:
        compute(z, at, n, space)
        return space
    return z.kept + at


cdef inline int64_t sum_blocks(int64_t pixels) noexcept nogil:
    """How many partial sums an image has."""
    return (pixels + SUM_PIXELS - 1) // SUM_PIXELS


cdef inline int64_t partial_of(const Quantize* z, int64_t at) noexcept nogil:
    """Which partial sum element `at` belongs to."""
    return (at // z.n * sum_blocks(z.n // z.channels)
            + at % z.n // (SUM_PIXELS * z.channels))


cdef uint32_t largest(const Quantize* z, int64_t at, int64_t n, float* kept) noexcept nogil:
    """The bits of the largest magnitude of n elements; what is computed goes to `kept`, if any."""
    cdef float space[COMPUTED]
    cdef float* to
    cdef double* sums
    cdef uint32_t most = 0
    cdef int64_t end = at + n, part, block = COMPUTED, first = 0
    if z.x != NULL:
        return kernel.absmax_bits(z.x + at, n)
    if z.partial != NULL:
        # Whole pixels, within a block of SUM_PIXELS.
        block = COMPUTED // z.channels * z.channels
    while at < end:
        part = min(block, end - at)
        if z.partial != NULL:
            first = at % z.n % (SUM_PIXELS * z.channels)
            part = min(part, SUM_PIXELS * z.channels - first)
        to = kept + at if kept != NULL else &space[0]
        compute(z, at, part, to)
        if z.positive != NULL:
            kernel.positive_bits(to, part, z.positive + at // 8)
        if z.partial != NULL:
            sums = z.partial + partial_of(z, at) * z.channels
            if first == 0:
                memset(sums, 0, z.channels * sizeof(double))
            kernel.channel_sums(to, NULL, NULL, part // z.channels, z.channels, sums)
        most = max(most, kernel.absmax_bits(to, part))
        at += part
    return most


cdef bint round_and_watch(Quantize* z, int64_t group, int64_t first, int64_t n, float* kept,
                          bint stream) noexcept nogil:
    """Writes n mantissas of a group from element `first` on; returns whether it may be that half of
    what is not zero became zero."""
    cdef float space[COMPUTED]
    cdef const float* x
    cdef int64_t counts[2]
    cdef int64_t at = group * z.n + first, end = at + n, part
    cdef int64_t block = COMPUTED if z.x == NULL and kept == NULL else SAMPLED
    if not z.watching and z.x != NULL:
        block = n
    memset(counts, 0, sizeof(counts))
    while at < end:
        # While it is in the nearest cache.
        part = min(block, end - at)
        if kept != NULL:
            x = kept + at
        else:
            x = values(z, at, part, space)
        round_block(z, x, group, at, part, stream)
        if z.watching and n >= SAMPLED:
            kernel.sample(x, z.q + at, part, counts)
        at += part
    if not z.watching:
        return False
    if n < SAMPLED:
        return n >= TELLING and 2 * kernel.zeros(z.q + end - n, n) >= n
    return counts[0] and 5 * counts[1] >= 2 * counts[0]


cdef void round_block(Quantize* z, const float* x, int64_t group, int64_t at, int64_t n,
                      bint stream) noexcept nogil:
    """Writes the mantissas of x, n elements of a group from `at` on."""
    cdef int32_t e = z.e[group]
    cdef int power, power1
    if e == NAN_EXPONENT:
        memset(z.q + at, 0, n * sizeof(int16_t))
        return
    e = clamp_exponent(e)
    if z.rounding == STOCHASTIC:
        kernel.stochastic(x, 1, n, at, &e, qmax_of(z.bits), z.key, z.step, z.q + at)
        return
    power = -e
    power1 = max(-126, min(126, power))
    kernel.quantize(x, n, <float>ldexp(1.0, power1), <float>ldexp(1.0, power - power1),
                    <float>qmax_of(z.bits), z.rounding == TRUNCATE, stream, z.q + at)


cdef void groups_task(void* work, int64_t i, int thread) noexcept nogil:
    """Whole groups, read and written in one go."""
    cdef Quantize* z = <Quantize*>work
    cdef int64_t first = i * z.block, count = min(z.groups - first, z.block), g
    cdef int64_t end = first + count, part
    cdef bint suspect
    cdef float* kept = z.kept
    if 0 < z.n <= DFP_SHORT and z.partial == NULL:
        while first < end:
            part = end - first
            if z.x == NULL:
                part = min(part, COMPUTED // z.n)
            short_groups(z, first, part)
            first += part
    else:
        for g in range(first, end):
            if z.space != NULL:
                kept = z.space + (thread - g) * z.n
            if not z.trusted:
                z.e[g] = exponent_of(z, g, largest(z, g * z.n, z.n, kept))
            suspect = round_and_watch(z, g, 0, z.n, kept, z.stream)
            if suspect or z.counting:
                look_closer(z, g)


cdef void short_groups(Quantize* z, int64_t first, int64_t count) noexcept nogil:
    cdef float space[COMPUTED]
    cdef const float* x
    cdef int64_t g, at = first * z.n
    cdef bint suspect
    if z.x == NULL:
        largest(z, at, count * z.n, z.kept)
    x = values(z, at, count * z.n, space)
    if z.given == NULL:
        kernel.exponents(x, count, z.n, z.bits, z.e + first)
    else:
        for g in range(first, first + count):
            z.e[g] = exponent_of(z, g, kernel.absmax_bits(x + (g - first) * z.n, z.n))
    if z.rounding != STOCHASTIC:
        kernel.quantize_groups(x, count, z.n, z.e + first, <float>qmax_of(z.bits),
                               z.rounding == TRUNCATE, z.q + at)
    else:
        kernel.stochastic(x, count, z.n, at, z.e + first, qmax_of(z.bits), z.key, z.step, z.q + at)
        for g in range(first, first + count):
            if z.e[g] == NAN_EXPONENT:
                memset(z.q + g * z.n, 0, z.n * sizeof(int16_t))
    suspect = z.counting or (z.watching and z.n >= TELLING and may_lose(z, at, count * z.n))
    for g in range(first, first + count if suspect else first):
        if z.counting or 2 * kernel.zeros(z.q + g * z.n, z.n) >= z.n:
            look_closer(z, g)


cdef void look_closer(Quantize* z, int64_t group) noexcept nogil:
    """Counts all of a group."""
    cdef int64_t counts[3]
    memset(counts, 0, sizeof(counts))
    count_group(z, group, 0, z.n, counts)
    add_counts(z.counts, counts)
    weigh(z, counts)


cdef inline bint may_lose(const Quantize* z, int64_t first, int64_t n) noexcept nogil:
    """Have small groups any chance to have lost what is worth looking for?"""
    cdef int64_t i
    # Half of a group, or half of that where it lies in two blocks.
    for i in range(first, first + n, 1024):
        if kernel.zeros(z.q + i, min(first + n - i, <int64_t>1024)) >= TELLING // 4:
            return True
    return False


cdef void absmax_task(void* work, int64_t i, int thread) noexcept nogil:
    """A piece of a group. Until all have been read, e holds the bits of the largest magnitude."""
    cdef Quantize* z = <Quantize*>work
    cdef int64_t group = i // z.pieces, first = i % z.pieces * z.piece
    dfp_atomic_max(<uint32_t*>z.e + group, largest(
        z, group * z.n + first, min(z.piece, z.n - first), z.kept))


cdef void round_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Quantize* z = <Quantize*>work
    cdef int64_t group = i // z.pieces, first = i % z.pieces * z.piece
    cdef int64_t n = min(z.piece, z.n - first)
    cdef int64_t counts[3]
    cdef bint suspect = round_and_watch(z, group, first, n, z.kept, z.stream)
    if z.counting:
        memset(counts, 0, sizeof(counts))
        count_group(z, group, first, n, counts)
        add_counts(z.counts, counts)
        add_counts(z.group_counts + 3 * group, counts)
    elif suspect:
        # Only a mark: the whole group has to be counted.
        dfp_atomic_add(z.group_counts + 3 * group, 1)


cdef void count_group(Quantize* z, int64_t group, int64_t first, int64_t n,
                      int64_t* counts) noexcept nogil:
    """Counts n elements of a group from `first` on, which has been written."""
    cdef float space[COMPUTED]
    cdef int64_t at = group * z.n + first, end = at + n, part
    cdef double limit = qmax_of(z.bits) * scale_of(z.e[group])
    cdef float below = <float>min(limit, <double>FLT_MAX)
    if z.e[group] == NAN_EXPONENT:
        # It is seen otherwise that nothing is left of it.
        return
    if below > limit:
        below = dfp_float_below(below)
    while at < end:
        part = end - at if z.x != NULL else min(<int64_t>COMPUTED, end - at)
        kernel.count(values(z, at, part, space), z.q + at, part, dfp_bits(below), counts)
        at += part


cdef inline void add_counts(int64_t* to, const int64_t* counts) noexcept nogil:
    cdef int i
    for i in range(3):
        dfp_atomic_add(to + i, counts[i])


cdef inline void weigh(Quantize* z, const int64_t* counts) noexcept nogil:
    """Remembers the group with the largest share of elements lost: of its nonzero elements the
    share in 2**-20 and, in 40 bits, the number."""
    if counts[1] and counts[0] >= TELLING:
        dfp_atomic_max64(&z.worst, <uint64_t>(<double>counts[1] / counts[0] * (1 << 20)) << 40
                         | <uint64_t>counts[0])


cdef extern from *:
    """
    #include <float.h>

    #define DFP_ATOMIC_MAX(name, type)                                                        \\
        static inline void name(type *to, type value) {                                       \\
            type seen = __atomic_load_n(to, __ATOMIC_RELAXED);                                \\
            while (value > seen &&                                                            \\
                   !__atomic_compare_exchange_n(to, &seen, value, 1, __ATOMIC_RELAXED,        \\
                                                __ATOMIC_RELAXED)) {}                         \\
        }
    DFP_ATOMIC_MAX(dfp_atomic_max, uint32_t)
    DFP_ATOMIC_MAX(dfp_atomic_max64, uint64_t)
    static inline void dfp_atomic_add(int64_t *to, int64_t value) {
        __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
    }
    static inline uint32_t dfp_bits(float x) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        return bits;
    }
    /* Of a positive number, the next one towards zero. */
    static inline float dfp_float_below(float x) {
        const uint32_t bits = dfp_bits(x) - 1;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
    """
    void dfp_atomic_max(uint32_t* to, uint32_t value) noexcept nogil
    void dfp_atomic_max64(uint64_t* to, uint64_t value) noexcept nogil
    void dfp_atomic_add(int64_t* to, int64_t value) noexcept nogil
    uint32_t dfp_bits(float x) noexcept nogil
    float dfp_float_below(float x) noexcept nogil
    const float FLT_MAX


cdef inline bint in_pieces(const Quantize* z) noexcept nogil:
    return z.n > QUANTIZE_GROUP or (z.groups < 2 * team_size() and z.n > QUANTIZE_CHUNK)


cdef void quantize(Quantize* z) noexcept nogil:
    """Fills z.q and z.e; z.group_counts, if it is needed, is room for its counts. Exponents that
    are `trusted` are in z.e already; nothing is kept then."""
    cdef int threads = z.threads if z.space != NULL else team_size()
    cdef int64_t g, total = z.groups * z.n
    memset(z.counts, 0, sizeof(z.counts))
    z.worst = 0
    z.stream = (total * sizeof(int16_t) >= STREAM and <int64_t>z.q % ALIGN == 0
                and (z.groups == 1 or z.n * sizeof(int16_t) % ALIGN == 0))
    if not z.by_pieces:
        z.block = max(<int64_t>1, QUANTIZE_CHUNK // max(z.n, <int64_t>1))
        parallel_for(groups_task, z, (z.groups + z.block - 1) // z.block, threads)
        return
    z.pieces = (z.n + QUANTIZE_CHUNK - 1) // QUANTIZE_CHUNK
    z.piece = (z.n + z.pieces - 1) // z.pieces
    z.piece = round_up(z.piece, 1024 if z.partial == NULL else SUM_PIXELS * z.channels)
    z.pieces = (z.n + z.piece - 1) // z.piece
    if z.counting or z.watching:
        memset(z.group_counts, 0, z.groups * 3 * sizeof(int64_t))
    if not z.trusted:
        memset(z.e, 0, z.groups * sizeof(int32_t))
        parallel_for(absmax_task, z, z.groups * z.pieces, threads)
        for g in range(z.groups):
            z.e[g] = exponent_of(z, g, (<uint32_t*>z.e)[g])
    parallel_for(round_task, z, z.groups * z.pieces, threads)
    if z.counting or z.watching:
        for g in range(z.groups):
            if z.watching and not z.counting and z.group_counts[3 * g]:
                memset(z.group_counts + 3 * g, 0, 3 * sizeof(int64_t))
                count_group(z, g, 0, z.n, z.group_counts + 3 * g)
            weigh(z, z.group_counts + 3 * g)


cdef inline int floor_log2(uint32_t bits) noexcept nogil:
    """floor(log2(x)) of a positive finite float from its bits; subnormals are normalised."""
    cdef int e = <int>(bits >> 23) - 127
    if e > -127:
        return e
    e = -150
    while bits:
        bits >>= 1
        e += 1
    return e


cdef struct Dequantize:
    const int16_t* q
    const int32_t* e
    int64_t n                   # elements of a group
    int64_t total, chunk
    float* y


cdef void dequantize_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Dequantize* z = <Dequantize*>work
    cdef int64_t k = i * z.chunk, end = min(z.total, k + z.chunk), stop
    cdef double scale
    while k < end:
        stop = min(end, (k // z.n + 1) * z.n)
        scale = scale_of(z.e[k // z.n])
        while k < stop:
            z.y[k] = <float>(z.q[k] * scale)
            k += 1


cdef void dequantize(const int16_t* q, const int32_t* e, int64_t groups, int64_t total,
                     float* y) noexcept nogil:
    """y = RN32(q * 2**e)"""
    cdef Dequantize z
    if total == 0:
        return
    z.q, z.e, z.y, z.n, z.total = q, e, y, total // groups, total
    z.chunk = QUANTIZE_CHUNK
    parallel_for(dequantize_task, &z, (total + z.chunk - 1) // z.chunk, team_size())


cdef inline double scale_of(int64_t e) noexcept nogil:
    """2**e; beyond +-960 every nonzero int64 times it is Inf or rounds to zero in float32."""
    if e == NAN_EXPONENT:
        return NAN
    return ldexp(1.0, <int>max(-960, min(960, e)))
