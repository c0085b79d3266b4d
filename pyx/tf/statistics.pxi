# Numbers of the ops that Python asks for: while it looks, each op adds what it measured to the
# entry of its site, and Python takes all entries when a step is over.

cdef enum:
    LOOK_CLOSELY = 1            # measure what is quantized, and the time of products
    LOOK_FOR_NONFINITE = 2      # note the first tensor that is not finite
    ENTRIES = 8192              # of which a step has no more

# Of an entry: what was quantized, or which product was computed.
cdef enum Kind:
    ACTIVATION
    WEIGHT
    GRADIENT
    FORWARD_PRODUCT
    INPUT_GRADIENT_PRODUCT
    WEIGHT_GRADIENT_PRODUCT

cdef struct Entry:
    Entry* next
    char site[200]
    int kind                    # a Kind
    Measures measures           # of an operand
    int64_t calls, nanoseconds  # of a product

cdef struct Nonfinite:
    bint found
    char site[200]
    int kind                    # a Kind
    int64_t sample, samples     # along the first axis

cdef extern from *:
    """
    static int dfp_looking;         /* LOOK_.., read by ops on their threads */
    static inline int dfp_look(void) { return __atomic_load_n(&dfp_looking, __ATOMIC_RELAXED); }
    static void dfp_set_look(int how) { __atomic_store_n(&dfp_looking, how, __ATOMIC_RELAXED); }
    """
    int dfp_look() noexcept nogil
    void dfp_set_look(int how) noexcept nogil

cdef Entry* entries
cdef int entry_count
cdef int64_t entries_dropped    # calls that found no room
cdef Nonfinite nonfinite


cdef Entry* entry_of(const char* site, int kind) noexcept nogil:
    """The entry, made if there is none; NULL if there is no room. The caller holds the lock."""
    global entries, entry_count, entries_dropped
    cdef Entry* e = entries
    while e != NULL and (e.kind != kind or strcmp(e.site, site) != 0):
        e = e.next
    if e == NULL and entry_count < ENTRIES:
        e = <Entry*>calloc(1, sizeof(Entry))
        if e != NULL:
            snprintf(e.site, sizeof(e.site), "%s", site)
            e.kind, e.next, entries = kind, entries, e
            entry_count += 1
    if e == NULL:
        entries_dropped += 1
    return e


cdef void add_measures(const Attrs* a, Quantize* z) noexcept nogil:
    """Measures what z has quantized for the entry of its site."""
    global entries_dropped
    cdef Measures* m = <Measures*>calloc(1, sizeof(Measures))
    cdef Measures* to
    cdef Entry* e
    cdef int i
    cdef bint done = m != NULL and measure(z, m)
    dfp_lock_losses()
    if not done:
        entries_dropped += 1
    else:
        e = entry_of(a.site, a.kind)
        if e != NULL:
            to = &e.measures
            for i in range(3):
                to.counts[i] += m.counts[i]
            to.signal += m.signal
            to.noise += m.noise
            to.nonfinite += m.nonfinite
            for i in range(EXPONENTS):
                to.exponents[i] += m.exponents[i]
            e.calls += 1
    dfp_unlock_losses()
    free(m)


cdef void note_nonfinite(const Attrs* a, Quantize* z, const Shape* shape) noexcept nogil:
    """Notes the first tensor that is not finite, once until Python takes it."""
    cdef int64_t at = first_nonfinite(z)
    if at < 0:
        return
    dfp_lock_losses()
    if not nonfinite.found:
        nonfinite.found, nonfinite.kind = True, a.kind
        memcpy(nonfinite.site, a.site, sizeof(nonfinite.site))
        nonfinite.samples = shape.dim[0] if shape.rank else 1
        nonfinite.sample = at // (z.groups * z.n // nonfinite.samples)
    dfp_unlock_losses()


cdef inline void look(const Attrs* a, Quantize* z, const Shape* shape) noexcept nogil:
    """After z has quantized a tensor of a site."""
    cdef int how = dfp_look()
    if how and a.site[0]:
        if how & LOOK_FOR_NONFINITE:
            note_nonfinite(a, z, shape)
        if how & LOOK_CLOSELY:
            add_measures(a, z)


cdef inline int64_t time_if_looking(const Attrs* a) noexcept nogil:
    """When a product began, or 0 if nobody wants to know."""
    return dfp_now() if dfp_look() & LOOK_CLOSELY and a.site[0] else 0


cdef void add_time(const Attrs* a, int64_t start) noexcept nogil:
    """Adds the time of a product that began at `start`, if that is not 0."""
    cdef int64_t end
    cdef Entry* e
    if start:
        end = dfp_now()
        dfp_lock_losses()
        e = entry_of(a.site, a.kind)
        if e != NULL:
            e.calls += 1
            e.nanoseconds += end - start
        dfp_unlock_losses()


cdef void site_attrs(TF_OpKernelConstruction* k, Attrs* a, TF_Status* st) noexcept nogil:
    """Where an operand is quantized, or a product computed, and which."""
    cdef char role
    text_attr(k, "site", a.site, sizeof(a.site), st)
    role = first_letter(k, "role", st)
    a.kind = WEIGHT if role == c"w" else GRADIENT if role == c"g" else ACTIVATION


cdef void product_site_attrs(TF_OpKernelConstruction* k, Attrs* a, TF_Status* st) noexcept nogil:
    cdef char product
    text_attr(k, "site", a.site, sizeof(a.site), st)
    product = first_letter(k, "product", st)
    a.kind = (WEIGHT_GRADIENT_PRODUCT if product == c"w" else
              INPUT_GRADIENT_PRODUCT if product == c"i" else FORWARD_PRODUCT)


def look_at_numbers(bint closely, bint for_nonfinite):
    """Makes every op with a site add its numbers to what `take_numbers` returns and, with
    `for_nonfinite`, note the first tensor that is not finite for `take_nonfinite`. All threads of
    the process see it."""
    dfp_set_look((LOOK_CLOSELY if closely else 0) | (LOOK_FOR_NONFINITE if for_nonfinite else 0))


def take_numbers():
    """Returns what was measured since this was asked last, and forgets it.

    Returns a list of operands `(site, role, calls, nonzero, lost, clamped, signal, noise,
    nonfinite, {exponent: groups})`, roles being 0 for an activation, 1 for a weight, 2 for a
    gradient; a list of products `(site, product, calls, nanoseconds)`: 0 forward, 1 input
    gradient, 2 weight gradient; and how many calls there was no room for."""
    global entries, entry_count, entries_dropped
    cdef Entry* e
    cdef Entry* done
    cdef Measures* m
    cdef int64_t dropped
    cdef int i
    dfp_lock_losses()
    e, dropped = entries, entries_dropped
    entries, entry_count, entries_dropped = NULL, 0, 0
    dfp_unlock_losses()
    operands, products = [], []
    while e != NULL:
        site = e.site.decode(errors="replace")
        if e.kind < FORWARD_PRODUCT:
            m = &e.measures
            exponents = {i - EXPONENTS // 2: m.exponents[i]
                         for i in range(EXPONENTS) if m.exponents[i]}
            operands.append((site, e.kind, e.calls, m.counts[0], m.counts[1], m.counts[2],
                             m.signal, m.noise, m.nonfinite, exponents))
        else:
            products.append((site, e.kind - FORWARD_PRODUCT, e.calls, e.nanoseconds))
        done, e = e, e.next
        free(done)
    return operands[::-1], products[::-1], dropped


def take_nonfinite():
    """Returns the first tensor that was not finite since this was asked last, `(site, role, sample,
    samples)` with roles as in `take_numbers`, or None; and forgets it."""
    cdef Nonfinite first
    dfp_lock_losses()
    first = nonfinite
    nonfinite.found = False
    dfp_unlock_losses()
    if not first.found:
        return None
    return first.site.decode(errors="replace"), first.kind, first.sample, first.samples
