# The blocked product that matmul and all passes of a convolution are:
#
#     C[m, n] = RN32(2**(ea + eb) * sum_k A[m, k] * B[k, n])
#
# for `batch` independent products (matrices of a batched matmul, groups of a convolution).
# Exponents may differ from row to row and from column to column of C; where they differ along K, B
# is aligned when it is packed (exponents.pxi).
# This is what is asked, how C is cut into blocks, and what becomes of their sums. The sums
# themselves are a driver's: pairs of int16 (pairs.pxi) or digits on int8 tiles (digits.pxi);
# plan.pxi chooses.
#
# A task computes a block of mb rows and nb columns. It packs the block of A (pack.pxi; rows of an
# image are copied or gathered here, im2col exists only block by block), packs its panels of B
# unless all of B was packed beforehand, and runs the microkernel tile by tile, panel after panel.
# Long K is cut into blocks of kb products; partial sums wait in `acc`, tile by tile.

cdef enum:
    CACHED = 393216         # bytes of A (or of B) a task keeps in the second-level cache
    LONG_K = 8192           # K beyond this is cut into blocks,
    LONG_COLUMNS = 1024     # where A is transposed in packing: long runs of its rows pack fast,
    BLOCK_K = 512           # of this length,
    BLOCK_MN = 256          # for tasks of this many rows and columns

# Where the results go: rows of C lie `ld` floats apart, or as `rows` says; and what is added.
cdef struct CTarget:
    float* data
    int64_t ld, batch
    bint scattered
    Scatter rows
    const float* bias           # of the columns, or NULL
    int64_t bias_batch
    Clip clip                   # of what it is added to

# What a driver's plan needs besides: pairs.pxi,
cdef struct Pairs:
    dfp_multiply multiply       # the microkernel
    int64_t segment             # spill: products after which chains restart, in K
    int64_t chain               # products of a chain,
    int64_t long_chain          # and where no mantissa of B has the bit more of aligned ones

# digits.pxi.
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

cdef struct Gemm
cdef struct Block
# Value i of a tile, from the int32 sums that its driver keeps.
ctypedef int64_t (*sum_fn)(const Gemm*, const int32_t* sums, int64_t i) noexcept nogil
ctypedef int64_t (*position_fn)(Gemm*, int64_t row) noexcept nogil
ctypedef void (*finish_fn)(Gemm*, Block*, int64_t panel, int64_t t) noexcept nogil

cdef struct Gemm:
    # What is computed. Strides count int16 elements (floats for c).
    ASource a
    BSource b
    CTarget c
    int64_t m, n, k         # k counts the positions of PATCHES' padded taps
    int64_t batch, a_batch, b_batch
    int64_t a_bits, b_bits
    Exponents exponents     # ea + eb
    bint spill
    # How: filled in by gemm_plan.
    int threads
    int64_t mr, nr              # of a tile of C
    int64_t tile_values         # sums that lie together
    int64_t mb, nb, kb, m_blocks, n_blocks
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
    # The driver.
    task_fn pack_b              # packs a panel of B, for all tasks
    task_fn multiply            # computes a block of C
    int64_t sum_bytes           # that it keeps for each value of C
    sum_fn sum_of
    position_fn position        # where a row of A has its row of C, or -1; NULL if it is the same
    finish_fn finish            # rounds sums that were split and do not lie as in C; or NULL
    Pairs pairs
    Digits digits


cdef inline int64_t safe_chain(int64_t a_bits, int64_t b_bits, int64_t room) noexcept nogil:
    """The longest chain of products that, with `room` more, stays within an int32."""
    return (<int64_t>2147483647 - room) // (<int64_t>qmax_of(a_bits) * qmax_of(b_bits))


cdef void share_out(Gemm* g, int64_t nb, bint carry) noexcept nogil:
    """Cuts C into blocks for the tasks: at most mb rows, nb columns unless B is packed for all.

    With `carry`, sums wait for the end of K even where it is one block.
    """
    cdef int64_t mr = g.mr, nr = g.nr, tasks
    g.fast = not g.wide
    g.carry = carry or g.kb < g.k
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


cdef void size_sums(Gemm* g) noexcept nogil:
    """Sums take sum_bytes for each value of C, and an int64 where they are too narrow."""
    g.tile_bytes = round_up(g.tile_values * (g.sum_bytes + (8 if g.wide else 0)), ALIGN)
    g.acc_bytes = g.tile_bytes
    if g.carry:
        g.acc_bytes *= g.mb * g.nb // g.tile_values


cdef void size_scratch(Gemm* g, int64_t column_bytes) noexcept nogil:
    """From a_bytes, b_bytes and acc_bytes; a packed column of B takes `column_bytes`."""
    g.scale_bytes = round_up((g.mb + g.nb * (2 if g.c.bias != NULL else 1)) * sizeof(float), ALIGN)
    g.task_bytes = (g.a_bytes + g.b_bytes + g.acc_bytes + g.scale_bytes
                    + round_up(g.mr * g.nr * sizeof(float), ALIGN))
    g.shared_bytes = 0
    if g.splits > 1:
        # The sums outlive their tasks.
        g.shared_bytes = g.splits * g.batch * g.m_blocks * g.n_blocks * g.acc_bytes
        g.task_bytes -= g.acc_bytes
    if g.packed_b:
        g.shared_bytes = round_up(g.batch * round_up(g.n, g.nr) * column_bytes, ALIGN)


cdef inline int64_t scratch_bytes(Gemm* g) noexcept nogil:
    cdef int64_t tasks = g.batch * g.m_blocks * g.n_blocks * g.splits
    return g.shared_bytes + min(<int64_t>g.threads, tasks) * g.task_bytes + ALIGN


cdef void gemm_run(Gemm* g, char* scratch) noexcept nogil:
    cdef int64_t panels = (g.n + g.nr - 1) // g.nr
    if g.m == 0 or g.n == 0 or g.batch == 0:
        return
    g.scratch = <char*>round_up(<int64_t>scratch, ALIGN)
    if g.packed_b:
        parallel_for(g.pack_b, g, g.batch * panels, g.threads)
    parallel_for(g.multiply, g, g.batch * g.m_blocks * g.n_blocks * g.splits, g.threads)
    if g.splits > 1:
        parallel_for(add_splits_task, g, g.batch * g.m_blocks * g.n_blocks, g.threads)


# The part of C a task computes, and where its sums wait.
cdef struct Block:
    int64_t item, m0, n0, mc, nc
    float* c
    char* acc
    float* spare                # one tile, for results that do not fill a tile of C
    float* row_scale            # as the microkernel wants them; 0 where only round_tile can,
    float* column_scale         # or NULL
    float* bias                 # or NULL
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
    block.c = g.c.data + block.item * g.c.batch
    block.spare = <float*>(mine + g.a_bytes + g.b_bytes)
    block.row_scale = <float*>(<char*>block.spare + round_up(g.mr * g.nr * sizeof(float), ALIGN))
    block.acc = <char*>block.row_scale + g.scale_bytes
    if g.splits > 1:
        block.acc = g.scratch + i * g.splits * g.acc_bytes
    block.column_scale = NULL
    if g.exponents.column.e != NULL:
        block.column_scale = block.row_scale + g.mb
    block.bias = NULL
    if g.c.bias != NULL:
        # Whole tiles are read.
        block.bias = block.row_scale + g.mb + g.nb
        memset(block.bias, 0, g.nb * sizeof(float))
        memcpy(block.bias, g.c.bias + block.item * g.c.bias_batch + block.n0,
               block.nc * sizeof(float))
    block.careful = find_scales(&g.exponents, block.item, block.m0, block.mc, round_up(
        block.mc, g.mr), block.row_scale, block.n0, block.nc, block.column_scale)


cdef void add_splits_task(void* work, int64_t i, int thread) noexcept nogil:
    """Adds up what the tasks that shared a block of C have summed, and rounds it."""
    cdef Gemm* g = <Gemm*>work
    cdef int64_t mr = g.mr, nr = g.nr, panel, t
    cdef Block block
    locate_block(g, i, g.scratch + g.shared_bytes + thread * g.task_bytes, &block)
    for panel in range((block.nc + nr - 1) // nr):
        for t in range((block.mc + mr - 1) // mr):
            if g.finish != NULL:
                g.finish(g, &block, panel, t)
                continue
            round_tile(g, &block, t * mr, panel * nr,
                       block.acc + (panel * (g.mb // mr) + t) * g.tile_bytes)
            store_tile(g, &block, t * mr, panel * nr, min(mr, block.mc - t * mr),
                       min(nr, block.nc - panel * nr))


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
    return <int64_t*>(acc + g.tile_values * g.sum_bytes)


cdef void widen(Gemm* g, char* acc, bint first, bint flush) noexcept nogil:
    """Moves what the int32 sums hold into the tile's int64 sums before they can overflow."""
    cdef int64_t* wide = wide_sums(g, acc)
    cdef int64_t i, n = g.tile_values
    if first:
        memset(wide, 0, n * sizeof(int64_t))
    if flush:
        for i in range(n):
            wide[i] += g.sum_of(g, <int32_t*>acc, i)
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
            total += g.sum_of(g, <int32_t*>(acc + split * g.acc_bytes), i)
            if g.wide:
                total += wide_sums(g, acc + split * g.acc_bytes)[i]
        out[i] = dfp_round(total, scale)
    if block.bias != NULL:
        for i in range(g.tile_values):
            out[i] = clipped(out[i] + block.bias[n + i % columns], &g.c.clip)


cdef void store_tile(Gemm* g, Block* block, int64_t m, int64_t n, int64_t rows,
                     int64_t cols) noexcept nogil:
    cdef int64_t i, row
    for i in range(rows):
        row = row_of_c(g, block.m0 + m + i)
        if row >= 0:
            memcpy(block.c + row * g.c.ld + block.n0 + n, block.spare + i * g.nr,
                   cols * sizeof(float))


cdef inline int64_t row_of_c(Gemm* g, int64_t row) noexcept nogil:
    """Where a row of A has its row of C, or -1."""
    if g.position != NULL:
        row = g.position(g, row)
    if g.c.scattered and row >= 0:
        row = scatter_row(&g.c.rows, row)
    return row


cdef void clear_block(Gemm* g, Block* block) noexcept nogil:
    """An empty sum is zero, or NaN."""
    cdef int64_t i, j
    cdef float* row
    for i in range(block.mc):
        row = block.c + row_of_c(g, block.m0 + i) * g.c.ld + block.n0
        if (block.column_scale == NULL and block.bias == NULL
                and block.row_scale[i] == block.row_scale[i]):
            memset(row, 0, block.nc * sizeof(float))
            continue
        for j in range(block.nc):
            row[j] = 0 * block.row_scale[i]
            if block.column_scale != NULL:
                row[j] *= block.column_scale[j]
            if block.bias != NULL:
                row[j] = clipped(row[j] + block.bias[j], &g.c.clip)
