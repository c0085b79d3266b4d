/* The microkernels, written once for every vector instruction set.
 *
 * Included by one header per instruction set, which defines
 *   ISA, ISA_NAME     suffix of the names, and the name as a string
 *   TARGET            __attribute__((target(...))) or nothing
 *   MR, NV            rows of the register tile, vectors per row: 2, and 1 in the narrow tile
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
 *   F_CLIP(f, low, high)   f < low ? low : f, and f > high ? high : f
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

/* hi * 2**16 + lo = u * 2**24 + r with |u| <= 2**23 and 0 <= r < 2**24: both convert exactly, and
 * the fused multiply-add rounds once. */
#define F_ROUND(hi, lo)                                                          \
    F_FMA(F_FROM(V_SRA(hi, 8)), F_SET1(16777216.0f),                             \
          F_FROM(V_OR(V_SLL(V_AND(hi, V_SET1(255)), 16), lo)))

#include "loops.h"

#define TILE_NV NV
#define TILE(f) DFP_CAT(f##__, ISA)
#include "register_tile.h"

/* Of half the columns, for products that have no more: the wide tile would compute zeros. */
#define TILE_NV (NV / 2)
#define TILE(f) DFP_CAT(f##_narrow__, ISA)
#include "register_tile.h"

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
    ISA_NAME, MR, NV * LANES,
    DFP_CAT(gemm_s16_exact__, ISA), DFP_CAT(gemm_s16_spill__, ISA),
    DFP_CAT(gemm_s16_exact_narrow__, ISA), DFP_CAT(gemm_s16_spill_narrow__, ISA),
    DFP_LOOPS, DFP_CAT(peak_s16__, ISA), NULL,
};

#undef STORE_F
#undef CARRY
#undef F_ROUND
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
#undef F_CLIP
#undef F_SET1
#undef F_ZERO
#undef F_LOADU
#undef F_STOREU
#undef F_STREAM
#undef F_POSITIVE
#undef F_ONES
#undef F_EIGHT
#undef V_ZIPLO
#undef V_ZIPHI
#undef V_FIRST
#undef V_SECOND
#undef F_FIRST
#undef F_SECOND
