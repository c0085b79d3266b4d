# Depthwise convolutions, channel by channel. Every pass walks over the same grid: positions (of y,
# of dx, for dw of dy) that the same kernel positions reach form patches, a few per image, and
# inside a patch a microkernel needs no test. A depth multiplier is resolved first: `spread` lays
# the operand out so that every pass sees rows of equal length.

cdef enum:
    DW_BLOCK = 262144       # bytes a task reads and writes, about: they stay in a core's cache
    DW_STREAM = 4194304     # bytes of a result that is written past the caches
    DW_PIXELS = 512         # of a weight gradient that a task sums up, about, at least,
    DW_DOTS = 65536         # and at most in one call
    DW_TERMS = 1024         # of them in spill mode,
    DW_CHANNELS = 256       # and channels computed by one task

# Along one axis, from one phase: position phase + j * stride reaches pixel start + j * step of the
# image by a kernel position, for low <= j < high.
cdef struct Span:
    int64_t start, low, high

cdef struct Depthwise:
    Conv* conv
    Pass which
    const int16_t* a            # x, dy, x
    const int16_t* b            # w, w, dy
    float* out                  # y, dx, dw
    # How: filled in by depthwise_plan.
    int threads
    int64_t multiplier
    int64_t taps
    int64_t row                 # elements of a row that is summed
    int64_t per_tap, terms      # rows at a pixel of the image, and in a whole sum
    int64_t positions[3]        # the grid that is walked over,
    int64_t stride[3]           # in `phases` with this stride,
    int64_t phases[3]
    int64_t image[3]            # and the image that it reaches
    int64_t step[3]
    int64_t rows, items         # of the grid in a task: rows, or whole images,
    int64_t blocks              # and how many tasks make an image
    int64_t limit               # products that an int32 can hold, in spill mode
    bint by_terms               # spill: more than one chain, or subnormal results
    bint careful                # sums may be too large for the fast way
    bint stream
    Span* spans[3]              # [phase][kernel position]
    double* scales              # of every image
    int64_t a_spread, b_spread, b_aligned, scale_bytes, span_bytes     # bytes of scratch
    int64_t sum_bytes, task_bytes
    int16_t* aligned            # dy, for the weight gradient
    char* sums                  # of that, int64: [thread][tap][row]
    char* scratch


cdef void depthwise_plan(Depthwise* z, Conv* v, Pass which, const int16_t* a,
                         const int16_t* b, float* out) noexcept nogil:
    cdef int64_t pixels = v.batch * volume(v.output), bytes, n
    cdef int64_t qq = <int64_t>qmax_of(v.a_bits) * qmax_of(v.b_bits)
    cdef bint back = which == INPUT_GRADIENT
    cdef int i
    memset(z, 0, sizeof(Depthwise))
    z.conv, z.which, z.a, z.b, z.out = v, which, a, b, out
    z.multiplier = v.filters // max(v.channels, <int64_t>1)
    z.taps = volume(v.kernel)
    # A product takes eight times as long as in a tile: memory is the limit.
    z.threads = team_size() if 8.0 * pixels * v.filters * z.taps > SMALL else 1
    z.row = v.channels if back else v.filters
    z.per_tap = z.multiplier if back else 1
    z.terms = z.taps * z.per_tap
    for i in range(3):
        z.positions[i] = v.input[i] if back else v.output[i]
        z.image[i] = v.output[i] if back else v.input[i]
        z.stride[i] = v.stride[i] if back else 1
        z.phases[i] = min(z.stride[i], z.positions[i])
        z.step[i] = 1 if back else v.stride[i]
        z.span_bytes += round_up(z.phases[i] * v.kernel[i] * sizeof(Span), ALIGN)

    # Grouped convolutions end their chains with each kernel position.
    z.limit = safe_chain(v.a_bits, v.b_bits, 0)
    z.careful = z.terms >= (<int64_t>1 << 47) // qq
    z.by_terms = v.spill and (z.careful or z.terms > z.limit or (z.taps > 1 and not v.depthwise)
                              or not normal_images(v, 0, v.batch))
    z.scale_bytes = round_up(v.batch * sizeof(double), ALIGN)
    bytes = volume(z.positions) * z.row * sizeof(float)
    z.stream = (v.batch * bytes >= DW_STREAM and z.row % 16 == 0 and <int64_t>out % ALIGN == 0)

    # A task is a block of rows or some small images, but there are two for each thread.
    bytes = (bytes + volume(z.image) * z.row * z.per_tap * sizeof(int16_t)) // max(
        z.positions[0] * z.positions[1], <int64_t>1)
    n = DW_BLOCK // max(bytes, <int64_t>1)
    if which == WEIGHT_GRADIENT:
        n = max(n, DW_PIXELS // max(z.positions[2], <int64_t>1))
    n = min(n, v.batch * z.positions[0] * z.positions[1] // (2 * z.threads))
    z.rows = clamp(n, 1, max(z.positions[1], <int64_t>1))
    z.blocks = (z.positions[1] + z.rows - 1) // z.rows
    z.items = clamp(n // z.rows, 1, v.batch) if z.positions[0] == z.blocks == 1 else 1

    if z.multiplier > 1:
        if back:
            z.a_spread = round_up(pixels * v.filters * 2, ALIGN)
            z.b_spread = round_up(z.taps * v.filters * 2, ALIGN)
        else:
            z.a_spread = round_up(v.batch * volume(v.input) * v.filters * 2, ALIGN)
    if v.exponents.shifts.shift != NULL:
        z.b_aligned = round_up(pixels * v.filters * 2, ALIGN)
    if which != WEIGHT_GRADIENT:
        z.task_bytes = round_up(3 * z.terms * sizeof(void*), ALIGN)
    elif v.spill:
        # Whole chains at a time, as many as make about DW_TERMS terms.
        z.terms = clamp(z.limit * max(DW_TERMS // z.limit, <int64_t>1), 1, max(pixels, <int64_t>1))
        z.task_bytes = round_up(2 * z.terms * sizeof(void*) + DW_CHANNELS * sizeof(float), ALIGN)
    else:
        z.task_bytes = round_up(2 * z.terms * sizeof(void*), ALIGN)
        z.sum_bytes = round_up(z.taps * z.row * sizeof(int64_t), ALIGN)


cdef inline int64_t depthwise_bytes(Depthwise* z) noexcept nogil:
    return (z.a_spread + z.b_spread + z.b_aligned + z.scale_bytes + z.span_bytes
            + z.threads * (z.sum_bytes + z.task_bytes) + ALIGN)


cdef inline bint normal_images(const Conv* v, int64_t first, int64_t count) noexcept nogil:
    """Can neither the scale nor a nonzero result (at least the scale) of an image be subnormal?"""
    cdef int64_t i, e
    for i in range(first, first + count):
        e = row_exponent(&v.exponents, 0, i)
        if e != NAN_EXPONENT and not -126 <= e <= 127:
            return False
    return True


cdef inline int64_t depthwise_tasks(Depthwise* z) noexcept nogil:
    return (z.conv.batch + z.items - 1) // z.items * z.positions[0] * z.blocks


cdef void depthwise_run(Depthwise* z, char* scratch) noexcept nogil:
    cdef Conv* v = z.conv
    cdef int i
    z.scratch = <char*>round_up(<int64_t>scratch, ALIGN)
    if z.multiplier > 1:
        if z.which == INPUT_GRADIENT:
            spread(z.a, v.batch * volume(v.output), v.channels, z.multiplier, True,
                   <int16_t*>z.scratch)
            spread(z.b, z.taps, v.channels, z.multiplier, True,
                   <int16_t*>(z.scratch + z.a_spread))
            z.b = <int16_t*>(z.scratch + z.a_spread)
        else:
            spread(z.a, v.batch * volume(v.input), v.channels, z.multiplier, False,
                   <int16_t*>z.scratch)
        z.a = <int16_t*>z.scratch
        z.scratch += z.a_spread + z.b_spread
    if z.b_aligned:
        z.aligned = <int16_t*>z.scratch
        parallel_for(align_image_task, z, v.batch, z.threads)
        z.b = z.aligned
        z.scratch += z.b_aligned
    z.scales = <double*>z.scratch
    z.scratch += z.scale_bytes
    for i in range(<int>v.batch):
        z.scales[i] = scale_of(row_exponent(&v.exponents, 0, i))
    for i in range(3):
        z.spans[i] = <Span*>z.scratch
        z.scratch += round_up(z.phases[i] * v.kernel[i] * sizeof(Span), ALIGN)
        find_spans(z, i)
    z.sums = z.scratch
    z.scratch += z.threads * z.sum_bytes
    if z.which != WEIGHT_GRADIENT:
        parallel_for(depthwise_task, z, depthwise_tasks(z), z.threads)
    elif v.spill:
        parallel_for(spilled_weight_task, z,
                     z.taps * ((z.row + DW_CHANNELS - 1) // DW_CHANNELS), z.threads)
    else:
        memset(z.sums, 0, z.threads * z.sum_bytes)
        parallel_for(depthwise_task, z, depthwise_tasks(z), z.threads)
        parallel_for(add_sums_task, z, z.taps, z.threads if 64 * z.taps * z.row > SMALL else 1)


cdef void align_image_task(void* work, int64_t i, int thread) noexcept nogil:
    """Aligns dy of an image."""
    cdef Depthwise* z = <Depthwise*>work
    cdef int64_t n = volume(z.conv.output) * z.conv.filters
    kernel.align(z.b + i * n, n, shift_of(&z.conv.exponents.shifts, 0, i), z.aligned + i * n)


cdef void spread(const int16_t* source, int64_t pixels, int64_t channels, int64_t multiplier,
                 bint split, int16_t* to) noexcept nogil:
    """[pixel][c][m] -> [pixel][m][c] if `split`; else [pixel][c] -> [pixel][c][m], repeated."""
    cdef int64_t p, c, m
    for p in range(pixels):
        for c in range(channels):
            for m in range(multiplier):
                if split:
                    to[m * channels + c] = source[c * multiplier + m]
                else:
                    to[c * multiplier + m] = source[c]
        to += channels * multiplier
        source += channels * (multiplier if split else 1)


cdef void find_spans(Depthwise* z, int i) noexcept nogil:
    cdef Conv* v = z.conv
    cdef int64_t phase, k, at, count
    cdef Span* s = z.spans[i]
    for phase in range(z.phases[i]):
        count = (z.positions[i] - phase + z.stride[i] - 1) // z.stride[i]
        for k in range(v.kernel[i]):
            at = k * v.dilation[i] - v.pad[i]
            s.start, s.low, s.high = at, 0, 0
            if z.which == INPUT_GRADIENT:
                at = phase - at
                s.start = at // v.stride[i]
            if z.which != INPUT_GRADIENT or at % v.stride[i] == 0:
                if s.start < 0:
                    s.low = (z.step[i] - 1 - s.start) // z.step[i]
                if s.start < z.image[i]:
                    s.high = min(count, (z.image[i] - s.start + z.step[i] - 1) // z.step[i])
                s.high = max(s.low, s.high)
            s += 1


cdef inline int64_t patch_end(const Span* s, int64_t kernel_size, int64_t j,
                              int64_t end) noexcept nogil:
    """Up to where the same kernel positions reach the image as at j."""
    cdef int64_t k
    for k in range(kernel_size):
        if j < s[k].low:
            end = min(end, s[k].low)
        elif j < s[k].high:
            end = min(end, s[k].high)
    return end


# A patch on the grid: along each axis its phase, and j from `first`; one position deep.
cdef struct Patch:
    int64_t item, items
    int64_t phase[3]
    int64_t first[3]
    int64_t rows, pixels


cdef void depthwise_task(void* work, int64_t i, int thread) noexcept nogil:
    """A block of rows of the grid: of y, of dx, or what one of dy adds to dw."""
    cdef Depthwise* z = <Depthwise*>work
    cdef Conv* v = z.conv
    cdef Patch at
    cdef const Span* rows
    cdef const Span* columns
    cdef int64_t r0 = i % z.blocks * z.rows, r1 = min(r0 + z.rows, z.positions[1])
    cdef int64_t depth = i // z.blocks % z.positions[0], rows_end, columns_end
    at.item = i // z.blocks // z.positions[0] * z.items
    at.items = min(z.items, v.batch - at.item)
    at.phase[0], at.first[0] = depth % z.stride[0], depth // z.stride[0]
    for at.phase[1] in range(z.phases[1]):
        rows = z.spans[1] + at.phase[1] * v.kernel[1]
        at.first[1] = (r0 - at.phase[1] + z.stride[1] - 1) // z.stride[1]
        rows_end = (r1 - at.phase[1] + z.stride[1] - 1) // z.stride[1]
        while at.first[1] < rows_end:
            at.rows = patch_end(rows, v.kernel[1], at.first[1], rows_end) - at.first[1]
            for at.phase[2] in range(z.phases[2]):
                columns = z.spans[2] + at.phase[2] * v.kernel[2]
                columns_end = (z.positions[2] - at.phase[2] + z.stride[2] - 1) // z.stride[2]
                at.first[2] = 0
                while at.first[2] < columns_end:
                    at.pixels = patch_end(columns, v.kernel[2], at.first[2],
                                          columns_end) - at.first[2]
                    if z.which == WEIGHT_GRADIENT:
                        at.pixels = min(at.pixels, max(DW_DOTS // (at.rows * at.items), <int64_t>1))
                    run_patch(z, &at, thread)
                    at.first[2] += at.pixels
            at.first[1] += at.rows


cdef void run_patch(Depthwise* z, const Patch* at, int thread) noexcept nogil:
    cdef Conv* v = z.conv
    cdef const int16_t** x = <const int16_t**>(z.scratch + thread * z.task_bytes)
    cdef const int16_t** w = x + z.terms
    cdef int64_t** sums = <int64_t**>w
    cdef int64_t* total = <int64_t*>(z.sums + thread * z.sum_bytes)
    cdef int64_t kernel_position = -1, kd, kh, kw, m, pixel, grid, lowest = 0
    cdef Span d, h, q
    cdef dfp_patch t
    memset(&t, 0, sizeof(dfp_patch))
    for kh in range(v.kernel[1]):
        h = z.spans[1][at.phase[1] * v.kernel[1] + kh]
        if h.low <= at.first[1] < h.high:
            lowest = max(lowest, h.start + at.first[1] * z.step[1])
    for kd in range(v.kernel[0]):
        d = z.spans[0][at.phase[0] * v.kernel[0] + kd]
        for kh in range(v.kernel[1]):
            h = z.spans[1][at.phase[1] * v.kernel[1] + kh]
            for kw in range(v.kernel[2]):
                q = z.spans[2][at.phase[2] * v.kernel[2] + kw]
                kernel_position += 1
                if (d.low <= at.first[0] < d.high and h.low <= at.first[1] < h.high
                        and q.low <= at.first[2] < q.high):
                    pixel = at.item * z.image[0] + d.start + at.first[0] * z.step[0]
                    pixel = pixel * z.image[1] + h.start + at.first[1] * z.step[1]
                    pixel = pixel * z.image[2] + q.start + at.first[2] * z.step[2]
                    if z.stream and h.start + (at.first[1] + 1) * z.step[1] > lowest:
                        # Not in a cache yet, and too far apart for the hardware to foresee.
                        t.fresh = t.fresh if t.fresh_end else t.terms
                        t.fresh_end = t.terms + z.per_tap
                    for m in range(z.per_tap):
                        x[t.terms] = z.a + (pixel * z.per_tap + m) * z.row
                        if z.which == WEIGHT_GRADIENT:
                            sums[t.terms] = total + kernel_position * z.row
                        else:
                            w[t.terms] = z.b + (kernel_position * z.per_tap + m) * z.row
                        t.terms += 1
                elif z.by_terms:
                    # It counts in its chain.
                    for m in range(z.per_tap):
                        x[t.terms] = NULL
                        w[t.terms] = z.b
                        t.terms += 1
    grid = at.item * z.positions[0] + at.phase[0] + at.first[0] * z.stride[0]
    grid = grid * z.positions[1] + at.phase[1] + at.first[1] * z.stride[1]
    grid = grid * z.positions[2] + at.phase[2] + at.first[2] * z.stride[2]
    t.x, t.w, t.sums, t.n = x, w, sums, z.row
    t.items, t.rows, t.pixels = at.items, at.rows, at.pixels
    t.x_step = z.step[2] * z.per_tap * z.row
    t.x_row = z.step[1] * z.image[2] * z.per_tap * z.row
    t.x_item = volume(z.image) * z.per_tap * z.row
    t.y_step = z.stride[2] * z.row
    t.y_row = z.stride[1] * z.positions[2] * z.row
    t.y_item = volume(z.positions) * z.row
    t.chain = safe_chain(v.a_bits, v.b_bits, 65535) // 2
    t.scale, t.stream = z.scales + at.item, z.stream
    t.careful = z.careful or not normal_images(v, at.item, at.items)
    if z.which == WEIGHT_GRADIENT:
        t.dy = z.b + grid * z.row
        if t.pixels < t.rows:
            # Pairs of pixels run along the longer side.
            t.rows, t.pixels = t.pixels, t.rows
            t.x_row, t.x_step = t.x_step, t.x_row
            t.y_row, t.y_step = t.y_step, t.y_row
        kernel.depthwise_dots(&t)
        return
    t.y = z.out + grid * z.row
    if z.by_terms:
        spill_patch(z, &t, w + z.terms)
    else:
        if v.spill:
            t.chain = z.limit       # one chain is all there is
        kernel.depthwise_patch(&t)


cdef void spill_patch(Depthwise* z, const dfp_patch* t, const int16_t** x) noexcept nogil:
    """Pixel by pixel; `x` is room for its terms."""
    cdef int64_t m, h, p, k, pixel
    cdef dfp_terms terms
    terms.x, terms.w, terms.terms, terms.n = x, t.w, t.terms, t.n
    terms.segment = t.terms if z.conv.depthwise else z.per_tap
    terms.chain, terms.resume, terms.sums = z.limit, False, NULL
    for m in range(t.items):
        terms.scale = t.scale[m]
        for h in range(t.rows):
            for p in range(t.pixels):
                pixel = m * t.x_item + h * t.x_row + p * t.x_step
                for k in range(t.terms):
                    x[k] = t.x[k] + pixel if t.x[k] != NULL else NULL
                terms.y = t.y + m * t.y_item + h * t.y_row + p * t.y_step
                kernel.depthwise_spill(&terms)


cdef void add_sums_task(void* work, int64_t tap, int thread) noexcept nogil:
    """Adds up what the threads summed for one kernel position of dw, and rounds it."""
    cdef Depthwise* z = <Depthwise*>work
    cdef double scale = scale_of(z.conv.exponents.all)
    cdef int64_t c, total
    cdef int i
    for c in range(z.row):
        total = 0
        for i in range(z.threads):
            total += (<int64_t*>(z.sums + i * z.sum_bytes))[tap * z.row + c]
        z.out[tap * z.row + c] = dfp_round(total, scale)


cdef void spilled_weight_task(void* work, int64_t i, int thread) noexcept nogil:
    """DW_CHANNELS channels of one kernel position of dw, in spill mode: pixels in order."""
    cdef Depthwise* z = <Depthwise*>work
    cdef Conv* v = z.conv
    cdef int64_t tap = i % z.taps, c0 = i // z.taps * DW_CHANNELS
    cdef int64_t pixels = v.batch * volume(v.output), first = 0, pixel, k, p, at, j
    cdef int64_t position[3]
    cdef int a
    cdef Span s
    cdef dfp_terms t
    position[2] = tap % v.kernel[2]
    position[1] = tap // v.kernel[2] % v.kernel[1]
    position[0] = tap // v.kernel[2] // v.kernel[1]
    t.x = <const int16_t**>(z.scratch + thread * z.task_bytes)
    t.w = t.x + z.terms
    t.sums = <float*>(t.w + z.terms)
    t.segment, t.chain, t.n = z.terms, z.limit, min(<int64_t>DW_CHANNELS, z.row - c0)
    t.resume, t.y, t.scale = False, NULL, scale_of(v.exponents.all)
    while first < pixels:
        t.terms = min(z.terms, pixels - first)
        for k in range(t.terms):
            p = first + k
            pixel = 0
            at = 1
            for a in range(2, -1, -1):
                s = z.spans[a][position[a]]
                j = p % v.output[a]
                p //= v.output[a]
                if not s.low <= j < s.high:
                    pixel = -1
                    break
                pixel += (s.start + j * z.step[a]) * at
                at *= v.input[a]
            t.x[k] = z.a + (p * at + pixel) * z.row + c0 if pixel >= 0 else NULL
            t.w[k] = z.b + (first + k) * z.row + c0
        first += t.terms
        if first >= pixels:
            t.y = z.out + tap * z.row + c0
        kernel.depthwise_spill(&t)
        t.resume = True
