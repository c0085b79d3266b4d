/* The contract of a GEMM microkernel: the register tile, and nothing else.
 *
 * A microkernel multiplies mr rows of A by one packed panel of nr columns of B, int16 x int16,
 * over K = 2 * pairs products, in chains short enough for an int32 accumulator, and carries every
 * chain's sum over into something wide.
 *
 *   A    row i, pair p (products 2p and 2p+1): a[i * row_stride + p * pair_stride + {0, 1}].
 *        Only `rows` rows exist; a microkernel reads row rows-1 in place of the missing ones.
 *   B    panel [pairs][nr][2], 64-byte aligned, zeros where K is odd or columns are missing.
 *   K    `pairs` is a multiple of `segment`; chains restart at every segment (kernel positions in
 *        spill mode), and within one they are `chain` pairs long, the last one perhaps shorter.
 *        |sum of a chain| <= 2**31 - 1 - 65535 in exact mode, 2**31 - 1 in spill mode.
 *
 * exact: the wide sum is v = hi * 2**16 + lo with 0 <= lo < 2**16, both int32. It starts from
 *        acc (hi tile, then lo tile, [mr][nr] each) if `resume`, else from zero.
 * spill: the wide sum is a float32; a chain's int32 is converted and added in order. It starts
 *        from acc (one float tile [mr][nr]) if `resume`, else from zero.
 *
 * Output: if `c` is not NULL, all mr x nr values of the sum, rounded once to float32 (exact mode)
 * and times `scale`, a power of two, go to c[i * ldc + j]. The caller guarantees that |v|, and
 * every sum of some of its products, is below 2**47, and that neither scale nor a nonzero result
 * is subnormal. If `c` is NULL, the sum goes to acc.
 *        With `stream`, c and ldc are multiples of 64 bytes, and the stores may go past the caches.
 */
#ifndef DFP_MICROKERNEL_H
#define DFP_MICROKERNEL_H

#include <stdint.h>

typedef struct {
    const int16_t *a;
    int64_t row_stride, pair_stride, rows;
    const int16_t *b;
    int64_t pairs, segment, chain;
    int resume;
    int32_t *acc;
    float *c;
    int64_t ldc;
    float scale;
    int stream;
} dfp_tile;

/* Sums of products of int16 rows, channel by channel: the loop of every depthwise pass.
 *
 *   sum[c] = sum over t of x[t][c] * w[t][c], 0 <= c < n; a NULL x[t] contributes nothing.
 *
 * Terms come in segments of `segment` terms, and a chain of int32 additions is at most `chain`
 * terms long and ends with its segment. The wide sums are int64 (exact) or float32 (spill, chains
 * added in order); they start from wide/floats if `resume`, else from zero. If `y` is not NULL the
 * sums go there, times `scale`, a power of two, and rounded once; else they go back to
 * wide/floats. Exactly one of wide and floats is not NULL. */
typedef struct {
    const int16_t **x;
    const int16_t **w;
    int64_t terms, segment, chain, n;
    int resume;
    int64_t *wide;
    float *floats;
    float *y;
    double scale;
} dfp_terms;

/* What an instruction set brings; chosen once, when the library is loaded. */
typedef struct {
    const char *isa;
    int mr, nr;
    void (*exact)(const dfp_tile *);
    void (*spill)(const dfp_tile *);
    /* The largest bit pattern of |x[i]|: at least 0x7f800000 if there is a NaN or an Inf. */
    uint32_t (*absmax_bits)(const float *x, int64_t n);
    /* q[i] = clamp(round(x[i] * 2**-e), -qmax, qmax), nearest-even or toward zero; -e is the sum
     * of the exponents of the two factors. */
    void (*quantize)(const float *x, int64_t n, float factor, float factor2, float qmax,
                     int truncate, int16_t *q);
    /* out[c / mr][..][c % mr][0, 1] = p[c], q[c]: pairs for panels of mr, `panel` elements apart.
     * The last panel is filled with zeros. */
    void (*interleave)(const int16_t *p, const int16_t *q, int64_t n, int mr, int64_t panel,
                       int16_t *out);
    void (*depthwise)(const dfp_terms *);
    /* Does nothing but multiply-accumulate, on registers; returns how many products. */
    int64_t (*peak)(int64_t rounds);
} dfp_kernel;

#define DFP_CAT_(a, b) a##b
#define DFP_CAT(a, b) DFP_CAT_(a, b)

/* RN32(sum * scale), rounded once: int64 to a 53-bit double by rounding to odd, so that the
 * rounding to float32 sees where the sum lay (Boldo and Melquiond, 2008). */
static inline float dfp_round(int64_t sum, double scale) {
    const int64_t limit = (int64_t)1 << 53;
    if (sum > limit || sum < -limit) sum = (sum >> 11 | ((sum & 2047) != 0)) * 2048;
    return (float)((double)sum * scale);
}

#endif
