/* The loops that a compiler vectorises well by itself, compiled once per instruction set.
 * Needs ISA and TARGET, as gemm_tile.h; the contracts are in microkernel.h. */

TARGET static uint32_t DFP_CAT(absmax_bits__, ISA)(const float *x, int64_t n) {
    const uint32_t *bits = (const uint32_t *)x;
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t b = bits[i] & 0x7fffffffu;
        most = b > most ? b : most;
    }
    return most;
}

/* Adding and subtracting 1.5 * 2**23 rounds to nearest-even below 2**22. */
#define MAGIC(truncate) ((truncate) ? 0.0f : 12582912.0f)

/* A scaled value's mantissa. */
TARGET static inline int16_t DFP_CAT(mantissa__, ISA)(float v, float qmax, float magic) {
    v = v < qmax ? v : qmax;
    v = v > -qmax ? v : -qmax;
    v = v + magic - magic;
    return (int16_t)(int32_t)v;
}

TARGET static inline void DFP_CAT(quantize_block__, ISA)(const float *x, int64_t n, float factor,
                                                         float factor2, float qmax, int truncate,
                                                         int16_t *q) {
    const float magic = MAGIC(truncate);
    for (int64_t i = 0; i < n; i++)
        q[i] = DFP_CAT(mantissa__, ISA)(x[i] * factor * factor2, qmax, magic);
}

TARGET static void DFP_CAT(quantize_f32_s16__, ISA)(const float *x, int64_t n, float factor,
                                                    float factor2, float qmax, int truncate,
                                                    int stream, int16_t *q) {
    int64_t i = 0;
#ifdef F_STREAM
    enum { BLOCK = 2048 };
    _Alignas(64) int16_t block[BLOCK];
    for (; stream && i + BLOCK <= n; i += BLOCK) {
        DFP_CAT(quantize_block__, ISA)(x + i, BLOCK, factor, factor2, qmax, truncate, block);
        for (int k = 0; k < BLOCK; k += 2 * LANES)
            F_STREAM((float *)(q + i + k), F_LOADU((const float *)(block + k)));
    }
#else
    (void)stream; /* a permission, which is not used */
#endif
    DFP_CAT(quantize_block__, ISA)(x + i, n - i, factor, factor2, qmax, truncate, q + i);
}

/* Groups of few elements: so many elements at a time, and room for vectors that reach beyond. */
#define SHORT_BLOCK 2048
#define SHORT_ROOM (SHORT_BLOCK + 2 * DFP_SHORT)

TARGET static inline void DFP_CAT(most_of_two__, ISA)(const uint8_t *a, const uint8_t *b,
                                                      int64_t n, uint8_t *restrict to) {
    for (int64_t i = 0; i < n; i++) to[i] = a[i] > b[i] ? a[i] : b[i];
}

/* floor(log2(x)) of the largest of n magnitudes, all subnormal; of zeros, that of the least. */
static inline int32_t DFP_CAT(subnormal_log2__, ISA)(const uint32_t *bits, int64_t n) {
    uint32_t most = 1;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t b = bits[i] & 0x7fffffffu;
        most = b > most ? b : most;
    }
    return 31 - __builtin_clz(most) - 149;
}

TARGET static void DFP_CAT(exponents__, ISA)(const float *x, int64_t groups, int64_t n, int bits,
                                             int32_t *e) {
    /* The largest of the floats' own exponents decides, and they are bytes. */
    const int64_t block = SHORT_BLOCK / n;
    for (int64_t first = 0; first < groups; first += block) {
        const int64_t count = groups - first < block ? groups - first : block;
        const uint32_t *in = (const uint32_t *)x + first * n;
        uint8_t space[2][SHORT_ROOM], *most = space[0], *wider = space[1];
        for (int64_t i = 0; i < count * n; i++) most[i] = (uint8_t)(in[i] >> 23);
        /* most[i] becomes the maximum of `width` elements from i on, until that is a group. */
        for (int64_t width = 1; width < n;) {
            const int64_t step = 2 * width <= n ? width : n - width;
            memset(most + count * n, 0, step);
            DFP_CAT(most_of_two__, ISA)(most, most + step, count * n, wider);
            width += step;
            uint8_t *const swap = most;
            most = wider, wider = swap;
        }
        int32_t *const to = e + first;
        for (int64_t g = 0; g < count; g++) to[g] = most[g * n];
        int32_t small = 0;
        for (int64_t g = 0; g < count; g++) {
            const int32_t field = to[g];
            small |= field == 0;
            to[g] = field == 255 ? INT32_MIN : field - 127 - (bits - 2);
        }
        for (int64_t g = 0; small && g < count; g++)
            if (to[g] == -127 - (bits - 2))
                to[g] = DFP_CAT(subnormal_log2__, ISA)(in + g * n, n) - (bits - 2);
    }
}

/* A group's value in the place of each of its elements; what is written beyond is overwritten by
 * the next group. */
#define REPEAT(width)                                                            \
    for (int64_t g = 0; g < groups; g++)                                         \
        for (int i = 0; i < (width); i++) to[g * n + i] = value[g];

TARGET static inline void DFP_CAT(repeat__, ISA)(const float *restrict value, int64_t groups,
                                                 int64_t n, float *restrict to) {
    if (n == 1) memcpy(to, value, groups * sizeof *to);
    else if (n <= 4) { REPEAT(4) }
    else if (n <= 8) { REPEAT(8) }
    else if (n <= 16) { REPEAT(16) }
    else if (n <= 32) { REPEAT(32) }
    else { REPEAT(DFP_SHORT) }
}

#undef REPEAT

TARGET static void DFP_CAT(quantize_groups__, ISA)(const float *x, int64_t groups, int64_t n,
                                                   const int32_t *e, float qmax, int truncate,
                                                   int16_t *q) {
    const float magic = MAGIC(truncate);
    const int64_t block = SHORT_BLOCK / n;
    for (int64_t first = 0; first < groups; first += block) {
        const int64_t count = groups - first < block ? groups - first : block;
        const float *in = x + first * n;
        int16_t *out = q + first * n;
        int32_t one[SHORT_BLOCK], two[SHORT_BLOCK];
        float factor[SHORT_ROOM], factor2[SHORT_ROOM];
        const int32_t *exponent = e + first;
        int32_t least = 0, largest = 0;
        for (int64_t g = 0; g < count; g++) {
            least = exponent[g] < least ? exponent[g] : least;
            largest = exponent[g] > largest ? exponent[g] : largest;
            one[g] = (int32_t)((127u - (uint32_t)exponent[g]) << 23);
        }
        const int far = least < -126 || largest > 126;
        for (int64_t g = 0; far && g < count; g++) {
            int32_t power = exponent[g] < -252 ? -252 : exponent[g];
            power = power > 252 ? -252 : -power;
            int32_t power1 = power < -126 ? -126 : power;
            power1 = power1 > 126 ? 126 : power1;
            one[g] = (power1 + 127) << 23;
            two[g] = (power - power1 + 127) << 23;
        }
        DFP_CAT(repeat__, ISA)((const float *)one, count, n, factor);
        if (far) {
            DFP_CAT(repeat__, ISA)((const float *)two, count, n, factor2);
            for (int64_t i = 0; i < count * n; i++)
                out[i] = DFP_CAT(mantissa__, ISA)(in[i] * factor[i] * factor2[i], qmax, magic);
        } else {
            for (int64_t i = 0; i < count * n; i++)
                out[i] = DFP_CAT(mantissa__, ISA)(in[i] * factor[i], qmax, magic);
        }
        for (int64_t g = 0; far && g < count; g++)
            if (exponent[g] == INT32_MIN) memset(out + g * n, 0, n * sizeof *out);
    }
}

#undef SHORT_BLOCK
#undef SHORT_ROOM
#undef MAGIC

TARGET static void DFP_CAT(count__, ISA)(const float *x, const int16_t *q, int64_t n,
                                         uint32_t limit, int64_t *counts) {
    enum { BLOCK = 1 << 16 }; /* sums of int32 vectorise */
    const uint32_t *bits = (const uint32_t *)x;
    for (int64_t at = 0; at < n; at += BLOCK) {
        const int64_t end = n - at < BLOCK ? n : at + BLOCK;
        int32_t nonzero = 0, lost = 0, clamped = 0;
        for (int64_t i = at; i < end; i++) {
            const uint32_t magnitude = bits[i] & 0x7fffffffu;
            nonzero += magnitude != 0;
            lost += (magnitude != 0) & (q[i] == 0);
            clamped += magnitude > limit;
        }
        counts[0] += nonzero;
        counts[1] += lost;
        counts[2] += clamped;
    }
}

TARGET static int64_t DFP_CAT(zeros__, ISA)(const int16_t *q, int64_t n) {
    enum { BLOCK = 1 << 14 }; /* sums of int16 vectorise best */
    int64_t total = 0;
    for (int64_t at = 0; at < n; at += BLOCK) {
        const int64_t end = n - at < BLOCK ? n : at + BLOCK;
        int16_t zeros = 0;
        for (int64_t i = at; i < end; i++) zeros += q[i] == 0;
        total += zeros;
    }
    return total;
}

TARGET static void DFP_CAT(sample__, ISA)(const float *x, const int16_t *q, int64_t n,
                                          int64_t *counts) {
    /* Of every 32 vectors one, now this, now that: channels repeat themselves. */
    enum { SAMPLE = 16, EVERY = 32 };
    int32_t nonzero[SAMPLE] = {0}, lost[SAMPLE] = {0};
    const uint32_t *bits = (const uint32_t *)x;
    for (int64_t v = 0, now = 0; v + EVERY <= n / SAMPLE; v += EVERY, now = (now + 5) % EVERY) {
        const int64_t at = (v + now) * SAMPLE;
        for (int i = 0; i < SAMPLE; i++) {
            const int32_t here = (bits[at + i] & 0x7fffffffu) != 0;
            nonzero[i] += here;
            lost[i] += here & (q[at + i] == 0);
        }
    }
    for (int i = 0; i < SAMPLE; i++) counts[0] += nonzero[i], counts[1] += lost[i];
}

/* RN(v * 2**-shift) of an int32, ties to even; shift from -1 on. */
#define ALIGNED(v, shift)                                                        \
    ((((v) * (1 << LEFT(shift))) + HALF(shift) + ((v) >> RIGHT(shift) & ((shift) > 0))) >> RIGHT(shift))
#define LEFT(shift) ((shift) < 0)
#define RIGHT(shift) ((shift) > 0 ? (shift) : 0)
#define HALF(shift) ((shift) > 0 ? (1 << ((shift) - 1)) - 1 : 0)

/* The same of int16, in which nothing may overflow: t has one bit after the point. */
TARGET static inline void DFP_CAT(align_s16__, ISA)(const int16_t *from, int64_t n, int shift,
                                                    int16_t *to) {
    if (shift < 0) {
        for (int64_t i = 0; i < n; i++) to[i] = (int16_t)(from[i] + from[i]);
        return;
    }
    if (shift == 0) {
        if (to != from) memcpy(to, from, n * sizeof *to);
        return;
    }
    if (shift > 15) {
        /* At most 32767 * 2**-16, which is less than half. */
        memset(to, 0, n * sizeof *to);
        return;
    }
    const int16_t low = (int16_t)((1 << (shift - 1)) - 1);
    for (int64_t i = 0; i < n; i++) {
        const int16_t v = from[i], t = (int16_t)(v >> (shift - 1)), whole = (int16_t)(t >> 1);
        const int16_t more = (int16_t)(whole | ((v & low) != 0));
        to[i] = (int16_t)(whole + (t & more & 1));
    }
}

TARGET static void DFP_CAT(align_rows_s16__, ISA)(const int16_t *const *rows, int64_t c, int64_t n,
                                                  const int *shifts, int16_t *space,
                                                  const int16_t **aligned) {
    for (int k = 0; k < DFP_DIGIT_STEP; k++, space += DFP_DIGIT_TILE) {
        aligned[k] = rows[k] ? rows[k] + c : NULL;
        if (!aligned[k] || !shifts[k]) continue;
        if (n == DFP_DIGIT_TILE)
            DFP_CAT(align_s16__, ISA)(aligned[k], DFP_DIGIT_TILE, shifts[k], space);
        else
            DFP_CAT(align_s16__, ISA)(aligned[k], n, shifts[k], space);
        aligned[k] = space;
    }
}

TARGET static void DFP_CAT(align_pairs_s16__, ISA)(int16_t *pairs, int64_t count, int first,
                                                   int second) {
    if (first == second) {
        DFP_CAT(align_s16__, ISA)(pairs, 2 * count, first, pairs);
        return;
    }
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    const int low = second, high = first;
#else
    const int low = first, high = second;
#endif
    pair_s16 *p = (pair_s16 *)pairs;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t both = p[i];
        const int32_t l = (int32_t)(both << 16) >> 16, h = (int32_t)both >> 16;
        p[i] = (uint32_t)ALIGNED(h, high) << 16 | ((uint32_t)ALIGNED(l, low) & 0xffffu);
    }
}

#undef LEFT
#undef RIGHT
#undef HALF
#undef ALIGNED

/* So many that the compiler makes vectors of the loop rather than unrolling it. */
#define COUNTERS 64

/* Philox4x32-10 (Salmon et al., 2011), counter-based noise: four words for each of the counters
 * `first` to `first` + COUNTERS - 1 with `step`. */
TARGET static inline void DFP_CAT(philox__, ISA)(uint64_t first, uint64_t step,
                                                 const uint32_t *key, uint32_t words[4][COUNTERS]) {
    uint32_t *c0 = words[0], *c1 = words[1], *c2 = words[2], *c3 = words[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int i = 0; i < COUNTERS; i++) {
        c0[i] = (uint32_t)(first + i), c1[i] = (uint32_t)((first + i) >> 32);
        c2[i] = (uint32_t)step, c3[i] = (uint32_t)(step >> 32);
    }
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < COUNTERS; i++) {
            const uint64_t p0 = (uint64_t)0xD2511F53u * c0[i], p1 = (uint64_t)0xCD9E8D57u * c2[i];
            c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = (uint32_t)p1;
            c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = (uint32_t)p0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

TARGET static void DFP_CAT(stochastic_f32_s16__, ISA)(const float *x, int64_t groups, int64_t n,
                                                      int64_t index, const int32_t *e,
                                                      double qmax, const uint32_t *key,
                                                      uint64_t step, int16_t *q) {
    enum { BLOCK = 4 * COUNTERS };
    uint32_t words[4][COUNTERS], noise[BLOCK];
    float in[BLOCK] = {0};
    double factor[BLOCK];
    int16_t out[BLOCK];
    const int64_t total = groups * n;
    int64_t group = 0, end = n; /* where the group ends that `filled` has come to */
    for (int i = 0; i < BLOCK; i++) factor[i] = 1.0;
    /* Counters come in fours. */
    for (int64_t at = 0, skip = index % 4; at < total; skip = 0) {
        const int64_t left = total - at < BLOCK - skip ? total - at : BLOCK - skip;
        DFP_CAT(philox__, ISA)((uint64_t)(index + at) / 4, step, key, words);
        for (int i = 0; i < COUNTERS; i++)
            for (int w = 0; w < 4; w++) noise[4 * i + w] = words[w][i];
        memcpy(in + skip, x + at, left * sizeof *in);
        for (int64_t filled = at; filled < at + left;) {
            if (filled == end) group++, end += n;
            const int64_t stop = end < at + left ? end : at + left;
            const double power = dfp_power_f64(-(int64_t)e[group]);
            for (; filled < stop; filled++) factor[skip + filled - at] = power;
        }
        /* The noise has 24 bits, so the sum is exact where it matters: within 2**-24 of an integer
         * a double holds every bit of it. */
        for (int i = 0; i < BLOCK; i++) {
            double v = in[i] * factor[i] + (int32_t)(noise[i] >> 8) * 5.9604644775390625e-08;
            v = v < qmax ? v : qmax;
            v = v > -qmax ? v : -qmax;
            out[i] = (int16_t)(int32_t)__builtin_floor(v);
        }
        memcpy(q + at, out + skip, left * sizeof *out);
        at += left;
    }
}

#undef COUNTERS

/* Two int16 that lie next to each other, p first. As one number, because gcc 12 would move the
 * elements of a pair one by one. */
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define PAIR(p, q) ((uint32_t)(uint16_t)(p) << 16 | (uint16_t)(q))
#else
#define PAIR(p, q) ((uint32_t)(uint16_t)(q) << 16 | (uint16_t)(p))
#endif

/* Of every row, so many elements at a time: all of a line of the cache, in few panels. */
#define SPAN(width) ((width) < 32 ? 32 / (width) * (width) : (width))

/* The whole panels; a constant width makes vectors of the inner loop. */
#define INTERLEAVE(width)                                                        \
    for (int64_t first = 0; first < whole; first += SPAN(width)) {               \
        const int64_t end = first + SPAN(width) < whole ? first + SPAN(width) : whole; \
        for (int64_t i = 0; i < pairs; i++) {                                    \
            const int16_t *pi = p + i * step, *qi = q + i * step;                \
            pair_s16 *to = (pair_s16 *)(out + first / (width) * panel) + i * (width); \
            /* What comes next of these rows, which lie too far apart for the    \
             * hardware to see it coming. */                                     \
            __builtin_prefetch(pi + end, 0, 2);                                  \
            __builtin_prefetch(qi + end, 0, 2);                                  \
            for (int64_t c = first; c < end; c += (width), to += panel / 2)      \
                for (int l = 0; l < (width); l++) to[l] = PAIR(pi[c + l], qi[c + l]); \
        }                                                                        \
    }

TARGET static void DFP_CAT(interleave_s16__, ISA)(const int16_t *restrict p,
                                                  const int16_t *restrict q, int64_t step,
                                                  int64_t pairs, int64_t n, int mr, int64_t panel,
                                                  int16_t *restrict out) {
    const int64_t whole = n - n % mr;
    if (mr == 4) { INTERLEAVE(4) }
    else if (mr == 8) { INTERLEAVE(8) }
    else if (mr == 16) { INTERLEAVE(16) }
    else if (mr == 32) { INTERLEAVE(32) }
    else { INTERLEAVE(mr) }
    if (whole == n) return;
    out += whole / mr * panel;
    for (int64_t i = 0; i < pairs; i++, p += step, q += step)
        for (int l = 0; l < mr; l++, out += 2) {
            out[0] = whole + l < n ? p[whole + l] : 0;
            out[1] = whole + l < n ? q[whole + l] : 0;
        }
}

#undef INTERLEAVE

TARGET static void DFP_CAT(copy_rows_s16__, ISA)(const int16_t *restrict from, int64_t from_step,
                                                 int64_t rows, int64_t n, int16_t *restrict to,
                                                 int64_t to_step) {
    /* Copies of constant length, the last two overlapping, are vectors and no calls. */
    for (int64_t i = 0; i < rows; i++, from += from_step, to += to_step) {
        if (n >= 32) {
            for (int64_t c = 0; c + 32 <= n; c += 32) memcpy(to + c, from + c, 64);
            memcpy(to + n - 32, from + n - 32, 64);
        } else if (n >= 16) {
            memcpy(to, from, 32);
            memcpy(to + n - 16, from + n - 16, 32);
        } else if (n >= 8) {
            memcpy(to, from, 16);
            memcpy(to + n - 8, from + n - 8, 16);
        } else {
            for (int64_t c = 0; c < n; c++) to[c] = from[c];
        }
    }
}

/* `width` channels from c on; a constant width keeps the accumulators in registers. */
#define SPILL_BLOCK(width)                                                               \
    {                                                                                    \
        float sum[width];                                                                \
        for (int i = 0; i < (width); i++) sum[i] = t->resume ? t->sums[c + i] : 0.0f;    \
        for (int64_t first = 0; first < t->terms;) {                                     \
            int64_t end = first - first % t->segment + t->segment;                       \
            if (end > first + t->chain) end = first + t->chain;                          \
            if (end > t->terms) end = t->terms;                                          \
            uint32_t acc[width];  /* which wrap, as in depthwise.h */                    \
            for (int i = 0; i < (width); i++) acc[i] = 0;                                \
            for (int64_t k = first; k < end; k++) {                                      \
                const int16_t *x = t->x[k], *w = t->w[k];                                \
                if (!x) continue;                                                        \
                for (int i = 0; i < (width); i++)                                        \
                    acc[i] += (uint32_t)((int32_t)x[c + i] * (int32_t)w[c + i]);         \
            }                                                                            \
            for (int i = 0; i < (width); i++) sum[i] += (float)(int32_t)acc[i];          \
            first = end;                                                                 \
        }                                                                                \
        for (int i = 0; i < (width); i++)                                                \
            if (t->y) t->y[c + i] = (float)((double)sum[i] * t->scale);                  \
            else t->sums[c + i] = sum[i];                                                \
    }

TARGET static void DFP_CAT(depthwise_spill__, ISA)(const dfp_terms *t) {
    int64_t c = 0;
    for (; c + 32 <= t->n; c += 32) SPILL_BLOCK(32)
    for (; c + 8 <= t->n; c += 8) SPILL_BLOCK(8)
    for (; c < t->n; c++) SPILL_BLOCK(1)
}

#undef SPILL_BLOCK

TARGET static void DFP_CAT(add_rows_f64__, ISA)(const double *rows, int64_t count, int64_t stride,
                                                int64_t n, double *restrict total) {
    for (int64_t c = 0; c < n; c++) total[c] = 0.0;
    for (int64_t r = 0; r < count; r++)
        for (int64_t c = 0; c < n; c++) total[c] += rows[r * stride + c];
}

#include "silu.h"
#include "channels.h"
#include "depthwise.h"
#include "response.h"
#include "update.h"

/* Their part of a dfp_kernel. */
#define DFP_LOOPS                                                                        \
    DFP_CAT(absmax_bits__, ISA), DFP_CAT(quantize_f32_s16__, ISA),                       \
        DFP_CAT(exponents__, ISA), DFP_CAT(quantize_groups__, ISA),                      \
        DFP_CAT(stochastic_f32_s16__, ISA), DFP_CAT(count__, ISA),                       \
        DFP_CAT(zeros__, ISA), DFP_CAT(sample__, ISA),                                   \
        DFP_CAT(align_s16__, ISA), DFP_CAT(align_rows_s16__, ISA),                       \
        DFP_CAT(align_pairs_s16__, ISA),                                                 \
        DFP_CAT(interleave_s16__, ISA), DFP_CAT(copy_rows_s16__, ISA),                   \
        DFP_CAT(depthwise_patch__, ISA), DFP_CAT(depthwise_dots__, ISA),                 \
        DFP_CAT(depthwise_spill__, ISA), DFP_CAT(map_f32__, ISA),                        \
        DFP_CAT(positive_bits__, ISA), DFP_CAT(gradient_f32__, ISA),                     \
        DFP_CAT(channel_sums__, ISA), DFP_CAT(moments_f32__, ISA),                       \
        DFP_CAT(add_rows_f64__, ISA), DFP_CAT(response_f32__, ISA),                      \
        DFP_CAT(sgd_f32__, ISA), DFP_CAT(adam_f32__, ISA),                               \
        DFP_CAT(unpack_slot__, ISA), DFP_CAT(pack_slot__, ISA)
