# float32 -> (mantissas, exponent) and back: numerics.md, "Quantise".

cdef extern from "philox.h" nogil:
    void dfp_philox(const uint32_t* counter, const uint32_t* key, uint32_t* out) noexcept

cdef enum Rounding:
    NEAREST
    TRUNCATE
    STOCHASTIC

cdef enum:
    NAN_EXPONENT = -2147483647 - 1
    QUANTIZE_CHUNKS = 256       # at most; a chunk is one task
    QUANTIZE_CHUNK = 16384      # at least this many elements: 3 us of work

cdef struct Quantize:
    const float* x
    int64_t n
    int bits
    Rounding rounding
    bint given                  # is the exponent given?
    int64_t exponent
    uint32_t key[2]
    uint64_t step
    int16_t* q
    # The state of a run.
    int64_t chunk
    uint32_t most[QUANTIZE_CHUNKS]


cdef inline int qmax_of(int64_t bits) noexcept nogil:
    return (1 << (bits - 1)) - 1


cdef void absmax_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Quantize* z = <Quantize*>work
    cdef int64_t first = i * z.chunk
    z.most[i] = kernel.absmax_bits(z.x + first, min(z.chunk, z.n - first))


cdef void round_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Quantize* z = <Quantize*>work
    cdef int64_t first = i * z.chunk
    cdef int64_t n = min(z.chunk, z.n - first)
    # With |e| above 252 every element clamps, or rounds to what it rounds to at 252.
    cdef int power = <int>max(-252, min(252, -z.exponent))
    cdef int power1 = max(-126, min(126, power))
    if z.rounding == STOCHASTIC:
        round_stochastic(z, first, n, ldexp(1.0, power))
    else:
        kernel.quantize(z.x + first, n, <float>ldexp(1.0, power1),
                        <float>ldexp(1.0, power - power1), <float>qmax_of(z.bits),
                        z.rounding == TRUNCATE, z.q + first)


cdef void round_stochastic(Quantize* z, int64_t first, int64_t n, double factor) noexcept nogil:
    """q = floor(x * 2**-e + u); u has 24 bits, so that the sum below is exact where it matters:
    within 2**-24 of an integer a double holds every bit of it."""
    cdef int64_t i
    cdef double v
    cdef double qmax = qmax_of(z.bits)
    cdef uint32_t counter[4]
    cdef uint32_t words[4]
    counter[2] = <uint32_t>z.step
    counter[3] = <uint32_t>(z.step >> 32)
    for i in range(first, first + n):
        if i == first or i % 4 == 0:
            counter[0] = <uint32_t>(i // 4)
            counter[1] = <uint32_t>((i // 4) >> 32)
            dfp_philox(counter, z.key, words)
        v = floor(z.x[i] * factor + (words[i % 4] >> 8) * 5.9604644775390625e-08)
        z.q[i] = <int16_t>max(-qmax, min(qmax, v))


cdef int32_t quantize(Quantize* z) noexcept nogil:
    """Fills z.q and returns the exponent."""
    cdef uint32_t most = 0
    cdef int64_t i, chunks
    cdef int threads = team_size()
    z.chunk = max(<int64_t>QUANTIZE_CHUNK, (z.n + QUANTIZE_CHUNKS - 1) // QUANTIZE_CHUNKS)
    z.chunk = (z.chunk + 1023) // 1024 * 1024
    chunks = (z.n + z.chunk - 1) // z.chunk
    parallel_for(absmax_task, z, chunks, threads)
    for i in range(chunks):
        most = max(most, z.most[i])
    if most >= 0x7f800000u or (z.given and z.exponent == NAN_EXPONENT):
        memset(z.q, 0, z.n * sizeof(int16_t))
        return NAN_EXPONENT
    if not z.given:
        if most == 0:
            memset(z.q, 0, z.n * sizeof(int16_t))
            return 0
        z.exponent = floor_log2(most) - (z.bits - 2)
    parallel_for(round_task, z, chunks, threads)
    return <int32_t>z.exponent


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
    int64_t n, chunk
    double scale
    float* y


cdef void dequantize_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Dequantize* z = <Dequantize*>work
    cdef int64_t k
    for k in range(i * z.chunk, min(z.n, (i + 1) * z.chunk)):
        z.y[k] = <float>(z.q[k] * z.scale) if z.q[k] else 0.0


cdef void dequantize(const int16_t* q, int32_t e, int64_t n, float* y) noexcept nogil:
    """y = RN32(q * 2**e)"""
    cdef Dequantize z
    if e == NAN_EXPONENT:
        fill_nan(y, n)
        return
    z.q, z.y, z.n, z.scale = q, y, n, scale_of(e)
    z.chunk = max(<int64_t>QUANTIZE_CHUNK, (n + QUANTIZE_CHUNKS - 1) // QUANTIZE_CHUNKS)
    parallel_for(dequantize_task, &z, (n + z.chunk - 1) // z.chunk, team_size())


cdef inline double scale_of(int64_t e) noexcept nogil:
    """2**e; beyond +-960 every nonzero int64 times it is Inf or rounds to zero in float32."""
    return ldexp(1.0, <int>max(-960, min(960, e)))


cdef inline void fill_nan(float* y, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        y[i] = NAN
