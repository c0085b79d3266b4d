# The driver that multiplies digits on int8 tiles: gemm.pxi's blocks, in the layouts of dfp_digits
# (microkernels/microkernel.h). A block of A is packed as lines of 64 products, a panel of B as
# columns; the product of a tile is rounded while the next one is summed.
#
# Windows that move pixel by pixel are not gathered tap by tap. Their image is laid out flat, its
# padding included, and a tap is a distance, the same at every position.
#
#   Where positions are rows of C, A has a line per pixel and 64 channels. Rows whose position lies
#   in the padding are summed in vain, and not stored.
#
#   Where positions are the products (weight gradients), the product is mirrored: C is summed
#   transposed, so that B is the image. It has groups of four pixels that follow each other, and
#   four copies, shifted by a pixel each: a tap is a copy and a distance in groups. A panel is 32
#   channels at all taps, that many tiles side by side. In the padding the other factor is zero.

cdef enum:
    FLAT_CACHED = 786432    # bytes of lines a task keeps if they are read, or made, many times
    DIGITS_M = 1024         # rows of C of a task, at most
    DIGITS_LONG = 1024      # K is cut into blocks of this length where A is transposed in packing,
    DIGITS_BLOCK_K = 2048   # and of this one where it is beyond LONG_K
    MIRRORED_M = 128        # rows and
    MIRRORED_N = 576        # columns of C of a task that is mirrored,
    MIRRORED_SUMS = 73728   # whose sums wait, so many of them
    MIRRORED_TAPS = 64
    FEW_CHANNELS = 8
    SPLIT_COST = 100        # gathering and splitting an element takes as long as so many products


cdef inline int64_t steps_of(int64_t k) noexcept nogil:
    return (k + DFP_DIGIT_STEP - 1) // DFP_DIGIT_STEP


cdef bint digits_pay(Gemm* g) noexcept nogil:
    """Is a good part of the tiles used? Pairs are a quarter as fast, and waste little."""
    cdef int64_t tile = DFP_DIGIT_TILE
    if kernel.digits == NULL or g.spill or g.m == 0 or g.n == 0 or g.k == 0:
        return False
    # SMALL = 0 is how tests ask for the large shapes' way.
    if SMALL == 0:
        return True
    # Transposed pixels of a few channels are gathered one by one: the weight gradient of
    # ResNet-50's first layer took 2.6 times as long as in pairs.
    if g.a.kind == PATCHES_T and g.a.window.channels < FEW_CHANNELS:
        return False
    return (4.0 * g.m * g.n * g.k >= <double>round_up(g.m, tile) * round_up(g.n, tile)
            * steps_of(g.k) * DFP_DIGIT_STEP)


cdef void digits_plan(Gemm* g) noexcept nogil:
    cdef Digits* d = &g.digits
    cdef Window* w = &g.a.window
    cdef int64_t tile = DFP_DIGIT_TILE, step = DFP_DIGIT_STEP, groups
    d.products = 3 if g.a_bits <= 14 and g.b_bits <= 14 else 4
    d.planes = 3 if d.products == 3 else 2
    d.taps = 1
    g.mr, g.nr, g.tile_values, g.sum_bytes = tile, tile, tile * tile, 12
    g.pack_b, g.multiply, g.sum_of = digits_pack_b_task, digits_task, digits_sum
    g.narrow_k = DFP_DIGIT_K_3 if d.products == 3 else DFP_DIGIT_K_4

    lay_flat(g)
    g.kb = g.k
    if d.mirrored:
        g.k = g.k // volume(w.positions) * volume(d.pitch)
        d.taps = volume(w.taps)
        g.m, g.n = g.n, round_up(w.channels, tile) * d.taps
        g.nr = tile * d.taps
        g.kb = DIGITS_LONG
        g.mb = clamp(MIRRORED_SUMS // g.nr // tile * tile, tile, MIRRORED_M)
        d.columns = d.steps = steps_of(g.kb)
        g.finish = round_mirrored
    elif d.flat:
        g.position = flat_position
        g.m = g.m // volume(w.positions) * volume(d.pitch)
        g.exponents.row.per = g.exponents.row.per // volume(w.positions) * volume(d.pitch)
        d.columns = steps_of(w.channels)
        d.steps = d.columns * volume(w.taps)
        g.mb = clamp(FLAT_CACHED // (d.planes * d.columns * step) // tile * tile, tile, DIGITS_M)
    else:
        if transposed(g):
            g.kb = min(g.k, <int64_t>DIGITS_LONG)
        elif g.k > LONG_K:
            g.kb = DIGITS_BLOCK_K
        d.columns = d.steps = steps_of(g.kb)
        g.mb = clamp((FLAT_CACHED if transposed(g) else CACHED) // (d.planes * d.columns * step)
                     // tile * tile, tile, BLOCK_MN if transposed(g) else DIGITS_M)
    g.wide = g.k > g.narrow_k
    share_out(g, max(g.nr, MIRRORED_N // g.nr * g.nr) if d.mirrored else BLOCK_MN, d.mirrored)
    size_sums(g)

    # An odd number of lines from step to step: at a multiple of 4096 bytes they would share a few
    # sets of the first-level cache.
    d.a_step = (g.mb + (d.halo if d.flat else 0) | 1) * step
    d.a_plane = d.columns * d.a_step
    d.b_copy = 0
    d.b_step, d.b_half, d.b_plane = 2048, 1024, d.steps * 2048
    if d.mirrored:
        groups = d.steps * 16 + (d.halo + 3) // 4 + 1
        d.b_step, d.b_half, d.b_plane = 1024, groups * 64, groups * 128
        d.b_copy = d.planes * d.b_plane
    g.a_bytes = round_up(d.planes * d.a_plane + (g.mb + d.steps) * sizeof(int64_t)
                         + gathered_bytes(g), ALIGN)
    g.b_bytes = 0 if g.packed_b else max(d.planes * d.b_plane, 4 * d.b_copy)
    size_scratch(g, d.planes * d.steps * step)


cdef inline bint transposed(Gemm* g) noexcept nogil:
    return g.a.kind == COLUMNS or g.a.kind == PATCHES_T


cdef inline int64_t gathered_bytes(Gemm* g) noexcept nogil:
    """What is put together for packing: products of a row, or pointers to the pixels of a block."""
    cdef int64_t k = steps_of(g.kb) * DFP_DIGIT_STEP
    if g.digits.mirrored:
        return (2 * k + round_up(g.digits.halo + 4, 4)) * sizeof(void*)
    return k * sizeof(int16_t)


cdef void lay_flat(Gemm* g) noexcept nogil:
    """Lays the image of a window out flat, if that takes less than to gather it."""
    cdef Digits* d = &g.digits
    cdef Window* w = &g.a.window
    cdef int i
    cdef int64_t reach, least, before, after
    cdef double layout = 1, halo = 0, positions, channels, taps, columns, filters
    d.flat = d.mirrored = False
    d.halo = 0
    if g.a.kind == ROWS or g.a.kind == COLUMNS or volume(w.taps) < 2 or not all_one(w.step):
        return
    for i in range(3):
        # The taps of one position span reach + 1 pixels, from coordinate `least` on at the first
        # position.
        reach = abs64((w.taps[i] - 1) * w.tap_step[i])
        least = w.offset[i] - (reach if w.tap_step[i] < 0 else 0)
        d.low[i], d.first[i] = least, w.offset[i] - least
        before = max(<int64_t>0, -least)
        after = max(<int64_t>0, w.positions[i] + least + reach - w.size[i])
        # The padding after a row is also the one before the next.
        d.pitch[i] = w.positions[i] + reach - min(reach, min(before, after))
        # Of padding alone it may be more than an int64 holds.
        layout, halo = layout * d.pitch[i], halo * d.pitch[i] + reach
    positions, taps = volume(w.positions), volume(w.taps)
    channels, columns = w.channels, steps_of(w.channels) * DFP_DIGIT_STEP
    if g.a.kind == PATCHES and taps * columns <= LONG_K:
        d.flat = (halo * columns * d.planes <= FLAT_CACHED
                  and layout * columns * g.n <= positions * channels * (g.n + SPLIT_COST))
    elif g.a.kind == PATCHES_T and taps <= MIRRORED_TAPS:
        # Halves of B have a group for every four pixels, in four copies.
        columns = round_up(w.channels, DFP_DIGIT_TILE)
        filters = round_up(g.n, DFP_DIGIT_TILE)
        d.mirrored = (halo * 128 * d.planes <= FLAT_CACHED
                      and layout * (columns * taps * filters + SPLIT_COST * (2 * channels + g.n))
                      <= positions * channels * taps * (filters + SPLIT_COST))
    if d.flat or d.mirrored:
        d.halo = <int64_t>halo


cdef inline int64_t abs64(int64_t x) noexcept nogil:
    return -x if x < 0 else x


cdef int64_t flat_position(Gemm* g, int64_t line) noexcept nogil:
    """The window's position at a pixel of the layout, counted through all images, or -1."""
    cdef Place at = place_of(g.digits.pitch, line)
    return position_at(&g.a.window, &at)


cdef inline int64_t position_at(const Window* w, const Place* at) noexcept nogil:
    if at.w >= w.positions[2] or at.h >= w.positions[1] or at.d >= w.positions[0]:
        return -1
    return ((at.item * w.positions[0] + at.d) * w.positions[1] + at.h) * w.positions[2] + at.w


cdef int64_t digits_sum(const Gemm* g, const int32_t* sums, int64_t i) noexcept nogil:
    cdef int64_t n = g.tile_values, hh = sums[i], mid = sums[n + i], ll = sums[2 * n + i]
    if g.digits.products == 3:
        return hh * 16384 + (mid - hh - ll) * 128 + ll
    return hh * 65536 + mid * 256 + ll


cdef void digits_pack_b_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Gemm* g = <Gemm*>work
    cdef int64_t panels = (g.n + g.nr - 1) // g.nr
    pack_columns(g, i // panels, i % panels * g.nr, 0, g.k,
                 <int8_t*>g.scratch + i * g.digits.planes * g.digits.b_plane)


cdef void digits_task(void* work, int64_t i, int thread) noexcept nogil:
    cdef Gemm* g = <Gemm*>work
    cdef Digits* d = &g.digits
    cdef int64_t nr = g.nr, panels = (g.n + nr - 1) // nr, split = i % g.splits
    cdef int64_t k0 = split * g.split_k, end = min(g.k, k0 + g.split_k), kc, panel, t, s, tap
    cdef char* mine = g.scratch + g.shared_bytes + thread * g.task_bytes
    cdef int8_t* a = <int8_t*>mine
    cdef int64_t* row = <int64_t*>(a + d.planes * d.a_plane)
    cdef int64_t* a_step = row + g.mb
    cdef int16_t* gathered = <int16_t*>(a_step + d.steps)
    cdef Block block
    cdef dfp_digit_tile tile
    cdef dfp_digit_rows rows
    locate_block(g, i // g.splits, mine, &block)
    block.acc += split * g.acc_bytes if g.splits > 1 else 0
    for t in range(round_up(block.mc, g.mr)):
        row[t] = -1
        if t < block.mc:
            row[t] = row_of_c(g, block.m0 + t) * g.c.ld
            row[t] = max(row[t], <int64_t>-1)
    for s in range(d.steps):
        a_step[s] = s * d.a_step
        if d.flat:
            # Tap by tap within 64 channels.
            tap = s % volume(g.a.window.taps)
            a_step[s] = (s // volume(g.a.window.taps) * d.a_step
                         + tap_distance(g, tap) * DFP_DIGIT_STEP)
    rows.next = rows.rows = 0
    rows.products, rows.stream = d.products, g.stream
    tile.a_plane, tile.a_step = d.a_plane, a_step
    tile.b_plane, tile.b_step, tile.b_half = d.b_plane, d.b_step, d.b_half
    tile.products = d.products
    block.first = True
    block.since_flush = 0
    kernel.digits.open()
    while k0 < end:
        kc = min(g.kb, end - k0)
        tile.steps = d.steps if d.flat else steps_of(kc)
        block.last = k0 + kc >= g.k and g.splits == 1
        block.since_flush += kc
        block.flush = g.wide and block.since_flush + g.kb > g.narrow_k
        pack_lines(g, &block, k0, kc, gathered, a)
        for panel in range((block.nc + nr - 1) // nr):
            tile.b = <int8_t*>mine + g.a_bytes
            if g.packed_b:
                tile.b = (<int8_t*>g.scratch + (block.item * panels + block.n0 // nr + panel)
                          * d.planes * d.b_plane)
            elif d.mirrored:
                pack_sliding(g, (block.n0 // nr + panel) * DFP_DIGIT_TILE, kc,
                             <const int16_t**>gathered, <int8_t*>mine + g.a_bytes)
            else:
                pack_columns(g, block.item, block.n0 + panel * nr, k0, kc,
                             <int8_t*>mine + g.a_bytes)
            for t in range((block.mc + g.mr - 1) // g.mr):
                tile.a = a + t * g.mr * DFP_DIGIT_STEP
                if d.mirrored:
                    multiply_mirrored(g, &block, &tile, &rows, panel, t)
                else:
                    multiply_tile(g, &block, &tile, &rows, row, panel, t)
        if block.flush:
            block.since_flush = 0
        block.first = False
        k0 += kc
    kernel.digits.finish(&rows)
    kernel.digits.close()


cdef inline void sum_tile(Gemm* g, Block* block, dfp_digit_tile* tile, dfp_digit_rows* rows,
                          char* acc) noexcept nogil:
    tile.sums = <int32_t*>acc
    tile.resume = not block.first
    kernel.digits.multiply(tile, rows)
    if g.wide and (block.first or block.flush):
        widen(g, acc, block.first, block.flush)


cdef void multiply_tile(Gemm* g, Block* block, dfp_digit_tile* tile, dfp_digit_rows* rows,
                        const int64_t* row, int64_t panel, int64_t t) noexcept nogil:
    """Sums a tile; `rows` are those of the one before, and become this one's."""
    cdef int64_t cols = min(g.nr, block.nc - panel * g.nr)
    cdef char* acc = block.acc
    if g.carry:
        acc += (panel * (g.mb // g.mr) + t) * g.tile_bytes
    sum_tile(g, block, tile, rows, acc)
    if not block.last:
        return
    if is_fast(g, block, t * g.mr, panel * g.nr):
        rows.sums, rows.c = tile.sums, block.c + block.n0 + panel * g.nr
        rows.row, rows.next, rows.rows, rows.cols = row + t * g.mr, 0, g.mr, cols
        rows.row_scale, rows.column_scale, rows.bias = block.row_scale + t * g.mr, NULL, NULL
        if block.column_scale != NULL:
            rows.column_scale = block.column_scale + panel * g.nr
        if block.bias != NULL:
            rows.bias = block.bias + panel * g.nr
            rows.low, rows.high = g.c.clip.low, g.c.clip.high
    else:
        round_tile(g, block, t * g.mr, panel * g.nr, acc)
        store_tile(g, block, t * g.mr, panel * g.nr, min(g.mr, block.mc - t * g.mr), cols)


cdef void multiply_mirrored(Gemm* g, Block* block, dfp_digit_tile* tile, dfp_digit_rows* rows,
                            int64_t panel, int64_t t) noexcept nogil:
    """Sums the tiles of all taps; stores them transposed after the last block of K."""
    cdef Digits* d = &g.digits
    cdef const int8_t* panel_data = tile.b
    cdef int64_t tap, at
    for tap in range(d.taps):
        at = tap_distance(g, tap)
        tile.b = panel_data + at % 4 * d.b_copy + at // 4 * 64
        sum_tile(g, block, tile, rows, mirrored_sums(g, block, panel, t, tap))
    tile.b = panel_data
    if block.last:
        round_mirrored(g, block, panel, t)


cdef inline char* mirrored_sums(Gemm* g, Block* block, int64_t panel, int64_t t,
                                int64_t tap) noexcept nogil:
    return block.acc + ((panel * (g.mb // g.mr) + t) * g.digits.taps + tap) * g.tile_bytes


cdef void round_mirrored(Gemm* g, Block* block, int64_t panel, int64_t t) noexcept nogil:
    """Rounds the tiles of all taps, [filters][channels], into C, [tap][channel][filter]."""
    cdef int64_t tap, i, j, channels = g.a.window.channels
    cdef int64_t c0 = (block.n0 // g.nr + panel) * DFP_DIGIT_TILE
    cdef char* acc
    cdef float* c
    cdef dfp_digit_rows done
    done.rows = min(g.mr, block.mc - t * g.mr)
    done.cols = min(<int64_t>DFP_DIGIT_TILE, channels - c0)
    done.row_scale, done.products = block.row_scale, g.digits.products
    for tap in range(g.digits.taps):
        acc = mirrored_sums(g, block, panel, t, tap)
        c = block.c + (tap * channels + c0) * g.c.ld + block.m0 + t * g.mr
        if g.fast and not block.careful and g.splits == 1:
            done.sums, done.c = <int32_t*>acc, c
            kernel.digits.finish_transposed(&done, g.c.ld)
            continue
        round_tile(g, block, t * g.mr, 0, acc)
        for j in range(done.cols):
            for i in range(done.rows):
                c[j * g.c.ld + i] = block.spare[i * DFP_DIGIT_TILE + j]


cdef inline int64_t tap_distance(Gemm* g, int64_t tap) noexcept nogil:
    """How many pixels of the layout a tap lies after the pixel of its position."""
    cdef Digits* d = &g.digits
    cdef Window* w = &g.a.window
    cdef Place at = place_of(w.taps, tap)
    return (((d.first[0] + at.d * w.tap_step[0]) * d.pitch[1]
             + d.first[1] + at.h * w.tap_step[1]) * d.pitch[2]
            + d.first[2] + at.w * w.tap_step[2])


# ---- Packing -------------------------------------------------------------------------------------

cdef void pack_lines(Gemm* g, Block* block, int64_t k0, int64_t kc, int16_t* gathered,
                     int8_t* out) noexcept nogil:
    """The block's rows, products k0 .. k0 + kc, of A."""
    cdef Digits* d = &g.digits
    cdef ASource* a = &g.a
    cdef const int16_t* data = a.data + block.item * g.a_batch
    cdef const int16_t* row
    cdef int64_t i, s
    cdef Place at
    if d.mirrored:
        pack_mirrored(g, block, k0, kc, <const int16_t**>gathered, out)
    elif d.flat:
        pack_flat(g, data, block.m0, block.mc + d.halo, out)
    elif transposed(g):
        for s in range(steps_of(kc)):
            pack_transposed(g, data, block.m0, block.mc, k0 + s * DFP_DIGIT_STEP,
                            min(kc - s * DFP_DIGIT_STEP, <int64_t>DFP_DIGIT_STEP),
                            out + s * d.a_step)
    else:
        if a.kind == PATCHES:
            at = place_of(a.window.positions, block.m0)
        for i in range(block.mc):
            row = data + (block.m0 + i) * a.ld + k0
            if a.kind == PATCHES:
                gather(&a.window, data, &at, k0, kc, gathered)
                go_on(&at, a.window.positions)
                row = gathered
            kernel.digits.lines(row, kc, d.products, out + i * DFP_DIGIT_STEP, d.a_step, d.a_plane)


cdef void pack_flat(Gemm* g, const int16_t* image, int64_t first, int64_t count,
                    int8_t* out) noexcept nogil:
    """Lines first .. first + count of the padded images."""
    cdef Digits* d = &g.digits
    cdef int64_t items = g.m // volume(d.pitch), channels = g.a.window.channels, i, j, s, p, n
    cdef const int16_t* pixels[64]
    for i in range(0, count, 64):
        n = min(count - i, <int64_t>64)
        layout_pixels(g, image, items, first + i, n, pixels)
        for j in range(n):
            if pixels[j] != NULL:
                kernel.digits.lines(pixels[j], channels, d.products, out, d.a_step, d.a_plane)
            else:
                for p in range(d.planes):
                    for s in range(d.columns):
                        memset(out + p * d.a_plane + s * d.a_step, 0, DFP_DIGIT_STEP)
            out += DFP_DIGIT_STEP


cdef void layout_pixels(Gemm* g, const int16_t* image, int64_t items, int64_t first,
                        int64_t count, const int16_t** pixels) noexcept nogil:
    """Where pixels first .. first + count of the layout lie; NULL in the padding."""
    cdef int64_t* low = &g.digits.low[0]
    cdef Place at = place_of(g.digits.pitch, first)
    cdef int64_t i
    for i in range(count):
        pixels[i] = NULL
        if at.item < items:
            pixels[i] = pixel_or_null(&g.a.window, image, at.item, at.d + low[0], at.h + low[1],
                                      at.w + low[2])
        go_on(&at, g.digits.pitch)


cdef void pack_mirrored(Gemm* g, Block* block, int64_t k0, int64_t kc, const int16_t** pixels,
                        int8_t* out) noexcept nogil:
    """A of a mirrored product: filters are lines. Before that, `pixels` are set to those of the
    image, for pack_sliding; the gradient's at the same positions come after them."""
    cdef Digits* d = &g.digits
    cdef int64_t image = round_up(g.kb + d.halo + 4, 4), k, s, c, position
    cdef int64_t items = g.k // volume(d.pitch), steps = steps_of(kc)
    cdef const int16_t* dy = g.b.data + block.item * g.b_batch
    cdef Place at = place_of(d.pitch, k0)
    cdef const int8_t* shift = g.exponents.shifts.shift
    # A group is one image or more.
    cdef int64_t images = g.exponents.shifts.per // max(volume(g.a.window.positions), <int64_t>1)
    cdef int shifts[64]
    cdef int16_t space[64 * 32]
    cdef const int16_t* aligned[64]
    cdef const int16_t** rows
    cdef int64_t first, n
    layout_pixels(g, g.a.data + block.item * g.a_batch, items, k0,
                  steps * DFP_DIGIT_STEP + d.halo + 4, pixels)
    pixels += image
    for s in range(steps):
        for k in range(DFP_DIGIT_STEP):
            pixels[k] = NULL
            shifts[k] = 0
            if s * DFP_DIGIT_STEP + k < kc:
                position = position_at(&g.a.window, &at)
                if position >= 0:
                    pixels[k] = dy + position * g.b.k_stride
                    shifts[k] = shift[at.item // images] if shift != NULL else 0
                go_on(&at, d.pitch)
        for c in range(0, block.mc, 32):
            rows, first, n = pixels, block.m0 + c, min(block.mc - c, <int64_t>32)
            if shift != NULL:
                kernel.align_rows(rows, first, n, shifts, space, aligned)
                rows, first = aligned, 0
            kernel.digits.lines_of_rows(rows, first, n, d.products,
                                        out + s * d.a_step + c * DFP_DIGIT_STEP, d.a_plane)
        pixels += DFP_DIGIT_STEP


cdef void pack_sliding(Gemm* g, int64_t channel, int64_t kc, const int16_t** pixels,
                       int8_t* out) noexcept nogil:
    """32 channels of the image, for all taps of a mirrored product."""
    cdef Digits* d = &g.digits
    kernel.digits.columns_sliding(pixels, steps_of(kc) * DFP_DIGIT_STEP + d.halo + 4, channel,
                                  min(g.a.window.channels - channel, <int64_t>32), d.products,
                                  out, d.b_half, d.b_plane, d.b_copy)


cdef void pack_transposed(Gemm* g, const int16_t* data, int64_t m0, int64_t mc, int64_t k0,
                          int64_t kc, int8_t* out) noexcept nogil:
    """One step of A where rows of A lie across the data: channels are rows, pixels products."""
    cdef Digits* d = &g.digits
    cdef Window* w = &g.a.window
    cdef int64_t j = m0, run, first, c, k
    cdef const int16_t* rows[64]
    while j < m0 + mc:
        if g.a.kind == COLUMNS:
            run, first = mc, j
            for k in range(DFP_DIGIT_STEP):
                rows[k] = data + (k0 + k) * g.a.ld if k < kc else NULL
        else:
            first = j % w.padded
            run = min(m0 + mc - j, w.channels - first)
            rows_of_tap(w, data, j // w.padded, k0, kc, rows)
        for c in range(0, run, 32):
            kernel.digits.lines_of_rows(rows, first + c, min(run - c, <int64_t>32), d.products,
                                        out + (j - m0 + c) * DFP_DIGIT_STEP, d.a_plane)
        j += run


cdef void rows_of_tap(const Window* w, const int16_t* image, int64_t tap, int64_t k0, int64_t kc,
                      const int16_t** rows) noexcept nogil:
    """The pixels that a tap meets at positions k0 .. k0 + kc."""
    cdef Place at = place_of(w.positions, k0), on = place_of(w.taps, tap)
    cdef int64_t k
    for k in range(DFP_DIGIT_STEP):
        rows[k] = NULL
        if k < kc:
            rows[k] = tap_pixel(w, image, &at, &on)
            go_on(&at, w.positions)


cdef void pack_columns(Gemm* g, int64_t item, int64_t n0, int64_t k0, int64_t kc,
                       int8_t* out) noexcept nogil:
    """A panel of B, aligned: columns from n0 on, products k0 .. k0 + kc."""
    cdef const int16_t* data = g.b.data + item * g.b_batch
    cdef Digits* d = &g.digits
    cdef BSource* b = &g.b
    cdef int64_t taps = volume(g.a.window.taps), s, k, count, half, i, n, first
    cdef const int16_t** at
    cdef int16_t q[16 * 64]
    cdef const int16_t* rows[64]
    cdef int shifts[64]
    cdef int16_t space[64 * 32]
    cdef const int16_t* aligned[64]
    cdef bint shifted = g.exponents.shifts.shift != NULL
    for s in range(d.steps if d.flat else steps_of(kc)):
        if d.flat:
            k = s % taps * b.padded + s // taps * DFP_DIGIT_STEP
            count = min(b.channels - s // taps * DFP_DIGIT_STEP, <int64_t>DFP_DIGIT_STEP)
        else:
            k = k0 + s * DFP_DIGIT_STEP
            count = min(kc - s * DFP_DIGIT_STEP, <int64_t>DFP_DIGIT_STEP)
        if shifted:
            shifts_of(&g.exponents.shifts, item, k, count, shifts)
        if b.n_stride == 1:
            for i in range(DFP_DIGIT_STEP):
                rows[i] = b_row(b, data, k + i) if i < count else NULL
            n = min(g.n - n0, <int64_t>32)
            first, at = n0, rows
            if shifted:
                kernel.align_rows(rows, n0, n, shifts, space, aligned)
                first, at = 0, aligned
            kernel.digits.columns_of_rows(at, first, n, transposed(g), d.products, out, d.b_half,
                                          d.b_plane)
        else:
            for half in range(2):
                for i in range(16):
                    n = n0 + half * 16 + i
                    copy_column(b, data, n, k, count if n < g.n else 0, q + i * 64)
                if shifted:
                    align_columns(q, shifts)
                kernel.digits.columns(q, transposed(g), d.products, out + half * d.b_half,
                                      d.b_plane)
        out += d.b_step


cdef void align_columns(int16_t* q, const int* shifts) noexcept nogil:
    """The products of 16 columns, each shifted by its shift."""
    cdef int64_t i, k
    for k in range(DFP_DIGIT_STEP):
        if shifts[k]:
            for i in range(16):
                kernel.align(q + i * 64 + k, 1, shifts[k], q + i * 64 + k)


cdef inline void copy_column(BSource* b, const int16_t* data, int64_t n, int64_t k, int64_t count,
                             int16_t* to) noexcept nogil:
    """`count` products of column n, and zeros up to a step; within a tap they lie in a row."""
    cdef int64_t i = 0, run
    while i < count:
        run = min(count - i, b.padded - (k + i) % b.padded)
        copy_s16(to + i, b_row(b, data, k + i) + n * b.n_stride, run)
        i += run
    zero_s16(to + count, DFP_DIGIT_STEP - count)
