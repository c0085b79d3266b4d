/* The contract of a GEMM microkernel: the register tile, and nothing else.
 *
 * A microkernel multiplies mr rows of A by one packed panel of nr columns of B, int16 x int16,
 * over K = 2 * pairs products, in chains short enough for an int32 accumulator, and carries every
 * chain's sum over into something wide.
 *
 *   A    row i, pair p (products 2p and 2p+1): a[i * row_stride + p * pair_stride + {0, 1}].
 *        Only `rows` rows exist; a microkernel reads row rows-1 in place of the missing ones.
 *        Where there are `runs` (exact mode only), pairs lie in runs of `run`, the last one perhaps
 *        shorter: pair p at runs[p / run] + p % run * pair_stride. Where there are `starts`, row i
 *        begins at a + starts[i] in place of i * row_stride.
 *        A microkernel may prefetch from `soon`, 2 * mr elements with every pair: what a later one
 *        reads.
 *   B    panel [pairs][nr][2], aligned to 4 * nr bytes (64 at most), zeros where K is odd or
 *        columns are missing.
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
 * and times row_scale[i] and, unless column_scale is NULL, column_scale[j], powers of two, go to
 * c[i * ldc + j]. The caller guarantees that |v|, and every sum of some of its products, is below
 * 2**47, and that neither a scale nor a nonzero result of either multiplication is subnormal, nor
 * that of the first infinite where that of both is not. A scale may be NaN, and so is then what it
 * multiplies. Unless bias is NULL, bias[j] is added then, and the result clipped to low .. high, NaN
 * staying NaN. If `c` is NULL, the sum goes to acc.
 *        With `stream`, c and ldc are multiples of 64 bytes, and the stores may go past the caches.
 */
#ifndef DFP_MICROKERNEL_H
#define DFP_MICROKERNEL_H

#include <stdint.h>

typedef struct {
    const int16_t *a;
    int64_t row_stride, pair_stride, rows;
    const int64_t *starts; /* or NULL */
    const int64_t *runs; /* or NULL */
    int64_t run;
    const int16_t *soon;
    const int16_t *b;
    int64_t pairs, segment, chain;
    int resume;
    int32_t *acc;
    float *c;
    int64_t ldc;
    const float *row_scale, *column_scale, *bias;
    float low, high;
    int stream;
} dfp_tile;

typedef void (*dfp_multiply)(const dfp_tile *);

/* What a depthwise convolution does with a patch of pixels that the same kernel positions reach:
 * products of int16 rows, channel by channel, 0 <= c < n. Term k of pixel (h, p) of item m (an
 * image) reads the row at x[k] + m * x_item + h * x_row + p * x_step. A chain of `chain` pairs of
 * terms (`dots`: of pixels) sums to no more than 2**31 - 1 - 65535 in magnitude.
 *
 * patch: y[m * y_item + h * y_row + p * y_step + c] = RN32(scale[m] * sum over k of
 *        x[k][..][c] * w[k][c]); scale[m] is a power of two, or NaN. Unless `careful`,
 *        |sum| < 2**47, and neither scale nor a nonzero result is subnormal. If all terms are one
 *        chain, it may be as large as 2**31 - 1. With `stream`, y, its steps and n are multiples of
 *        64 bytes, and the stores may go past the caches.
 *        A row of pixels lower, terms `fresh` to `fresh_end` - 1 read what nothing has read before.
 * dots:  sums[k][c] += sum over m, h, p of x[k][..][c] * dy[m * y_item + .. + c]; a call adds less
 *        than 2**47. */
typedef struct {
    const int16_t **x;
    int64_t terms, n, items, rows, pixels;
    int64_t x_item, x_row, x_step, y_item, y_row, y_step;
    int64_t chain;
    int64_t fresh, fresh_end;
    const int16_t **w;
    float *y;
    const double *scale;
    int careful, stream;
    const int16_t *dy;
    int64_t **sums;
} dfp_patch;

/* The same sums in spill mode, for one pixel or one row of dw:
 *
 *   sum[c] = sum over t of x[t][c] * w[t][c], 0 <= c < n; a NULL x[t] contributes nothing.
 *
 * Terms come in segments of `segment` terms, and a chain of int32 additions is at most `chain`
 * terms long and ends with its segment; chains are added in float32, in order. The sums start from
 * `sums` if `resume`, else from zero. If `y` is not NULL they go there, times `scale`, a power of
 * two, and rounded once; else they go back to `sums`. */
typedef struct {
    const int16_t **x;
    const int16_t **w;
    int64_t terms, segment, chain, n;
    int resume;
    float *sums;
    float *y;
    double scale;
} dfp_terms;

/* Exact products on int8 tiles, by digits: an instruction set without fast int16 products may bring
 * these beside its pairs of int16. A mantissa is split in two digits of d bits,
 *
 *   products = 3 (both operands of at most 14 bits):  q = 128 h + l, d = 7, -64 <= h, l <= 64;
 *        planes h, h + l, l; sums hh, ss, ll (Karatsuba: hl + lh = ss - hh - ll);
 *   products = 4 (any operands):  q = 256 h + l, d = 8, h signed, 0 <= l < 256;
 *        planes h, l; sums hh, hl + lh, ll;
 *
 * and sum q q' = 2**2d hh + 2**d (hl + lh) + ll. K is cut into steps of 64 products. Within a step
 * products lie in an order of the kernel's own where they come from lines of the data, and as they
 * come where they are its rows (`natural`): the same in every plane, of A and of B.
 *
 *   line     64 bytes: the digits of one row of A in one step.
 *   A        line r of step s of plane p: a + p * a_plane + a_step[s] + 64 * r.
 *   B        groups of four products, [16 columns][4 products]: half h of the 32 columns, group g
 *            of step s of plane p: b + p * b_plane + s * b_step + h * b_half + 64 * g.
 *   sums     [3][32][32] int32, no longer than 131072 (3) or 32768 (4) products: none overflows.
 */
enum {
    DFP_DIGIT_TILE = 32,        /* rows, and columns, of a tile of C */
    DFP_DIGIT_STEP = 64,
    DFP_DIGIT_SUMS = 3 * 32 * 32,
    DFP_DIGIT_K_3 = 131072,
    DFP_DIGIT_K_4 = 32768,
};

typedef struct {
    const int8_t *a;
    int64_t a_plane;
    const int64_t *a_step;
    const int8_t *b;
    int64_t b_plane, b_step, b_half;
    int64_t steps;
    int products;
    int resume;                 /* from what `sums` holds, else from zero */
    int32_t *sums;
} dfp_digit_tile;

/* Rows of a tile whose sums are complete: row i, rounded once and scaled, goes to c[row[i] + j],
 * j < cols, unless row[i] is negative. Scales, bias, its bounds and `stream` as in dfp_tile. */
typedef struct {
    const int32_t *sums;
    float *c;
    const int64_t *row;
    int64_t next, rows, cols;
    const float *row_scale, *column_scale, *bias;
    float low, high;
    int products, stream;
} dfp_digit_rows;

typedef struct {
    /* Before the first and after the last call of `multiply` on a thread. */
    void (*open)(void);
    void (*close)(void);
    /* Lines of one row of A: `count` products in a row, zeros up to a multiple of a step; step s
     * of plane p goes to out + s * step + p * plane. */
    void (*lines)(const int16_t *q, int64_t count, int products, int8_t *out, int64_t step,
                  int64_t plane);
    /* n <= 32 lines of one step of A from rows: line i has rows[k][c + i] for the step's 64 k,
     * in natural order. A row that is NULL is zeros, here and below. */
    void (*lines_of_rows)(const int16_t *const *rows, int64_t c, int64_t n, int products,
                          int8_t *out, int64_t plane);
    /* One step of B, n <= 32 columns, from rows: rows[k][c + j]; */
    void (*columns_of_rows)(const int16_t *const *rows, int64_t c, int64_t n, int natural,
                            int products, int8_t *out, int64_t half, int64_t plane);
    /* 16 columns of it, from q[j * 64 + k]; */
    void (*columns)(const int16_t *q, int natural, int products, int8_t *out, int64_t plane);
    /* and four copies, for windows that slide along the rows: group g of copy v has the products
     * 4g + v and the three after it, of `count` products in all. */
    void (*columns_sliding)(const int16_t *const *rows, int64_t count, int64_t c, int64_t n,
                            int products, int8_t *out, int64_t half, int64_t plane,
                            int64_t copy);
    /* Sums of a tile; on the way it finishes the rows of another one, whose sums it may share. */
    void (*multiply)(const dfp_digit_tile *tile, dfp_digit_rows *pending);
    void (*finish)(dfp_digit_rows *pending);
    /* The same at once, the tile transposed and all of it times *row_scale: column j goes to
     * c[j * ldc + i], i < rows. */
    void (*finish_transposed)(const dfp_digit_rows *done, int64_t ldc);
} dfp_digits;

/* y = activation((x - center) * scale + offset + residual): batch norm, a bias, a residual sum, and
 * a ReLU, which clips, or a SiLU. Every operation rounds to float. Arrays that are NULL leave their
 * step out (center and scale together); those of channels repeat themselves up to n channels. As a
 * mask, `high` is NaN for none. */
typedef struct {
    const float *x, *residual;
    const float *center, *scale, *offset;
    float low, high;
    int silu;
    int64_t n;
} dfp_map;

enum { DFP_PARTS = 8 };     /* that are added in one expression, as TensorFlow's AddN does */

/* The gradient dy that arrives: the sum of the parts, in order, times 1 where the mask's map
 * (without its clipping) is above 0 and not from `high` on, or the bit is set, else times 0; or
 * times the SiLU's derivative at the mask's map. And with `a`, that of batch norm,
 * dx = a * dy + (b * (x - center) + c), or a * dy where b is NULL. */
typedef struct {
    const float *parts[DFP_PARTS];
    int n_parts;
    const uint8_t *bits;
    dfp_map mask;               /* its x is NULL for none */
    int self;                   /* are the mask's x and center those below? */
    const float *x, *center, *a, *b, *c;
    int64_t n;                  /* as of a map, and the mask's */
} dfp_gradient;

/* Local response normalisation of pixels of n channels: y = x / s ** (quarters / 4), where
 * s = bias + alpha * (the sum of squares of the channels at most `radius` < n away). */
typedef struct {
    int64_t n, radius;
    float bias, alpha;
    float slope;                /* of the gradient: 2 * alpha * beta */
    int quarters;               /* 1 to 4 */
} dfp_response;

/* A step of an optimizer, numerics.md, "Optimizers": new weights and slots from weights, gradient
 * and slots. An array may be written where it, or the gradient, is read, index by index. `m` is
 * NULL for SGD without momentum, `h` for Adam without the largest v. Without `decay`, 0, weights
 * do not decay. */
typedef struct {
    const float *w, *g, *m, *v, *h;
    float *w_to, *m_to, *v_to, *h_to;
    float rate, decay;
    float momentum;             /* of SGD */
    int nesterov;
    float alpha, renewal, renewal2, epsilon; /* of Adam: m and v move so far towards g and g**2 */
} dfp_update;

enum { DFP_SLOT_BLOCK = 64 }; /* elements of a slot that share an exponent; at most DFP_SHORT */

enum { DFP_SHORT = 80 };    /* elements of a group whose overhead would exceed its work */

/* What an instruction set brings; chosen once, when the library is loaded. */
typedef struct {
    const char *isa;
    int mr, nr;
    dfp_multiply exact, spill;
    /* Of nr / 2 columns; NULL where they would not be faster. */
    dfp_multiply exact_narrow, spill_narrow;
    /* The largest bit pattern of |x[i]|: at least 0x7f800000 if there is a NaN or an Inf. */
    uint32_t (*absmax_bits)(const float *x, int64_t n);
    /* q[i] = clamp(round(x[i] * 2**-e), -qmax, qmax), nearest-even or toward zero; -e is the sum
     * of the exponents of the two factors. With `stream`, q is 64-byte aligned, and the stores
     * may go past the caches. */
    void (*quantize)(const float *x, int64_t n, float factor, float factor2, float qmax,
                     int truncate, int stream, int16_t *q);
    /* The same for groups of 1 to DFP_SHORT elements, one after the other: their exponents for
     * mantissas of so many bits, INT32_MIN where there is a NaN or an Inf; and mantissas by
     * exponents, which may be any, 0 where they are INT32_MIN. */
    void (*exponents)(const float *x, int64_t groups, int64_t n, int bits, int32_t *e);
    void (*quantize_groups)(const float *x, int64_t groups, int64_t n, const int32_t *e, float qmax,
                            int truncate, int16_t *q);
    /* q[i] = clamp(floor(x[i] * 2**-e + u), -qmax, qmax), u the noise (docs/numerics.md) of element
     * index + i, for groups of n elements with an exponent each, which may be any; those beyond
     * +-252 are as good as these. */
    void (*stochastic)(const float *x, int64_t groups, int64_t n, int64_t index, const int32_t *e,
                       double qmax, const uint32_t *key, uint64_t step, int16_t *q);
    /* Adds to counts[0] how many elements of x are not zero, to counts[1] how many of these have
     * a mantissa of zero in q, to counts[2] how many have a magnitude whose bits exceed `limit`. */
    void (*count)(const float *x, const int16_t *q, int64_t n, uint32_t limit, int64_t *counts);
    /* How many mantissas are zero. */
    int64_t (*zeros)(const int16_t *q, int64_t n);
    /* counts[0] and counts[1] as by `count`, but of one element in 32: of n / 512 times 16. */
    void (*sample)(const float *x, const int16_t *q, int64_t n, int64_t *counts);
    /* to[i] = RN(from[i] * 2**-shift), ties to even, -1 <= shift <= 16; `to` may be `from`. */
    void (*align)(const int16_t *from, int64_t n, int shift, int16_t *to);
    /* The same for the elements c to c + n, n <= DFP_DIGIT_TILE, of DFP_DIGIT_STEP rows with a
     * shift each: aligned[k] is where they are then, in `space` or, unchanged, in the row. */
    void (*align_rows)(const int16_t *const *rows, int64_t c, int64_t n, const int *shifts,
                       int16_t *space, const int16_t **aligned);
    /* The same in place for `count` pairs: the first of each by `first`, the second by `second`. */
    void (*align_pairs)(int16_t *pairs, int64_t count, int first, int second);
    /* Pairs for panels of mr, `panel` elements apart: of pair i of the rows p and q, `step`
     * elements from one to the next, out[c / mr * panel + 2 * (i * mr + c % mr) + {0, 1}] =
     * {p[i * step + c], q[i * step + c]}, c < n. The last panel is filled with zeros. */
    void (*interleave)(const int16_t *p, const int16_t *q, int64_t step, int64_t pairs, int64_t n,
                       int mr, int64_t panel, int16_t *out);
    /* to[i * to_step + c] = from[i * from_step + c], i < rows, c < n; rows of `to` do not
     * overlap. */
    void (*copy_rows)(const int16_t *from, int64_t from_step, int64_t rows, int64_t n, int16_t *to,
                      int64_t to_step);
    void (*depthwise_patch)(const dfp_patch *);
    void (*depthwise_dots)(const dfp_patch *);
    void (*depthwise_spill)(const dfp_terms *);
    /* y[i] = element first + i of the map, i < count. */
    void (*map)(const dfp_map *, int64_t first, int64_t count, float *y);
    /* Bit i % 8 of bits[i / 8] says whether y[i] > 0; n is a multiple of 8. */
    void (*positive_bits)(const float *y, int64_t n, uint8_t *bits);
    /* dx[i] = element first + i of the gradient, i < count; with bits, `first` is a multiple of
     * 8. */
    void (*gradient)(const dfp_gradient *, int64_t first, int64_t count, float *dx);
    /* Of y[pixels][n], pixel by pixel in double: adds y to sums[c] and, if there is a `center`,
     * y * (x - center[c]) to sums[n + c], where the difference is rounded to float. */
    void (*channel_sums)(const float *y, const float *x, const float *center, int64_t pixels,
                         int64_t n, double *sums);
    /* The same of y and its squares; bounds[c] and bounds[n + c] become smaller and larger where y
     * is, a NaN may leave them. */
    void (*moments)(const float *y, int64_t pixels, int64_t n, double *sums, float *bounds);
    /* total[c] = the sum over r < count, in order, of rows[r * stride + c]. */
    void (*add_rows)(const double *rows, int64_t count, int64_t stride, int64_t n, double *total);
    /* Normalised responses of x or, with a dy, their gradient; `room` is for 4 * n + 2 * radius
     * floats. */
    void (*response)(const dfp_response *, const float *x, const float *dy, int64_t pixels,
                     float *room, float *y);
    /* A step on n weights. */
    void (*sgd)(const dfp_update *, int64_t n);
    void (*adam)(const dfp_update *, int64_t n);
    /* n elements of a slot in dynamic fixed point, from the beginning of a block on: to float,
     * squared if they are roots; and from float, which may be overwritten by their roots if they
     * shall be kept. They are rounded stochastically, as element `index` of the slot and the next;
     * a root above 0 has a mantissa of at least 1. */
    void (*unpack_slot)(const int16_t *q, const int32_t *e, int64_t n, int root, float *to);
    void (*pack_slot)(float *x, int64_t n, int root, int64_t index, const uint32_t *key,
                      uint64_t step, int16_t *q, int32_t *e);
    /* Does nothing but multiply-accumulate, on registers; returns how many products. */
    int64_t (*peak)(int64_t rounds);
    const dfp_digits *digits;   /* or NULL */
} dfp_kernel;

#define DFP_CAT_(a, b) a##b
#define DFP_CAT(a, b) DFP_CAT_(a, b)

/* 2**e, or what is as good beyond +-252: float32 overflows, or vanishes, all the same. */
static inline double dfp_power_f64(int64_t e) {
    const int64_t near = e < -252 ? -252 : e > 252 ? 252 : e;
    const union { int64_t bits; double value; } power = {(1023 + near) << 52};
    return power.value;
}

/* RN32(sum * scale), rounded once: int64 to a 53-bit double by rounding to odd, so that the
 * rounding to float32 sees where the sum lay (Boldo and Melquiond, 2008). */
static inline float dfp_round(int64_t sum, double scale) {
    const int64_t limit = (int64_t)1 << 53;
    if (sum > limit || sum < -limit) sum = (sum >> 11 | ((sum & 2047) != 0)) * 2048;
    return (float)((double)sum * scale);
}

#endif
