# A step of an optimizer: one pass over weights, gradient and slots (numerics.md, "Optimizers").
#
# Slots in dynamic fixed point become float32, and mantissas again, a few thousand elements at a
# time in the nearest cache; so what is computed on them is what is computed on float32 slots.

cdef enum:
    MAX_SLOTS = 3
    UPDATE_CHUNK = 65536        # a task's elements: a multiple of COMPUTED

cdef struct Update:
    dfp_update step             # where a task's arrays begin is filled in by the task
    bint adam                   # or SGD
    int64_t n
    const float* w
    const float* g              # w_to may be the same memory
    float* w_to
    int slots
    const float* slot[MAX_SLOTS]            # float32, or all are NULL, and
    float* new_slot[MAX_SLOTS]
    const int16_t* q[MAX_SLOTS]             # mantissas
    const int32_t* e[MAX_SLOTS]
    int16_t* new_q[MAX_SLOTS]
    int32_t* new_e[MAX_SLOTS]
    uint32_t seed               # of the noise; the number of the slot is the other half of the key
    uint64_t count              # and its step


cdef inline int64_t slot_blocks(int64_t n) noexcept nogil:
    """Exponents of a slot of n elements."""
    return (n + DFP_SLOT_BLOCK - 1) // DFP_SLOT_BLOCK


cdef void update_slots(dfp_update* step, int slots, const float** slot, float** to) noexcept nogil:
    step.m = slot[0] if slots > 0 else NULL
    step.v = slot[1] if slots > 1 else NULL
    step.h = slot[2] if slots > 2 else NULL
    step.m_to, step.v_to, step.h_to = to[0], to[1], to[2]


cdef void update_block(const Update* u, int64_t first, int64_t n) noexcept nogil:
    """Slots in dynamic fixed point: n elements, at most COMPUTED, from `first` on."""
    cdef float space[MAX_SLOTS][COMPUTED]
    cdef float* to[MAX_SLOTS]
    cdef uint32_t key[2]
    cdef dfp_update step = u.step
    cdef int64_t block = first // DFP_SLOT_BLOCK
    cdef int s
    for s in range(MAX_SLOTS):
        to[s] = space[s]
    for s in range(u.slots):
        # Of the second moments, roots are kept.
        kernel.unpack_slot(u.q[s] + first, u.e[s] + block, n, s > 0, to[s])
    step.w, step.g, step.w_to = u.w + first, u.g + first, u.w_to + first
    update_slots(&step, u.slots, <const float**>to, to)
    if u.adam:
        kernel.adam(&step, n)
    else:
        kernel.sgd(&step, n)
    key[0] = u.seed
    for s in range(u.slots):
        key[1] = s
        kernel.pack_slot(to[s], n, s > 0, first, key, u.count, u.new_q[s] + first,
                         u.new_e[s] + block)


cdef void update_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef const Update* u = <const Update*>work
    cdef int64_t first = i * UPDATE_CHUNK, end = min(u.n, first + UPDATE_CHUNK)
    cdef dfp_update step
    cdef const float* slot[MAX_SLOTS]
    cdef float* to[MAX_SLOTS]
    cdef int s
    if u.slots and u.slot[0] == NULL:
        while first < end:
            update_block(u, first, min(<int64_t>COMPUTED, end - first))
            first += COMPUTED
        return
    step = u.step
    memset(to, 0, sizeof(to))
    for s in range(u.slots):
        slot[s], to[s] = u.slot[s] + first, u.new_slot[s] + first
    step.w, step.g, step.w_to = u.w + first, u.g + first, u.w_to + first
    update_slots(&step, u.slots, slot, to)
    if u.adam:
        kernel.adam(&step, end - first)
    else:
        kernel.sgd(&step, end - first)


cdef void update(Update* u) noexcept nogil:
    parallel_for(update_task, u, (u.n + UPDATE_CHUNK - 1) // UPDATE_CHUNK, pass_threads(u.n))


cdef double power_of(double base, int64_t exponent) noexcept nogil:
    """base**exponent by squaring: the same on every machine, which pow of the C library is not."""
    cdef double power = 1.0
    while exponent > 0:
        if exponent & 1:
            power *= base
        base *= base
        exponent >>= 1
    return power
