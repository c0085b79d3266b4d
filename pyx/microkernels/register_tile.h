/* One register tile of MR rows and TILE_NV vectors; gemm_tile.h says what else is defined here.
 * TILE(f) makes the name of its function f. */

#define NR (TILE_NV * LANES)

/* One chain: `n` pairs into the int32 accumulators. */
#define RUN_CHAIN(n)                                                             \
    for (int64_t u = 0; u < (n); u++) {                                          \
        VI bv[TILE_NV];                                                          \
        UNROLL for (int j = 0; j < TILE_NV; j++) bv[j] = V_LOAD(b + j * 2 * LANES);\
        UNROLL for (int i = 0; i < MR; i++) {                                    \
            const VI av = V_PAIR(a[i] + at);                                     \
            UNROLL for (int j = 0; j < TILE_NV; j++)                             \
                V_DOT(acc[i][j], av, bv[j]);                                     \
        }                                                                        \
        __builtin_prefetch(soon, 0, 3);                                          \
        soon += 2 * MR;                                                          \
        b += 2 * NR;                                                             \
        at += t->pair_stride;                                                    \
    }

#define OPEN_TILE                                                                \
    const int16_t *a[MR], *b = t->b, *soon = t->soon;                            \
    int64_t at = 0;                                                              \
    UNROLL for (int i = 0; i < MR; i++) {                                        \
        const int64_t row = i < t->rows ? i : t->rows - 1;                       \
        a[i] = t->a + (t->starts ? t->starts[row] : row * t->row_stride);           \
    }                                                                            \
    VI acc[MR][TILE_NV];

TARGET static void TILE(gemm_s16_exact)(const dfp_tile *t) {
    OPEN_TILE
    VI hi[MR][TILE_NV];
    if (t->resume) {
        UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < TILE_NV; j++) {
            hi[i][j] = V_LOADU(t->acc + i * NR + j * LANES);
            acc[i][j] = V_LOADU(t->acc + (MR + i) * NR + j * LANES);
        }
    } else {
        UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < TILE_NV; j++)
            hi[i][j] = acc[i][j] = V_ZERO();
    }
    const int64_t *runs = t->runs;
    int64_t in_run = runs ? t->run : t->pairs;
    if (runs) at = *runs++;
    for (int64_t left = t->pairs, room = t->chain; left > 0;) {
        int64_t n = left < room ? left : room;
        n = n < in_run ? n : in_run;
        RUN_CHAIN(n)
        left -= n, room -= n, in_run -= n;
        if (!in_run && left) at = *runs++, in_run = t->run;
        if (room && left) continue;
        room = t->chain;
        /* What stays in the accumulator is small: the bound on chains leaves room. */
        UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < TILE_NV; j++)
            CARRY(hi[i][j], acc[i][j]);
    }
    if (!t->c) {
        UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < TILE_NV; j++) {
            V_STOREU(t->acc + i * NR + j * LANES, hi[i][j]);
            V_STOREU(t->acc + (MR + i) * NR + j * LANES, acc[i][j]);
        }
        return;
    }
    UNROLL for (int i = 0; i < MR; i++) {
        const VF scale = F_SET1(t->row_scale[i]);
        UNROLL for (int j = 0; j < TILE_NV; j++) {
            VF y = F_MUL(F_ROUND(hi[i][j], acc[i][j]), scale);
            if (t->column_scale) y = F_MUL(y, F_LOADU(t->column_scale + j * LANES));
            if (t->bias)
                y = F_CLIP(F_ADD(y, F_LOADU(t->bias + j * LANES)), F_SET1(t->low), F_SET1(t->high));
            STORE_F(t->c + i * t->ldc + j * LANES, y);
        }
    }
}

TARGET static void TILE(gemm_s16_spill)(const dfp_tile *t) {
    OPEN_TILE
    VF sum[MR][TILE_NV];
    float *const carried = (float *)t->acc;
    UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < TILE_NV; j++)
        sum[i][j] = t->resume ? F_LOADU(carried + i * NR + j * LANES) : F_ZERO();
    for (int64_t done = 0; done < t->pairs; done += t->segment)
        for (int64_t left = t->segment; left > 0; left -= t->chain) {
            const int64_t n = left < t->chain ? left : t->chain;
            UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < TILE_NV; j++)
                acc[i][j] = V_ZERO();
            RUN_CHAIN(n)
            UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < TILE_NV; j++)
                sum[i][j] = F_ADD(sum[i][j], F_FROM(acc[i][j]));
        }
    if (!t->c) {
        UNROLL for (int i = 0; i < MR; i++) UNROLL for (int j = 0; j < TILE_NV; j++)
            F_STOREU(carried + i * NR + j * LANES, sum[i][j]);
        return;
    }
    UNROLL for (int i = 0; i < MR; i++) {
        const VF scale = F_SET1(t->row_scale[i]);
        UNROLL for (int j = 0; j < TILE_NV; j++) {
            VF y = F_MUL(sum[i][j], scale);
            if (t->column_scale) y = F_MUL(y, F_LOADU(t->column_scale + j * LANES));
            if (t->bias)
                y = F_CLIP(F_ADD(y, F_LOADU(t->bias + j * LANES)), F_SET1(t->low), F_SET1(t->high));
            STORE_F(t->c + i * t->ldc + j * LANES, y);
        }
    }
}

#undef NR
#undef RUN_CHAIN
#undef OPEN_TILE
#undef TILE
#undef TILE_NV
