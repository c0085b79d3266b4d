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

TARGET static void DFP_CAT(quantize_f32_s16__, ISA)(const float *x, int64_t n, float factor,
                                                    float factor2, float qmax, int truncate,
                                                    int16_t *q) {
    /* Adding and subtracting 1.5 * 2**23 rounds to nearest-even below 2**22. */
    const float magic = truncate ? 0.0f : 12582912.0f;
    for (int64_t i = 0; i < n; i++) {
        float v = x[i] * factor * factor2;
        v = v < qmax ? v : qmax;
        v = v > -qmax ? v : -qmax;
        v = v + magic - magic;
        q[i] = (int16_t)(int32_t)v;
    }
}

#define INTERLEAVE(MR_)                                                          \
    for (; c + MR_ <= n; c += MR_, out += panel)                                 \
        for (int i = 0; i < MR_; i++) {                                          \
            out[2 * i] = p[c + i];                                               \
            out[2 * i + 1] = q[c + i];                                           \
        }

TARGET static void DFP_CAT(interleave_s16__, ISA)(const int16_t *restrict p,
                                                  const int16_t *restrict q, int64_t n, int mr,
                                                  int64_t panel, int16_t *restrict out) {
    int64_t c = 0;
    if (mr == 4) { INTERLEAVE(4) }
    else if (mr == 8) { INTERLEAVE(8) }
    else if (mr == 16) { INTERLEAVE(16) }
    else if (mr == 32) { INTERLEAVE(32) }
    else { INTERLEAVE(mr) }
    if (c < n)
        for (int i = 0; i < mr; i++) {
            out[2 * i] = c + i < n ? p[c + i] : 0;
            out[2 * i + 1] = c + i < n ? q[c + i] : 0;
        }
}

#undef INTERLEAVE

/* `width` channels from c on; a constant width keeps the accumulators in registers. */
#define SPILL_BLOCK(width)                                                               \
    {                                                                                    \
        float sum[width];                                                                \
        for (int i = 0; i < (width); i++) sum[i] = t->resume ? t->sums[c + i] : 0.0f;    \
        for (int64_t first = 0; first < t->terms;) {                                     \
            int64_t end = first - first % t->segment + t->segment;                       \
            if (end > first + t->chain) end = first + t->chain;                          \
            if (end > t->terms) end = t->terms;                                          \
            int32_t acc[width];                                                          \
            for (int i = 0; i < (width); i++) acc[i] = 0;                                \
            for (int64_t k = first; k < end; k++) {                                      \
                const int16_t *x = t->x[k], *w = t->w[k];                                \
                if (!x) continue;                                                        \
                for (int i = 0; i < (width); i++)                                        \
                    acc[i] += (int32_t)x[c + i] * (int32_t)w[c + i];                     \
            }                                                                            \
            for (int i = 0; i < (width); i++) sum[i] += (float)acc[i];                   \
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

#include "depthwise.h"

/* Their part of a dfp_kernel. */
#define DFP_LOOPS                                                                        \
    DFP_CAT(absmax_bits__, ISA), DFP_CAT(quantize_f32_s16__, ISA),                       \
        DFP_CAT(interleave_s16__, ISA), DFP_CAT(depthwise_patch__, ISA),                 \
        DFP_CAT(depthwise_dots__, ISA), DFP_CAT(depthwise_spill__, ISA)
