/* SiLU (swish) and its derivative, element by element: numerics.md, "SiLU". */

/* What both are made of: s = 1 / (1 + exp(-v)) and, in *rest, 1 - s. */
TARGET static inline float DFP_CAT(logistic__, ISA)(float v, float *rest) {
    const float a = __builtin_fabsf(v);
    /* a = n * ln(2) - r: adding 1.5 * 2**23 rounds to the nearest integer, and leaves it in the low
     * bits. */
    const float shifted = a * 1.44269502f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (n * 0.693359375f - a) + n * -2.12194442e-4f;
    float p = r * 0.00138144672f + 0.00836878084f;
    p = p * r + 0.0416683927f;
    p = p * r + 0.166665196f;
    p = p * r + 0.49999994f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (0x4b400000u + 127u - bits) << 23; /* of 2**-n */
    float power;
    memcpy(&power, &bits, sizeof power);
    const float t = a > 87.0f ? 0.0f : p * power; /* exp(-a); NaN stays */
    const float large = 1.0f / (1.0f + t), small = t * large;
    *rest = v < 0.0f ? large : small;
    return v < 0.0f ? small : large;
}

TARGET static inline float DFP_CAT(silu__, ISA)(float v) {
    float rest;
    return v * DFP_CAT(logistic__, ISA)(v, &rest);
}

/* Its derivative. */
TARGET static inline float DFP_CAT(silu_slope__, ISA)(float v) {
    float rest;
    const float s = DFP_CAT(logistic__, ISA)(v, &rest);
    return s * (1.0f + v * rest);
}
