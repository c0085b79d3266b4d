# The driver that multiplies pairs of int16: gemm.pxi's blocks, by the microkernels' dfp_tile. It
# does all that is asked; digits.pxi is for a part.

cdef void pairs_plan(Gemm* g) noexcept nogil:
    """The plan for the pairs of int16 of dfp_tile."""
    cdef bint narrow = kernel.exact_narrow != NULL and g.n <= kernel.nr // 2
    cdef int64_t mr = kernel.mr, nr = kernel.nr // 2 if narrow else kernel.nr
    cdef int64_t qq = <int64_t>qmax_of(g.a_bits) * qmax_of(g.b_bits)
    cdef int64_t limit = safe_chain(g.a_bits, g.b_bits, 0 if g.spill else 65535)
    g.mr, g.nr, g.tile_values, g.sum_bytes = mr, nr, mr * nr, 8
    g.pack_b, g.multiply, g.sum_of = pack_b_task, pairs_task, pairs_sum
    if narrow:
        g.pairs.multiply = kernel.spill_narrow if g.spill else kernel.exact_narrow
    else:
        g.pairs.multiply = kernel.spill if g.spill else kernel.exact
    g.narrow_k = (<int64_t>1 << 47) // qq // 2 * 2
    g.wide = not g.spill and g.k > g.narrow_k

    g.pairs.chain = limit // 2 * 2
    g.pairs.segment = g.k
    g.kb = g.k
    if g.k > (LONG_COLUMNS if g.a.kind == COLUMNS or g.a.kind == PATCHES_T else LONG_K):
        g.kb = BLOCK_K
    if g.a.kind == PATCHES_T and not g.spill and taps_share(&g.a.window):
        plan_taps(g)
    if g.spill:
        plan_spill(g, limit)
    elif g.a.kind == PATCHES and g.kb == g.k and g.m > 0:
        plan_windows(g)
    g.pairs.long_chain = g.pairs.chain
    if not g.spill and g.exponents.shifts.more:
        g.pairs.long_chain = safe_chain(g.a_bits, g.b_bits - 1, 65535) // 2 * 2

    if g.a.kind != TAPS_T:
        g.mb = clamp(CACHED // 2 // max(g.kb, <int64_t>1) // mr * mr, mr, BLOCK_MN)
    share_out(g, BLOCK_MN, False)
    # hi and lo, or one float; and the int64 beyond them.
    size_sums(g)
    g.a_bytes = round_up(a_block_bytes(&g.a, g.mb, g.kb), ALIGN)
    g.b_bytes = 0 if g.packed_b else round_up(nr * round_up(g.kb, 2) * 2, ALIGN)
    size_scratch(g, round_up(g.k, 2) * 2)


cdef void plan_taps(Gemm* g) noexcept nogil:
    """Blocks of A are all taps of some channels, and whole rows of positions or a part of a long
    one."""
    cdef Window* v = &g.a.window
    cdef int64_t width = v.positions[2], ld = round_up(width, 2), kb = BLOCK_K
    cdef int64_t rows = g.k // max(width, <int64_t>1)
    cdef int64_t blocks = max((g.m + BLOCK_MN // 2) // BLOCK_MN, <int64_t>1)
    cdef int64_t channels = round_up((v.channels + blocks - 1) // blocks, g.mr)
    if width > 2 * BLOCK_K:
        ld = round_up(width, BLOCK_K)
    else:
        # Less than all: blocks of A must stay as they are, so K is what threads share.
        kb = min((rows + 1) // 2, max(BLOCK_K // ld, <int64_t>1)) * ld
    if rows * ld <= kb:
        return
    g.a.kind, g.a.ld, g.kb, g.position = TAPS_T, ld, kb, taps_position
    g.mb = min(volume(v.taps) * channels, round_up(g.m, g.mr))
    if ld == width:
        return
    g.k = g.pairs.segment = rows * ld
    g.b.channels, g.b.padded, g.b.tap_stride = width, ld, width * g.b.k_stride
    g.b.taps[2] = g.b.size[2] = rows
    g.exponents.shifts.per = g.exponents.shifts.per // width * ld


cdef void plan_windows(Gemm* g) noexcept nogil:
    """Windows that overlap are read in place of patches."""
    cdef Window* v = &g.a.window
    cdef BSource* b = &g.b
    cdef int64_t together = run_taps(v), run = together * v.channels
    if not windows_overlap(v):
        return
    if run % 2:
        # Pairs end with a run: there is one more zero in B.
        if together > 1:
            if b.jump[2] != 1 or b.tap_stride != v.channels * b.k_stride:
                return
            b.channels, b.tap_stride = run, run * b.k_stride
            b.taps[2] = b.size[2] = 1
        b.padded = run + 1
        g.k = g.kb = g.pairs.segment = v.taps[1] * (v.taps[2] // together) * b.padded
    g.a.kind = WINDOWS


cdef int64_t taps_position(Gemm* g, int64_t row) noexcept nogil:
    return element_of(&g.a.window, g.mb // volume(g.a.window.taps), row)


cdef void plan_spill(Gemm* g, int64_t limit) noexcept nogil:
    """Chains end where the canonical order says; blocks of K end where chains do."""
    g.pairs.chain = limit
    g.pairs.segment = g.a.window.padded if g.a.kind == PATCHES else g.k
    if limit % 2 and limit < g.pairs.segment:
        # An odd chain would end within a pair: one block of K is one chain, padded to pairs.
        g.kb = limit
    elif g.pairs.segment <= max(<int64_t>LONG_K, limit):
        # Whole segments: a block that ended within one would end within a chain.
        g.kb = max(LONG_K // max(g.pairs.segment, <int64_t>1), <int64_t>1) * g.pairs.segment
    else:
        g.kb = max(limit, LONG_K // limit * limit)
    g.kb = min(g.kb, g.k)


cdef inline int64_t next_block(Gemm* g, int64_t k0) noexcept nogil:
    """The length of the block of K that begins at k0."""
    cdef int64_t length = min(g.kb, g.k - k0)
    if g.spill and g.pairs.segment > g.kb:
        length = min(length, g.pairs.segment - k0 % g.pairs.segment)
    return length


cdef int64_t pairs_sum(const Gemm* g, const int32_t* sums, int64_t i) noexcept nogil:
    return <int64_t>sums[i] * 65536 + sums[g.tile_values + i]


cdef void pack_b_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Gemm* g = <Gemm*>work
    cdef int64_t panels = (g.n + g.nr - 1) // g.nr
    cdef int64_t n0 = i % panels * g.nr
    pack_b(g, i // panels, n0, min(g.nr, g.n - n0), 0, g.k,
           <int16_t*>g.scratch + i * g.nr * round_up(g.k, 2))


cdef void pack_b(Gemm* g, int64_t item, int64_t n0, int64_t nc, int64_t k0, int64_t kc,
                 int16_t* to) noexcept nogil:
    """A panel of B, aligned."""
    cdef Shifts* s = &g.exponents.shifts
    cdef int64_t k = k0, end = k0 + kc, pairs
    cdef int first, second
    pack_b_panel(&g.b, g.b.data + item * g.b_batch, n0, nc, g.nr, k0, kc, to)
    if s.shift == NULL:
        return
    while k < end:
        first = second = shift_of(s, item, k)
        # Pairs up to the end of a group, or one whose second product is of the next.
        pairs = (min(end, group_end(s.item, s.per, item, k)) - k) // 2
        if pairs == 0:
            pairs = 1
            if k + 1 < end:
                second = shift_of(s, item, k + 1)
        if first or second:
            kernel.align_pairs(to, pairs * g.nr, first, second)
        to += pairs * 2 * g.nr
        k += 2 * pairs


cdef void pairs_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Gemm* g = <Gemm*>work
    cdef int64_t nr = g.nr, panels = (g.n + nr - 1) // nr, split = i % g.splits
    cdef int64_t k0 = split * g.split_k, end = min(g.k, k0 + g.split_k), panel, kc, pairs
    cdef char* mine = g.scratch + g.shared_bytes + thread * g.task_bytes
    cdef int16_t* a_pack = <int16_t*>mine
    cdef int16_t* b_pack = <int16_t*>(mine + g.a_bytes)
    cdef const int16_t* b
    cdef ABlock a
    cdef Block block
    locate_block(g, i // g.splits, mine, &block)
    block.acc += split * g.acc_bytes if g.splits > 1 else 0
    if g.k == 0:
        clear_block(g, &block)
        return
    block.first = True
    block.since_flush = 0
    while k0 < end:
        kc = min(next_block(g, k0), end - k0)
        pairs = (kc + 1) // 2
        block.last = k0 + kc >= g.k and g.splits == 1
        block.since_flush += kc
        block.flush = g.wide and block.since_flush + g.kb > g.narrow_k
        block.chain = g.pairs.long_chain
        if any_doubled(&g.exponents.shifts, block.item, k0, kc):
            block.chain = g.pairs.chain
        pack_a(&g.a, g.a.data + block.item * g.a_batch, block.m0, block.mc, k0, kc, a_pack, &a)
        for panel in range((block.nc + nr - 1) // nr):
            if g.packed_b:
                b = (<int16_t*>g.scratch + (block.item * panels + block.n0 // nr + panel)
                     * round_up(g.k, 2) * nr)
            else:
                b = b_pack
                pack_b(g, block.item, block.n0 + panel * nr, min(nr, block.nc - panel * nr), k0,
                       kc, b_pack)
            multiply_panel(g, &block, &a, b, panel, pairs,
                           min(round_up(g.pairs.segment, 2) // 2, pairs))
        if block.flush:
            block.since_flush = 0
        block.first = False
        k0 += kc


cdef inline bint lie_together(Gemm* g, int64_t row) noexcept nogil:
    """Is a tile of A's rows from `row` on one of C's, too?"""
    if g.position == NULL and not g.c.scattered:
        return True
    return row_of_c(g, row + g.mr - 1) - row_of_c(g, row) == g.mr - 1


cdef void multiply_panel(Gemm* g, Block* block, ABlock* a, const int16_t* b, int64_t panel,
                         int64_t pairs, int64_t segment) noexcept nogil:
    cdef int64_t mr = g.mr, nr = g.nr, tiles = (block.mc + mr - 1) // mr
    cdef int64_t t, rows, cols = min(nr, block.nc - panel * nr)
    cdef bint direct, fast, in_line = a.starts == NULL and a.row_stride == 2 * pairs
    cdef char* acc
    cdef const Runs* met
    cdef dfp_tile tile
    tile.row_stride, tile.pair_stride = a.row_stride, a.pair_stride
    tile.starts = NULL
    tile.runs, tile.run = a.runs, a.run
    tile.b = b
    tile.pairs, tile.segment, tile.chain = pairs, segment, (block.chain + 1) // 2
    tile.column_scale = tile.bias = NULL
    tile.low, tile.high = g.c.clip.low, g.c.clip.high
    if block.column_scale != NULL:
        tile.column_scale = block.column_scale + panel * nr
    if block.bias != NULL:
        tile.bias = block.bias + panel * nr
    for t in range(tiles):
        rows = min(mr, block.mc - t * mr)
        acc = block.acc + ((panel * (g.mb // mr) + t) * g.tile_bytes if g.carry else 0)
        tile.a = a.data + t * a.tile_stride
        # Rows that lie where the data has them come from memory at first: those of the next tile
        # but one are fetched meanwhile. Otherwise what is there already.
        tile.soon = tile.a + 2 * a.tile_stride if in_line and panel == 0 else b
        if a.starts != NULL:
            tile.starts = a.starts + t * mr
            met = a.met + t
            tile.runs = a.runs + met.first
            tile.b = b + met.first * a.run * 2 * nr
            tile.pairs = (met.end - met.first) * a.run
        tile.rows = rows
        tile.acc = <int32_t*>acc
        tile.resume = not block.first
        tile.row_scale = block.row_scale + t * mr
        fast = is_fast(g, block, t * mr, panel * nr)
        direct = (block.last and fast and rows == mr and cols == nr
                  and lie_together(g, block.m0 + t * mr))
        tile.c = NULL
        tile.ldc = nr
        tile.stream = False
        if direct:
            tile.c = block.c + row_of_c(g, block.m0 + t * mr) * g.c.ld + block.n0 + panel * nr
            tile.ldc = g.c.ld
            tile.stream = g.stream
        elif block.last and fast:
            tile.c = block.spare
        g.pairs.multiply(&tile)
        if g.wide and (block.first or block.flush):
            widen(g, acc, block.first, block.flush)
        if block.last and not fast:
            round_tile(g, block, t * mr, panel * nr, acc)
        if block.last and not direct:
            store_tile(g, block, t * mr, panel * nr, rows, cols)
