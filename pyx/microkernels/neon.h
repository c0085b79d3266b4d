/* NEON, which every 64-bit Arm has: smlal and smlal2, four products into four int32 lanes each.
 *
 * Pairs are taken apart when a vector of B is loaded: four even products in the low half, four odd
 * ones in the high half, once per vector for the MR rows that use it. Multiplying pairs as they lie
 * would take four instructions for eight products (two smull, addp, add) instead of two. */

#define ISA neon
#define ISA_NAME "neon"
#define TARGET
#define MR 8
#define NV 2
#define LANES 4
#define VI int32x4_t
#define VF float32x4_t
#define V_REGISTER "w"
#define V_ZERO() vdupq_n_s32(0)
#define V_LOAD(p) neon_take_apart(p)
#define V_LOADU(p) vld1q_s32(p)
#define V_STOREU(p, v) vst1q_s32(p, v)
#define V_PAIR(p) neon_pair(p)
/* Assembly, because around the intrinsics clang 14 spends another instruction on every second
 * product, and gcc 12 one on every pair of A. "x" is v0 to v15: only there smlal finds a lane. */
#define V_DOT(acc, a, b)                                                         \
    __asm__("smlal %0.4s, %1.4h, %2.h[0]\n\tsmlal2 %0.4s, %1.8h, %2.h[1]"        \
            : "+w"(acc) : "w"(b), "x"(a))
#define V_ADD(a, b) vaddq_s32(a, b)
#define V_AND(a, b) vandq_s32(a, b)
#define V_OR(a, b) vorrq_s32(a, b)
#define V_SET1(x) vdupq_n_s32(x)
#define V_SRA(v, n) vshrq_n_s32(v, n)
#define V_SLL(v, n) vshlq_n_s32(v, n)
#define F_FROM(v) vcvtq_f32_s32(v)
#define F_ADD(a, b) vaddq_f32(a, b)
#define F_MUL(a, b) vmulq_f32(a, b)
#define F_CLIP(f, low, high) neon_clip(f, low, high)
#define F_FMA(a, b, c) vfmaq_f32(c, a, b)
#define F_SET1(x) vdupq_n_f32(x)
#define F_ZERO() vdupq_n_f32(0.0f)
#define F_LOADU(p) vld1q_f32(p)
#define F_STOREU(p, f) vst1q_f32(p, f)
#define F_STREAM(p, f) vst1q_f32(p, f)

static inline int32x4_t neon_take_apart(const int16_t *p) {
    static const uint8_t order[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
    return vreinterpretq_s32_u8(vqtbl1q_u8(vld1q_u8((const uint8_t *)p), vld1q_u8(order)));
}

/* In the first lane only, where V_DOT looks for it. */
static inline int32x4_t neon_pair(const int16_t *p) {
    int32x4_t pair;
    __asm__("ldr %s0, %1" : "=w"(pair) : "m"(*(const int16_t(*)[2])p));
    return pair;
}

static inline float32x4_t neon_clip(float32x4_t f, float32x4_t low, float32x4_t high) {
    f = vbslq_f32(vcltq_f32(f, low), low, f);
    return vbslq_f32(vcgtq_f32(f, high), high, f);
}

#include "gemm_tile.h"
