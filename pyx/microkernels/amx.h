/* AMX-INT8: exact int16 products by digits, on tiles of int8 (dfp_digits in microkernel.h). What has
 * no tiles (spill, quantize, depthwise) is AVX-512-VNNI's.
 *
 * Tile registers: sums 0-3 (2 x 2 tiles of C), A 4 and 5, B 6 and 7. A tile product has a latency of
 * 52 cycles and starts every 16, so four sums are what keeps the unit busy.
 */

#define AMX_TARGET                                                                          \
    __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))

/* Assembly rather than intrinsics: those of gcc 12 do not say what memory they read and write. */
typedef struct { int8_t x[16][64]; } amx_lines;
typedef struct { int32_t x[16][32]; } amx_sums;
#define AMX_RESUME(t, p)                                                                    \
    __asm__ __volatile__("tileloadd (%0,%1,1), %%tmm" #t                                    \
                         : : "r"(p), "r"((int64_t)128), "m"(*(const amx_sums *)(p)))
#define AMX_STORE(t, p)                                                                     \
    __asm__ __volatile__("tilestored %%tmm" #t ", (%1,%2,1)"                                \
                         : "+m"(*(amx_sums *)(p)) : "r"(p), "r"((int64_t)128))
#define AMX_ZERO(t) __asm__ __volatile__("tilezero %%tmm" #t : :)
/* sums c += A tile a times B tile b */
#define AMX_DOT(op, c, a, b)                                                                \
    __asm__ __volatile__(op " %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

static void amx_open(void) {
    /* Palette 1; eight tiles of 16 rows, 64 bytes each. */
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) configuration = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ __volatile__("ldtilecfg %0" : : "m"(configuration));
}

static void amx_close(void) { __asm__ __volatile__("tilerelease" : :); }

/* ---- Digits ---------------------------------------------------------------------------------- */

/* The planes of 64 mantissas, 32 in a and 32 in b. vpacksswb takes eight of a, eight of b, and so
 * on: that is the order of products within a step. */
AMX_TARGET static inline __attribute__((always_inline)) int
amx_split(__m512i a, __m512i b, int products, __m512i planes[3]) {
    if (products == 3) {
        const __m512i half = _mm512_set1_epi16(64);
        const __m512i ah = _mm512_srai_epi16(_mm512_add_epi16(a, half), 7);
        const __m512i bh = _mm512_srai_epi16(_mm512_add_epi16(b, half), 7);
        planes[0] = _mm512_packs_epi16(ah, bh);
        planes[2] = _mm512_packs_epi16(_mm512_sub_epi16(a, _mm512_slli_epi16(ah, 7)),
                                       _mm512_sub_epi16(b, _mm512_slli_epi16(bh, 7)));
        planes[1] = _mm512_add_epi8(planes[0], planes[2]);
        return 3;
    }
    const __m512i byte = _mm512_set1_epi16(255);
    planes[0] = _mm512_packs_epi16(_mm512_srai_epi16(a, 8), _mm512_srai_epi16(b, 8));
    planes[1] = _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte));
    return 2;
}

/* Where the g-th group of four products of a step lies before packing. */
static inline int amx_group(int g) {
    const int lane = g / 4, quarter = g % 4;
    return (quarter < 2 ? 0 : 32) + 8 * lane + 4 * (quarter % 2);
}

AMX_TARGET static void lines_s8__amx(const int16_t *q, int64_t count, int products, int8_t *out,
                                     int64_t step, int64_t plane) {
    for (; count > 0; count -= 64, q += 64, out += step) {
        __m512i planes[3], a, b;
        if (count >= 64) {
            a = _mm512_loadu_si512(q);
            b = _mm512_loadu_si512(q + 32);
        } else {
            const uint64_t here = ((uint64_t)1 << count) - 1;
            a = _mm512_maskz_loadu_epi16((__mmask32)here, q);
            b = _mm512_maskz_loadu_epi16((__mmask32)(here >> 32), q + 32);
        }
        const int n = amx_split(a, b, products, planes);
        for (int p = 0; p < n; p++) _mm512_store_si512(out + p * plane, planes[p]);
    }
}

/* 16 x 16 int32, transposed in registers. */
AMX_TARGET static inline __attribute__((always_inline)) void amx_transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Column c of a row, as a number where the row is missing: nothing may be added to NULL. */
static inline const int16_t *amx_column(const int16_t *row, int64_t c) {
    return (const int16_t *)((uintptr_t)row + (uintptr_t)c * sizeof *row);
}

/* Digits (high, low) of a row of 32 mantissas, as int16. */
typedef struct { __m512i high, low; } amx_row;
AMX_TARGET static inline __attribute__((always_inline)) amx_row
amx_split_row(const int16_t *row, int64_t c, __mmask32 columns, int products) {
    amx_row r;
    const __m512i q = _mm512_maskz_loadu_epi16(row ? columns : 0, amx_column(row, c));
    if (products == 3) {
        r.high = _mm512_srai_epi16(_mm512_add_epi16(q, _mm512_set1_epi16(64)), 7);
        r.low = _mm512_sub_epi16(q, _mm512_slli_epi16(r.high, 7));
    } else {
        r.high = _mm512_srai_epi16(q, 8);
        r.low = _mm512_and_si512(q, _mm512_set1_epi16(255));
    }
    return r;
}

/* Two rows' digits in turns: bytes (first, second) of a column. */
AMX_TARGET static inline __attribute__((always_inline)) amx_row
amx_pair(amx_row a, amx_row b, int products) {
    const __m512i turns = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
    amx_row r = {_mm512_packs_epi16(a.high, b.high),
                 products == 3 ? _mm512_packs_epi16(a.low, b.low)
                               : _mm512_packus_epi16(a.low, b.low)};
    r.high = _mm512_shuffle_epi8(r.high, turns);
    r.low = _mm512_shuffle_epi8(r.low, turns);
    return r;
}

/* A group of four products, two pairs, of 32 columns: stores [16][4] bytes per half and plane. */
AMX_TARGET static inline __attribute__((always_inline)) void
amx_store_group(amx_row first, amx_row second, int products, int8_t *out, int64_t half,
                int64_t plane) {
    /* A lane has 8 columns; its two halves come from two unpacks. */
    const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i h0 = _mm512_unpacklo_epi16(first.high, second.high);
    const __m512i h1 = _mm512_unpackhi_epi16(first.high, second.high);
    const __m512i l0 = _mm512_unpacklo_epi16(first.low, second.low);
    const __m512i l1 = _mm512_unpackhi_epi16(first.low, second.low);
    for (int i = 0; i < 2; i++, out += half) {
        const __m512i high = _mm512_permutex2var_epi64(h0, i ? right : left, h1);
        const __m512i low = _mm512_permutex2var_epi64(l0, i ? right : left, l1);
        _mm512_store_si512(out, high);
        if (products == 3) {
            _mm512_store_si512(out + plane, _mm512_add_epi8(high, low));
            _mm512_store_si512(out + 2 * plane, low);
        } else {
            _mm512_store_si512(out + plane, low);
        }
    }
}

AMX_TARGET static inline __attribute__((always_inline)) void
amx_columns_of_rows(const int16_t *const *rows, int64_t c, int64_t n, int natural, int products,
                    int8_t *out, int64_t half, int64_t plane) {
    const __mmask32 columns = (__mmask32)(((uint64_t)1 << n) - 1);
    for (int g = 0; g < 16; g++) {
        const int16_t *const *r = rows + (natural ? 4 * g : amx_group(g));
        /* The next panel's: rows are too far apart for the hardware to see it coming. */
        for (int i = 0; i < 4; i++)
            _mm_prefetch((const char *)amx_column(r[i], c + 32), _MM_HINT_T1);
        amx_store_group(amx_pair(amx_split_row(r[0], c, columns, products),
                                 amx_split_row(r[1], c, columns, products), products),
                        amx_pair(amx_split_row(r[2], c, columns, products),
                                 amx_split_row(r[3], c, columns, products), products),
                        products, out + g * 64, half, plane);
    }
}

AMX_TARGET static void columns_of_rows_s8__amx(const int16_t *const *rows, int64_t c, int64_t n,
                                               int natural, int products, int8_t *out,
                                               int64_t half, int64_t plane) {
    if (products == 3) amx_columns_of_rows(rows, c, n, natural, 3, out, half, plane);
    else amx_columns_of_rows(rows, c, n, natural, 4, out, half, plane);
}

AMX_TARGET static inline __attribute__((always_inline)) void
amx_columns_sliding(const int16_t *const *rows, int64_t count, int64_t c, int64_t n, int products,
                    int8_t *out, int64_t half, int64_t plane, int64_t copy) {
    const __mmask32 columns = (__mmask32)(((uint64_t)1 << n) - 1);
    /* The row before, and the pairs that begin two and one rows before it. */
    amx_row last = amx_split_row(rows[2], c, columns, products);
    amx_row middle = amx_split_row(rows[1], c, columns, products);
    amx_row older = amx_pair(amx_split_row(rows[0], c, columns, products), middle, products);
    amx_row old = amx_pair(middle, last, products);
    for (int64_t q = 0; q + 3 < count; q++) {
        const amx_row next = amx_split_row(rows[q + 3], c, columns, products);
        const amx_row pair = amx_pair(last, next, products);
        amx_store_group(older, pair, products, out + (q & 3) * copy + q / 4 * 64, half, plane);
        last = next;
        older = old;
        old = pair;
    }
}

AMX_TARGET static void columns_sliding_s8__amx(const int16_t *const *rows, int64_t count,
                                               int64_t c, int64_t n, int products, int8_t *out,
                                               int64_t half, int64_t plane, int64_t copy) {
    if (products == 3) amx_columns_sliding(rows, count, c, n, 3, out, half, plane, copy);
    else amx_columns_sliding(rows, count, c, n, 4, out, half, plane, copy);
}

AMX_TARGET static void lines_of_rows_s8__amx(const int16_t *const *rows, int64_t c, int64_t n,
                                             int products, int8_t *out, int64_t plane) {
    int8_t groups[3][2][1024] __attribute__((aligned(64)));
    columns_of_rows_s8__amx(rows, c, n, 1, products, groups[0][0], 1024, 2048);
    for (int p = 0; p < (products == 3 ? 3 : 2); p++)
        for (int h = 0; h < 2; h++) {
            __m512i r[16];
            for (int g = 0; g < 16; g++) r[g] = _mm512_load_si512(groups[p][h] + g * 64);
            amx_transpose(r);
            const int64_t lines = n - h * 16 < 16 ? n - h * 16 : 16;
            for (int i = 0; i < lines; i++)
                _mm512_store_si512(out + p * plane + (h * 16 + i) * 64, r[i]);
        }
}

AMX_TARGET static void columns_s8__amx(const int16_t *q, int natural, int products, int8_t *out,
                                       int64_t plane) {
    int8_t lines[3][1024] __attribute__((aligned(64)));
    for (int j = 0; j < 16; j++) lines_s8__amx(q + j * 64, 64, products, lines[0] + j * 64, 0, 1024);
    for (int p = 0; p < (products == 3 ? 3 : 2); p++) {
        __m512i r[16];
        for (int j = 0; j < 16; j++) r[j] = _mm512_load_si512(lines[p] + j * 64);
        amx_transpose(r);
        for (int g = 0; g < 16; g++)
            _mm512_store_si512(out + p * plane + (natural ? amx_group(g) / 4 : g) * 64, r[g]);
    }
}

/* ---- Sums ------------------------------------------------------------------------------------ */

/* v = 2**2d hh + 2**d mid + ll = u * 2**24 + r with 0 <= r < 2**24: u and r convert exactly, and the
 * fused multiply-add rounds once. */
AMX_TARGET static inline __attribute__((always_inline)) __m512
amx_round(__m512i hh, __m512i mid, __m512i ll, const int d, __m512 scale) {
    if (d == 7) mid = _mm512_sub_epi32(_mm512_sub_epi32(mid, hh), ll);
    const __m512i digit = _mm512_set1_epi32((1 << d) - 1);
    const __m512i t = _mm512_add_epi32(mid, _mm512_srai_epi32(ll, d));
    const __m512i v = _mm512_add_epi32(hh, _mm512_srai_epi32(t, d));
    __m512i r = _mm512_or_si512(_mm512_slli_epi32(_mm512_and_si512(t, digit), d),
                                _mm512_and_si512(ll, digit));
    const __m512i low = _mm512_and_si512(v, _mm512_set1_epi32((1 << (24 - 2 * d)) - 1));
    r = _mm512_or_si512(r, _mm512_slli_epi32(low, 2 * d));
    const __m512i u = _mm512_srai_epi32(v, 24 - 2 * d);
    const __m512 radix = _mm512_set1_ps(16777216.0f);
    return _mm512_mul_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(u), radix, _mm512_cvtepi32_ps(r)),
                         scale);
}

AMX_TARGET static inline __attribute__((always_inline)) void
amx_finish_rows(dfp_digit_rows *e, int64_t count) {
    const int64_t end = e->next + count < e->rows ? e->next + count : e->rows;
    for (int64_t i = e->next; i < end; i++) {
        if (e->row[i] < 0) continue;
        const __m512 scale = _mm512_set1_ps(e->row_scale[i]);
        for (int j = 0; j < 2; j++) {
            const int32_t *s = e->sums + i * 32 + j * 16;
            const __m512i hh = _mm512_load_si512(s), mid = _mm512_load_si512(s + 1024);
            const __m512i ll = _mm512_load_si512(s + 2048);
            __m512 y = e->products == 3 ? amx_round(hh, mid, ll, 7, scale)
                                        : amx_round(hh, mid, ll, 8, scale);
            if (e->column_scale) y = _mm512_mul_ps(y, _mm512_loadu_ps(e->column_scale + j * 16));
            if (e->bias) {
                y = _mm512_add_ps(y, _mm512_loadu_ps(e->bias + j * 16));
                y = _mm512_max_ps(_mm512_set1_ps(e->low), y);
                y = _mm512_min_ps(_mm512_set1_ps(e->high), y);
            }
            float *c = e->c + e->row[i] + j * 16;
            const int64_t left = e->cols - j * 16;
            if (left >= 16 && e->stream) _mm512_stream_ps(c, y);
            else if (left >= 16) _mm512_storeu_ps(c, y);
            else if (left > 0) _mm512_mask_storeu_ps(c, (__mmask16)((1u << left) - 1), y);
        }
    }
    e->next = end;
}

AMX_TARGET static void finish_s8__amx(dfp_digit_rows *pending) {
    amx_finish_rows(pending, pending->rows);
}

AMX_TARGET static void finish_transposed_s8__amx(const dfp_digit_rows *e, int64_t ldc) {
    const __m512 scale = _mm512_set1_ps(*e->row_scale);
    for (int64_t i = 0; i < e->rows; i += 16)
        for (int64_t j = 0; j < e->cols; j += 16) {
            const int64_t left = e->rows - i;
            const __mmask16 here = left < 16 ? (__mmask16)((1u << left) - 1) : 0xffff;
            __m512i r[16];
            for (int k = 0; k < 16; k++) {
                const int32_t *s = e->sums + (i + k) * 32 + j;
                const __m512i hh = _mm512_load_si512(s), mid = _mm512_load_si512(s + 1024);
                const __m512i ll = _mm512_load_si512(s + 2048);
                r[k] = _mm512_castps_si512(e->products == 3 ? amx_round(hh, mid, ll, 7, scale)
                                                            : amx_round(hh, mid, ll, 8, scale));
            }
            amx_transpose(r);
            for (int k = 0; k < 16 && j + k < e->cols; k++)
                _mm512_mask_storeu_epi32(e->c + (j + k) * ldc + i, here, r[k]);
        }
}

/* One step: 2 x 2 tiles of products, two tiles of A and two of B loaded. */
#define AMX_STEP(op)                                                                        \
    do {                                                                                    \
        const int8_t *const at = a + t->a_step[s], *const right = b + t->b_half;            \
        __asm__ __volatile__("tileloadd (%[b],%[line],1), %%tmm6\n\t"                       \
                             "tileloadd (%[a],%[line],1), %%tmm4\n\t"                       \
                             op " %%tmm6, %%tmm4, %%tmm0\n\t"                               \
                             "tileloadd 1024(%[a],%[line],1), %%tmm5\n\t"                   \
                             op " %%tmm6, %%tmm5, %%tmm2\n\t"                               \
                             "tileloadd (%[right],%[line],1), %%tmm7\n\t"                   \
                             op " %%tmm7, %%tmm4, %%tmm1\n\t"                               \
                             op " %%tmm7, %%tmm5, %%tmm3"                                   \
                             :                                                              \
                             : [a] "r"(at), [b] "r"(b), [right] "r"(right),                 \
                               [line] "r"((int64_t)64), "m"(*(const amx_lines(*)[2])at),    \
                               "m"(*(const amx_lines *)b), "m"(*(const amx_lines *)right)); \
        b += t->b_step;                                                                     \
    } while (0)

#define AMX_PASS(op, a_digit, b_digit)                                                      \
    do {                                                                                    \
        const int8_t *a = t->a + (a_digit) * t->a_plane, *b = t->b + (b_digit) * t->b_plane; \
        for (int64_t s = 0; s < t->steps; s++) AMX_STEP(op);                                \
    } while (0)

#define AMX_OPEN_SUMS(sums)                                                                 \
    do {                                                                                    \
        if (t->resume) {                                                                    \
            AMX_RESUME(0, sums);                                                            \
            AMX_RESUME(1, sums + 16);                                                       \
            AMX_RESUME(2, sums + 512);                                                      \
            AMX_RESUME(3, sums + 528);                                                      \
        } else {                                                                            \
            AMX_ZERO(0);                                                                    \
            AMX_ZERO(1);                                                                    \
            AMX_ZERO(2);                                                                    \
            AMX_ZERO(3);                                                                    \
        }                                                                                   \
    } while (0)

#define AMX_CLOSE_SUMS(sums)                                                                \
    do {                                                                                    \
        AMX_STORE(0, sums);                                                                 \
        AMX_STORE(1, sums + 16);                                                            \
        AMX_STORE(2, sums + 512);                                                           \
        AMX_STORE(3, sums + 528);                                                           \
    } while (0)

/* Planes one after the other, because eight registers hold the sums of one. While the first runs,
 * the vector units round the rows of the tile before; they are done when its sums are stored. */
AMX_TARGET static void multiply_s8__amx(const dfp_digit_tile *t, dfp_digit_rows *pending) {
    int32_t *const hh = t->sums, *const mid = hh + 1024, *const ll = mid + 1024;
    AMX_OPEN_SUMS(hh);
    const int64_t left = pending->rows - pending->next;
    if (left > 0 && t->steps > 0) {
        const int64_t share = (left + t->steps - 1) / t->steps;
        const int8_t *a = t->a, *b = t->b;
        for (int64_t s = 0; s < t->steps; s++) {
            AMX_STEP("tdpbssd");
            amx_finish_rows(pending, share);
        }
    } else {
        AMX_PASS("tdpbssd", 0, 0);
    }
    AMX_CLOSE_SUMS(hh);
    AMX_OPEN_SUMS(mid);
    if (t->products == 3) {
        AMX_PASS("tdpbssd", 1, 1);
    } else {
        AMX_PASS("tdpbsud", 0, 1);
        AMX_PASS("tdpbusd", 1, 0);
    }
    AMX_CLOSE_SUMS(mid);
    AMX_OPEN_SUMS(ll);
    if (t->products == 3) AMX_PASS("tdpbssd", 2, 2);
    else AMX_PASS("tdpbuud", 1, 1);
    AMX_CLOSE_SUMS(ll);
}

#undef AMX_STEP
#undef AMX_PASS
#undef AMX_OPEN_SUMS
#undef AMX_CLOSE_SUMS

/* Exact int16 products of four tile products each. */
static int64_t peak_s16__amx(int64_t rounds) {
    amx_open();
    AMX_ZERO(0);
    AMX_ZERO(1);
    AMX_ZERO(2);
    AMX_ZERO(3);
    AMX_ZERO(4);
    AMX_ZERO(6);
    for (int64_t r = 0; r < rounds; r++) {
        AMX_DOT("tdpbssd", 0, 4, 6);
        AMX_DOT("tdpbssd", 1, 4, 6);
        AMX_DOT("tdpbssd", 2, 4, 6);
        AMX_DOT("tdpbssd", 3, 4, 6);
    }
    amx_close();
    return rounds * 16 * 16 * 64;
}

static const dfp_digits dfp_digits__amx = {
    amx_open, amx_close, lines_s8__amx, lines_of_rows_s8__amx, columns_of_rows_s8__amx,
    columns_s8__amx, columns_sliding_s8__amx, multiply_s8__amx, finish_s8__amx,
    finish_transposed_s8__amx,
};

#define ISA avx512vnni
static const dfp_kernel dfp_kernel__amx = {
    "amx", 8, 32,
    gemm_s16_exact__avx512vnni, gemm_s16_spill__avx512vnni,
    gemm_s16_exact_narrow__avx512vnni, gemm_s16_spill_narrow__avx512vnni,
    DFP_LOOPS, peak_s16__amx, &dfp_digits__amx,
};
#undef ISA
