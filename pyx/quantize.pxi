# float32 -> (mantissas, exponent) and back: numerics.md, "Quantise".

cdef enum Rounding:
    NEAREST
    TRUNCATE
    STOCHASTIC

cdef enum:
    NAN_EXPONENT = -2147483647 - 1
    QUANTIZE_CHUNKS = 256       # at most; a chunk is one task
    QUANTIZE_CHUNK = 131072     # at least this many elements: 20 us of work

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
    bint stream
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
        kernel.stochastic(z.x + first, n, first, ldexp(1.0, power), qmax_of(z.bits), z.key,
                          z.step, z.q + first)
    else:
        kernel.quantize(z.x + first, n, <float>ldexp(1.0, power1),
                        <float>ldexp(1.0, power - power1), <float>qmax_of(z.bits),
                        z.rounding == TRUNCATE, z.stream, z.q + first)


cdef int32_t quantize(Quantize* z) noexcept nogil:
    """Fills z.q and returns the exponent."""
    cdef uint32_t most = 0
    cdef int64_t i, chunks
    cdef int threads = team_size()
    z.chunk = max(<int64_t>QUANTIZE_CHUNK, (z.n + QUANTIZE_CHUNKS - 1) // QUANTIZE_CHUNKS)
    z.chunk = (z.chunk + 1023) // 1024 * 1024
    chunks = (z.n + z.chunk - 1) // z.chunk
    z.stream = z.n * sizeof(int16_t) >= STREAM and <int64_t>z.q % ALIGN == 0
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
