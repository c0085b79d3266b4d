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

/* The exact value rounded once: a long double holds every int64, on every machine we know. */
static float rounded(int64_t sum, int exponent) {
    return (float)ldexpl((long double)sum, exponent);
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
    return t->a[row * t->row_stride + k / 2 * t->pair_stride + k % 2];
}

static void expect_sums(const dfp_tile *t, int resume) {
    for (int64_t i = 0; i < kernel->mr; i++)
        for (int64_t j = 0; j < kernel->nr; j++) {
            int64_t exact = resume ? exact_sum[i][j] : 0;
            float sum = resume ? float_sum[i][j] : 0.0f;
            int64_t chain = 0;
            for (int64_t p = 0; p < t->pairs; p++) {
                for (int64_t k = 2 * p; k < 2 * p + 2; k++)
                    chain += (int64_t)a_at(t, i, k) * t->b[(p * kernel->nr + j) * 2 + k % 2];
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

/* New operands for `pairs` pairs, in either layout of A, for any number of rows. */
static void fill_operands(dfp_tile *t, int64_t pairs, enum data kind, int qa, int qb) {
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
    t->b = b_space;
    for (int64_t i = 0; i < pairs * kernel->nr * 2; i++) b_space[i] = mantissa(kind, qb);
}

static void check_c(const dfp_tile *t, int spill, int exponent, const char *what) {
    const float *end = t->c + (kernel->mr - 1) * t->ldc + kernel->nr;
    for (float *c = c_space; c < c_space + MAX_TILE * (MAX_TILE + 32); c++) {
        const int64_t i = (c - t->c) / t->ldc, j = (c - t->c) % t->ldc;
        float expected = float_of(0x7fc0dead);
        if (c >= t->c && c < end && j < kernel->nr)
            expected = spill ? (float)ldexp(float_sum[i][j], exponent)
                             : rounded(exact_sum[i][j], exponent);
        CHECK(bits_of(*c) == bits_of(expected), "%s, c[%d][%d]: got %a, expected %a", what, (int)i,
              (int)j, *c, expected);
    }
}

static void check_tile(int spill) {
    const int tile = kernel->mr * kernel->nr;
    const int qa = (1 << between(7, 15)) - 1, qb = (1 << between(7, 15)) - 1;
    const enum data kind = word() % KINDS;
    const int64_t limit = (INT32_MAX - (spill ? 0 : 65535)) / ((int64_t)qa * qb) / 2;
    const int parts = between(1, 3), exponent = between(-126, 80);
    dfp_tile t = {.acc = acc_space, .scale = ldexpf(1.0f, exponent)};
    t.chain = word() % 4 ? limit : between(1, limit);
    t.resume = word() % 3 == 0;
    for (int i = 0; i < kernel->mr; i++)
        for (int j = 0; j < kernel->nr; j++) {
            /* Room for what the parts add: |v| stays below 2**47. */
            const int32_t hi = (int32_t)between(-2000000000, 2000000000), lo = word() & 65535;
            exact_sum[i][j] = (int64_t)hi * 65536 + lo;
            float_sum[i][j] = (float)hi;
            if (spill) {
                memcpy(acc_space + i * kernel->nr + j, &float_sum[i][j], sizeof(float));
            } else {
                acc_space[i * kernel->nr + j] = hi;
                acc_space[tile + i * kernel->nr + j] = lo;
            }
        }
    for (int part = 0; part < parts; part++) {
        const int64_t segments = between(1, 3);
        fill_operands(&t, segments * between(1, MAX_PAIRS / (word() % 2 ? 3 : 60)), kind, qa, qb);
        t.segment = t.pairs / segments;
        expect_sums(&t, t.resume);
        t.c = NULL;
        if (part == parts - 1) {
            t.stream = word() % 2;
            t.ldc = t.stream ? (kernel->nr + 15) / 16 * 16 + 16 * between(0, 1)
                             : kernel->nr + between(0, 9);
            t.c = c_space + (t.stream ? 16 : between(0, 20));
            for (int i = 0; i < MAX_TILE * (MAX_TILE + 32); i++) c_space[i] = float_of(0x7fc0dead);
        }
        (spill ? kernel->spill : kernel->exact)(&t);
        t.resume = 1;
        for (int n = 0; !t.c && n < tile; n++) {
            const int i = n / kernel->nr, j = n % kernel->nr;
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
    check_c(&t, spill, exponent, spill ? "spill" : "exact");
}

/* Sums beside the ties of rounding to float32, and at both ends of their range. */
static void check_rounding(void) {
    const int tile = kernel->mr * kernel->nr;
    dfp_tile t = {.acc = acc_space, .scale = 1.0f, .resume = 1, .c = c_space, .ldc = kernel->nr};
    fill_operands(&t, 1, LARGEST, 0, 0);
    t.segment = t.chain = 1;
    for (int n = 0; n < tile; n++) {
        int64_t v = near_tie(between(24, 46));
        if (word() % 8 == 0) v = (((int64_t)1 << 47) - 1) * (word() % 2 ? 1 : -1);
        if (word() % 8 == 0) v = 0;
        exact_sum[n / kernel->nr][n % kernel->nr] = v;
        acc_space[n] = (int32_t)((v - (v & 65535)) / 65536);
        acc_space[tile + n] = (int32_t)(v & 65535);
    }
    for (int i = 0; i < MAX_TILE * (MAX_TILE + 32); i++) c_space[i] = float_of(0x7fc0dead);
    kernel->exact(&t);
    check_c(&t, 0, 0, "rounding");
}

/* ---- Quantise, interleave -------------------------------------------------------------------- */

enum { MAX_N = 300 };

static float any_float(void) {
    static const float special[] = {0.0f, -0.0f, 0.5f, -1.5f, 2.5f, 3.4028235e38f, -3.4028235e38f,
                                    1e-45f, -1.1754944e-38f, 8191.5f, -32767.5f};
    if (word() % 4 == 0) return special[word() % (sizeof special / sizeof *special)];
    if (word() % 4 == 0) return float_of((word() & 0xfff00000u) % 0x7f800000u);
    if (word() % 2) return (float)between(-70000, 70000) / 2;
    const uint32_t bits = word();
    return (bits >> 23 & 255) == 255 ? 1.0f : float_of(bits);
}

static void check_quantize(void) {
    static float x[MAX_N];
    static int16_t q[MAX_N + 1];
    const int64_t n = between(0, MAX_N);
    const int power = word() % 2 ? between(-2, 2) : between(-252, 252);
    const int power1 = power > 126 ? 126 : power < -126 ? -126 : power;
    const int qmax = (1 << between(7, 15)) - 1, truncate = word() % 2;
    for (int i = 0; i < n; i++) x[i] = any_float();
    q[n] = 12345;
    kernel->quantize(x, n, ldexpf(1.0f, power1), ldexpf(1.0f, power - power1), (float)qmax,
                     truncate, q);
    for (int i = 0; i < n; i++) {
        double v = ldexp(x[i], power);
        v = truncate ? trunc(v) : nearbyint(v);
        v = v > qmax ? qmax : v < -qmax ? -qmax : v;
        CHECK(q[i] == (int)v, "%a * 2**%d, qmax %d, truncate %d: got %d, expected %d", x[i], power,
              qmax, truncate, q[i], (int)v);
    }
    CHECK(q[n] == 12345, "wrote beyond the end");
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
    CHECK(kernel->absmax_bits(x, n) == most, "got %x, expected %x", kernel->absmax_bits(x, n), most);
}

static void check_interleave(void) {
    static int16_t p[MAX_N], q[MAX_N];
    static int16_t out[4 * 2 * MAX_TILE * (MAX_N + 1)];
    const int width = word() % 2 ? (word() % 2 ? kernel->mr : kernel->nr) : between(1, MAX_TILE);
    const int64_t n = between(0, MAX_N), panel = 2 * width * between(1, 3);
    const int64_t panels = (n + width - 1) / width;
    for (int i = 0; i < n; i++) p[i] = (int16_t)word(), q[i] = (int16_t)word();
    memset(out, 0x55, sizeof out);
    kernel->interleave(p, q, n, width, panel, out);
    for (int64_t i = 0; i < panels * panel + 2 * width; i++) {
        const int64_t c = i / panel * width + i % panel / 2;
        int expected = 0x5555;
        if (i < panels * panel && i % panel < 2 * width)
            expected = c < n ? (i % 2 ? q[c] : p[c]) : 0;
        CHECK(out[i] == expected, "width %d, n %d, out[%d]: got %d, expected %d", width, (int)n,
              (int)i, out[i], expected);
    }
}

/* ---- Depthwise ------------------------------------------------------------------------------- */

enum { MAX_TERMS = 40, MAX_CHANNELS = 110 };

static void check_depthwise(void) {
    static int16_t x[MAX_TERMS][MAX_CHANNELS], w[MAX_TERMS][MAX_CHANNELS];
    const int16_t *xs[MAX_TERMS], *ws[MAX_TERMS];
    static int64_t wide[MAX_CHANNELS], exact[MAX_CHANNELS];
    static float floats[MAX_CHANNELS], sums[MAX_CHANNELS], y[MAX_CHANNELS + 1];
    const int spill = word() % 2, exponent = between(-190, 90), parts = between(1, 3);
    const int qa = (1 << between(7, 15)) - 1, qb = (1 << between(7, 15)) - 1;
    const int64_t limit = INT32_MAX / ((int64_t)qa * qb), n = between(1, MAX_CHANNELS);
    const enum data kind = word() % KINDS;
    const int present = between(0, 3);
    dfp_terms t = {.x = xs, .w = ws, .n = n, .resume = word() % 2, .scale = ldexp(1.0, exponent)};
    t.chain = word() % 2 ? limit : between(1, limit);
    t.wide = spill ? NULL : wide;
    t.floats = spill ? floats : NULL;
    for (int c = 0; c < n; c++) {
        wide[c] = exact[c] = near_tie(between(24, 61));
        floats[c] = sums[c] = (float)(int32_t)word();
        if (!t.resume) exact[c] = 0, sums[c] = 0.0f;
    }
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
                    exact[c] += chain;
                    sums[c] += (float)chain;
                    chain = length = 0;
                }
            }
        }
        t.y = part == parts - 1 ? y : NULL;
        y[n] = 12345.0f;
        kernel->depthwise(&t);
        t.resume = 1;
        for (int c = 0; c < n && t.y; c++) {
            const float expected =
                spill ? (float)ldexp(sums[c], exponent) : rounded(exact[c], exponent);
            CHECK(bits_of(y[c]) == bits_of(expected), "spill %d, channel %d of %d: got %a, expected %a",
                  spill, c, (int)n, y[c], expected);
        }
        CHECK(y[n] == 12345.0f, "wrote beyond the end");
    }
}

/* ---- All of it ------------------------------------------------------------------------------- */

static void check_kernel(const dfp_kernel *k) {
    kernel = k;
    checks = 0;
    CHECK(k->mr <= MAX_TILE && k->nr <= MAX_TILE, "tile of %d x %d", k->mr, k->nr);
    for (int i = 0; i < 150; i++) check_tile(0);
    for (int i = 0; i < 150; i++) check_tile(1);
    for (int i = 0; i < 200; i++) check_rounding();
    for (int i = 0; i < 1000; i++) check_quantize();
    for (int i = 0; i < 500; i++) check_absmax();
    for (int i = 0; i < 500; i++) check_interleave();
    for (int i = 0; i < 1000; i++) check_depthwise();
    CHECK(k->peak(1000) > 0, "no products counted");
    printf("%s: %lld checks passed\n", k->isa, (long long)checks);
}

int main(int argc, char **argv) {
#ifdef DFP_HAS_AMX
    amx_emulate();
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
