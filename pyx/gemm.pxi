# The blocked product that matmul and all passes of a convolution are:
#
#     C[m, n] = RN32(2**(ea + eb) * sum_k A[m, k] * B[k, n])
#
# for `batch` independent products (matrices of a batched matmul, groups of a convolution).
# Exponents may differ from row to row and from column to column of C; where they differ along K, B
# is aligned when it is packed (exponents.pxi).
# A task computes a block of mb rows and nb columns. It packs the block of A (pack.pxi; rows of an
# image are gathered here, im2col exists only block by block), packs its panels of B unless all of
# B was packed beforehand, and runs the microkernel tile by tile, panel after panel. Long K is cut
# into blocks of kb products; partial sums wait in `acc`, tile by tile.

cdef enum:
    CACHED = 393216         # bytes of A (or of B) a task keeps in the second-level cache
    LONG_K = 8192           # K beyond this is cut into blocks,
    LONG_COLUMNS = 1024     # where A is transposed in packing: long runs of its rows pack fast,
    BLOCK_K = 512           # of this length,
    BLOCK_MN = 256          # for tasks of this many rows and columns
    STREAM = 16777216       # bytes of C that no cache keeps until it is read
    ALIGN = 64

# What a product on int8 tiles needs besides: digits.pxi.
cdef struct Digits:
    int products, planes
    bint flat                   # the window's image is laid out flat, with its padding
    bint mirrored               # and its pixels are the products: C is summed transposed
    int64_t low[3]              # the image's coordinates of the first pixel of the layout
    int64_t pitch[3]            # pixels, rows and planes from one to the next
    int64_t first[3]            # where the first tap of position 0 lies, in the same units
    int64_t halo                # how far the last tap is from the first, in pixels
    int64_t taps                # tiles side by side in a panel: mirrored taps
    int64_t columns             # steps of A that are stored: flat taps share them
    int64_t steps               # that are summed
    int64_t a_step, a_plane, b_plane, b_step, b_half, b_copy    # bytes

cdef struct Gemm:
    # What is computed. Strides count int16 elements (floats for c).
    ASource a
    BSource b
    int64_t m, n, k         # k counts the positions of PATCHES' padded taps
    int64_t batch, a_batch, b_batch, c_batch
    float* c
    int64_t ldc
    bint scattered          # rows of C follow `rows` instead of m * ldc
    Scatter rows
    int64_t a_bits, b_bits
    Exponents exponents     # ea + eb
    bint spill
    # How: filled in by gemm_plan.
    int threads
    int64_t mr, nr              # of a tile of C
    dfp_multiply multiply       # and the microkernel for it
    int64_t tile_values         # sums that lie together
    int64_t mb, nb, kb, m_blocks, n_blocks
    int64_t segment         # spill: products after which chains restart, in K
    int64_t chain           # products of a chain,
    int64_t long_chain      # and where no mantissa of B has the bit more of aligned ones
    bint packed_b           # B is packed once, for all tasks
    bint carry              # partial sums wait in acc between blocks of K
    int64_t splits          # K is shared out among this many tasks per block of C, in parts of
    int64_t split_k         # this length; their sums are added at the end (integers: any order)
    bint fast               # the microkernel may scale and store,
    bint stream             # past the caches: C does not fit them, and its rows are aligned
    bint wide               # hi * 2**16 + lo is too narrow for all of K
    int64_t narrow_k        # K it is wide enough for
    int64_t a_bytes, b_bytes, acc_bytes, tile_bytes, scale_bytes, task_bytes, shared_bytes
    char* scratch
    bint digits                 # by digits, on int8 tiles: digits.pxi
    Digits by


cdef inline int64_t round_up(int64_t x, int64_t to) noexcept nogil:
    return (x + to - 1) // to * to


cdef inline int64_t clamp(int64_t x, int64_t low, int64_t high) noexcept nogil:
    return max(low, min(x, high))


cdef inline int64_t safe_chain(int64_t a_bits, int64_t b_bits, int64_t room) noexcept nogil:
    """The longest chain of products that, with `room` more, stays within an int32."""
    return (<int64_t>2147483647 - room) // (<int64_t>qmax_of(a_bits) * qmax_of(b_bits))


cdef void gemm_plan(Gemm* g) noexcept nogil:
    """Chooses kernel, blocks and threads, and says how much scratch gemm_run needs."""
    g.stream = (g.m * g.ldc * sizeof(float) >= STREAM and g.ldc % 16 == 0 and g.c_batch % 16 == 0
                and <int64_t>g.c % ALIGN == 0)
    g.threads = team_size() if <double>g.m * g.n * g.k * g.batch > SMALL else 1
    g.digits = digits_pay(g)
    if g.digits:
        digits_plan(g)
    else:
        pairs_plan(g)


cdef void pairs_plan(Gemm* g) noexcept nogil:
    """The plan for the pairs of int16 of dfp_tile."""
    cdef bint narrow = kernel.exact_narrow != NULL and g.n <= kernel.nr // 2
    cdef int64_t mr = kernel.mr, nr = kernel.nr // 2 if narrow else kernel.nr
    cdef int64_t qq = <int64_t>qmax_of(g.a_bits) * qmax_of(g.b_bits)
    cdef int64_t limit = safe_chain(g.a_bits, g.b_bits, 0 if g.spill else 65535)
    g.mr, g.nr, g.tile_values = mr, nr, mr * nr
    if narrow:
        g.multiply = kernel.spill_narrow if g.spill else kernel.exact_narrow
    else:
        g.multiply = kernel.spill if g.spill else kernel.exact
    g.narrow_k = (<int64_t>1 << 47) // qq // 2 * 2
    g.wide = not g.spill and g.k > g.narrow_k

    g.chain = limit // 2 * 2
    g.segment = g.k
    g.kb = g.k
    if g.k > (LONG_COLUMNS if g.a.kind == COLUMNS or g.a.kind == PATCHES_T else LONG_K):
        g.kb = BLOCK_K
    if g.spill:
        plan_spill(g, limit)
    g.long_chain = g.chain
    if not g.spill and g.exponents.shifts.more:
        g.long_chain = safe_chain(g.a_bits, g.b_bits - 1, 65535) // 2 * 2

    g.mb = clamp(CACHED // 2 // max(g.kb, <int64_t>1) // mr * mr, mr, BLOCK_MN)
    share_out(g, BLOCK_MN)
    # hi and lo, or one float; and the int64 beyond them.
    size_sums(g, 8)
    g.a_bytes = round_up(a_block_bytes(&g.a, g.mb, g.kb), ALIGN)
    g.b_bytes = 0 if g.packed_b else round_up(nr * round_up(g.kb, 2) * 2, ALIGN)
    size_scratch(g, round_up(g.k, 2) * 2)


cdef void share_out(Gemm* g, int64_t nb) noexcept nogil:
    """Cuts C into blocks for the tasks: at most mb rows, nb columns unless B is packed for all."""
    cdef int64_t mr = g.mr, nr = g.nr, tasks
    g.fast = not g.wide
    g.carry = g.kb < g.k or (g.digits and g.by.mirrored)
    g.mb = min(g.mb, round_up(max(g.m, <int64_t>1), mr))
    g.m_blocks = (g.m + g.mb - 1) // g.mb
    g.packed_b = not g.carry and g.m_blocks > 2
    g.splits, g.split_k = 1, g.k
    g.nb = round_up(max(g.n, <int64_t>1), nr)
    if not g.packed_b:
        g.nb = min(g.nb, round_up(nb, nr))
    # Enough tasks for all threads: split a long K, or halve the longer side of the blocks.
    while True:
        g.m_blocks = (g.m + g.mb - 1) // g.mb
        g.n_blocks = (g.n + g.nb - 1) // g.nb
        tasks = max(g.batch * g.m_blocks * g.n_blocks, <int64_t>1)
        if g.threads == 1 or tasks >= 2 * g.threads:
            break
        if g.kb < g.k and not g.spill:
            g.splits = (2 * g.threads + tasks - 1) // tasks
            g.split_k = round_up((g.k + g.splits - 1) // g.splits, g.kb)
            g.splits = (g.k + g.split_k - 1) // g.split_k
            break
        if g.mb >= g.nb and g.mb > mr:
            g.mb = round_up(g.mb // 2, mr)
        elif g.nb > nr:
            g.nb = round_up(g.nb // 2, nr)
        elif g.mb > mr:
            g.mb = round_up(g.mb // 2, mr)
        else:
            break


cdef void size_sums(Gemm* g, int64_t element) noexcept nogil:
    """Sums take `element` bytes for each value of C, and an int64 where they are too narrow."""
    g.tile_bytes = round_up(g.tile_values * (element + (8 if g.wide else 0)), ALIGN)
    g.acc_bytes = g.tile_bytes
    if g.carry:
        g.acc_bytes *= g.mb * g.nb // g.tile_values


cdef void size_scratch(Gemm* g, int64_t column_bytes) noexcept nogil:
    """From a_bytes, b_bytes and acc_bytes; a packed column of B takes `column_bytes`."""
    g.scale_bytes = round_up((g.mb + g.nb) * sizeof(float), ALIGN)
    g.task_bytes = (g.a_bytes + g.b_bytes + g.acc_bytes + g.scale_bytes
                    + round_up(g.mr * g.nr * sizeof(float), ALIGN))
    g.shared_bytes = 0
    if g.splits > 1:
        # The sums outlive their tasks.
        g.shared_bytes = g.splits * g.batch * g.m_blocks * g.n_blocks * g.acc_bytes
        g.task_bytes -= g.acc_bytes
    if g.packed_b:
        g.shared_bytes = round_up(g.batch * round_up(g.n, g.nr) * column_bytes, ALIGN)


cdef void plan_spill(Gemm* g, int64_t limit) noexcept nogil:
    """Chains end where the canonical order says; blocks of K end where chains do."""
    g.chain = limit
    g.segment = g.a.window.padded if g.a.kind == PATCHES else g.k
    if limit % 2 and limit < g.segment:
        # An odd chain would end within a pair: one block of K is one chain, padded to pairs.
        g.kb = limit
    elif g.segment <= max(<int64_t>LONG_K, limit):
        # Whole segments: a block that ended within one would end within a chain.
        g.kb = max(LONG_K // max(g.segment, <int64_t>1), <int64_t>1) * g.segment
    else:
        g.kb = max(limit, LONG_K // limit * limit)
    g.kb = min(g.kb, g.k)


cdef inline int64_t scratch_bytes(Gemm* g) noexcept nogil:
    cdef int64_t tasks = g.batch * g.m_blocks * g.n_blocks * g.splits
    return g.shared_bytes + min(<int64_t>g.threads, tasks) * g.task_bytes + ALIGN


cdef inline int64_t next_block(Gemm* g, int64_t k0) noexcept nogil:
    """The length of the block of K that begins at k0."""
    cdef int64_t length = min(g.kb, g.k - k0)
    if g.spill and g.segment > g.kb:
        length = min(length, g.segment - k0 % g.segment)
    return length


cdef void gemm_run(Gemm* g, char* scratch) noexcept nogil:
    cdef int64_t panels = (g.n + g.nr - 1) // g.nr
    if g.m == 0 or g.n == 0 or g.batch == 0:
        return
    g.scratch = <char*>round_up(<int64_t>scratch, ALIGN)
    if g.packed_b:
        parallel_for(digits_pack_b_task if g.digits else pack_b_task, g, g.batch * panels,
                     g.threads)
    parallel_for(digits_task if g.digits else gemm_task, g,
                 g.batch * g.m_blocks * g.n_blocks * g.splits, g.threads)
    if g.splits > 1:
        parallel_for(add_splits_task, g, g.batch * g.m_blocks * g.n_blocks, g.threads)


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


# The part of C a task computes, and where its sums wait.
cdef struct Block:
    int64_t item, m0, n0, mc, nc
    float* c
    char* acc
    float* spare                # one tile, for results that do not fill a tile of C
    float* row_scale            # as the microkernel wants them; 0 where only round_tile can,
    float* column_scale         # or NULL
    bint careful                # which some are
    bint first, last            # is this the first, the last block of K?
    bint flush                  # does hi have to be emptied after it?
    int64_t chain               # of products in it
    int64_t since_flush         # products summed since it was


cdef void locate_block(Gemm* g, int64_t i, char* mine, Block* block) noexcept nogil:
    """Finds the i-th block of C, its scales and where its sums wait; `mine` is the thread's
    scratch."""
    cdef int64_t n_block = i % g.n_blocks, m_block = i // g.n_blocks % g.m_blocks
    block.item = i // g.n_blocks // g.m_blocks
    block.m0, block.n0 = m_block * g.mb, n_block * g.nb
    block.mc, block.nc = min(g.mb, g.m - block.m0), min(g.nb, g.n - block.n0)
    block.c = g.c + block.item * g.c_batch
    block.spare = <float*>(mine + g.a_bytes + g.b_bytes)
    block.row_scale = <float*>(<char*>block.spare + round_up(g.mr * g.nr * sizeof(float), ALIGN))
    block.acc = <char*>block.row_scale + g.scale_bytes
    if g.splits > 1:
        block.acc = g.scratch + i * g.splits * g.acc_bytes
    block.column_scale = NULL
    if g.exponents.column.e != NULL:
        block.column_scale = block.row_scale + g.mb
    block.careful = find_scales(&g.exponents, block.item, block.m0, block.mc, round_up(
        block.mc, g.mr), block.row_scale, block.n0, block.nc, block.column_scale)


cdef void gemm_task(void* work, int64_t i, int thread) noexcept nogil:
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
        block.chain = g.long_chain
        if any_doubled(&g.exponents.shifts, block.item, k0, kc):
            block.chain = g.chain
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
                           min(round_up(g.segment, 2) // 2, pairs))
        if block.flush:
            block.since_flush = 0
        block.first = False
        k0 += kc


cdef void add_splits_task(void* work, int64_t i, int thread) noexcept nogil:
    """Adds up what the tasks that shared a block of C have summed, and rounds it."""
    cdef Gemm* g = <Gemm*>work
    cdef int64_t mr = g.mr, nr = g.nr, panel, t
    cdef Block block
    locate_block(g, i, g.scratch + g.shared_bytes + thread * g.task_bytes, &block)
    for panel in range((block.nc + nr - 1) // nr):
        for t in range((block.mc + mr - 1) // mr):
            if g.digits and g.by.mirrored:
                round_mirrored(g, &block, panel, t)
                continue
            round_tile(g, &block, t * mr, panel * nr,
                       block.acc + (panel * (g.mb // mr) + t) * g.tile_bytes)
            store_tile(g, &block, t * mr, panel * nr, min(mr, block.mc - t * mr),
                       min(nr, block.nc - panel * nr))


cdef void multiply_panel(Gemm* g, Block* block, ABlock* a, const int16_t* b, int64_t panel,
                         int64_t pairs, int64_t segment) noexcept nogil:
    cdef int64_t mr = g.mr, nr = g.nr, tiles = (block.mc + mr - 1) // mr
    cdef int64_t t, rows, cols = min(nr, block.nc - panel * nr)
    cdef bint direct, fast
    cdef char* acc
    cdef dfp_tile tile
    tile.row_stride, tile.pair_stride = a.row_stride, a.pair_stride
    tile.b = b
    tile.pairs, tile.segment, tile.chain = pairs, segment, (block.chain + 1) // 2
    tile.column_scale = NULL
    if block.column_scale != NULL:
        tile.column_scale = block.column_scale + panel * nr
    for t in range(tiles):
        rows = min(mr, block.mc - t * mr)
        acc = block.acc + ((panel * (g.mb // mr) + t) * g.tile_bytes if g.carry else 0)
        tile.a = a.data + t * a.tile_stride
        tile.rows = rows
        tile.acc = <int32_t*>acc
        tile.resume = not block.first
        tile.row_scale = block.row_scale + t * mr
        fast = is_fast(g, block, t * mr, panel * nr)
        direct = fast and rows == mr and cols == nr and not g.scattered
        tile.c = NULL
        tile.ldc = nr
        tile.stream = False
        if block.last and direct:
            tile.c = block.c + (block.m0 + t * mr) * g.ldc + block.n0 + panel * nr
            tile.ldc = g.ldc
            tile.stream = g.stream
        elif block.last and fast:
            tile.c = block.spare
        g.multiply(&tile)
        if g.wide and (block.first or block.flush):
            widen(g, acc, block.first, block.flush)
        if block.last and not fast:
            round_tile(g, block, t * mr, panel * nr, acc)
        if block.last and not direct:
            store_tile(g, block, t * mr, panel * nr, rows, cols)


cdef inline bint is_fast(Gemm* g, const Block* block, int64_t m, int64_t n) noexcept nogil:
    """May a tile be scaled by the microkernel?"""
    cdef int64_t i
    if not g.fast or not block.careful:
        return g.fast
    for i in range(m, min(m + g.mr, block.mc)):
        if block.row_scale[i] == 0:
            return False
    if block.column_scale != NULL:
        for i in range(n, min(n + g.nr, block.nc)):
            if block.column_scale[i] == 0:
                return False
    return True


cdef inline int64_t* wide_sums(Gemm* g, char* acc) noexcept nogil:
    """A tile's int64 sums lie after its int32 ones."""
    return <int64_t*>(acc + g.tile_values * (12 if g.digits else 8))


cdef inline int64_t narrow_sum(Gemm* g, char* acc, int64_t i) noexcept nogil:
    """Element i of a tile, from what its int32 sums hold."""
    cdef int32_t* sums = <int32_t*>acc
    cdef int64_t n = g.tile_values
    if g.digits:
        return digits_sum(g, sums[i], sums[n + i], sums[2 * n + i])
    return <int64_t>sums[i] * 65536 + sums[n + i]


cdef void widen(Gemm* g, char* acc, bint first, bint flush) noexcept nogil:
    """Moves what the int32 sums hold into the tile's int64 sums before they can overflow."""
    cdef int64_t* wide = wide_sums(g, acc)
    cdef int64_t i, n = g.tile_values
    if first:
        memset(wide, 0, n * sizeof(int64_t))
    if flush:
        for i in range(n):
            wide[i] += narrow_sum(g, acc, i)
        memset(acc, 0, <char*>wide - acc)


cdef void round_tile(Gemm* g, Block* block, int64_t m, int64_t n, char* acc) noexcept nogil:
    """Rounds the sums of the tile at (m, n) of a block into block.spare the careful way: any
    exponent, any length of K, any number of splits."""
    cdef int64_t i, split, total, columns = g.tile_values // g.mr
    cdef int64_t row = -1, e = 0
    cdef bint by_column = g.exponents.column.e != NULL
    cdef double scale = 0
    cdef float* out = block.spare
    for i in range(g.tile_values):
        if i % columns == 0:
            row = min(block.m0 + m + i // columns, g.m - 1)
            e = row_exponent(&g.exponents, block.item, row)
            scale = scale_of(e)
        if by_column:
            scale = scale_of(added(e, column_exponent(
                &g.exponents, block.item, min(block.n0 + n + i % columns, g.n - 1))))
        if g.spill:
            out[i] = <float>((<float*>acc)[i] * scale)
            continue
        total = 0
        for split in range(g.splits):
            total += narrow_sum(g, acc + split * g.acc_bytes, i)
            if g.wide:
                total += wide_sums(g, acc + split * g.acc_bytes)[i]
        out[i] = dfp_round(total, scale)


cdef void store_tile(Gemm* g, Block* block, int64_t m, int64_t n, int64_t rows,
                     int64_t cols) noexcept nogil:
    cdef int64_t i, row
    for i in range(rows):
        row = row_of_c(g, block.m0 + m + i)
        if row >= 0:
            memcpy(block.c + row * g.ldc + block.n0 + n, block.spare + i * g.nr,
                   cols * sizeof(float))


cdef inline int64_t row_of_c(Gemm* g, int64_t row) noexcept nogil:
    """Where a row of A has its row of C, or -1."""
    if g.digits and g.by.flat:
        row = flat_position(g, row)
    if g.scattered and row >= 0:
        row = scatter_row(&g.rows, row)
    return row


cdef void clear_block(Gemm* g, Block* block) noexcept nogil:
    """An empty sum is zero, or NaN."""
    cdef int64_t i, j
    cdef float* row
    for i in range(block.mc):
        row = block.c + row_of_c(g, block.m0 + i) * g.ldc + block.n0
        if block.column_scale == NULL and block.row_scale[i] == block.row_scale[i]:
            memset(row, 0, block.nc * sizeof(float))
            continue
        for j in range(block.nc):
            row[j] = 0 * block.row_scale[i]
            if block.column_scale != NULL:
                row[j] *= block.column_scale[j]
