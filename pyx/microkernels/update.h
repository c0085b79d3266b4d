/* Steps of optimizers, and their slots in dynamic fixed point: the contracts are in microkernel.h.
 * Every operation rounds to float by itself. */

/* What is constant costs nothing. */
TARGET static inline __attribute__((always_inline)) void DFP_CAT(sgd_loop__, ISA)(
    const dfp_update *u, int64_t n, const int moves, const int nesterov, const int decays) {
    const float rate = u->rate, momentum = u->momentum, decay = u->decay;
    const float *w = u->w, *g = u->g, *m = moves ? u->m : w;
    float *w_to = u->w_to, *m_to = moves ? u->m_to : w_to;
    DFP_IN_PLACE
    for (int64_t i = 0; i < n; i++) {
        float weight = w[i];
        const float step = g[i] * rate;
        if (decays) weight -= weight * decay * rate;
        if (moves) {
            const float velocity = m[i] * momentum - step;
            m_to[i] = velocity;
            weight += nesterov ? velocity * momentum - step : velocity;
        } else {
            weight -= step;
        }
        w_to[i] = weight;
    }
}

#define SGD(moves, nesterov)                                                     \
    {                                                                            \
        if (u->decay != 0.0f) DFP_CAT(sgd_loop__, ISA)(u, n, moves, nesterov, 1); \
        else DFP_CAT(sgd_loop__, ISA)(u, n, moves, nesterov, 0);                 \
    }

TARGET static void DFP_CAT(sgd_f32__, ISA)(const dfp_update *u, int64_t n) {
    if (!u->m) SGD(0, 0)
    else if (u->nesterov) SGD(1, 1)
    else SGD(1, 0)
}

#undef SGD

TARGET static inline __attribute__((always_inline)) void DFP_CAT(adam_loop__, ISA)(
    const dfp_update *u, int64_t n, const int keeps_largest, const int decays) {
    const float rate = u->rate, alpha = u->alpha, decay = u->decay, epsilon = u->epsilon;
    const float renewal = u->renewal, renewal2 = u->renewal2;
    const float *w = u->w, *g = u->g, *m = u->m, *v = u->v, *h = keeps_largest ? u->h : v;
    float *w_to = u->w_to, *m_to = u->m_to, *v_to = u->v_to;
    float *h_to = keeps_largest ? u->h_to : v_to;
    DFP_IN_PLACE
    for (int64_t i = 0; i < n; i++) {
        float weight = w[i];
        const float gradient = g[i];
        if (decays) weight -= weight * decay * rate;
        const float first = m[i] + (gradient - m[i]) * renewal;
        float second = v[i] + (gradient * gradient - v[i]) * renewal2;
        m_to[i] = first;
        v_to[i] = second;
        if (keeps_largest) {
            /* A NaN stays, whichever it is. */
            second = ((h[i] > second) | (h[i] != h[i])) ? h[i] : second;
            h_to[i] = second;
        }
        w_to[i] = weight - first * alpha / (__builtin_sqrtf(second) + epsilon);
    }
}

#define ADAM(keeps_largest)                                                      \
    {                                                                            \
        if (u->decay != 0.0f) DFP_CAT(adam_loop__, ISA)(u, n, keeps_largest, 1); \
        else DFP_CAT(adam_loop__, ISA)(u, n, keeps_largest, 0);                  \
    }

TARGET static void DFP_CAT(adam_f32__, ISA)(const dfp_update *u, int64_t n) {
    if (u->h) ADAM(1)
    else ADAM(0)
}

#undef ADAM

TARGET static void DFP_CAT(unpack_slot__, ISA)(const int16_t *q, const int32_t *e, int64_t n,
                                               int root, float *to) {
    for (int64_t first = 0; first < n; first += DFP_SLOT_BLOCK, e++) {
        const int64_t end = first + DFP_SLOT_BLOCK < n ? first + DFP_SLOT_BLOCK : n;
        const double scale = *e == INT32_MIN ? __builtin_nan("") : dfp_power_f64(*e);
        for (int64_t i = first; i < end; i++) to[i] = (float)(q[i] * scale);
    }
    for (int64_t i = 0; root && i < n; i++) to[i] *= to[i];
}

TARGET static void DFP_CAT(pack_slot__, ISA)(float *x, int64_t n, int root, int64_t index,
                                             const uint32_t *key, uint64_t step, int16_t *q,
                                             int32_t *e) {
    const int64_t blocks = n / DFP_SLOT_BLOCK, whole = blocks * DFP_SLOT_BLOCK;
    /* Not constants: of a clone for these, gcc 12 makes no vectors. */
    const volatile double limit = 32767.0;
    const volatile int64_t block = DFP_SLOT_BLOCK;
    for (int64_t i = 0; root && i < n; i++) x[i] = __builtin_sqrtf(x[i]);
    if (blocks) {
        DFP_CAT(exponents__, ISA)(x, blocks, DFP_SLOT_BLOCK, 16, e);
        DFP_CAT(stochastic_f32_s16__, ISA)(x, blocks, block, index, e, limit, key, step, q);
    }
    if (whole < n) {
        DFP_CAT(exponents__, ISA)(x + whole, 1, n - whole, 16, e + blocks);
        DFP_CAT(stochastic_f32_s16__, ISA)(x + whole, 1, n - whole, index + whole, e + blocks,
                                           limit, key, step, q + whole);
    }
    for (int64_t i = 0; root && i < n; i++) q[i] += (q[i] == 0) & (x[i] > 0.0f);
    for (int64_t first = 0; first < n; first += DFP_SLOT_BLOCK, e++) {
        if (*e != INT32_MIN) continue;
        const int64_t end = first + DFP_SLOT_BLOCK < n ? first + DFP_SLOT_BLOCK : n;
        memset(q + first, 0, (end - first) * sizeof *q);
    }
}
