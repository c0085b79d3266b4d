# Which driver multiplies.

cdef void gemm_plan(Gemm* g) noexcept nogil:
    """Chooses kernel, blocks and threads, and says how much scratch gemm_run needs."""
    g.stream = (g.m * g.c.ld * sizeof(float) >= STREAM and g.c.ld % 16 == 0 and g.c.batch % 16 == 0
                and <int64_t>g.c.data % ALIGN == 0)
    g.threads = team_size() if <double>g.m * g.n * g.k * g.batch > SMALL else 1
    if digits_pay(g):
        digits_plan(g)
    else:
        pairs_plan(g)
