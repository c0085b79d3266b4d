/* C without any instruction set: the fallback of every machine, and the reading copy of the tile. */

#define ISA portable
#define TARGET

#include "loops.h"

enum { PORTABLE_MR = 4, PORTABLE_NR = 8, PORTABLE_LANES = 2 * PORTABLE_NR };

/* A row of sums, even and odd products apart, as they lie in B: added up at the end only. */
typedef int32_t portable_row[PORTABLE_LANES];

/* The vectors of GNU C, which every machine has, if need be in pieces. */
typedef int16_t portable_s16x8 __attribute__((vector_size(16)));
typedef int32_t portable_s32x4 __attribute__((vector_size(16)));
typedef uint32_t portable_u32x4 __attribute__((vector_size(16)));

/* Adds a chain of `n` pairs from pair `first` on, which lie in one run. */
static inline void portable_chain(const dfp_tile *t, int64_t first, int64_t n, portable_row *acc) {
    const int16_t *a[PORTABLE_MR], *b = t->b + first * PORTABLE_LANES;
    const int64_t at = t->runs ? t->runs[first / t->run] + first % t->run * t->pair_stride
                               : first * t->pair_stride;
    portable_u32x4 sum[PORTABLE_MR][PORTABLE_LANES / 4];
    memcpy(sum, acc, sizeof sum);
    for (int i = 0; i < PORTABLE_MR; i++) {
        const int64_t row = i < t->rows ? i : t->rows - 1;
        a[i] = t->a + (t->starts ? t->starts[row] : row * t->row_stride) + at;
    }
    for (int64_t p = 0; p < n; p++, b += PORTABLE_LANES)
        for (int i = 0; i < PORTABLE_MR; i++) {
            const int32_t pair = load_s32(a[i] + p * t->pair_stride);
            const portable_s16x8 x = (portable_s16x8)(portable_s32x4){pair, pair, pair, pair};
            for (int j = 0; j < PORTABLE_LANES; j += 8) {
                const portable_s16x8 y = *(const portable_s16x8 *)(b + j);
                /* As a loop: gcc 12 finds no widening multiplication in a product of vectors. */
                int32_t products[8];
                for (int l = 0; l < 8; l++) products[l] = x[l] * y[l];
                portable_u32x4 low, high;
                memcpy(&low, products, sizeof low);
                memcpy(&high, products + 4, sizeof high);
                sum[i][j / 4] += low;
                sum[i][j / 4 + 1] += high;
            }
        }
    memcpy(acc, sum, sizeof sum);
}

static inline float portable_scaled(const dfp_tile *t, int i, int j, float sum) {
    sum *= t->row_scale[i];
    if (t->column_scale) sum *= t->column_scale[j];
    return t->bias ? clip__portable(sum + t->bias[j], t->low, t->high) : sum;
}

static void gemm_s16_exact__portable(const dfp_tile *t) {
    const int tile = PORTABLE_MR * PORTABLE_NR;
    portable_row hi[PORTABLE_MR] = {{0}}, acc[PORTABLE_MR] = {{0}};
    if (t->resume)
        for (int i = 0; i < PORTABLE_MR; i++)
            for (int j = 0; j < PORTABLE_NR; j++) {
                hi[i][2 * j] = t->acc[i * PORTABLE_NR + j];
                acc[i][2 * j] = t->acc[tile + i * PORTABLE_NR + j];
            }
    for (int64_t p = 0, n; p < t->pairs; p += n) {
        n = t->pairs - p < t->chain ? t->pairs - p : t->chain;
        if (t->runs && n > t->run - p % t->run) n = t->run - p % t->run;
        portable_chain(t, p, n, acc);
        for (int i = 0; i < PORTABLE_MR; i++)
            for (int j = 0; j < PORTABLE_LANES; j++) {
                hi[i][j] += acc[i][j] >> 16;
                acc[i][j] &= 65535;
            }
    }
    for (int i = 0; i < PORTABLE_MR; i++)
        for (int j = 0; j < PORTABLE_NR; j++) {
            const int64_t v = ((int64_t)hi[i][2 * j] + hi[i][2 * j + 1]) * 65536 +
                              acc[i][2 * j] + acc[i][2 * j + 1];
            if (t->c) {
                t->c[i * t->ldc + j] = portable_scaled(t, i, j, (float)v);
            } else {
                t->acc[i * PORTABLE_NR + j] = (int32_t)(v >> 16);
                t->acc[tile + i * PORTABLE_NR + j] = (int32_t)(v & 65535);
            }
        }
}

static void gemm_s16_spill__portable(const dfp_tile *t) {
    float sum[PORTABLE_MR][PORTABLE_NR] = {{0}};
    if (t->resume) memcpy(sum, t->acc, sizeof sum);
    for (int64_t s = 0; s < t->pairs; s += t->segment)
        for (int64_t p = 0; p < t->segment; p += t->chain) {
            portable_row acc[PORTABLE_MR] = {{0}};
            portable_chain(t, s + p, t->segment - p < t->chain ? t->segment - p : t->chain, acc);
            for (int i = 0; i < PORTABLE_MR; i++)
                for (int j = 0; j < PORTABLE_NR; j++)
                    sum[i][j] += (float)(int32_t)((uint32_t)acc[i][2 * j] +
                                                  (uint32_t)acc[i][2 * j + 1]);
        }
    if (!t->c) {
        memcpy(t->acc, sum, sizeof sum);
        return;
    }
    for (int i = 0; i < PORTABLE_MR; i++)
        for (int j = 0; j < PORTABLE_NR; j++)
            t->c[i * t->ldc + j] = portable_scaled(t, i, j, sum[i][j]);
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
    gemm_s16_exact__portable, gemm_s16_spill__portable, NULL, NULL,
    DFP_LOOPS, peak_s16__portable, NULL,
};

#undef ISA
#undef TARGET
