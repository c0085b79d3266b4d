/* Local response normalisation and its gradient, numerics.md, "Local response normalisation": the
 * contract is in microkernel.h. A pixel's terms lie in a row with zeros on both sides, so that
 * every channel has a whole window. */

/* sum[i] = terms[i] + .. + terms[i + 2 * radius], in order. */
TARGET static inline void DFP_CAT(window__, ISA)(const float *restrict terms, int64_t n,
                                                 int64_t radius, float *restrict sum) {
    for (int64_t i = 0; i < n; i++) sum[i] = terms[i];
    for (int64_t k = 1; k <= 2 * radius; k++)
        for (int64_t i = 0; i < n; i++) sum[i] += terms[i + k];
}

/* s ** (quarters / 4). */
TARGET static inline __attribute__((always_inline)) float DFP_CAT(root__, ISA)(
    float s, const int quarters) {
    const float half = __builtin_sqrtf(s);
    return quarters == 4   ? s
           : quarters == 3 ? half * __builtin_sqrtf(half)
           : quarters == 2 ? half
                           : __builtin_sqrtf(half);
}

TARGET static inline __attribute__((always_inline)) void DFP_CAT(response_loop__, ISA)(
    const dfp_response *p, const float *x, const float *dy, int64_t pixels, float *room, float *y,
    const int quarters) {
    const int64_t n = p->n, radius = p->radius;
    const float bias = p->bias, alpha = p->alpha, slope = p->slope;
    float *restrict terms = room, *restrict sums = terms + n + 2 * radius;
    float *restrict direct = sums + n, *restrict middle = terms + radius;
    for (int64_t i = 0; i < radius; i++) terms[i] = middle[n + i] = 0.0f;
    for (; pixels > 0; pixels--, x += n, y += n) {
        const float *restrict in = x;
        float *restrict out = y;
        for (int64_t i = 0; i < n; i++) middle[i] = in[i] * in[i];
        DFP_CAT(window__, ISA)(terms, n, radius, sums);
        if (!dy) {
            for (int64_t i = 0; i < n; i++)
                out[i] = in[i] / DFP_CAT(root__, ISA)(bias + alpha * sums[i], quarters);
            continue;
        }
        const float *restrict g = dy;
        for (int64_t i = 0; i < n; i++) {
            const float s = bias + alpha * sums[i];
            const float d = g[i] / DFP_CAT(root__, ISA)(s, quarters);
            direct[i] = d;
            middle[i] = d * in[i] / s;
        }
        DFP_CAT(window__, ISA)(terms, n, radius, sums);
        for (int64_t i = 0; i < n; i++) out[i] = direct[i] - slope * in[i] * sums[i];
        dy += n;
    }
}

TARGET static void DFP_CAT(response_f32__, ISA)(const dfp_response *p, const float *x,
                                                const float *dy, int64_t pixels, float *room,
                                                float *y) {
    if (p->quarters == 3) DFP_CAT(response_loop__, ISA)(p, x, dy, pixels, room, y, 3);
    else if (p->quarters == 1) DFP_CAT(response_loop__, ISA)(p, x, dy, pixels, room, y, 1);
    else if (p->quarters == 2) DFP_CAT(response_loop__, ISA)(p, x, dy, pixels, room, y, 2);
    else DFP_CAT(response_loop__, ISA)(p, x, dy, pixels, room, y, 4);
}
