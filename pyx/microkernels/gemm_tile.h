/* The register tile, written once for every vector instruction set.
 *
 * Included by one header per instruction set, which defines
 *   ISA, ISA_NAME     suffix of the names, and the name as a string
 *   TARGET            __attribute__((target(...))) or nothing
 *   MR, NV            rows of the tile, vectors per row
 *   LANES             int32 lanes of a vector
 *   V_REGISTER        the constraint of inline assembly for a vector register
 *   VI, VF            the integer and the float vector types
 *   V_ZERO()          all zero
 *   V_LOAD(p)         aligned load, V_LOADU(p) and V_STOREU(p, v) unaligned
 *   V_PAIR(p)         the two int16 at p in every lane
 *   V_DOT(acc, a, b)  acc += a.even * b.even + a.odd * b.odd, per int32 lane
 *   V_ADD, V_AND, V_SET1, V_SRA(v, n), V_SLL(v, n), V_OR   on int32 lanes
 *   F_FROM(v)         int32 to float, nearest-even
 *   F_STREAM(p, f)    store past the caches, p aligned to a vector
 *   F_ADD, F_MUL, F_FMA(a, b, c), F_SET1, F_STOREU(p, f), F_LOADU(p), F_ZERO()
 * and, where V_DOT is worth interleaving pairs for (depthwise.h), all or none of
 *   V_ZIPLO(a, b), V_ZIPHI(a, b)     a0 b0 a1 b1 .. of int16: half of each 128-bit part
 *   V_FIRST(lo, hi), V_SECOND(lo, hi)   int32 lanes that V_DOT made of them, back in order
 *   F_FIRST, F_SECOND                the same of float lanes
 */

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* Past the caches, if the caller may have that. */
#define STORE_F(p, f)                                                            \
    do {                                                                         \
        if (t->stream) F_STREAM(p, f);                                           \
        else F_STOREU(p, f);                                                     \
    } while (0)

/* hi * 2**16 + lo takes over what lo sums: after a chain, lo is in [0, 65535]. */
#define CARRY(hi, lo)                                                            \
    do {                                                                         \
        hi = V_ADD(hi, V_SRA(lo, 16));                                           \
        lo = V_AND(lo, V_SET1(65535));                                           \
    } while (0)

/* hi * 2**16 + lo = u * 2**24 + r with |u| <= 2**24 and 0 <= r < 2**24: both convert exactly, and
 * the fused multiply-add rounds once. */
#define F_ROUND(hi, lo)                                                          \
    F_FMA(F_FROM(V_SRA(hi, 8)), F_SET1(16777216.0f),                             \
          F_FROM(V_OR(V_SLL(V_AND(hi, V_SET1(255)), 16), lo)))

#include "loops.h"

#define NR (NV * LANES)

/* One chain: `n` pairs into the int32 accumulators. */
#define RUN_CHAIN(n)                                                             \
    for (int64_t u = 0; u < (n); u++) {                                          \
        VI bv[NV];                                                               \
        UNROLL for (int j = 0; j < NV; j++) bv[j] = V_LOAD(b + j * 2 * LANES);   \
        UNROLL for (int i = 0; i < MR; i++) {                                    \
            const VI av = V_PAIR(a[i] + at);                                     \
            UNROLL for (int j = 0; j < NV; j++)                                  \
                V_DOT(acc[i][j], av, bv[j]);                                     \
        }                                                                        \
        b += 2 * NR;                                                             \
        at += t->pair_stride;                                                    \
    }

#define OPEN_TILE                                                                \
    const int16_t *a[MR], *b = t->b;                                             \
    int64_t at = 0;                                                              \
    UNROLL for (int i = 0; i < MR; i++)                                          \
        a[i] = t->a + (i < t->rows ? i : t->rows - 1) * t->row_stride;           \
    VI acc[MR][NV];

TARGET static void DFP_CAT(gemm_s16_exact__, ISA)(const dfp_tile *t) {
    OPEN_TILE
    VI hi[MR][NV];
    if (t->resume) {
        UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++) {
            hi[i][j] = V_LOADU(t->acc + i * NR + j * LANES);
            acc[i][j] = V_LOADU(t->acc + (MR + i) * NR + j * LANES);
        }
    } else {
        UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++)
            hi[i][j] = acc[i][j] = V_ZERO();
    }
    for (int64_t left = t->pairs; left > 0; left -= t->chain) {
        const int64_t n = left < t->chain ? left : t->chain;
        RUN_CHAIN(n)
        /* What stays in the accumulator is small: the bound on chains leaves room. */
        UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++)
            CARRY(hi[i][j], acc[i][j]);
    }
    if (!t->c) {
        UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++) {
            V_STOREU(t->acc + i * NR + j * LANES, hi[i][j]);
            V_STOREU(t->acc + (MR + i) * NR + j * LANES, acc[i][j]);
        }
        return;
    }
    const VF scale = F_SET1(t->scale);
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++)
        STORE_F(t->c + i * t->ldc + j * LANES, F_MUL(F_ROUND(hi[i][j], acc[i][j]), scale));
}

TARGET static void DFP_CAT(gemm_s16_spill__, ISA)(const dfp_tile *t) {
    OPEN_TILE
    VF sum[MR][NV];
    float *const carried = (float *)t->acc;
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++)
        sum[i][j] = t->resume ? F_LOADU(carried + i * NR + j * LANES) : F_ZERO();
    for (int64_t done = 0; done < t->pairs; done += t->segment)
        for (int64_t left = t->segment; left > 0; left -= t->chain) {
            const int64_t n = left < t->chain ? left : t->chain;
            UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++)
                acc[i][j] = V_ZERO();
            RUN_CHAIN(n)
            UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++)
                sum[i][j] = F_ADD(sum[i][j], F_FROM(acc[i][j]));
        }
    float *const out = t->c ? t->c : carried;
    const int64_t ld = t->c ? t->ldc : NR;
    const VF scale = F_SET1(t->c ? t->scale : 1.0f);
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < NV; j++)
        STORE_F(out + i * ld + j * LANES, F_MUL(sum[i][j], scale));
}

TARGET static int64_t DFP_CAT(peak_s16__, ISA)(int64_t rounds) {
    VI acc[12], one = V_SET1(65537);
    UNROLL for (int i = 0; i < 12; i++) acc[i] = V_ZERO();
    for (int64_t r = 0; r < rounds; r++)
        UNROLL for (int i = 0; i < 12; i++) {
            /* Opaque, or a product of constants would leave the loop. */
            __asm__ __volatile__("" : "+" V_REGISTER(one), "+" V_REGISTER(acc[i]));
            V_DOT(acc[i], one, one);
        }
    UNROLL for (int i = 0; i < 12; i++) __asm__ __volatile__("" : : V_REGISTER(acc[i]));
    return rounds * 12 * 2 * LANES;
}

static const dfp_kernel DFP_CAT(dfp_kernel__, ISA) = {
    ISA_NAME, MR, NR,
    DFP_CAT(gemm_s16_exact__, ISA), DFP_CAT(gemm_s16_spill__, ISA),
    DFP_LOOPS, DFP_CAT(peak_s16__, ISA), NULL,
};

#undef NR
#undef RUN_CHAIN
#undef STORE_F
#undef CARRY
#undef F_ROUND
#undef OPEN_TILE
#undef UNROLL
#undef ISA
#undef ISA_NAME
#undef TARGET
#undef MR
#undef NV
#undef LANES
#undef V_REGISTER
#undef VI
#undef VF
#undef V_ZERO
#undef V_LOAD
#undef V_LOADU
#undef V_STOREU
#undef V_PAIR
#undef V_DOT
#undef V_ADD
#undef V_AND
#undef V_OR
#undef V_SET1
#undef V_SRA
#undef V_SLL
#undef F_FROM
#undef F_ADD
#undef F_MUL
#undef F_FMA
#undef F_SET1
#undef F_ZERO
#undef F_LOADU
#undef F_STOREU
#undef F_STREAM
#undef V_ZIPLO
#undef V_ZIPHI
#undef V_FIRST
#undef V_SECOND
#undef F_FIRST
#undef F_SECOND
