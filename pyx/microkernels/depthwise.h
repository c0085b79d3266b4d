/* The loops of depthwise convolutions, once per instruction set; loops.h includes it. With
 * V_ZIPLO, V_ZIPHI, V_FIRST and V_SECOND (see gemm_tile.h) exact sums are made of V_DOT: a pair of
 * terms is interleaved channel by channel, and one instruction multiplies and adds both. Without,
 * or with fewer channels than a vector holds, the compiler makes of them what it can. */

/* ---- plain loops: `width` channels from c on; constant, so that sums stay in registers ------- */

/* Sums are unsigned: of mantissas that are larger than their format allows they wrap around. */

#define EACH for (int i = 0; i < width; i++)

/* `whole`: all terms are one chain, and nothing is subnormal. */
#define PATCH_BLOCK(whole)                                                                \
    {                                                                                     \
        int64_t wide[width];                                                              \
        uint32_t acc[width];                                                              \
        EACH wide[i] = 0;                                                                 \
        EACH acc[i] = 0;                                                                  \
        for (int64_t k = 0; k < t->terms; k++) {                                          \
            const int16_t *x = t->x[k] + at, *w = t->w[k] + c;                            \
            EACH acc[i] += (uint32_t)((int32_t)x[i] * (int32_t)w[i]);                     \
            if (!(whole) && (k + 1) % (2 * t->chain) == 0) {                              \
                EACH wide[i] += (int32_t)acc[i];                                          \
                EACH acc[i] = 0;                                                          \
            }                                                                             \
        }                                                                                 \
        if (whole) EACH y[i] = (float)(int32_t)acc[i] * (float)t->scale[m];               \
        else EACH y[i] = dfp_round(wide[i] + (int32_t)acc[i], t->scale[m]);               \
    }

#define PATCH_WIDTH(size)                                                                 \
    for (; c + (size) <= t->n; c += (size)) {                                             \
        enum { width = size };                                                            \
        FOR_ITEMS_AND_ROWS                                                                \
            for (int64_t p = 0; p < t->pixels; p++) {                                     \
                const int64_t at = m * t->x_item + h * t->x_row + p * t->x_step + c;      \
                float *y = t->y + m * t->y_item + h * t->y_row + p * t->y_step + c;       \
                if (whole) PATCH_BLOCK(1) else PATCH_BLOCK(0)                             \
            }                                                                             \
    }

#define FOR_ITEMS_AND_ROWS                                                                \
    for (int64_t m = 0; m < t->items; m++)                                                \
        for (int64_t h = 0; h < t->rows; h++)

TARGET static void DFP_CAT(patch_plain__, ISA)(const dfp_patch *t) {
    const int whole = !t->careful && t->terms <= 2 * t->chain;
    int64_t c = 0;
    PATCH_WIDTH(32)
    PATCH_WIDTH(8)
    PATCH_WIDTH(1)
}

#undef PATCH_WIDTH
#undef PATCH_BLOCK

#define DOTS_WIDTH(size)                                                                  \
    for (; c + (size) <= t->n; c += (size)) {                                             \
        enum { width = size };                                                            \
        for (int64_t k = 0; k < t->terms; k++) {                                          \
            int64_t *sums = t->sums[k] + c;                                               \
            FOR_ITEMS_AND_ROWS {                                                          \
                const int16_t *x = t->x[k] + m * t->x_item + h * t->x_row + c;            \
                const int16_t *dy = t->dy + m * t->y_item + h * t->y_row + c;             \
                for (int64_t p = 0; p < t->pixels;) {                                     \
                    uint32_t acc[width];                                                  \
                    EACH acc[i] = 0;                                                      \
                    for (int64_t left = 2 * t->chain; left && p < t->pixels; left--, p++) { \
                        EACH acc[i] += (uint32_t)((int32_t)x[i] * (int32_t)dy[i]);        \
                        x += t->x_step;                                                   \
                        dy += t->y_step;                                                  \
                    }                                                                     \
                    EACH sums[i] += (int32_t)acc[i];                                      \
                }                                                                         \
            }                                                                             \
        }                                                                                 \
    }

TARGET static void DFP_CAT(dots_plain__, ISA)(const dfp_patch *t) {
    int64_t c = 0;
    DOTS_WIDTH(32)
    DOTS_WIDTH(8)
    DOTS_WIDTH(1)
}

#undef DOTS_WIDTH
#undef EACH

#ifndef V_ZIPLO

TARGET static void DFP_CAT(depthwise_patch__, ISA)(const dfp_patch *t) {
    DFP_CAT(patch_plain__, ISA)(t);
}

TARGET static void DFP_CAT(depthwise_dots__, ISA)(const dfp_patch *t) {
    DFP_CAT(dots_plain__, ISA)(t);
}

#else

/* ---- vectors of 2 * LANES channels; the last one may overlap the one before ------------------ */

/* Stays in a register: gcc 12 would load it once for each use. */
#define LOADED(v) __asm__("" : "+" V_REGISTER(v))

/* After a pair: carries all sums over where a chain ends. */
#define END_PAIR(count)                                                                   \
    if (--chain == 0) {                                                                   \
        chain = t->chain;                                                                 \
        UNROLL for (int i = 0; i < (count); i++) {                                        \
            CARRY(hi[i][0], acc[i][0]);                                                   \
            CARRY(hi[i][1], acc[i][1]);                                                   \
        }                                                                                 \
    }

/* All terms of `count` neighbouring pixels; with `carried`, over more than one chain. */
#define SUM_PIXELS(count, carried)                                                        \
    {                                                                                     \
        VI acc[count][2], hi[count][2];                                                   \
        UNROLL for (int i = 0; i < (count); i++)                                          \
            acc[i][0] = acc[i][1] = hi[i][0] = hi[i][1] = V_ZERO();                       \
        for (int64_t k = 0, chain = t->chain; k < t->terms; k += 2) {                     \
            const int paired = k + 1 < t->terms;                                          \
            const int16_t *x0 = t->x[k] + at, *x1 = paired ? t->x[k + 1] + at : x0;       \
            const VI w0 = V_LOADU(t->w[k] + c);                                           \
            const VI w1 = paired ? V_LOADU(t->w[k + 1] + c) : V_ZERO();                   \
            const VI wa = V_ZIPLO(w0, w1), wb = V_ZIPHI(w0, w1);                          \
            if (k + 1 >= t->fresh && k < t->fresh_end)                                    \
                UNROLL for (int i = 0; i < (count); i++) {                                \
                    __builtin_prefetch(x0 + t->x_row + i * t->x_step, 0, 2);              \
                    __builtin_prefetch(x1 + t->x_row + i * t->x_step, 0, 2);              \
                }                                                                         \
            UNROLL for (int i = 0; i < (count); i++) {                                    \
                VI a = V_LOADU(x0 + i * t->x_step), b = V_LOADU(x1 + i * t->x_step);       \
                LOADED(a);                                                                \
                LOADED(b);                                                                \
                V_DOT(acc[i][0], V_ZIPLO(a, b), wa);                                      \
                V_DOT(acc[i][1], V_ZIPHI(a, b), wb);                                      \
            }                                                                             \
            if (carried) END_PAIR(count)                                                  \
        }                                                                                 \
        UNROLL for (int i = 0; i < (count); i++) {                                        \
            VF f[2];                                                                      \
            UNROLL for (int j = 0; j < 2; j++)                                            \
                if (carried) {                                                            \
                    CARRY(hi[i][j], acc[i][j]);                                           \
                    f[j] = F_ROUND(hi[i][j], acc[i][j]);                                  \
                } else {                                                                  \
                    f[j] = F_FROM(acc[i][j]);                                             \
                }                                                                         \
            STORE_F(y + i * t->y_step, F_MUL(F_FIRST(f[0], f[1]), scale));                \
            STORE_F(y + i * t->y_step + LANES, F_MUL(F_SECOND(f[0], f[1]), scale));       \
        }                                                                                 \
    }

#define PATCH(carried)                                                                    \
    FOR_ITEMS_AND_ROWS                                                                    \
        for (int64_t p = 0; p < t->pixels; p += p + 4 <= t->pixels ? 4 : 1)               \
            for (int64_t next = 0; next < t->n; next += 2 * LANES) {                      \
                const int64_t c = next + 2 * LANES <= t->n ? next : t->n - 2 * LANES;     \
                const int64_t at = m * t->x_item + h * t->x_row + p * t->x_step + c;      \
                float *y = t->y + m * t->y_item + h * t->y_row + p * t->y_step + c;       \
                const VF scale = F_SET1((float)t->scale[m]);                              \
                if (p + 4 <= t->pixels) SUM_PIXELS(4, carried) else SUM_PIXELS(1, carried) \
            }

TARGET static void DFP_CAT(depthwise_patch__, ISA)(const dfp_patch *t) {
    if (t->careful || t->n < 2 * LANES) DFP_CAT(patch_plain__, ISA)(t);
    else if ((t->terms + 1) / 2 <= t->chain) PATCH(0)
    else PATCH(1)
}

#undef PATCH
#undef SUM_PIXELS

/* `count` terms from k on, over all pixels, for the channels from c on. */
#define DOT_TERMS(count)                                                                  \
    {                                                                                     \
        VI acc[count][2], hi[count][2];                                                   \
        int64_t chain = t->chain;                                                         \
        UNROLL for (int i = 0; i < (count); i++)                                          \
            acc[i][0] = acc[i][1] = hi[i][0] = hi[i][1] = V_ZERO();                       \
        FOR_ITEMS_AND_ROWS {                                                              \
            const int16_t *x[count], *dy = t->dy + m * t->y_item + h * t->y_row + c;      \
            UNROLL for (int i = 0; i < (count); i++) x[i] = t->x[k + i] + c;              \
            int64_t at = m * t->x_item + h * t->x_row;                                    \
            for (int64_t p = 0; p < t->pixels; p += 2) {                                  \
                const int paired = p + 1 < t->pixels;                                     \
                const VI d0 = V_LOADU(dy);                                                \
                const VI d1 = paired ? V_LOADU(dy + t->y_step) : V_ZERO();                \
                const VI da = V_ZIPLO(d0, d1), db = V_ZIPHI(d0, d1);                      \
                const int64_t second = paired ? t->x_step : 0;                            \
                UNROLL for (int i = 0; i < (count); i++) {                                \
                    VI a = V_LOADU(x[i] + at), b = V_LOADU(x[i] + at + second);           \
                    LOADED(a);                                                            \
                    LOADED(b);                                                            \
                    V_DOT(acc[i][0], V_ZIPLO(a, b), da);                                  \
                    V_DOT(acc[i][1], V_ZIPHI(a, b), db);                                  \
                }                                                                         \
                dy += 2 * t->y_step;                                                      \
                at += 2 * t->x_step;                                                      \
                END_PAIR(count)                                                           \
            }                                                                             \
        }                                                                                 \
        UNROLL for (int i = 0; i < (count); i++) {                                        \
            int32_t low[2 * LANES], high[2 * LANES];                                      \
            V_STOREU(low, V_FIRST(acc[i][0], acc[i][1]));                                 \
            V_STOREU(low + LANES, V_SECOND(acc[i][0], acc[i][1]));                        \
            V_STOREU(high, V_FIRST(hi[i][0], hi[i][1]));                                  \
            V_STOREU(high + LANES, V_SECOND(hi[i][0], hi[i][1]));                         \
            int64_t *sums = t->sums[k + i] + c;                                           \
            if (c == next)                                                                \
                for (int j = 0; j < 2 * LANES; j++)                                       \
                    sums[j] += (int64_t)high[j] * 65536 + low[j];                         \
            else                                                                          \
                for (int64_t j = next - c; j < 2 * LANES; j++)                            \
                    sums[j] += (int64_t)high[j] * 65536 + low[j];                         \
        }                                                                                 \
    }

TARGET static void DFP_CAT(depthwise_dots__, ISA)(const dfp_patch *t) {
    if (t->n < 2 * LANES) {
        DFP_CAT(dots_plain__, ISA)(t);
        return;
    }
    for (int64_t next = 0; next < t->n; next += 2 * LANES) {
        const int64_t c = next + 2 * LANES <= t->n ? next : t->n - 2 * LANES;
        int64_t k = 0;
        for (; k + 3 <= t->terms; k += 3) DOT_TERMS(3)
        for (; k < t->terms; k++) DOT_TERMS(1)
    }
}

#undef DOT_TERMS
#undef END_PAIR
#undef LOADED

#endif

#undef FOR_ITEMS_AND_ROWS
