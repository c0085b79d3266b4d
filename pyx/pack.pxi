# From the tensors' own layout (row-major int16, channels last) into the microkernel's, one block
# that fits the cache at a time.

# A window slides over an image: position p of tap t lies at pixel p * step + offset + t * tap_step
# of each spatial dimension, and outside of the image there are zeros. Forward convolutions and both
# gradients are such windows (conv.pxi). Shapes count depth, height, width.
cdef struct Window:
    int64_t positions[3]
    int64_t step[3]
    int64_t taps[3]
    int64_t offset[3]
    int64_t tap_step[3]
    int64_t size[3]             # of the image, in pixels
    int64_t pixel               # elements from a pixel to the next: all channels
    int64_t channels            # channels of one group
    int64_t padded              # elements a tap takes in K: channels, or rounded up to even

cdef enum AKind:
    ROWS        # A[m, k] = data[m * ld + k], used where it lies in blocks of even length; k even
    COLUMNS     # A[m, k] = data[k * ld + m]
    PATCHES     # A[m, k]: position m, element k = (tap, channel) of the window
    WINDOWS     # the same, read from a copy of the image's rows, whose windows overlap
    PATCHES_T   # A[m, k]: element m of the window, position k
    # The same, the taps of a block of channels packed as one; m as element_of has it. A row of
    # positions has `ld` products, for the last of which B may have zeros.
    TAPS_T

cdef struct ASource:
    AKind kind
    const int16_t* data
    int64_t ld
    Window window

# Runs from `first` to before `end`.
cdef struct Runs:
    int64_t first, end

# A block of A in a layout the microkernel reads: tile t begins at data + t * tile_stride; or each
# of its rows at data + starts[row], and the tile has the products of those runs only that meet the
# image.
cdef struct ABlock:
    const int16_t* data
    int64_t row_stride, pair_stride, tile_stride
    const int64_t* starts
    const Runs* met             # by a tile
    const int64_t* runs
    int64_t run

# B[k, n] = data[tap(k) + channel(k) * k_stride + n * n_stride]; one of the strides is 1. Without
# taps (taps[i] = 1, padded = K) that is a matrix.
cdef struct BSource:
    const int16_t* data
    int64_t k_stride, n_stride
    int64_t channels, padded    # of a tap, as in Window
    int64_t taps[3]             # taps the window has,
    int64_t first[3]            # the kernel position of the first,
    int64_t jump[3]             # and from one to the next,
    int64_t size[3]             # of so many positions
    int64_t tap_stride          # elements from a kernel position to the next

# Where the rows of C go when positions of the window are not consecutive pixels of the result.
cdef struct Scatter:
    int64_t positions[3]
    int64_t step[3]
    int64_t offset[3]
    int64_t size[3]

# A pixel of `size` (depth, height, width), or a tap of a kernel of that size, in image after image.
cdef struct Place:
    int64_t item, d, h, w

cdef enum:
    MAX_NR = 64
    INTERLEAVED = 32        # elements at a time
    LINE_PAIRS = 16         # of 64 bytes
    SHORT_ROW = 16          # positions

cdef int16_t zero_row[MAX_NR]


cdef inline int64_t a_block_bytes(ASource* a, int64_t mb, int64_t kb) noexcept nogil:
    if a.kind == ROWS and kb % 2 == 0:
        return 0
    if a.kind == WINDOWS:
        return windows_block_bytes(&a.window, mb)
    if a.kind == TAPS_T:
        return taps_block_bytes(a, mb, kb)
    # PATCHES_T gathers two positions before it interleaves them.
    return mb * patch_stride(kb) * 2 + (2 * mb * 2 if a.kind == PATCHES_T else 0)


cdef inline int64_t patch_stride(int64_t kc) noexcept nogil:
    """Elements from a packed row to the next. Rows a multiple of 512 bytes apart would share few
    sets of the first-level cache, so they are moved apart by a line."""
    cdef int64_t stride = round_up(kc, 32)
    return stride + 32 if stride % 256 == 0 else stride


cdef inline Place place_of(const int64_t* size, int64_t i) noexcept nogil:
    cdef Place at
    at.w, i = i % size[2], i // size[2]
    at.h, i = i % size[1], i // size[1]
    at.d, at.item = i % size[0], i // size[0]
    return at


cdef inline void go_on(Place* at, const int64_t* size) noexcept nogil:
    """To the next place, without a division."""
    at.w += 1
    if at.w == size[2]:
        at.w, at.h = 0, at.h + 1
        if at.h == size[1]:
            at.h, at.d = 0, at.d + 1
            if at.d == size[0]:
                at.d, at.item = 0, at.item + 1


cdef inline int64_t scatter_row(Scatter* s, int64_t row) noexcept nogil:
    cdef int64_t w = row % s.positions[2] * s.step[2] + s.offset[2]
    row //= s.positions[2]
    cdef int64_t h = row % s.positions[1] * s.step[1] + s.offset[1]
    row //= s.positions[1]
    cdef int64_t d = row % s.positions[0] * s.step[0] + s.offset[0]
    row //= s.positions[0]
    return ((row * s.size[0] + d) * s.size[1] + h) * s.size[2] + w


cdef inline void copy_s16(int16_t* to, const int16_t* source, int64_t n) noexcept nogil:
    """memcpy without the call: most copies are one pixel's channels. The last vector overlaps."""
    cdef int64_t i = 0
    if n >= 16:
        while i + 16 <= n:
            memcpy(to + i, source + i, 32)
            i += 16
        memcpy(to + n - 16, source + n - 16, 32)
    elif n >= 8:
        memcpy(to, source, 16)
        memcpy(to + n - 8, source + n - 8, 16)
    else:
        while i < n:
            to[i] = source[i]
            i += 1


cdef inline void zero_s16(int16_t* to, int64_t n) noexcept nogil:
    memset(to, 0, n * sizeof(int16_t))


cdef inline bint adjacent(const Window* v) noexcept nogil:
    """Do the taps of a kernel row lie next to each other in memory?"""
    return v.tap_step[2] == 1 and v.channels == v.pixel == v.padded


cdef inline int64_t whole_windows(const Window* v, const Place* at) noexcept nogil:
    """Positions from here on in this row whose windows, adjacent taps, lie inside of the image."""
    cdef int64_t d0 = at.d * v.step[0] + v.offset[0], d1 = d0 + (v.taps[0] - 1) * v.tap_step[0]
    cdef int64_t h0 = at.h * v.step[1] + v.offset[1], h1 = h0 + (v.taps[1] - 1) * v.tap_step[1]
    cdef int64_t w0 = at.w * v.step[2] + v.offset[2], room = v.size[2] - v.taps[2] - w0
    if (min(d0, d1) < 0 or max(d0, d1) >= v.size[0] or min(h0, h1) < 0
            or max(h0, h1) >= v.size[1] or w0 < 0 or room < 0):
        return 0
    return min(v.positions[2] - at.w, room // v.step[2] + 1)


cdef inline void gather_windows(const Window* v, const int16_t* image, const Place* at,
                                int64_t count, int16_t* to, int64_t stride) noexcept nogil:
    """Copies so many of those windows, whole, to rows `stride` elements apart."""
    cdef int64_t run = v.taps[2] * v.pixel, td, th, d, h
    for td in range(v.taps[0]):
        for th in range(v.taps[1]):
            d = at.d * v.step[0] + v.offset[0] + td * v.tap_step[0]
            h = at.h * v.step[1] + v.offset[1] + th * v.tap_step[1]
            kernel.copy_rows(pixel_or_null(v, image, at.item, d, h,
                                           at.w * v.step[2] + v.offset[2]),
                             v.step[2] * v.pixel, count, run, to, stride)
            to += run


cdef void gather(const Window* v, const int16_t* image, const Place* at, int64_t j0, int64_t count,
                 int16_t* to) noexcept nogil:
    """Copies elements j0 .. j0 + count of the window's (tap, channel) axis at one position."""
    cdef int64_t w0 = at.w * v.step[2] + v.offset[2]
    cdef int64_t h0 = at.h * v.step[1] + v.offset[1]
    cdef int64_t d0 = at.d * v.step[0] + v.offset[0]
    cdef int64_t end = j0 + count, j = j0
    cdef int64_t td, th, tw, d, h, w, c, n, run, low, high
    cdef Place tap
    cdef const int16_t* row
    if (count == volume(v.taps) * v.padded and adjacent(v) and whole_windows(v, at)):
        # Most positions of a first layer.
        gather_windows(v, image, at, 1, to, 0)
        return
    tap = place_of(v.taps, j0 // v.padded)
    td, th, tw = tap.d, tap.h, tap.w
    while j < end:
        d, h = d0 + td * v.tap_step[0], h0 + th * v.tap_step[1]
        if not (0 <= d < v.size[0] and 0 <= h < v.size[1]):
            n = min(end - j, ((td * v.taps[1] + th + 1) * v.taps[2]) * v.padded - j)
            zero_s16(to, n)
            to += n
            j += n
            tw = v.taps[2]
        else:
            row = image + ((at.item * v.size[0] + d) * v.size[1] + h) * v.size[2] * v.pixel
            if adjacent(v):
                # Elements of this kernel row, counted from the image row's own start.
                run = min(end - j, ((td * v.taps[1] + th + 1) * v.taps[2]) * v.padded - j)
                low = w0 * v.pixel + j - (td * v.taps[1] + th) * v.taps[2] * v.padded
                high = low + run
                n = clamp(-low, 0, run)
                if n:
                    zero_s16(to, n)
                c = clamp(v.size[2] * v.pixel - low, n, run)
                if c > n:
                    copy_s16(to + n, row + low + n, c - n)
                if run > c:
                    zero_s16(to + c, run - c)
                to += run
                j += run
                tw = v.taps[2]
            else:
                while j < end and tw < v.taps[2]:
                    w = w0 + tw * v.tap_step[2]
                    c = j % v.padded
                    run = min(end - j, v.padded - c)
                    n = clamp(v.channels - c, 0, run)
                    if 0 <= w < v.size[2]:
                        copy_s16(to, row + w * v.pixel + c, n)
                        if run > n:
                            zero_s16(to + n, run - n)
                    else:
                        zero_s16(to, run)
                    to += run
                    j += run
                    tw += 1
        if tw == v.taps[2]:
            tw = 0
            th += 1
            if th == v.taps[1]:
                th = 0
                td += 1


cdef void pack_patches_t(const Window* v, const int16_t* image, int64_t m0, int64_t mc, int64_t k0,
                         int64_t kc, int64_t panel, int16_t* to) noexcept nogil:
    """Elements m0 .. m0 + mc of the window's axis at positions k0 .. k0 + kc, in panels; a tap's
    channels fill whole panels, so they are interleaved straight from the image."""
    cdef int64_t mr = kernel.mr, j = m0, step = v.step[2] * v.pixel, c, n, k, pairs
    cdef Place tap, at
    cdef const int16_t* p
    cdef const int16_t* q
    cdef int16_t* out
    while j < m0 + mc:
        tap, c = place_of(v.taps, j // v.padded), j % v.padded
        n = min(m0 + mc - j, v.channels - c)
        at = place_of(v.positions, k0)
        out = to + (j - m0) // mr * panel
        k = 0
        while k < kc:
            p = tap_pixel(v, image, &at, &tap)
            pairs = min(kc - k, in_a_row(v, &at, &tap)) // 2
            if p != NULL and pairs:
                # Pixels at equal distances, all inside of the image.
                kernel.interleave(p + c, p + step + c, 2 * step, pairs, n, <int>mr, panel, out)
                at.w += 2 * pairs - 1
            else:
                pairs, q = 1, NULL
                if k + 1 < kc:
                    go_on(&at, v.positions)
                    q = tap_pixel(v, image, &at, &tap)
                interleave_or_zero(p, q, c, n, mr, panel, out)
            go_on(&at, v.positions)
            out += pairs * 2 * mr
            k += 2 * pairs
        j += n


cdef inline int64_t in_a_row(const Window* v, const Place* at, const Place* tap) noexcept nogil:
    """Positions from here on in this row at which the tap meets the image, if it does here."""
    cdef int64_t w = at.w * v.step[2] + v.offset[2] + tap.w * v.tap_step[2]
    return min(v.positions[2] - at.w, (v.size[2] - 1 - w) // v.step[2] + 1)


cdef inline const int16_t* tap_pixel(const Window* v, const int16_t* image, const Place* at,
                                     const Place* tap) noexcept nogil:
    """What a tap meets at a position; NULL outside of the image."""
    return pixel_or_null(v, image, at.item,
                         at.d * v.step[0] + v.offset[0] + tap.d * v.tap_step[0],
                         at.h * v.step[1] + v.offset[1] + tap.h * v.tap_step[1],
                         at.w * v.step[2] + v.offset[2] + tap.w * v.tap_step[2])


cdef inline const int16_t* pixel_or_null(const Window* v, const int16_t* image, int64_t item,
                                         int64_t d, int64_t h, int64_t w) noexcept nogil:
    if not (0 <= d < v.size[0] and 0 <= h < v.size[1] and 0 <= w < v.size[2]):
        return NULL
    return image + (((item * v.size[0] + d) * v.size[1] + h) * v.size[2] + w) * v.pixel


cdef inline void interleave_or_zero(const int16_t* p, const int16_t* q, int64_t c, int64_t n,
                                    int64_t mr, int64_t panel, int16_t* to) noexcept nogil:
    """interleave, where a missing pixel is zeros."""
    cdef int64_t i = 0
    if p != NULL and q != NULL:
        kernel.interleave(p + c, q + c, 0, 1, n, <int>mr, panel, to)
        return
    while i < n:
        # Panel by panel: the row of zeros is short.
        kernel.interleave(p + c + i if p != NULL else zero_row,
                          q + c + i if q != NULL else zero_row, 0, 1, min(mr, n - i), <int>mr, 0,
                          to)
        to += panel
        i += mr


# Weight gradients: what one tap meets is what its neighbour met a position earlier. So the pixels
# of an image row, with its padding, are interleaved once for all taps, each with the pixel that the
# next position meets in its place; a tap is a distance, and a row of positions a run of pairs.

cdef inline bint in_plane(const Window* v) noexcept nogil:
    """Are there several taps, and no depth to slide along?"""
    return (v.taps[0] == v.size[0] == v.positions[0] == 1 and v.offset[0] == 0
            and v.taps[1] * v.taps[2] > 1)


cdef inline int64_t reach(const Window* v, int dim) noexcept nogil:
    """Pixels from the first tap to the last."""
    return (v.taps[dim] - 1) * v.tap_step[dim]


cdef inline bint windows_touch(const Window* v, int dim, int64_t most) noexcept nogil:
    """Or overlap, with at most so many pixels from the first tap to the last?"""
    return v.step[dim] <= reach(v, dim) + 1 and reach(v, dim) <= most


cdef inline bint taps_share(const Window* v) noexcept nogil:
    """Does that pay? Few pixels may lie between windows, or between taps; half a pair is lost at
    the end of a row of odd length, and short runs are slow."""
    return (in_plane(v) and windows_touch(v, 1, max(2 * v.taps[1], v.positions[1]))
            and windows_touch(v, 2, max(2 * v.taps[2], v.positions[2]))
            and (v.positions[2] % 2 == 0 or v.positions[2] >= SHORT_ROW
                 or v.channels % kernel.mr != 0))


cdef inline int64_t pixels_met(const Window* v, int dim, int64_t positions) noexcept nogil:
    """By so many positions in a row."""
    return (positions - 1) * v.step[dim] + reach(v, dim) + 1


cdef inline int64_t pitch_of(int64_t channels) noexcept nogil:
    """Elements from a pixel to the next. A pair takes 8 bytes for each: those of a row would share
    few sets of the first-level cache."""
    return channels + 8 if channels % 16 == 0 else channels


cdef inline int64_t line_of(const Window* v, int64_t positions, int64_t pitch) noexcept nogil:
    """Pairs of a row of pixels that so many positions, an even number, meet."""
    return round_up((pixels_met(v, 2, positions) - v.step[2]) * pitch, INTERLEAVED)


cdef int64_t taps_block_bytes(const ASource* a, int64_t mb, int64_t kb) noexcept nogil:
    cdef const Window* v = &a.window
    cdef int64_t rows = max(kb // a.ld, <int64_t>1)
    cdef int64_t images = (rows + v.positions[1] - 2) // v.positions[1] + 1
    cdef int64_t pitch = pitch_of(min(mb // volume(v.taps), v.channels))
    cdef int64_t line = line_of(v, min(kb, a.ld), pitch)
    return (round_up(mb // kernel.mr * sizeof(Runs) + (mb + rows) * sizeof(int64_t), ALIGN)
            + (rows * v.step[1] + images * (reach(v, 1) + 1)) * line * 4
            + (line + v.step[2] * pitch) * sizeof(int16_t))


cdef inline int64_t element_of(const Window* v, int64_t channels, int64_t row) noexcept nogil:
    """The window's element that row `row` of A is: its channels come in blocks of so many."""
    cdef int64_t taps = volume(v.taps), first = row // (channels * taps) * channels
    cdef int64_t width = min(channels, v.channels - first)
    row -= first * taps
    return row // width * v.channels + first + row % width


cdef void pack_taps_t(const ASource* a, const int16_t* image, int64_t m0, int64_t mc, int64_t k0,
                      int64_t kc, char* to, ABlock* block) noexcept nogil:
    """Rows m0 .. m0 + mc, all taps of some channels, at k0 .. k0 + kc: whole rows of positions, or
    a part of one."""
    cdef const Window* v = &a.window
    cdef int64_t taps = volume(v.taps), channels = mc // taps, c = m0 // taps
    cdef int64_t pitch = pitch_of(channels), width = min(kc, a.ld), line = line_of(v, width, pitch)
    cdef int64_t tiles = (mc + kernel.mr - 1) // kernel.mr, first = k0 // a.ld, count = kc // width
    cdef int64_t i, row, n, tap
    cdef Place at
    cdef Runs* met = <Runs*>to
    cdef int64_t* starts = <int64_t*>(met + tiles)
    cdef int64_t* runs = starts + mc
    cdef int16_t* pairs = <int16_t*>(to + round_up(<char*>(runs + count) - to, ALIGN))
    block.data, block.met, block.starts, block.runs = pairs, met, starts, runs
    block.run, block.pair_stride = width // 2, 4 * v.step[2] * pitch
    block.row_stride = block.tile_stride = 0
    for i in range(tiles):
        met[i].first, met[i].end = 0, count
    for i in range(mc):
        tap = i // channels
        starts[i] = 2 * (tap // v.taps[2] * v.tap_step[1] * line
                         + tap % v.taps[2] * v.tap_step[2] * pitch + i % channels)
    at.d, at.w, i = 0, k0 % a.ld, 0
    while i < count:
        # What the positions of one image meet.
        at.item, at.h = (first + i) // v.positions[1], (first + i) % v.positions[1]
        n = min(count - i, v.positions[1] - at.h)
        for row in range(n):
            runs[i + row] = (pairs - block.data) + 2 * row * v.step[1] * line
        for row in range(pixels_met(v, 1, n)):
            # The pixels lie where the next row's pairs come to lie.
            copy_row(v, image + c, &at, row, pixels_met(v, 2, width), channels, pitch,
                     pairs + 2 * line)
            kernel.interleave(pairs + 2 * line, pairs + 2 * line + v.step[2] * pitch, 0, 1, line,
                              INTERLEAVED, 2 * INTERLEAVED, pairs)
            pairs += 2 * line
        i += n


# Windows that overlap: a pixel is copied once, for all that meet it, in rows as the image has them,
# with its padding. A position is a start, and a kernel row (or a tap, where taps lie apart) a run.
# What is copied at a time is a band: whole rows of positions of one image, or a part of one row.

cdef inline bint windows_overlap(const Window* v) noexcept nogil:
    """Or touch, and few pixels lie between their taps."""
    return (in_plane(v) and windows_touch(v, 1, 2 * v.taps[1])
            and windows_touch(v, 2, 2 * v.taps[2]))


cdef inline int64_t run_taps(const Window* v) noexcept nogil:
    """Taps that are a run."""
    return v.taps[2] if v.tap_step[2] == 1 else 1


cdef int64_t windows_block_bytes(const Window* v, int64_t mb) noexcept nogil:
    cdef int64_t rows = mb // v.positions[2], images = (rows + v.positions[1] - 2) // v.positions[1]
    cdef int64_t copied = rows * v.step[1] + (images + 3) * (reach(v, 1) + 1)
    return (round_up(mb // kernel.mr * sizeof(Runs)
                     + (mb + v.taps[1] * v.taps[2]) * sizeof(int64_t), ALIGN)
            + (copied * pixels_met(v, 2, min(mb, v.positions[2])) * v.channels + 1)
            * sizeof(int16_t))


cdef void pack_windows(const Window* v, const int16_t* image, int64_t m0, int64_t mc,
                       char* to, ABlock* block) noexcept nogil:
    """All products of positions m0 .. m0 + mc."""
    cdef int64_t together = run_taps(v), across = v.taps[2] // together
    cdef int64_t line = pixels_met(v, 2, min(mc, v.positions[2])) * v.channels
    cdef int64_t tiles = (mc + kernel.mr - 1) // kernel.mr, i, h, w, width, height
    cdef Runs* met = <Runs*>to
    cdef int64_t* starts = <int64_t*>(met + tiles)
    cdef int64_t* runs = starts + mc
    cdef int16_t* pixels = <int16_t*>(
        to + round_up(<char*>(runs + v.taps[1] * across) - to, ALIGN))
    cdef Place at = place_of(v.positions, m0)
    block.data, block.met, block.starts, block.runs = pixels, met, starts, runs
    block.run = round_up(together * v.channels, 2) // 2
    block.row_stride, block.pair_stride, block.tile_stride = 0, 2, 0
    for i in range(v.taps[1] * across):
        runs[i] = (i // across * v.tap_step[1] * line
                   + i % across * v.tap_step[2] * v.channels)
    for i in range(tiles):
        met[i].first, met[i].end = v.taps[1] * across, 0
    i = 0
    while i < mc:
        width = min(v.positions[2] - at.w, mc - i)
        height = 1
        if width == v.positions[2]:
            height = min(v.positions[1] - at.h, (mc - i) // width)
        for h in range(height):
            meet_rows(v, at.h + h, across, met + i // kernel.mr,
                      met + (i + width - 1) // kernel.mr)
            for w in range(width):
                starts[i + w] = (pixels - block.data) + (h * v.step[1] * line
                                                         + w * v.step[2] * v.channels)
            i += width
        for h in range(pixels_met(v, 1, height)):
            copy_row(v, image, &at, h, pixels_met(v, 2, width), v.channels, v.channels, pixels)
            pixels += line
        at.w += width
        if at.w == v.positions[2]:
            at.w, at.h = 0, at.h + height
            if at.h == v.positions[1]:
                at.h, at.item = 0, at.item + 1
    for i in range(tiles):
        # Of nothing but padding, an empty sum.
        met[i].first = min(met[i].first, met[i].end)
    # A run of odd length reads one more, where B has a zero.
    pixels[0] = 0


cdef inline void meet_rows(const Window* v, int64_t h, int64_t across, Runs* tile,
                           const Runs* last) noexcept nogil:
    """Lets tiles have the runs, `across` of a kernel row, that meet the image from row h."""
    cdef int64_t first = 0, end = v.taps[1], pixel = h * v.step[1] + v.offset[1]
    while first < end and not 0 <= pixel + first * v.tap_step[1] < v.size[1]:
        first += 1
    while first < end and not 0 <= pixel + (end - 1) * v.tap_step[1] < v.size[1]:
        end -= 1
    while first < end and tile <= last:
        tile.first, tile.end = min(tile.first, first * across), max(tile.end, end * across)
        tile += 1


cdef void copy_row(const Window* v, const int16_t* image, const Place* at, int64_t row,
                   int64_t count, int64_t channels, int64_t pitch, int16_t* to) noexcept nogil:
    """So many pixels, zeros beyond the image, of a row that the window at a position meets."""
    cdef int64_t h = at.h * v.step[1] + v.offset[1] + row, w = at.w * v.step[2] + v.offset[2]
    cdef int64_t left = clamp(-w, 0, count), right = clamp(v.size[2] - w, left, count)
    if not 0 <= h < v.size[1]:
        left = right = count
    zero_s16(to, left * pitch)
    zero_s16(to + right * pitch, (count - right) * pitch)
    if left == right:
        return
    image += ((at.item * v.size[1] + h) * v.size[2] + w + left) * v.pixel
    to += left * pitch
    if channels == pitch == v.pixel:
        memcpy(to, image, (right - left) * pitch * sizeof(int16_t))
    else:
        kernel.copy_rows(image, v.pixel, right - left, channels, to, pitch)


cdef void pack_a(ASource* s, const int16_t* data, int64_t m0, int64_t mc, int64_t k0, int64_t kc,
                 int16_t* to, ABlock* block) noexcept nogil:
    """Makes rows m0 .. m0 + mc and products k0 .. k0 + kc of A readable for the microkernel."""
    cdef int64_t mr = kernel.mr, pairs = (kc + 1) // 2, i, stride, count
    cdef bint whole
    cdef Place at
    cdef int16_t* even
    cdef int16_t* odd
    block.data = to
    block.starts = block.runs = NULL
    block.run = 0
    if s.kind == ROWS and kc % 2:
        # The last pair would reach into the next row, or past the last: a chain of odd length.
        stride = patch_stride(kc)
        block.row_stride, block.pair_stride, block.tile_stride = stride, 2, mr * stride
        kernel.copy_rows(data + m0 * s.ld + k0, s.ld, mc, kc, to, stride)
        for i in range(mc):
            to[i * stride + kc] = 0
    elif s.kind == ROWS:
        block.data = data + m0 * s.ld + k0
        block.row_stride, block.pair_stride, block.tile_stride = s.ld, 2, mr * s.ld
    elif s.kind == PATCHES:
        stride = patch_stride(kc)
        block.row_stride, block.pair_stride, block.tile_stride = stride, 2, mr * stride
        at = place_of(s.window.positions, m0)
        whole = adjacent(&s.window) and kc == volume(s.window.taps) * s.window.padded
        i = 0
        while i < mc:
            count = min(mc - i, whole_windows(&s.window, &at)) if whole else 0
            if count:
                gather_windows(&s.window, data, &at, count, to + i * stride, stride)
                at.w += count - 1
            else:
                count = 1
                gather(&s.window, data, &at, k0, kc, to + i * stride)
            go_on(&at, s.window.positions)
            i += count
        if kc % 2:
            for i in range(mc):
                to[i * stride + kc] = 0
    elif s.kind == WINDOWS:
        pack_windows(&s.window, data, m0, mc, <char*>to, block)
    elif s.kind == TAPS_T:
        pack_taps_t(s, data, m0, mc, k0, kc, <char*>to, block)
    else:
        # Panels [pairs][mr][2], as B has them.
        block.row_stride, block.pair_stride, block.tile_stride = 2, 2 * mr, 2 * mr * pairs
        stride = round_up(mc, mr)
        even = to + stride * pairs * 2
        odd = even + stride
        if s.kind == COLUMNS:
            data += k0 * s.ld + m0
            kernel.interleave(data, data + s.ld, 2 * s.ld, kc // 2, mc, <int>mr, block.tile_stride,
                              to)
            if kc % 2:
                # With what is in the place of the missing row, B has zeros to multiply.
                data += (kc - 1) * s.ld
                kernel.interleave(data, data, 0, 1, mc, <int>mr, block.tile_stride,
                                  to + (kc - 1) * mr)
        elif s.window.channels % mr == 0:
            pack_patches_t(&s.window, data, m0, mc, k0, kc, block.tile_stride, to)
        else:
            at = place_of(s.window.positions, k0)
            for i in range(0, 2 * pairs, 2):
                gather(&s.window, data, &at, m0, mc, even)
                if i + 1 < kc:
                    go_on(&at, s.window.positions)
                gather(&s.window, data, &at, m0, mc, odd)
                go_on(&at, s.window.positions)
                kernel.interleave(even, odd, 0, 1, mc, <int>mr, block.tile_stride, to + i * mr)


cdef inline const int16_t* b_row(BSource* s, const int16_t* data, int64_t k) noexcept nogil:
    """Element (k, 0) of B, or NULL where k is padding."""
    cdef int64_t tap, c = k, w = s.first[2], h = s.first[1], d = s.first[0]
    if k >= s.padded:               # not the first tap, which is all there is of a matrix
        tap, c = k // s.padded, k % s.padded
        w += tap % s.taps[2] * s.jump[2]
        tap //= s.taps[2]
        h += tap % s.taps[1] * s.jump[1]
        d += tap // s.taps[1] * s.jump[0]
    if c >= s.channels:
        return NULL
    return data + ((d * s.size[1] + h) * s.size[2] + w) * s.tap_stride + c * s.k_stride


cdef extern from *:
    void prefetch "__builtin_prefetch"(const void*) noexcept nogil


cdef inline void pack_pairs(const int16_t* from_, int64_t step, int64_t pairs, int64_t nc,
                            int64_t nr, int16_t* to) noexcept nogil:
    """Pairs that lie side by side, columns so far apart: a line of the cache of each at a time,
    since a power of two apart they share few sets."""
    cdef int64_t k = 0, i, j, end
    if nc < nr:
        zero_s16(to, pairs * 2 * nr)
    while k < pairs:
        end = min(k + LINE_PAIRS, pairs)
        for i in range(nc):
            prefetch(from_ + i * step + 2 * end)
            for j in range(k, end):
                memcpy(to + 2 * (j * nr + i), from_ + i * step + 2 * j, 4)
        k = end


cdef void pack_b_panel(BSource* s, const int16_t* data, int64_t n0, int64_t nc, int64_t nr,
                       int64_t k0, int64_t kc, int16_t* to) noexcept nogil:
    """Packs columns n0 .. n0 + nc, products k0 .. k0 + kc as [pairs][nr][2], zeros beyond."""
    cdef int64_t k = 0, pairs, together, i, n
    cdef const int16_t* p
    cdef const int16_t* q
    while k < kc:
        p = b_row(s, data, k0 + k)
        q = b_row(s, data, k0 + k + 1) if k + 1 < kc else NULL
        pairs = 1
        # As many as follow each other in this tap.
        together = max(min(kc - k, s.channels - (k0 + k) % s.padded) // 2, pairs)
        if s.n_stride == 1:
            if p != NULL:
                pairs = together
            kernel.interleave(p + n0 if p != NULL else zero_row, q + n0 if q != NULL else zero_row,
                              2 * s.k_stride, pairs, nc, <int>nr, 0, to)
        elif q == p + 1:
            pairs = together
            pack_pairs(p + n0 * s.n_stride, s.n_stride, pairs, nc, nr, to)
        else:
            for i in range(nr):
                n = (n0 + i) * s.n_stride
                to[i * 2] = p[n] if p != NULL and i < nc else 0
                to[i * 2 + 1] = q[n] if q != NULL and i < nc else 0
        to += pairs * 2 * nr
        k += 2 * pairs
