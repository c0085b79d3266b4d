/* Every microkernel of this machine against what microkernel.h says, in plain C.
 *
 *   microkernels          tests all there are; prints one line for each; fails at the first error
 *   microkernels <isa>    tests one
 *
 * Needs only a C compiler, so that it runs on any machine, emulated ones included. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "microkernels/table.h"

#ifdef DFP_HAS_AVX512VNNI
/* AVX-VNNI's tile on CPUs that know its instruction in AVX-512's encoding only. */
#define ISA avxvnni_evex
#define ISA_NAME "avxvnni-evex"
#define TARGET __attribute__((target("avx512f,avx512vl,avx512vnni,avx2,fma")))
#include "microkernels/avx256.inc.h"
#define V_DOT(acc, a, b) __asm__("vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b))
#include "microkernels/gemm_tile.h"
#endif

static const dfp_kernel *kernel;
static int64_t checks;

#define CHECK(ok, ...)                                                           \
    do {                                                                         \
        checks++;                                                                \
        if (!(ok)) {                                                             \
            printf("%s: %s: ", kernel->isa, __func__);                           \
            printf(__VA_ARGS__);                                                 \
            printf("\n");                                                        \
            exit(1);                                                             \
        }                                                                        \
    } while (0)

/* ---- Data ------------------------------------------------------------------------------------ */

static uint64_t state = 88172645463325252u;

static uint32_t word(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32);
}

static int64_t between(int64_t low, int64_t high) { return low + word() % (high - low + 1); }

enum data { RANDOM, LARGEST, SIGNS, KINDS };

static int16_t mantissa(enum data kind, int q) {
    if (kind == LARGEST) return (int16_t)q;
    if (kind == SIGNS) return (int16_t)(word() & 1 ? q : -q);
    return (int16_t)between(-q, q);
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A sum of either sign that lies at, or one beside, a float32 or the middle between two. */
static int64_t near_tie(int bit) {
    const int64_t v = ((int64_t)1 << bit) + ((int64_t)word() & 3) * ((int64_t)1 << (bit - 24));
    return (v + between(-1, 1)) * (word() % 2 ? 1 : -1);
}

enum { NAN_EXPONENT = INT32_MIN };

/* The exact value rounded once: a long double holds every int64, on every machine we know. */
static float rounded(int64_t sum, int exponent) {
    if (exponent == NAN_EXPONENT) return float_of(0x7fc00000);
    return (float)ldexpl((long double)sum, exponent);
}

/* ---- Scales ---------------------------------------------------------------------------------- */

enum { MAX_SCALES = 64 };

static float row_scales[MAX_SCALES + 3], column_scales[MAX_SCALES + 3];
static int row_exponents[MAX_SCALES], column_exponents[MAX_SCALES];

static double scale_of(int exponent) {
    return exponent == NAN_EXPONENT ? (double)float_of(0x7fc00000) : ldexp(1.0, exponent);
}

/* Some that are one and the same, some that differ, some that are NaN. */
static float *any_scales(float *space, int *exponents, int low, int high) {
    float *const scales = space + between(0, 3);
    const int kind = word() % 3, same = between(low, high);
    for (int i = 0; i < MAX_SCALES; i++) {
        exponents[i] = kind ? between(low, high) : same;
        if (kind == 2 && word() % 8 == 0) exponents[i] = NAN_EXPONENT;
        scales[i] = (float)scale_of(exponents[i]);
    }
    return scales;
}

/* Of rows and, half of the time, of columns: no result can be subnormal. */
static void choose_scales(const float **row_scale, const float **column_scale) {
    const int both = word() % 2, low = both ? -62 : -126, high = both ? 62 : 127;
    *row_scale = any_scales(row_scales, row_exponents, low, high);
    *column_scale = both ? any_scales(column_scales, column_exponents, -62, 62) : NULL;
    for (int i = 0; i < MAX_SCALES && !both; i++) column_exponents[i] = 0;
}

static float any_float(void) {
    static const float special[] = {0.0f, -0.0f, 0.5f, -1.5f, 2.5f, 3.4028235e38f, -3.4028235e38f,
                                    1e-45f, -1.1754944e-38f, 8191.5f, -32767.5f};
    if (word() % 4 == 0) return special[word() % (sizeof special / sizeof *special)];
    if (word() % 4 == 0) return float_of((word() & 0xfff00000u) % 0x7f800000u);
    if (word() % 2) return (float)between(-70000, 70000) / 2;
    const uint32_t bits = word();
    return (bits >> 23 & 255) == 255 ? 1.0f : float_of(bits);
}

static float biases[MAX_SCALES];

/* Half of the time. */
static const float *choose_bias(void) {
    for (int i = 0; i < MAX_SCALES; i++) biases[i] = any_float();
    return word() % 2 ? biases : NULL;
}

/* As a ReLU does, or a ReLU6, or not at all. */
static void choose_clip(float *low, float *high) {
    static const float most[] = {INFINITY, INFINITY, 6.0f};
    const int which = word() % 3;
    *low = which ? 0.0f : -INFINITY;
    *high = most[which];
}

static float clipped(float v, float low, float high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}

static int exponent_at(int64_t i, int64_t j) {
    const int row = row_exponents[i], column = column_exponents[j];
    return row == NAN_EXPONENT || column == NAN_EXPONENT ? NAN_EXPONENT : row + column;
}

/* ---- The tile -------------------------------------------------------------------------------- */

enum { MAX_TILE = 64, MAX_PAIRS = 600, SPACE = 2 * MAX_TILE * (MAX_PAIRS + 40) };

static int16_t a_space[SPACE] __attribute__((aligned(64)));
static int16_t b_space[SPACE] __attribute__((aligned(64)));
static float c_space[MAX_TILE * (MAX_TILE + 32)] __attribute__((aligned(64)));
static int32_t acc_space[2 * MAX_TILE * MAX_TILE] __attribute__((aligned(64)));
static int64_t exact_sum[MAX_TILE][MAX_TILE];
static float float_sum[MAX_TILE][MAX_TILE];

static int16_t a_at(const dfp_tile *t, int64_t i, int64_t k) {
    const int64_t row = i < t->rows ? i : t->rows - 1;
    const int64_t p = k / 2, at = t->runs ? t->runs[p / t->run] + p % t->run * t->pair_stride
                                          : p * t->pair_stride;
    return t->a[(t->starts ? t->starts[row] : row * t->row_stride) + at + k % 2];
}

/* Whether the tile has half the columns, and how many it has. */
static int narrow, nr;

static void expect_sums(const dfp_tile *t, int resume) {
    for (int64_t i = 0; i < kernel->mr; i++)
        for (int64_t j = 0; j < nr; j++) {
            int64_t exact = resume ? exact_sum[i][j] : 0;
            float sum = resume ? float_sum[i][j] : 0.0f;
            int64_t chain = 0;
            for (int64_t p = 0; p < t->pairs; p++) {
                for (int64_t k = 2 * p; k < 2 * p + 2; k++)
                    chain += (int64_t)a_at(t, i, k) * t->b[(p * nr + j) * 2 + k % 2];
                if ((p % t->segment + 1) % t->chain == 0 || (p + 1) % t->segment == 0) {
                    exact += chain;
                    sum += (float)chain;
                    chain = 0;
                }
            }
            exact_sum[i][j] = exact;
            float_sum[i][j] = sum;
        }
}

/* New operands for `pairs` pairs, in either layout of A, perhaps in runs, or with starts, for any
 * number of rows. */
static void fill_operands(dfp_tile *t, int64_t pairs, enum data kind, int qa, int qb,
                          int may_run) {
    t->pairs = pairs;
    t->rows = word() % 2 ? kernel->mr : between(1, kernel->mr);
    t->a = a_space + between(0, 3);
    if (word() % 2) {
        t->pair_stride = 2;
        t->row_stride = 2 * pairs + between(0, 9);
    } else {
        t->pair_stride = 2 * kernel->mr;
        t->row_stride = 2;
    }
    for (int64_t i = 0; i < SPACE; i++) a_space[i] = mantissa(RANDOM, 32767);
    for (int64_t i = 0; i < t->rows; i++)
        for (int64_t k = 0; k < 2 * pairs; k++)
            a_space[t->a - a_space + i * t->row_stride + k / 2 * t->pair_stride + k % 2] =
                mantissa(kind, qa);
    t->starts = NULL;
    if (word() % 2) {
        /* The same rows, in another order, some more than once. */
        static int64_t starts[MAX_TILE];
        for (int i = 0; i < kernel->mr; i++)
            starts[i] = between(0, t->rows - 1) * t->row_stride;
        t->starts = starts;
    }
    t->runs = NULL;
    if (word() % 2 && may_run) {
        /* The same pairs, or others that are in the same bounds: runs from anywhere in A. */
        static int64_t runs[MAX_PAIRS];
        t->run = between(1, pairs);
        for (int64_t r = 0; r * t->run < pairs; r++)
            runs[r] = between(0, pairs - t->run) * t->pair_stride;
        t->runs = runs;
    }
    t->b = t->soon = b_space;
    for (int64_t i = 0; i < pairs * nr * 2; i++) b_space[i] = mantissa(kind, qb);
}

static void check_c(const dfp_tile *t, int spill, const char *what) {
    const float *end = t->c + (kernel->mr - 1) * t->ldc + nr;
    for (float *c = c_space; c < c_space + MAX_TILE * (MAX_TILE + 32); c++) {
        const int64_t i = (c - t->c) / t->ldc, j = (c - t->c) % t->ldc;
        float expected = float_of(0x7fc0dead);
        if (c >= t->c && c < end && j < nr) {
            expected = rounded(spill ? (int64_t)float_sum[i][j] : exact_sum[i][j],
                               exponent_at(i, j));
            if (t->bias) expected = clipped(expected + t->bias[j], t->low, t->high);
        }
        CHECK(bits_of(*c) == bits_of(expected), "%s, c[%d][%d]: got %a, expected %a", what, (int)i,
              (int)j, *c, expected);
    }
}

static void check_tile(int spill) {
    const int tile = kernel->mr * nr;
    const int qa = (1 << between(7, 15)) - 1, qb = (1 << between(7, 15)) - 1;
    const enum data kind = word() % KINDS;
    const int64_t limit = (INT32_MAX - (spill ? 0 : 65535)) / ((int64_t)qa * qb) / 2;
    const int parts = between(1, 3);
    dfp_tile t = {.acc = acc_space};
    choose_scales(&t.row_scale, &t.column_scale);
    t.bias = choose_bias();
    choose_clip(&t.low, &t.high);
    t.chain = word() % 4 ? limit : between(1, limit);
    t.resume = word() % 3 == 0;
    for (int i = 0; i < kernel->mr; i++)
        for (int j = 0; j < nr; j++) {
            /* Room for what the parts add: |v| stays below 2**47. */
            const int32_t hi = (int32_t)between(-2000000000, 2000000000), lo = word() & 65535;
            exact_sum[i][j] = (int64_t)hi * 65536 + lo;
            float_sum[i][j] = (float)hi;
            if (spill) {
                memcpy(acc_space + i * nr + j, &float_sum[i][j], sizeof(float));
            } else {
                acc_space[i * nr + j] = hi;
                acc_space[tile + i * nr + j] = lo;
            }
        }
    for (int part = 0; part < parts; part++) {
        const int64_t segments = between(1, 3);
        fill_operands(&t, segments * between(1, MAX_PAIRS / (word() % 2 ? 3 : 60)), kind, qa, qb,
                      !spill);
        t.segment = t.pairs / segments;
        expect_sums(&t, t.resume);
        t.c = NULL;
        if (part == parts - 1) {
            t.stream = word() % 2;
            t.ldc = t.stream ? (nr + 15) / 16 * 16 + 16 * between(0, 1)
                             : nr + between(0, 9);
            t.c = c_space + (t.stream ? 16 : between(0, 20));
            for (int i = 0; i < MAX_TILE * (MAX_TILE + 32); i++) c_space[i] = float_of(0x7fc0dead);
        }
        (narrow ? spill ? kernel->spill_narrow : kernel->exact_narrow
                : spill ? kernel->spill : kernel->exact)(&t);
        t.resume = 1;
        for (int n = 0; !t.c && n < tile; n++) {
            const int i = n / nr, j = n % nr;
            const int32_t hi = acc_space[n], lo = acc_space[tile + n];
            if (spill)
                CHECK((uint32_t)hi == bits_of(float_sum[i][j]), "acc[%d][%d]: got %a, expected %a",
                      i, j, float_of((uint32_t)hi), float_sum[i][j]);
            else
                CHECK(lo >= 0 && lo < 65536 && (int64_t)hi * 65536 + lo == exact_sum[i][j],
                      "acc[%d][%d]: got hi %d, lo %d, expected their sum to be %lld", i, j, hi, lo,
                      (long long)exact_sum[i][j]);
        }
    }
    check_c(&t, spill, spill ? "spill" : "exact");
}

/* Sums beside the ties of rounding to float32, and at both ends of their range. */
static void check_rounding(void) {
    const int tile = kernel->mr * nr;
    dfp_tile t = {.acc = acc_space, .resume = 1, .c = c_space, .ldc = nr};
    choose_scales(&t.row_scale, &t.column_scale);
    t.bias = choose_bias();
    choose_clip(&t.low, &t.high);
    fill_operands(&t, 1, LARGEST, 0, 0, 0);
    t.segment = t.chain = 1;
    for (int n = 0; n < tile; n++) {
        int64_t v = near_tie(between(24, 46));
        if (word() % 8 == 0) v = (((int64_t)1 << 47) - 1) * (word() % 2 ? 1 : -1);
        if (word() % 8 == 0) v = 0;
        exact_sum[n / nr][n % nr] = v;
        acc_space[n] = (int32_t)((v - (v & 65535)) / 65536);
        acc_space[tile + n] = (int32_t)(v & 65535);
    }
    for (int i = 0; i < MAX_TILE * (MAX_TILE + 32); i++) c_space[i] = float_of(0x7fc0dead);
    (narrow ? kernel->exact_narrow : kernel->exact)(&t);
    check_c(&t, 0, "rounding");
}

/* ---- Quantize, align, interleave ------------------------------------------------------------- */

enum { MAX_N = 300, MAX_LONG = 5000, MAX_GROUPS = 300, ALL_GROUPS = MAX_GROUPS * DFP_SHORT };

/* To nearest, ties to even, or toward zero. */
static int quantized(float x, int power, int qmax, int truncate) {
    double v = ldexp(x, power);
    v = truncate ? trunc(v) : nearbyint(v);
    return (int)(v > qmax ? qmax : v < -qmax ? -qmax : v);
}

static void check_quantize(void) {
    static float x[MAX_LONG];
    static int16_t space[MAX_LONG + 33] __attribute__((aligned(64)));
    const int stream = word() % 2;
    const int64_t n = word() % 16 ? between(0, MAX_N) : between(0, MAX_LONG);
    const int power = word() % 2 ? between(-2, 2) : between(-252, 252);
    const int power1 = power > 126 ? 126 : power < -126 ? -126 : power;
    const int qmax = (1 << between(7, 15)) - 1, truncate = word() % 2;
    int16_t *const q = space + (stream ? 32 : between(1, 32));
    for (int i = 0; i < n; i++) x[i] = any_float();
    q[-1] = q[n] = 12345;
    kernel->quantize(x, n, ldexpf(1.0f, power1), ldexpf(1.0f, power - power1), (float)qmax,
                     truncate, stream, q);
    for (int i = 0; i < n; i++) {
        const int expected = quantized(x[i], power, qmax, truncate);
        CHECK(q[i] == expected, "%a * 2**%d, qmax %d, truncate %d, stream %d: got %d, expected %d",
              x[i], power, qmax, truncate, stream, q[i], expected);
    }
    CHECK(q[-1] == 12345 && q[n] == 12345, "wrote beyond an end");
}

/* Of a group: near to each other, anything that counts, or anything. */
static int32_t any_exponent(int kind) {
    static const int32_t special[] = {INT32_MAX, INT32_MIN + 1, -253, 253, -252, 252, -127, 127};
    if (kind == 0) return between(-3, 3);
    if (kind == 1 || word() % 4) return between(-252, 252);
    return special[word() % (sizeof special / sizeof *special)];
}

static void check_quantize_groups(void) {
    static float space_x[ALL_GROUPS];
    static int16_t space[ALL_GROUPS + 34];
    static int32_t space_e[MAX_GROUPS];
    const int qmax = (1 << between(7, 15)) - 1, truncate = word() % 2, kind = word() % 3;
    const int64_t n = between(1, DFP_SHORT), groups = between(0, word() % 4 ? 40 : MAX_GROUPS);
    /* They end where memory does. */
    float *const x = space_x + ALL_GROUPS - groups * n;
    int32_t *const e = space_e + MAX_GROUPS - groups;
    int16_t *const q = space + between(1, 32);
    for (int64_t i = 0; i < groups * n; i++) x[i] = any_float();
    for (int64_t g = 0; g < groups; g++)
        e[g] = kind == 2 && word() % 8 == 0 ? NAN_EXPONENT : any_exponent(kind);
    q[-1] = q[groups * n] = 12345;
    kernel->quantize_groups(x, groups, n, e, (float)qmax, truncate, q);
    for (int64_t i = 0; i < groups * n; i++) {
        const int32_t one = e[i / n];
        const int expected = one == NAN_EXPONENT ? 0 : quantized(x[i], -one, qmax, truncate);
        CHECK(q[i] == expected, "group %d of %d, %a * 2**-%d, qmax %d: got %d, expected %d",
              (int)(i / n), (int)n, x[i], one, qmax, q[i], expected);
    }
    CHECK(q[-1] == 12345 && q[groups * n] == 12345, "wrote beyond an end");
}

/* floor(log2(x)) of the largest magnitude, that of the least subnormal where there is none. */
static int32_t exponent_of(const float *x, int64_t n, int bits) {
    double most = ldexp(1.0, -149);
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) return NAN_EXPONENT;
        most = fmax(most, fabs(x[i]));
    }
    return ilogb(most) - (bits - 2);
}

static void check_exponents(void) {
    static float space[ALL_GROUPS];
    static int32_t e[MAX_GROUPS + 1];
    const int64_t n = between(1, DFP_SHORT), groups = between(0, word() % 4 ? 40 : MAX_GROUPS);
    const int bits = between(8, 16), special = word() % 3 == 0;
    float *const x = space + ALL_GROUPS - groups * n;
    for (int64_t g = 0; g < groups; g++) {
        const int small = word() % 4;
        for (int64_t i = g * n; i < (g + 1) * n; i++) {
            x[i] = any_float();
            if (small == 0) x[i] = word() % 2 ? 0.0f : -0.0f;
            if (small == 1) x[i] = float_of(word() & (0x807fffffu >> (word() % 23)));
            if (special && word() % 100 == 0) x[i] = float_of(word() | 0x7f800000u);
        }
    }
    e[groups] = 12345;
    kernel->exponents(x, groups, n, bits, e);
    for (int64_t g = 0; g < groups; g++) {
        const int32_t expected = exponent_of(x + g * n, n, bits);
        CHECK(e[g] == expected, "group %d of %d, of %d elements: got %d, expected %d", (int)g,
              (int)groups, (int)n, e[g], expected);
    }
    CHECK(e[groups] == 12345, "wrote beyond the end");
}

static void check_count(void) {
    enum { LONG = 70000 };
    static float x[LONG];
    static int16_t q[LONG];
    const int64_t n = word() % 16 ? between(0, MAX_N) : between(0, LONG);
    const uint32_t limit = bits_of(any_float()) & 0x7fffffffu;
    int64_t counts[3], expected[3];
    for (int k = 0; k < 3; k++) counts[k] = expected[k] = (int64_t)word() << 20;
    for (int64_t i = 0; i < n; i++) {
        x[i] = word() % 4 ? any_float() : float_of(limit + (uint32_t)between(-1, 1));
        if (word() % 8 == 0) x[i] = word() % 2 ? 0.0f : -0.0f;
        if (isnan(x[i])) x[i] = 1.0f;
        q[i] = word() % 2 ? (int16_t)word() : 0;
        expected[0] += x[i] != 0;
        expected[1] += x[i] != 0 && q[i] == 0;
        expected[2] += fabsf(x[i]) > float_of(limit);
    }
    kernel->count(x, q, n, limit, counts);
    for (int k = 0; k < 3; k++)
        CHECK(counts[k] == expected[k], "%d elements, count %d: got %lld, expected %lld", (int)n, k,
              (long long)counts[k], (long long)expected[k]);
}

static void check_zeros(void) {
    enum { LONG = 70000 };
    static int16_t space[LONG];
    const int64_t n = word() % 16 ? between(0, MAX_N) : between(0, LONG);
    int16_t *const q = space + LONG - n;
    const int many = word() % 3;
    int64_t expected = 0;
    for (int64_t i = 0; i < n; i++) {
        q[i] = many == 2 || (many == 1 && word() % 2) ? 0 : (int16_t)word();
        expected += q[i] == 0;
    }
    const int64_t got = kernel->zeros(q, n);
    CHECK(got == expected, "%d elements: got %lld, expected %lld", (int)n, (long long)got,
          (long long)expected);
}

static void check_sample(void) {
    enum { LONG = 20000 };
    static float x[LONG];
    static int16_t q[LONG];
    const int64_t n = between(0, LONG);
    int64_t counts[2] = {5, 7}, nonzero = 5, lost = 7;
    for (int64_t i = 0; i < n; i++) {
        x[i] = word() % 4 ? any_float() : 0.0f;
        q[i] = word() % 2;
    }
    for (int64_t block = 0; block < n / 512; block++)
        for (int64_t i = 0; i < 16; i++) {
            const int64_t at = 512 * block + 16 * (block * 5 % 32) + i;
            nonzero += x[at] != 0;
            lost += x[at] != 0 && q[at] == 0;
        }
    kernel->sample(x, q, n, counts);
    CHECK(counts[0] == nonzero && counts[1] == lost, "%d elements: got %d and %d, expected %d, %d",
          (int)n, (int)counts[0], (int)counts[1], (int)nonzero, (int)lost);
}

static int16_t any_int16(void) {
    static const int16_t special[] = {0, 1, -1, 32767, -32767, -32768, 8191, -8191, 16384, -16384};
    return word() % 4 ? (int16_t)word() : special[word() % (sizeof special / sizeof *special)];
}

/* A double holds every bit of it, and is rounded to nearest with ties to even. */
static int aligned(int v, int shift) { return (int)nearbyint(ldexp(v, -shift)); }

/* Of what is doubled there is room for twice as much. */
static int16_t alignable(int shift) { return any_int16() / (shift < 0 ? 2 : 1); }

static void check_align(void) {
    static int16_t from[MAX_LONG], space[MAX_LONG + 34];
    const int64_t n = word() % 16 ? between(0, MAX_N) : between(0, MAX_LONG);
    const int shift = between(-1, 16), in_place = word() % 2;
    int16_t *const to = space + between(1, 32);
    for (int64_t i = 0; i < n; i++) from[i] = alignable(shift);
    to[-1] = to[n] = 12345;
    if (in_place) memcpy(to, from, n * sizeof *to);
    kernel->align(in_place ? to : from, n, shift, to);
    for (int64_t i = 0; i < n; i++) {
        const int expected = aligned(from[i], shift);
        CHECK(to[i] == expected, "%d * 2**-%d: got %d, expected %d", from[i], shift, to[i],
              expected);
    }
    CHECK(to[-1] == 12345 && to[n] == 12345, "wrote beyond an end");
}

static void check_align_rows(void) {
    enum { STEP = DFP_DIGIT_STEP, TILE = DFP_DIGIT_TILE, LONG = 50 };
    static int16_t data[STEP][LONG], space[STEP * TILE + 1];
    const int16_t *rows[STEP], *got[STEP];
    const int64_t n = word() % 2 ? TILE : between(1, TILE), c = between(0, LONG - n);
    const int many = word() % 2;
    int shifts[STEP];
    for (int k = 0; k < STEP; k++) {
        rows[k] = word() % 8 ? data[k] : NULL;
        shifts[k] = many ? between(-1, 16) : k < 20 ? 3 : 0;
        for (int i = 0; i < LONG; i++) data[k][i] = alignable(shifts[k]);
    }
    space[STEP * TILE] = 12345;
    kernel->align_rows(rows, c, n, shifts, space, got);
    for (int k = 0; k < STEP; k++) {
        CHECK(!got[k] == !rows[k], "row %d: %s", k, rows[k] ? "missing" : "comes from nowhere");
        for (int64_t i = 0; rows[k] && i < n; i++) {
            const int expected = aligned(data[k][c + i], shifts[k]);
            CHECK(got[k][i] == expected, "row %d, %d * 2**-%d: got %d, expected %d", k,
                  data[k][c + i], shifts[k], got[k][i], expected);
        }
    }
    CHECK(space[STEP * TILE] == 12345, "wrote beyond the end");
}

static void check_align_pairs(void) {
    static int16_t before[2 * MAX_N];
    static int16_t pairs[2 * MAX_N + 36] __attribute__((aligned(4)));
    const int64_t count = between(0, MAX_N);
    const int first = between(-1, 16), shift[2] = {first, word() % 2 ? first : between(-1, 16)};
    int16_t *const p = pairs + 2 * between(1, 16);
    for (int64_t i = 0; i < 2 * count; i++) p[i] = before[i] = alignable(shift[i % 2]);
    p[-1] = p[2 * count] = 12345;
    kernel->align_pairs(p, count, shift[0], shift[1]);
    for (int64_t i = 0; i < 2 * count; i++) {
        const int expected = aligned(before[i], shift[i % 2]);
        CHECK(p[i] == expected, "%d * 2**-%d: got %d, expected %d", before[i], shift[i % 2], p[i],
              expected);
    }
    CHECK(p[-1] == 12345 && p[2 * count] == 12345, "wrote beyond an end");
}

/* Philox4x32-10: the four words of a counter. */
static void philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)counter[0] * 0xD2511F53u;
        const uint64_t b = (uint64_t)counter[2] * 0xCD9E8D57u;
        counter[0] = (uint32_t)(b >> 32) ^ counter[1] ^ key0;
        counter[2] = (uint32_t)(a >> 32) ^ counter[3] ^ key1;
        counter[1] = (uint32_t)b, counter[3] = (uint32_t)a;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

/* The statement above, by the published vectors. */
static void check_philox(void) {
    uint32_t pi[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, zeros[4] = {0};
    static const uint32_t of_pi[4] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
    static const uint32_t of_zeros[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
    philox(pi, 0xa4093822, 0x299f31d0);
    philox(zeros, 0, 0);
    CHECK(!memcmp(pi, of_pi, sizeof pi) && !memcmp(zeros, of_zeros, sizeof zeros),
          "other words than published");
}

/* Beyond these bounds nothing changes. */
static int stochastic_power(int32_t e) { return e < -252 ? 252 : e > 252 ? -252 : -e; }

/* In one group, or in many of any length. */
static void check_stochastic(void) {
    static float x[MAX_LONG];
    static int32_t e[MAX_LONG];
    static double u[MAX_LONG];
    static int16_t space[MAX_LONG + 2];
    int16_t *const q = space + 1;
    const int64_t most = word() % 16 ? MAX_N : MAX_LONG;
    const int64_t of_group = word() % 2 ? between(1, most) : between(1, 40);
    const int64_t groups = between(0, most / of_group), n = groups * of_group;
    /* Both halves of the counter's words count. */
    const int64_t index = word() % 2 ? between(0, 4000) : (int64_t)word() << between(0, 30);
    const uint64_t step = (uint64_t)word() << 32 | word();
    const uint32_t key[2] = {word(), word()};
    const int kind = word() % 3, qmax = (1 << between(7, 15)) - 1;
    for (int g = 0; g < groups; g++) e[g] = kind ? any_exponent(kind) : between(-2, 12);
    for (int i = 0; i < n; i++) {
        const int power = stochastic_power(e[i / of_group]);
        const uint64_t block = (uint64_t)(index + i) / 4;
        uint32_t words[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)step,
                             (uint32_t)(step >> 32)};
        philox(words, key[0], key[1]);
        u[i] = ldexp(words[(index + i) % 4] >> 8, -24);
        x[i] = any_float();
        /* Where the sum is 0 or 1, or just not. */
        if (power > -100 && word() % 4 == 0)
            x[i] = (float)ldexp(word() % 2 - u[i] - word() % 2 * ldexp(1.0, -24), -power);
    }
    q[-1] = q[n] = 12345;
    kernel->stochastic(x, groups, of_group, index, e, qmax, key, step, q);
    for (int i = 0; i < n; i++) {
        /* floor(v + u) without the sum, which may not fit a double: whole part and rest are exact,
         * and so is 1 - u. */
        const int power = stochastic_power(e[i / of_group]);
        const double v = ldexp(x[i], power), whole = trunc(v);
        double expected = v < 0 ? whole - (u[i] < whole - v) : whole + (v - whole >= 1 - u[i]);
        expected = expected > qmax ? qmax : expected < -qmax ? -qmax : expected;
        CHECK(q[i] == (int)expected, "%a * 2**%d + %a, qmax %d: got %d, expected %d", x[i], power,
              u[i], qmax, q[i], (int)expected);
    }
    CHECK(q[-1] == 12345 && q[n] == 12345, "wrote beyond an end");
}

static void check_absmax(void) {
    static float x[MAX_N];
    const int64_t n = between(0, MAX_N);
    uint32_t most = 0;
    for (int i = 0; i < n; i++) {
        const uint32_t bits = word() % 8 ? bits_of(any_float()) : word();
        memcpy(&x[i], &bits, sizeof bits);
        if ((bits & 0x7fffffffu) > most) most = bits & 0x7fffffffu;
    }
    const uint32_t got = kernel->absmax_bits(x, n);
    CHECK(got == most, "got %x, expected %x", got, most);
}

static void check_interleave(void) {
    enum { MAX_PAIRS = 5, MAX_STEP = 2 * MAX_N + 20 };
    static int16_t rows[2 * MAX_N + MAX_PAIRS * MAX_STEP];
    static int16_t out[(MAX_N + 1) * 2 * (MAX_PAIRS + 2) * MAX_TILE];
    const int width = word() % 2 ? (word() % 2 ? kernel->mr : kernel->nr) : between(1, MAX_TILE);
    const int64_t n = between(0, MAX_N), pairs = between(0, MAX_PAIRS);
    const int64_t step = between(0, MAX_STEP), apart = between(0, MAX_N);
    const int64_t panels = (n + width - 1) / width;
    const int64_t panel = 2 * width * (pairs + between(0, 2));
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) rows[i] = (int16_t)word();
    memset(out, 0x55, sizeof out);
    kernel->interleave(rows, rows + apart, step, pairs, n, width, panel, out);
    for (int64_t i = 0; i < panels * panel + 2 * width; i++) {
        /* Element i lies in a panel, in a pair of rows, and in a pair of elements. */
        const int64_t in_panel = panel ? i % panel : 0, pair = in_panel / (2 * width);
        const int64_t c = (panel ? i / panel * width : 0) + in_panel % (2 * width) / 2;
        int expected = 0x5555;
        if (i < panels * panel && pair < pairs)
            expected = c < n ? rows[pair * step + c + (i % 2 ? apart : 0)] : 0;
        CHECK(out[i] == expected, "width %d, n %d, pairs %d, step %d, out[%d]: got %d, expected %d",
              width, (int)n, (int)pairs, (int)step, (int)i, out[i], expected);
    }
}

static void check_copy_rows(void) {
    enum { ROWS = 5, STEP = MAX_N + 20 };
    static int16_t from[ROWS * STEP + MAX_N], to[ROWS * STEP + 1];
    const int64_t n = between(0, MAX_N), rows = between(0, ROWS);
    const int64_t from_step = between(0, STEP), to_step = between(n, STEP);
    for (size_t i = 0; i < sizeof from / sizeof *from; i++) from[i] = (int16_t)word();
    memset(to, 0x55, sizeof to);
    kernel->copy_rows(from, from_step, rows, n, to, to_step);
    for (int64_t i = 0; i <= rows * to_step; i++) {
        const int64_t row = to_step ? i / to_step : rows, c = to_step ? i % to_step : 0;
        const int expected = row < rows && c < n ? from[row * from_step + c] : 0x5555;
        CHECK(to[i] == expected, "n %d, row %d, element %d: got %d, expected %d", (int)n, (int)row,
              (int)c, to[i], expected);
    }
}

/* ---- Depthwise ------------------------------------------------------------------------------- */

enum {
    MAX_TERMS = 40,
    MAX_CHANNELS = 112,
    MAX_SPAN = 16 * 140,                    /* steps of a patch, together */
    MANY_TERMS = 140000,                    /* at 16 bits, beyond 2**47 */
    PATCH_Y = 2 * 3 * 9 * (MAX_CHANNELS + 40),
};

static int16_t x_space[4 * MAX_SPAN], w_space[MAX_TERMS][MAX_CHANNELS];
static int16_t dy_space[PATCH_Y];
static float y_space[PATCH_Y] __attribute__((aligned(64)));
static float y_expected[PATCH_Y];
static const int16_t *x_rows[MANY_TERMS], *w_rows[MANY_TERMS];

/* Strides, and data that they reach, up to the last element; `aligned` to so many floats of y. */
static void fill_patch(dfp_patch *t, int aligned, enum data kind, int qa, int qb) {
    t->n = (between(1, MAX_CHANNELS) + aligned - 1) / aligned * aligned;
    t->items = t->rows = 1;
    if (t->terms <= MAX_TERMS) t->items = between(1, 2), t->rows = between(1, 3);
    t->pixels = between(1, 9);
    t->x_item = between(0, 500), t->x_row = between(0, 300), t->x_step = between(0, 130);
    t->y_step = t->n + aligned * between(0, 20 / aligned);
    t->y_row = t->pixels * t->y_step;
    t->y_item = t->rows * t->y_row;
    const int64_t reach = (t->items - 1) * t->x_item + (t->rows - 1) * t->x_row +
                          (t->pixels - 1) * t->x_step + t->n;
    const int64_t space = sizeof x_space / sizeof *x_space;
    for (int64_t i = 0; i < space; i++) x_space[i] = mantissa(kind, qa);
    for (int k = 0; k < MAX_TERMS; k++)
        for (int c = 0; c < t->n; c++) w_space[k][c] = mantissa(kind, qb);
    for (int64_t k = 0; k < t->terms; k++) {
        x_rows[k] = x_space + (word() % 4 ? between(0, space - reach) : space - reach);
        w_rows[k] = w_space[k % MAX_TERMS];
    }
    t->x = x_rows;
    t->w = w_rows;
}

#define EACH_PIXEL(t)                                                            \
    for (int64_t m = 0; m < (t)->items; m++)                                     \
        for (int64_t h = 0; h < (t)->rows; h++)                                  \
            for (int64_t p = 0; p < (t)->pixels; p++)

static int64_t at_x(const dfp_patch *t, int64_t m, int64_t h, int64_t p) {
    return m * t->x_item + h * t->x_row + p * t->x_step;
}

static int64_t at_y(const dfp_patch *t, int64_t m, int64_t h, int64_t p) {
    return m * t->y_item + h * t->y_row + p * t->y_step;
}

static void check_patch(int64_t terms, int qa, int qb, enum data kind) {
    const int64_t product = (int64_t)qa * qb, limit = (INT32_MAX - 65535) / product / 2;
    dfp_patch t = {.terms = terms, .stream = word() % 4 == 0};
    fill_patch(&t, t.stream ? 16 : 1, kind, qa, qb);
    t.chain = word() % 2 ? limit : between(1, limit);
    if (word() % 4 == 0 && terms <= INT32_MAX / product) t.chain = (terms + 1) / 2 + 1;
    t.fresh = between(0, terms);
    t.fresh_end = between(t.fresh, terms);
    t.careful = terms >= ((int64_t)1 << 47) / product || word() % 4 == 0;
    int exponents[2];
    double scales[2];
    for (int m = 0; m < 2; m++) {
        exponents[m] = t.careful ? between(-326, 242) : between(-126, 127);
        if (word() % 8 == 0) exponents[m] = NAN_EXPONENT;
        scales[m] = scale_of(exponents[m]);
    }
    t.scale = scales + 2 - t.items;
    t.y = y_space + (t.stream ? 16 : between(0, 20));
    for (int i = 0; i < PATCH_Y; i++) y_space[i] = y_expected[i] = float_of(0x7fc0dead);
    EACH_PIXEL(&t)
        for (int64_t c = 0; c < t.n; c++) {
            int64_t sum = 0;
            for (int64_t k = 0; k < terms; k++)
                sum += (int64_t)t.x[k][at_x(&t, m, h, p) + c] * t.w[k][c];
            y_expected[t.y - y_space + at_y(&t, m, h, p) + c] =
                rounded(sum, exponents[2 - t.items + m]);
        }
    kernel->depthwise_patch(&t);
    for (int i = 0; i < PATCH_Y; i++)
        CHECK(bits_of(y_space[i]) == bits_of(y_expected[i]),
              "%d terms, chain %d, %d channels, careful %d, y[%d]: got %a, expected %a", (int)terms,
              (int)t.chain, (int)t.n, t.careful, i - (int)(t.y - y_space), y_space[i],
              y_expected[i]);
}

static void check_patches(void) {
    for (int i = 0; i < 300; i++)
        check_patch(between(0, MAX_TERMS), (1 << between(7, 15)) - 1, (1 << between(7, 15)) - 1,
                    word() % KINDS);
    check_patch(MANY_TERMS / 2, 32767, 32767, LARGEST);
    check_patch(MANY_TERMS, 32767, 32767, LARGEST);
}

static void check_dots(void) {
    static int64_t sums[MAX_TERMS][MAX_CHANNELS + 1], expected[MAX_TERMS][MAX_CHANNELS + 1];
    int64_t *rows[MAX_TERMS];
    const int qa = (1 << between(7, 15)) - 1, qb = (1 << between(7, 15)) - 1;
    const int64_t limit = (INT32_MAX - 65535) / ((int64_t)qa * qb) / 2;
    const enum data kind = word() % KINDS;
    dfp_patch t = {.terms = between(0, MAX_TERMS), .sums = rows};
    fill_patch(&t, 1, kind, qa, qb);
    t.chain = word() % 2 ? limit : between(1, limit);
    t.dy = dy_space + PATCH_Y - (at_y(&t, t.items - 1, t.rows - 1, t.pixels - 1) + t.n);
    for (int i = 0; i < PATCH_Y; i++) dy_space[i] = mantissa(kind, qb);
    for (int k = 0; k < MAX_TERMS; k++) {
        rows[k] = sums[k];
        for (int c = 0; c <= MAX_CHANNELS; c++)
            sums[k][c] = expected[k][c] = near_tie(between(24, 61));
    }
    for (int k = 0; k < t.terms; k++)
        EACH_PIXEL(&t)
            for (int64_t c = 0; c < t.n; c++)
                expected[k][c] += (int64_t)t.x[k][at_x(&t, m, h, p) + c] *
                                  t.dy[at_y(&t, m, h, p) + c];
    kernel->depthwise_dots(&t);
    for (int k = 0; k < MAX_TERMS; k++)
        for (int c = 0; c <= MAX_CHANNELS; c++)
            CHECK(sums[k][c] == expected[k][c],
                  "term %d of %d, chain %d, channel %d of %d: got %lld, expected %lld", k,
                  (int)t.terms, (int)t.chain, c, (int)t.n, (long long)sums[k][c],
                  (long long)expected[k][c]);
}

static void check_depthwise_spill(void) {
    static int16_t x[MAX_TERMS][MAX_CHANNELS], w[MAX_TERMS][MAX_CHANNELS];
    const int16_t *xs[MAX_TERMS], *ws[MAX_TERMS];
    static float carried[MAX_CHANNELS + 1], sums[MAX_CHANNELS], y[MAX_CHANNELS + 1];
    const int exponent = word() % 8 ? between(-190, 90) : NAN_EXPONENT;
    const int parts = between(1, 3), present = between(0, 3);
    const int qa = (1 << between(7, 15)) - 1, qb = (1 << between(7, 15)) - 1;
    const int64_t limit = INT32_MAX / ((int64_t)qa * qb), n = between(1, MAX_CHANNELS);
    const enum data kind = word() % KINDS;
    dfp_terms t = {.x = xs, .w = ws, .n = n, .resume = word() % 2, .sums = carried,
                   .scale = scale_of(exponent)};
    t.chain = word() % 2 ? limit : between(1, limit);
    for (int c = 0; c < n; c++) {
        carried[c] = (float)(int32_t)word();
        sums[c] = t.resume ? carried[c] : 0.0f;
    }
    carried[n] = y[n] = 12345.0f;
    for (int part = 0; part < parts; part++) {
        t.segment = between(1, MAX_TERMS);
        t.terms = between(0, MAX_TERMS);
        for (int k = 0; k < t.terms; k++) {
            for (int c = 0; c < n; c++) x[k][c] = mantissa(kind, qa), w[k][c] = mantissa(kind, qb);
            xs[k] = (int)(word() % 3) < present ? x[k] : NULL;
            ws[k] = w[k];
        }
        for (int c = 0; c < n; c++) {
            int64_t chain = 0, length = 0;
            for (int k = 0; k < t.terms; k++) {
                chain += xs[k] ? (int64_t)x[k][c] * w[k][c] : 0;
                if (++length == t.chain || (k + 1) % t.segment == 0 || k + 1 == t.terms) {
                    sums[c] += (float)chain;
                    chain = length = 0;
                }
            }
        }
        t.y = part == parts - 1 ? y : NULL;
        kernel->depthwise_spill(&t);
        t.resume = 1;
        for (int c = 0; c < n; c++) {
            const float got = t.y ? y[c] : carried[c];
            const float expected = t.y ? rounded((int64_t)sums[c], exponent) : sums[c];
            CHECK(bits_of(got) == bits_of(expected), "channel %d of %d: got %a, expected %a", c,
                  (int)n, got, expected);
        }
        CHECK(carried[n] == 12345.0f && y[n] == 12345.0f, "wrote beyond the end");
    }
}

/* Any int64, also where the result is subnormal, zero or infinite. */
static void check_round(void) {
    const int64_t end = word() % 2 ? INT64_MAX : INT64_MIN;
    const int64_t sum = word() % 16 ? near_tie(between(24, 61)) : end;
    const int exponent = word() % 64 ? between(-326, 242) : NAN_EXPONENT;
    const float got = dfp_round(sum, scale_of(exponent)), expected = rounded(sum, exponent);
    CHECK(bits_of(got) == bits_of(expected), "%lld * 2**%d: got %a, expected %a", (long long)sum,
          exponent, got, expected);
}

/* ---- Channels -------------------------------------------------------------------------------- */

enum { MAX_ROWS = 20, MAX_FLAT = MAX_ROWS * MAX_CHANNELS };

/* Infinities and NaN too, if there are to be some. */
static void any_floats(float *x, int64_t n, int special) {
    for (int64_t i = 0; i < n; i++) {
        x[i] = any_float();
        if (special && word() % 50 == 0) x[i] = float_of(0x7f800000u + (word() % 3 << 22));
    }
}

static int same(float a, float b) { return bits_of(a) == bits_of(b) || (isnan(a) && isnan(b)); }

static int same_sum(double a, double b) { return a == b || (isnan(a) && isnan(b)); }

/* A map of some of its steps; its arrays have so many elements and channels. */
static dfp_map any_map(int64_t size, int64_t n, int special) {
    static float x[MAX_FLAT], residual[MAX_FLAT];
    static float center[MAX_CHANNELS], scale[MAX_CHANNELS], offset[MAX_CHANNELS];
    static const float lows[] = {-INFINITY, 0.0f, 0.0f}, highs[] = {INFINITY, INFINITY, 6.0f};
    const int steps = word() % 3, clip = word() % 3;
    any_floats(x, size, special), any_floats(residual, size, special);
    any_floats(center, n, special), any_floats(scale, n, special), any_floats(offset, n, special);
    return (dfp_map){
        .x = x,
        .residual = word() % 2 ? residual : NULL,
        .center = steps > 1 ? center : NULL,
        .scale = steps > 1 ? scale : NULL,
        .offset = steps > 0 ? offset : NULL,
        .low = lows[clip],
        .high = highs[clip],
        .n = n,
    };
}

static float mapped(const dfp_map *m, int64_t i) {
    const int64_t c = i % m->n;
    float v = m->x[i];
    if (m->center) v = v - m->center[c], v = v * m->scale[c];
    if (m->offset) v = v + m->offset[c];
    if (m->residual) v = v + m->residual[i];
    return v;
}

static void check_map(void) {
    static float y[MAX_FLAT + 1];
    const int64_t n = between(1, MAX_CHANNELS), size = MAX_ROWS * n;
    const int64_t first = between(0, size), count = between(0, size - first);
    const dfp_map m = any_map(size, n, word() % 2);
    y[count] = 12345.0f;
    kernel->map(&m, first, count, y);
    for (int64_t i = 0; i < count; i++) {
        float v = mapped(&m, first + i);
        if (v < m.low) v = m.low;
        if (v > m.high) v = m.high;
        CHECK(same(y[i], v), "element %d + %d of %d channels: got %a, expected %a", (int)first,
              (int)i, (int)n, y[i], v);
    }
    CHECK(y[count] == 12345.0f, "wrote beyond the end");
}

static void check_positive_bits(void) {
    static float y[MAX_N + 8];
    static uint8_t bits[MAX_N / 8 + 2];
    const int64_t n = between(0, MAX_N / 8) * 8;
    any_floats(y, n, word() % 2);
    bits[n / 8] = 123;
    kernel->positive_bits(y, n, bits);
    for (int64_t i = 0; i < n; i++)
        CHECK((bits[i / 8] >> (i % 8) & 1) == (y[i] > 0.0f), "element %d of %d: %a", (int)i, (int)n,
              y[i]);
    CHECK(bits[n / 8] == 123, "wrote beyond the end");
}

static void check_gradient(void) {
    static float parts[DFP_PARTS][MAX_FLAT], x[MAX_FLAT], dx[MAX_FLAT + 1];
    static float a[MAX_CHANNELS], b[MAX_CHANNELS], c[MAX_CHANNELS], center[MAX_CHANNELS];
    static uint8_t bits[MAX_FLAT / 8 + 1];
    const int64_t n = between(1, MAX_CHANNELS), size = MAX_ROWS * n;
    const int special = word() % 2, mask = word() % 3, norm = word() % 3;
    int64_t first = between(0, size);
    if (mask == 1) first -= first % 8;
    const int64_t count = between(0, size - first);
    dfp_gradient g = {.n_parts = (int)between(1, DFP_PARTS), .n = n};
    for (int k = 0; k < g.n_parts; k++) {
        any_floats(parts[k], size, special);
        g.parts[k] = parts[k];
    }
    for (int64_t i = 0; i <= size / 8; i++) bits[i] = (uint8_t)word();
    if (mask == 1) g.bits = bits;
    if (mask == 2) {
        g.mask = any_map(size, n, special);
        g.mask.residual = NULL;
        g.mask.high = word() % 2 ? 6.0f : NAN;
    }
    any_floats(x, size, special), any_floats(center, n, special);
    any_floats(a, n, special), any_floats(b, n, special), any_floats(c, n, special);
    g.x = x, g.center = center;
    if (norm > 0) g.a = a;
    if (norm > 1) g.b = b, g.c = c;
    dx[count] = 12345.0f;
    kernel->gradient(&g, first, count, dx);
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = first + i, channel = at % n;
        float dy = parts[0][at];
        for (int k = 1; k < g.n_parts; k++) dy = dy + parts[k][at];
        if (mask == 1) dy = dy * (float)(bits[at / 8] >> (at % 8) & 1);
        if (mask == 2) {
            const float v = mapped(&g.mask, at);
            dy = dy * (v > 0.0f && !(v >= g.mask.high) ? 1.0f : 0.0f);
        }
        if (norm > 0) dy = a[channel] * dy;
        if (norm > 1) {
            float v = x[at] - center[channel];
            v = b[channel] * v;
            v = v + c[channel];
            dy = dy + v;
        }
        CHECK(same(dx[i], dy),
              "element %d of %d channels, %d parts, mask %d, norm %d: got %a, expected %a", (int)at,
              (int)n, g.n_parts, mask, norm, dx[i], dy);
    }
    CHECK(dx[count] == 12345.0f, "wrote beyond the end");
}

static void check_channel_sums(void) {
    static float y[MAX_FLAT], x[MAX_FLAT], center[MAX_CHANNELS];
    static double sums[2 * MAX_CHANNELS + 1], before[2 * MAX_CHANNELS];
    const int64_t n = between(1, MAX_CHANNELS), pixels = between(0, MAX_ROWS);
    const int two = word() % 2, special = word() % 2;
    any_floats(y, pixels * n, special), any_floats(x, pixels * n, special);
    any_floats(center, n, special);
    for (int64_t c = 0; c < 2 * n; c++) sums[c] = before[c] = any_float();
    sums[(1 + two) * n] = 12345.0;
    kernel->channel_sums(y, two ? x : NULL, two ? center : NULL, pixels, n, sums);
    for (int64_t c = 0; c < n; c++) {
        double sum = before[c], products = before[n + c];
        for (int64_t p = 0; p < pixels; p++) {
            const float v = x[p * n + c] - center[c];
            sum += y[p * n + c];
            products += (double)y[p * n + c] * v;
        }
        CHECK(same_sum(sums[c], sum) && (!two || same_sum(sums[n + c], products)),
              "channel %d of %d, %d pixels: got %a, %a, expected %a, %a", (int)c, (int)n,
              (int)pixels, sums[c], sums[n + c], sum, products);
    }
    CHECK(sums[(1 + two) * n] == 12345.0, "wrote beyond the end");
}

static void check_moments(void) {
    static float y[MAX_FLAT], bounds[2 * MAX_CHANNELS + 1], around[2 * MAX_CHANNELS];
    static double sums[2 * MAX_CHANNELS + 1], before[2 * MAX_CHANNELS];
    const int64_t n = between(1, MAX_CHANNELS), pixels = between(0, MAX_ROWS);
    any_floats(y, pixels * n, word() % 2);
    for (int64_t c = 0; c < 2 * n; c++) {
        sums[c] = before[c] = any_float();
        bounds[c] = around[c] = word() % 2 ? any_float() : c < n ? INFINITY : -INFINITY;
    }
    sums[2 * n] = bounds[2 * n] = 12345.0f;
    kernel->moments(y, pixels, n, sums, bounds);
    for (int64_t c = 0; c < n; c++) {
        double sum = before[c], square = before[n + c];
        float low = around[c], high = around[n + c];
        for (int64_t p = 0; p < pixels; p++) {
            const float v = y[p * n + c];
            sum += v;
            square += (double)v * v;
            if (v < low) low = v;
            if (v > high) high = v;
        }
        CHECK(same_sum(sums[c], sum) && same_sum(sums[n + c], square),
              "channel %d of %d: got sums %a, %a, expected %a, %a", (int)c, (int)n, sums[c],
              sums[n + c], sum, square);
        CHECK(bounds[c] == low && bounds[n + c] == high,
              "channel %d of %d: got bounds %a, %a, expected %a, %a", (int)c, (int)n, bounds[c],
              bounds[n + c], low, high);
    }
    CHECK(sums[2 * n] == 12345.0 && bounds[2 * n] == 12345.0f, "wrote beyond the end");
}

static void check_add_rows(void) {
    static double rows[20 * (MAX_N + 5)], total[MAX_N + 1];
    const int64_t n = between(0, MAX_N), count = between(0, 20), stride = n + between(0, 5);
    for (int64_t i = 0; i < count * stride; i++)
        rows[i] = ldexp((double)between(-1000000, 1000000), between(-60, 60));
    total[n] = 12345.0;
    kernel->add_rows(rows, count, stride, n, total);
    for (int64_t c = 0; c < n; c++) {
        double expected = 0.0;
        for (int64_t r = 0; r < count; r++) expected += rows[r * stride + c];
        CHECK(total[c] == expected, "%d rows, total[%d]: got %a, expected %a", (int)count, (int)c,
              total[c], expected);
    }
    CHECK(total[n] == 12345.0, "wrote beyond the end");
}

/* ---- Optimizers ------------------------------------------------------------------------------ */

static float some_float(void) { return ldexpf((float)between(-1000000, 1000000), (int)between(-50, 10)); }

static void check_update(void) {
    static float in[5][MAX_N], out[4][MAX_N + 1];
    const int64_t n = between(0, MAX_N);
    const int adam = between(0, 1), slots = adam ? (int)between(2, 3) : (int)between(0, 1);
    const int in_place = between(0, 1);
    for (int k = 0; k < 5; k++)
        for (int64_t i = 0; i < n; i++) in[k][i] = k < 3 ? some_float() : fabsf(some_float());
    dfp_update u = {.w = in[0], .g = in[1], .rate = 0.037f, .decay = between(0, 1) ? 0.01f : 0.0f,
                    .momentum = 0.9f, .nesterov = (int)between(0, 1), .alpha = 0.02f,
                    .renewal = 0.1f, .renewal2 = 0.001f, .epsilon = 1e-7f};
    const float **from[] = {&u.m, &u.v, &u.h};
    float **to[] = {&u.m_to, &u.v_to, &u.h_to};
    for (int k = 0; k < slots; k++) *from[k] = in[2 + k], *to[k] = out[1 + k];
    for (int k = 0; k < 4; k++) out[k][n] = 12345.0f;
    u.w_to = out[0];
    if (in_place) {
        /* New weights where the gradient is. */
        memcpy(out[0], in[1], n * sizeof(float));
        u.g = out[0];
    }
    (adam ? kernel->adam : kernel->sgd)(&u, n);
    for (int64_t i = 0; i < n; i++) {
        volatile float w = in[0][i], g = in[1][i], m = in[2][i], v = in[3][i], t, s;
        if (u.decay != 0.0f) t = w * u.decay, t = t * u.rate, w = w - t;
        if (adam) {
            t = g - m, t = t * u.renewal, m = m + t;
            t = g * g, t = t - v, t = t * u.renewal2, v = v + t;
            s = slots == 3 && in[4][i] > v ? in[4][i] : v;
            if (slots == 3) CHECK(out[3][i] == s, "h[%d]: got %a, expected %a", (int)i, out[3][i], s);
            CHECK(out[2][i] == v, "v[%d]: got %a, expected %a", (int)i, out[2][i], v);
            s = sqrtf(s), s = s + u.epsilon, t = m * u.alpha, t = t / s, w = w - t;
        } else {
            t = g * u.rate;
            if (slots) m = m * u.momentum, m = m - t, s = m * u.momentum, s = s - t;
            if (slots) w = w + (u.nesterov ? s : m);
            else w = w - t;
        }
        if (slots) CHECK(out[1][i] == m, "m[%d]: got %a, expected %a", (int)i, out[1][i], m);
        CHECK(out[0][i] == w, "w[%d]: got %a, expected %a", (int)i, out[0][i], w);
    }
    for (int k = 0; k <= slots; k++) CHECK(out[k][n] == 12345.0f, "wrote beyond the end");
}

static void check_slot(void) {
    static float x[MAX_N + 1], kept[MAX_N], back[MAX_N + 1];
    static int16_t q[MAX_N + 1];
    int32_t e[MAX_N / DFP_SLOT_BLOCK + 2];
    const int64_t n = between(0, MAX_N), blocks = (n + DFP_SLOT_BLOCK - 1) / DFP_SLOT_BLOCK;
    const int root = between(0, 1);
    const uint32_t key[2] = {word(), word()};
    for (int64_t i = 0; i < n; i++) {
        x[i] = between(0, 9) ? some_float() : 0.0f;
        if (root) x[i] = fabsf(x[i]);
        kept[i] = root ? sqrtf(x[i]) : x[i];
    }
    if (n && between(0, 1)) x[between(0, n - 1)] = between(0, 1) ? NAN : INFINITY;
    for (int64_t i = 0; i < n; i++)
        if (!(x[i] - x[i] == 0.0f)) kept[i] = x[i];
    x[n] = back[n] = 12345.0f, q[n] = 12345, e[blocks] = 12345;
    kernel->pack_slot(x, n, root, 4 * between(0, 1000), key, word(), q, e);
    kernel->unpack_slot(q, e, n, root, back);
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t end = (b + 1) * DFP_SLOT_BLOCK < n ? (b + 1) * DFP_SLOT_BLOCK : n;
        float most = 0.0f;
        int lost = 0;
        for (int64_t i = b * DFP_SLOT_BLOCK; i < end; i++) {
            lost |= !(kept[i] - kept[i] == 0.0f);
            if (fabsf(kept[i]) > most) most = fabsf(kept[i]);
        }
        const int expected = lost ? INT32_MIN : most == 0.0f ? -163 : ilogbf(most) - 14;
        CHECK(e[b] == expected, "exponent %d: got %d, expected %d", (int)b, e[b], expected);
        for (int64_t i = b * DFP_SLOT_BLOCK; i < end; i++) {
            if (lost) {
                CHECK(q[i] == 0 && back[i] != back[i], "element %d of a NaN block", (int)i);
                continue;
            }
            const double unit = ldexp(1.0, e[b]), value = q[i] * unit;
            CHECK(fabs(value - kept[i]) <= unit, "q[%d]: got %g for %g", (int)i, value, kept[i]);
            CHECK(!root || (q[i] > 0) == (kept[i] > 0.0f), "root %d: %d for %g", (int)i, q[i], kept[i]);
            const float read = (float)value;
            CHECK(back[i] == (root ? read * read : read), "back[%d]", (int)i);
        }
    }
    CHECK(x[n] == 12345.0f && back[n] == 12345.0f && q[n] == 12345 && e[blocks] == 12345,
          "wrote beyond the end");
}

/* ---- Local response normalisation ------------------------------------------------------------ */

static float power_of_quarters(float s, int quarters) {
    volatile float half = sqrtf(s), quarter = sqrtf(half), product = half * quarter;
    return quarters == 4 ? s : quarters == 3 ? product : quarters == 2 ? half : quarter;
}

/* The sum of the terms of the channels at most `radius` from c, in order. */
static float near_sum(const float *terms, int64_t n, int64_t radius, int64_t c) {
    volatile float sum = 0.0f;
    for (int64_t k = c - radius; k <= c + radius; k++) sum = sum + (k < 0 || k >= n ? 0.0f : terms[k]);
    return sum;
}

static void check_response(void) {
    enum { PIXELS = 3, MOST = 70 };
    static float x[PIXELS * MOST], dy[PIXELS * MOST], y[PIXELS * MOST + 1], room[6 * MOST + 1];
    static float terms[MOST], direct[MOST];
    const int64_t n = between(1, MOST), radius = between(0, n - 1), pixels = between(0, PIXELS);
    const int backward = between(0, 1), quarters = (int)between(1, 4);
    const dfp_response r = {.n = n, .radius = radius, .bias = 1.5f, .alpha = 0.3f,
                            .slope = 0.15f * (float)quarters, .quarters = quarters};
    for (int64_t i = 0; i < pixels * n; i++) x[i] = some_float(), dy[i] = some_float();
    y[pixels * n] = room[4 * n + 2 * radius] = 12345.0f;
    kernel->response(&r, x, backward ? dy : NULL, pixels, room, y);
    for (int64_t p = 0; p < pixels; p++) {
        const float *in = x + p * n, *g = dy + p * n;
        for (int64_t c = 0; c < n; c++) terms[c] = in[c] * in[c];
        for (int64_t c = 0; c < n; c++) {
            volatile float s = near_sum(terms, n, radius, c);
            s = r.alpha * s, s = r.bias + s;
            direct[c] = s;
        }
        for (int64_t c = 0; c < n; c++) {
            const float s = direct[c], power = power_of_quarters(s, quarters);
            volatile float t;
            if (!backward) {
                t = in[c] / power;
                CHECK(y[p * n + c] == t, "y: got %a, expected %a", y[p * n + c], t);
                continue;
            }
            direct[c] = g[c] / power;
            t = direct[c] * in[c], t = t / s;
            terms[c] = t;
        }
        for (int64_t c = 0; backward && c < n; c++) {
            volatile float t = near_sum(terms, n, radius, c), u = r.slope * in[c];
            t = u * t, t = direct[c] - t;
            CHECK(y[p * n + c] == t, "dx: got %a, expected %a", y[p * n + c], t);
        }
    }
    CHECK(y[pixels * n] == 12345.0f && room[4 * n + 2 * radius] == 12345.0f, "wrote beyond the end");
}

/* ---- Digits ---------------------------------------------------------------------------------- */

enum {
    SIDE = DFP_DIGIT_TILE,
    STEP = DFP_DIGIT_STEP,
    STEPS = 3,
    HALO = 6,                               /* products that a window may slide */
    GROUPS = STEPS * STEP / 4 + (HALO + 3) / 4 + 1,
    ROW = SIDE + 8,
    LONGEST = DFP_DIGIT_K_3 / STEP,
    DIGITS_C = SIDE * 64 + 32,
};

static int16_t left[STEPS * STEP][ROW], right[STEPS * STEP + HALO + 4][ROW];
static int8_t a_digits[3 * STEPS * SIDE * STEP] __attribute__((aligned(64)));
static int8_t b_digits[4 * 3 * 2 * GROUPS * 64] __attribute__((aligned(64)));
static int32_t digit_sums[2][DFP_DIGIT_SUMS] __attribute__((aligned(64)));
static float digits_c[DIGITS_C] __attribute__((aligned(64)));
static float digits_expected[DIGITS_C];
static int64_t tile_sum[SIDE][SIDE];

/* Random, or one of those whose digits are extreme. */
static int16_t digit_mantissa(enum data kind, int products) {
    static const int16_t extreme[2][4] = {{8191, -8191, -8128, 8127}, {32767, -32767, -32513, 255}};
    if (kind == RANDOM) return mantissa(RANDOM, products == 3 ? 8191 : 32767);
    return extreme[products - 3][kind == LARGEST ? 2 : word() % 4];
}

/* Rows of a step for the packing of rows; of those that are zeros some are missing. */
static void step_rows(int16_t (*data)[ROW], int64_t count, const int16_t **rows) {
    static const int16_t zeros[ROW];
    for (int64_t k = 0; k < count; k++)
        rows[k] = memcmp(data[k], zeros, sizeof zeros) || word() % 2 ? data[k] : NULL;
}

/* Packs `left`, `count` products by `rows` lines, from column c on. */
static void pack_left(dfp_digit_tile *t, int64_t *a_step, int64_t c, int64_t rows, int64_t count,
                      int natural) {
    const int64_t step = SIDE * STEP;
    memset(a_digits, 77, sizeof a_digits);
    t->a = a_digits;
    t->a_plane = STEPS * step;
    t->a_step = a_step;
    for (int s = 0; s < t->steps; s++) {
        const int16_t *products[STEP];
        a_step[s] = s * step;
        step_rows(left + s * STEP, STEP, products);
        if (natural)
            kernel->digits->lines_of_rows(products, c, rows, t->products, a_digits + a_step[s],
                                          t->a_plane);
    }
    for (int64_t i = 0; i < rows && !natural; i++) {
        int16_t line[STEPS * STEP];
        for (int64_t k = 0; k < STEPS * STEP; k++) line[k] = k < count ? left[k][c + i] : 5555;
        kernel->digits->lines(line, count, t->products, a_digits + i * STEP, step, t->a_plane);
    }
}

/* Packs `right`, `cols` columns from c on, and returns by how many products it slid. */
static int64_t pack_right(dfp_digit_tile *t, int64_t c, int64_t cols, int natural) {
    const int16_t *products[STEPS * STEP + HALO + 4];
    memset(b_digits, 77, sizeof b_digits);
    t->b = b_digits;
    if (natural && word() % 2) {
        const int64_t slide = between(0, HALO), count = t->steps * STEP + HALO + 4;
        t->b_step = STEP / 4 * 64;
        t->b_half = GROUPS * 64;
        t->b_plane = 2 * t->b_half;
        step_rows(right, count, products);
        kernel->digits->columns_sliding(products, count, c, cols, t->products, b_digits,
                                        t->b_half, t->b_plane, 3 * t->b_plane);
        t->b = b_digits + slide % 4 * 3 * t->b_plane + slide / 4 * 64;
        return slide;
    }
    t->b_half = STEP / 4 * 64;
    t->b_step = 2 * t->b_half;
    t->b_plane = STEPS * t->b_step;
    const int of_rows = word() % 2;
    for (int s = 0; s < t->steps; s++) {
        int8_t *const out = b_digits + s * t->b_step;
        step_rows(right + s * STEP, STEP, products);
        if (of_rows)
            kernel->digits->columns_of_rows(products, c, cols, natural, t->products, out,
                                            t->b_half, t->b_plane);
        for (int half = 0; half < 2 && !of_rows; half++) {
            int16_t q[16 * STEP];
            for (int j = 0; j < 16; j++)
                for (int k = 0; k < STEP; k++)
                    q[j * STEP + k] = right[s * STEP + k][c + half * 16 + j];
            kernel->digits->columns(q, natural, t->products, out + half * t->b_half, t->b_plane);
        }
    }
    return 0;
}

/* Where the rows go, some of them nowhere, and what then is to be found there. */
static void place_rows(dfp_digit_rows *done, int64_t *row) {
    done->stream = word() % 2;
    done->c = digits_c + (done->stream ? 16 : between(0, 20));
    done->row = row;
    done->next = 0;
    choose_scales(&done->row_scale, &done->column_scale);
    done->bias = choose_bias();
    choose_clip(&done->low, &done->high);
    const int64_t ldc = done->stream ? 48 : done->cols + between(0, 20), turn = between(0, 31);
    for (int i = 0; i < DIGITS_C; i++) digits_c[i] = digits_expected[i] = float_of(0x7fc0dead);
    for (int64_t i = 0; i < done->rows; i++) {
        row[i] = word() % 8 ? (i + turn) % SIDE * ldc : -1;
        for (int64_t j = 0; j < done->cols && row[i] >= 0; j++) {
            float expected = rounded(tile_sum[i][j], exponent_at(i, j));
            if (done->bias) expected = clipped(expected + done->bias[j], done->low, done->high);
            digits_expected[done->c - digits_c + row[i] + j] = expected;
        }
    }
}

static void check_digits_c(const dfp_digit_rows *done, const char *what) {
    for (int i = 0; i < DIGITS_C; i++)
        CHECK(bits_of(digits_c[i]) == bits_of(digits_expected[i]),
              "%s, %d products, %d x %d, c[%d]: got %a, expected %a", what, done->products,
              (int)done->rows, (int)done->cols, i - (int)(done->c - digits_c), digits_c[i],
              digits_expected[i]);
}

static void check_finish(dfp_digit_rows *done, const char *what) {
    int64_t row[SIDE];
    place_rows(done, row);
    kernel->digits->finish(done);
    CHECK(done->next == done->rows, "%s: rows are left", what);
    check_digits_c(done, what);

    const int64_t ldc = done->rows + between(0, 20);
    for (int i = 0; i < DIGITS_C; i++) digits_c[i] = digits_expected[i] = float_of(0x7fc0dead);
    for (int64_t i = 0; i < done->rows; i++)
        for (int64_t j = 0; j < done->cols; j++)
            digits_expected[done->c - digits_c + j * ldc + i] =
                rounded(tile_sum[i][j], row_exponents[0]);
    done->column_scale = NULL;
    kernel->digits->finish_transposed(done, ldc);
    check_digits_c(done, "transposed");
}

/* Sums beside the ties of rounding to float32, in digits that do not look like them. */
static void check_digit_rounding(void) {
    int32_t *const sums = digit_sums[0];
    const int products = between(3, 4), d = products == 3 ? 7 : 8;
    dfp_digit_rows done = {.sums = sums, .rows = SIDE, .cols = SIDE, .products = products};
    for (int n = 0; n < SIDE * SIDE; n++) {
        const int64_t v = word() % 16 ? near_tie(between(24, 42)) : 0;
        const int64_t radix = 1 << d, ll = (v & (radix - 1)) + between(-999999, 999999) * radix;
        const int64_t over = (v - ll) / radix;
        const int64_t middle = (over & (radix - 1)) + between(-999999, 999999) * radix;
        const int64_t hh = (over - middle) / radix;
        tile_sum[n / SIDE][n % SIDE] = v;
        sums[n] = (int32_t)hh;
        sums[1024 + n] = (int32_t)(products == 3 ? middle + hh + ll : middle);
        sums[2048 + n] = (int32_t)ll;
    }
    check_finish(&done, "rounding");
}

/* A product from int16 to float32. `repeat`: its one step again and again, up to the longest K. */
static void check_digit_product(int repeat) {
    int64_t a_step[LONGEST], row[SIDE];
    const int natural = word() % 2, products = between(3, 4);
    const int steps = repeat ? 1 : between(1, STEPS);
    const int64_t rows = between(1, SIDE), cols = between(1, SIDE), ca = between(0, ROW - rows);
    const int64_t count = (steps - 1) * STEP + (repeat ? STEP : between(1, STEP));
    const int64_t cb = between(0, ROW - SIDE);
    const enum data kind = repeat ? between(1, 2) : word() % KINDS;
    const int64_t times = !repeat ? 1 : (products == 3 ? DFP_DIGIT_K_3 : DFP_DIGIT_K_4) / STEP;
    dfp_digit_tile t = {.steps = steps, .products = products, .sums = digit_sums[0]};
    for (int64_t k = 0; k < STEPS * STEP; k++) {
        const int missing = k >= count || (!repeat && word() % 16 == 0);
        for (int i = 0; i < ROW; i++) left[k][i] = missing ? 0 : digit_mantissa(kind, products);
    }
    for (int64_t k = 0; k < STEPS * STEP + HALO + 4; k++) {
        const int missing = !repeat && word() % 16 == 0;
        for (int i = 0; i < ROW; i++) right[k][i] = missing ? 0 : digit_mantissa(kind, products);
    }
    pack_left(&t, a_step, ca, rows, count, natural);
    const int64_t slide = pack_right(&t, cb, cols, natural);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            tile_sum[i][j] = 0;
            for (int64_t k = 0; k < count; k++)
                tile_sum[i][j] += times * left[k][ca + i] * right[k + slide][cb + j];
        }
    if (repeat) {
        for (int64_t s = 0; s < times; s++) a_step[s] = 0;
        t.b_step = 0;
        t.steps = times;
    }

    /* At once or, resumed, in two calls. */
    dfp_digit_rows done = {.sums = t.sums, .rows = 0, .products = products};
    dfp_digit_tile part = t;
    part.steps = between(1, t.steps);
    kernel->digits->multiply(&part, &done);
    if (part.steps < t.steps) {
        part.a_step += part.steps;
        part.b += part.steps * part.b_step;
        part.steps = t.steps - part.steps;
        part.resume = 1;
        kernel->digits->multiply(&part, &done);
    }
    done.rows = rows, done.cols = cols;
    check_finish(&done, "finish");
    if (repeat) return;

    /* The rows wait for the same product again, which may reuse their sums. */
    t.sums = digit_sums[word() % 2];
    place_rows(&done, row);
    kernel->digits->multiply(&t, &done);
    CHECK(done.next == done.rows, "rows are left");
    check_digits_c(&done, "multiply");
    done.sums = t.sums;
    check_finish(&done, "again");
}

static void check_digits(void) {
    for (int i = 0; i < 50; i++) check_digit_rounding();
    kernel->digits->open();
    for (int i = 0; i < 100; i++) check_digit_product(0);
    for (int i = 0; i < 6; i++) check_digit_product(1);
    kernel->digits->close();
}

/* ---- All of it ------------------------------------------------------------------------------- */

static void check_kernel(const dfp_kernel *k) {
    kernel = k;
    checks = 0;
    CHECK(k->mr <= MAX_TILE && k->nr <= MAX_TILE, "tile of %d x %d", k->mr, k->nr);
    for (narrow = 0; narrow <= (k->exact_narrow != NULL); narrow++) {
        nr = narrow ? k->nr / 2 : k->nr;
        for (int i = 0; i < 150; i++) check_tile(0);
        for (int i = 0; i < 150; i++) check_tile(1);
        for (int i = 0; i < 200; i++) check_rounding();
    }
    for (int i = 0; i < 1000; i++) check_quantize();
    for (int i = 0; i < 500; i++) check_absmax();
    for (int i = 0; i < 500; i++) check_exponents();
    for (int i = 0; i < 1000; i++) check_quantize_groups();
    for (int i = 0; i < 500; i++) check_count();
    for (int i = 0; i < 500; i++) check_zeros();
    for (int i = 0; i < 200; i++) check_sample();
    for (int i = 0; i < 500; i++) check_align();
    for (int i = 0; i < 500; i++) check_align_rows();
    for (int i = 0; i < 500; i++) check_align_pairs();
    for (int i = 0; i < 500; i++) check_interleave();
    for (int i = 0; i < 500; i++) check_copy_rows();
    check_philox();
    for (int i = 0; i < 1000; i++) check_stochastic();
    check_patches();
    for (int i = 0; i < 300; i++) check_dots();
    for (int i = 0; i < 1000; i++) check_depthwise_spill();
    for (int i = 0; i < 10000; i++) check_round();
    for (int i = 0; i < 1000; i++) check_map();
    for (int i = 0; i < 200; i++) check_positive_bits();
    for (int i = 0; i < 1000; i++) check_gradient();
    for (int i = 0; i < 500; i++) check_channel_sums();
    for (int i = 0; i < 500; i++) check_moments();
    for (int i = 0; i < 200; i++) check_add_rows();
    for (int i = 0; i < 500; i++) check_update();
    for (int i = 0; i < 500; i++) check_slot();
    for (int i = 0; i < 500; i++) check_response();
    if (k->digits) check_digits();
    CHECK(k->peak(1000) > 0, "no products counted");
    printf("%s: %lld checks passed\n", k->isa, (long long)checks);
}

int main(int argc, char **argv) {
#ifdef DFP_HAS_AMX
    if (!cpu_amx()) amx_emulate();
#endif
    for (int i = 0; i < DFP_ISAS; i++) {
        const dfp_isa *isa = &dfp_isas[i];
        if (argc > 1 && strcmp(argv[1], isa->name) != 0) continue;
        if (!isa->kernel) printf("%s: not compiled\n", isa->name);
        else if (!isa->supported()) printf("%s: not on this CPU\n", isa->name);
        else check_kernel(isa->kernel);
    }
#ifdef DFP_HAS_AVX512VNNI
    if (argc == 1 && cpu_avx512vnni()) check_kernel(&dfp_kernel__avxvnni_evex);
#endif
    return 0;
}
