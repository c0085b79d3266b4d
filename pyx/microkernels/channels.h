/* Passes over rows of channels, for batch norm, biases, residual sums and ReLU: the contracts are
 * in microkernel.h. A tensor is flat; element i is of channel i % n. */

/* Runs `body` for elements i < len, whose channel is c + i, from element `first` on. */
#define BY_CHANNEL(n, first, count, ...)                                         \
    for (int64_t done = 0, c = (first) % (n); done < (count); c = 0) {           \
        const int64_t len = (n) - c < (count) - done ? (n) - c : (count) - done; \
        __VA_ARGS__                                                              \
        done += len;                                                             \
    }

/* v between low and high; NaN stays NaN. */
TARGET static inline float DFP_CAT(clip__, ISA)(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

/* Variants of a map, each a loop of its own. */
TARGET static inline __attribute__((always_inline)) void DFP_CAT(map_loop__, ISA)(
    const dfp_map *m, int64_t first, int64_t count, float *y, const int normed, const int offset,
    const int residual, const int silu) {
    const float low = m->low, high = m->high;
    BY_CHANNEL(m->n, first, count, {
        const float *restrict x = m->x + first + done;
        const float *restrict r = residual ? m->residual + first + done : x;
        const float *restrict shift = offset ? m->offset + c : x;
        const float *restrict center = normed ? m->center + c : x;
        const float *restrict scale = normed ? m->scale + c : x;
        float *restrict to = y + done;
        for (int64_t i = 0; i < len; i++) {
            float v = x[i];
            if (normed) v = (v - center[i]) * scale[i];
            if (offset) v += shift[i];
            if (residual) v += r[i];
            to[i] = silu ? DFP_CAT(silu__, ISA)(v) : DFP_CAT(clip__, ISA)(v, low, high);
        }
    })
}

#define MAP(normed, offset, residual)                                            \
    if (m->silu)                                                                 \
        DFP_CAT(map_loop__, ISA)(m, first, count, y, normed, offset, residual, 1); \
    else                                                                         \
        DFP_CAT(map_loop__, ISA)(m, first, count, y, normed, offset, residual, 0);

TARGET static void DFP_CAT(map_f32__, ISA)(const dfp_map *m, int64_t first, int64_t count,
                                           float *y) {
    if (m->center) {
        if (m->residual) { MAP(1, 1, 1) }
        else { MAP(1, 1, 0) }
    } else if (m->offset) {
        if (m->residual) { MAP(0, 1, 1) }
        else { MAP(0, 1, 0) }
    } else if (m->residual) { MAP(0, 0, 1) }
    else { MAP(0, 0, 0) }
}

#undef MAP

TARGET static void DFP_CAT(positive_bits__, ISA)(const float *y, int64_t n, uint8_t *bits) {
    int64_t i = 0;
#ifdef F_POSITIVE
    for (; i + LANES <= n; i += LANES) {
        const uint32_t lanes = F_POSITIVE(F_LOADU(y + i));
        memcpy(bits + i / 8, &lanes, LANES / 8);
    }
#endif
    for (; i < n; i += 8) {
        unsigned byte = 0;
        for (int k = 0; k < 8; k++) byte |= (unsigned)(y[i + k] > 0.0f) << k;
        bits[i / 8] = (uint8_t)byte;
    }
}

/* to[i] *= 1 or 0, by bit i. */
TARGET static inline void DFP_CAT(keep_bits__, ISA)(const uint8_t *bits, int64_t n, float *to) {
    int64_t i = 0;
#ifdef F_ONES
    for (; i + LANES <= n; i += LANES)
        F_STOREU(to + i, F_MUL(F_LOADU(to + i), F_ONES(bits + i / 8)));
#endif
    for (; i < n; i++) to[i] *= (float)(bits[i / 8] >> (i % 8) & 1);
}

/* What is written is at most what is read at the same index. */
#ifndef DFP_IN_PLACE
#ifdef __clang__
#define DFP_IN_PLACE _Pragma("clang loop vectorize(assume_safety)")
#else
#define DFP_IN_PLACE _Pragma("GCC ivdep")
#endif
#endif

/* The variants of a gradient, each a loop of its own: what is constant costs nothing. MASK_SELF is
 * MASK_NORM of the x and the center of batch norm itself. */
enum { DFP_CAT(NO_MASK__, ISA), DFP_CAT(MASK_X__, ISA), DFP_CAT(MASK_BIAS__, ISA),
       DFP_CAT(MASK_NORM__, ISA), DFP_CAT(MASK_SELF__, ISA) };
enum { DFP_CAT(NO_NORM__, ISA), DFP_CAT(FIXED_NORM__, ISA), DFP_CAT(FULL_NORM__, ISA) };

/* p + q, or p alone, times the mask or a SiLU's slope, and through batch norm. (Two pixels at a time
 * would load what is a channel's once for both, and take twice as long where rows of one page are
 * read side by side.) */
TARGET static inline __attribute__((always_inline)) void DFP_CAT(gradient_loop__, ISA)(
    const dfp_gradient *g, const float *p, const float *q, int64_t first, int64_t count, float *y,
    const int mask, const int norm, const int silu) {
    const dfp_map *m = &g->mask;
    const int normed = mask >= DFP_CAT(MASK_NORM__, ISA), full = norm == DFP_CAT(FULL_NORM__, ISA);
    const int self = mask == DFP_CAT(MASK_SELF__, ISA);
    const float high = m->high; /* v >= NaN is never true */
    BY_CHANNEL(g->n, first, count, {
        const float *in = p + done;
        const float *more = q ? q + done : in;
        const float *v = mask ? m->x + first + done : in;
        const float *offset = mask > DFP_CAT(MASK_X__, ISA) ? m->offset + c : in;
        const float *center = normed ? m->center + c : in;
        const float *scale = normed ? m->scale + c : in;
        const float *x = full ? g->x + first + done : in;
        const float *mean = full ? g->center + c : in;
        const float *a = norm ? g->a + c : in;
        const float *b = full ? g->b + c : in;
        const float *d = full ? g->c + c : in;
        float *to = y + done;
        DFP_IN_PLACE
        for (int64_t i = 0; i < len; i++) {
            float dy = q ? in[i] + more[i] : in[i], t = 0.0f;
            if (full) t = x[i] - mean[i];
            if (mask) {
                float w = self ? t : v[i];
                if (normed && !self) w -= center[i];
                if (normed) w *= scale[i];
                if (mask > DFP_CAT(MASK_X__, ISA)) w += offset[i];
                float keep = w > 0.0f ? 1.0f : 0.0f;
                keep = w >= high ? 0.0f : keep;
                dy *= silu ? DFP_CAT(silu_slope__, ISA)(w) : keep;
            }
            if (norm) dy *= a[i];
            if (full) dy += b[i] * t + d[i];
            to[i] = dy;
        }
    })
}

#define GRADIENT_NORM(q, mask, silu)                                             \
    if (!g->a)                                                                   \
        DFP_CAT(gradient_loop__, ISA)(g, p, q, first, count, to, mask,           \
                                      DFP_CAT(NO_NORM__, ISA), silu);            \
    else if (!g->b)                                                              \
        DFP_CAT(gradient_loop__, ISA)(g, p, q, first, count, to, mask,           \
                                      DFP_CAT(FIXED_NORM__, ISA), silu);         \
    else                                                                         \
        DFP_CAT(gradient_loop__, ISA)(g, p, q, first, count, to, mask,           \
                                      DFP_CAT(FULL_NORM__, ISA), silu);

#define GRADIENT_MASK(q, silu)                                                   \
    if (!g->mask.offset) { GRADIENT_NORM(q, DFP_CAT(MASK_X__, ISA), silu) }      \
    else if (!g->mask.center) { GRADIENT_NORM(q, DFP_CAT(MASK_BIAS__, ISA), silu) } \
    else if (g->self && g->b)                                                    \
        DFP_CAT(gradient_loop__, ISA)(g, p, q, first, count, to,                 \
                                      DFP_CAT(MASK_SELF__, ISA),                 \
                                      DFP_CAT(FULL_NORM__, ISA), silu);          \
    else { GRADIENT_NORM(q, DFP_CAT(MASK_NORM__, ISA), silu) }

TARGET static void DFP_CAT(gradient_f32__, ISA)(const dfp_gradient *g, int64_t first,
                                                int64_t count, float *to) {
    const float *p = g->parts[0] + first, *q = g->n_parts > 1 ? g->parts[1] + first : NULL;
    if (g->n_parts > 2 || g->bits || (q && g->mask.silu)) {
        /* What is rare goes first, in the cache. */
        for (int64_t i = 0; i < count; i++) to[i] = q ? p[i] + q[i] : p[i];
        for (int k = 2; k < g->n_parts; k++) {
            const float *part = g->parts[k] + first;
            for (int64_t i = 0; i < count; i++) to[i] += part[i];
        }
        if (g->bits) DFP_CAT(keep_bits__, ISA)(g->bits + first / 8, count, to);
        p = to, q = NULL;
        if (!g->a && !g->mask.x) return;
    }
    if (g->mask.silu) { GRADIENT_MASK(NULL, 1) }
    else if (q && g->mask.x) { GRADIENT_MASK(q, 0) }
    else if (q) { GRADIENT_NORM(q, DFP_CAT(NO_MASK__, ISA), 0) }
    else if (g->mask.x) { GRADIENT_MASK(NULL, 0) }
    else { GRADIENT_NORM(NULL, DFP_CAT(NO_MASK__, ISA), 0) }
}

#undef GRADIENT_MASK
#undef GRADIENT_NORM

/* a * b + c of a product that is exact in double: whether it is rounded makes no difference. */
#ifdef F_FMA
#define EXACT_FMA(a, b, c) __builtin_fma(a, b, c)
#else
#define EXACT_FMA(a, b, c) ((a) * (b) + (c))
#endif

/* Four pixels at a time: sums are loaded and stored once for them, and added to in order. */
#define SUM_PIXELS(unroll, fetch, more)                                          \
    for (; p + (unroll) <= pixels; p += (unroll), y += (unroll) * n, x += (unroll) * n) { \
        fetch                                                                    \
        for (int64_t c = 0; c < n; c++) {                                        \
            double s = sums[c];                                                  \
            for (int k = 0; k < (unroll); k++) s += (double)y[k * n + c];        \
            sums[c] = s;                                                         \
            more                                                                 \
        }                                                                        \
    }

#define PRODUCTS(unroll)                                                         \
    double t = sums[n + c];                                                      \
    for (int k = 0; k < (unroll); k++)                                           \
        t = EXACT_FMA((double)y[k * n + c], (double)(x[k * n + c] - center[c]), t); \
    sums[n + c] = t;

TARGET static void DFP_CAT(channel_sums__, ISA)(const float *restrict y, const float *restrict x,
                                                const float *restrict center, int64_t pixels,
                                                int64_t n, double *restrict sums) {
    int64_t p = 0;
    if (!center) {
        x = y;
        SUM_PIXELS(4, , )
        SUM_PIXELS(1, , )
    } else {
        SUM_PIXELS(4, , PRODUCTS(4))
        SUM_PIXELS(1, , PRODUCTS(1))
    }
}

#undef PRODUCTS

#define SQUARES(unroll)                                                          \
    double t = sums[n + c];                                                      \
    float low = bounds[c], high = bounds[n + c];                                 \
    for (int k = 0; k < (unroll); k++) {                                         \
        const float v = y[k * n + c];                                            \
        t = EXACT_FMA((double)v, (double)v, t);                                  \
        low = v < low ? v : low;                                                 \
        high = v > high ? v : high;                                              \
    }                                                                            \
    sums[n + c] = t, bounds[c] = low, bounds[n + c] = high;

/* The next pixels, one after the other: read side by side, rows of one page look random to the
 * hardware (7.5 instead of 2.5 ns for 16 values of 256 channels, Zen 4). */
#define FETCH(unroll)                                                            \
    for (int64_t i = 0; n < 1024 && i < (unroll) * n; i += 16)                   \
        __builtin_prefetch(y + (unroll) * n + i);

TARGET static void DFP_CAT(moments_f32__, ISA)(const float *restrict y, int64_t pixels, int64_t n,
                                               double *restrict sums, float *restrict bounds) {
    const float *restrict x = y;
    int64_t p = 0;
    SUM_PIXELS(4, FETCH(4), SQUARES(4))
    SUM_PIXELS(1, , SQUARES(1))
    (void)x;
}

#undef FETCH
#undef SQUARES
#undef SUM_PIXELS
#undef EXACT_FMA
#undef BY_CHANNEL
