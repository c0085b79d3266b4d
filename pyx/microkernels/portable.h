/* Plain C: the fallback of every machine, and the reading copy of the register tile. */

#define ISA portable
#define TARGET

#include "loops.h"

enum { PORTABLE_MR = 4, PORTABLE_NR = 8 };

/* One chain of `n` pairs from pair `first` on. */
static inline void portable_chain(const dfp_tile *t, int64_t first, int64_t n,
                                  int32_t acc[PORTABLE_MR][PORTABLE_NR]) {
    for (int64_t p = first; p < first + n; p++) {
        const int16_t *b = t->b + p * 2 * PORTABLE_NR;
        for (int i = 0; i < PORTABLE_MR; i++) {
            const int64_t row = i < t->rows ? i : t->rows - 1;
            const int16_t *a = t->a + row * t->row_stride + p * t->pair_stride;
            for (int j = 0; j < PORTABLE_NR; j++)
                acc[i][j] += a[0] * b[2 * j] + a[1] * b[2 * j + 1];
        }
    }
}

static void gemm_s16_exact__portable(const dfp_tile *t) {
    const int tile = PORTABLE_MR * PORTABLE_NR;
    int32_t hi[PORTABLE_MR][PORTABLE_NR] = {{0}}, acc[PORTABLE_MR][PORTABLE_NR] = {{0}};
    if (t->resume) {
        memcpy(hi, t->acc, sizeof hi);
        memcpy(acc, t->acc + tile, sizeof acc);
    }
    for (int64_t p = 0; p < t->pairs; p += t->chain) {
        portable_chain(t, p, t->pairs - p < t->chain ? t->pairs - p : t->chain, acc);
        for (int i = 0; i < PORTABLE_MR; i++)
            for (int j = 0; j < PORTABLE_NR; j++) {
                hi[i][j] += acc[i][j] >> 16;
                acc[i][j] &= 65535;
            }
    }
    if (!t->c) {
        memcpy(t->acc, hi, sizeof hi);
        memcpy(t->acc + tile, acc, sizeof acc);
        return;
    }
    for (int i = 0; i < PORTABLE_MR; i++)
        for (int j = 0; j < PORTABLE_NR; j++)
            t->c[i * t->ldc + j] = (float)((hi[i][j] * 65536.0 + acc[i][j]) * t->scale);
}

static void gemm_s16_spill__portable(const dfp_tile *t) {
    float sum[PORTABLE_MR][PORTABLE_NR] = {{0}};
    if (t->resume) memcpy(sum, t->acc, sizeof sum);
    for (int64_t s = 0; s < t->pairs; s += t->segment)
        for (int64_t p = 0; p < t->segment; p += t->chain) {
            int32_t acc[PORTABLE_MR][PORTABLE_NR] = {{0}};
            portable_chain(t, s + p, t->segment - p < t->chain ? t->segment - p : t->chain, acc);
            for (int i = 0; i < PORTABLE_MR; i++)
                for (int j = 0; j < PORTABLE_NR; j++) sum[i][j] += (float)acc[i][j];
        }
    if (!t->c) {
        memcpy(t->acc, sum, sizeof sum);
        return;
    }
    for (int i = 0; i < PORTABLE_MR; i++)
        for (int j = 0; j < PORTABLE_NR; j++) t->c[i * t->ldc + j] = sum[i][j] * t->scale;
}

/* Without a vector instruction to count, the tile itself is the roof. */
static int64_t peak_s16__portable(int64_t rounds) {
    enum { PAIRS = 128 };
    static const int16_t ones[2 * PAIRS * PORTABLE_NR] = {1};
    int32_t sums[2 * PORTABLE_MR * PORTABLE_NR];
    const dfp_tile t = {.a = ones, .row_stride = 2 * PAIRS, .pair_stride = 2, .rows = PORTABLE_MR,
                        .b = ones, .pairs = PAIRS, .segment = PAIRS, .chain = 16, .acc = sums};
    int64_t done = 0;
    for (int64_t r = 0; r < rounds; r += 100) {
        gemm_s16_exact__portable(&t);
        __asm__ __volatile__("" : : "r"(sums) : "memory");
        done += 2 * PAIRS * PORTABLE_MR * PORTABLE_NR;
    }
    return done;
}

static const dfp_kernel dfp_kernel__portable = {
    "portable", PORTABLE_MR, PORTABLE_NR,
    gemm_s16_exact__portable, gemm_s16_spill__portable,
    absmax_bits__portable, quantize_f32_s16__portable,
    interleave_s16__portable, depthwise_s16__portable, peak_s16__portable,
};

#undef ISA
#undef TARGET
