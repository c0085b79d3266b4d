# Arithmetic of sizes.

cdef enum:
    ALIGN = 64              # bytes of a line of the cache
    STREAM = 16777216       # bytes of a result that no cache keeps until it is read


cdef inline int64_t round_up(int64_t x, int64_t to) noexcept nogil:
    return (x + to - 1) // to * to


cdef inline int64_t clamp(int64_t x, int64_t low, int64_t high) noexcept nogil:
    return max(low, min(x, high))


cdef inline int64_t volume(const int64_t* size) noexcept nogil:
    return size[0] * size[1] * size[2]


cdef inline bint all_one(const int64_t* size) noexcept nogil:
    """Of strides, whose volume an int64 need not hold."""
    return size[0] == size[1] == size[2] == 1


cdef inline int64_t gcd(int64_t a, int64_t b) noexcept nogil:
    while b:
        a, b = b, a % b
    return a
