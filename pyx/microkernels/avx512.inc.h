/* What the 512-bit instruction sets share; a header of theirs adds ISA, TARGET and V_DOT. */

#define MR 8
#define NV 2
#define LANES 16
#define VI __m512i
#define VF __m512
#define V_REGISTER "v"
#define V_ZERO() _mm512_setzero_si512()
#define V_LOAD(p) _mm512_load_si512((const void *)(p))
#define V_LOADU(p) _mm512_loadu_si512((const void *)(p))
#define V_STOREU(p, v) _mm512_storeu_si512((void *)(p), v)
#define V_PAIR(p) _mm512_set1_epi32(load_s32(p))
#define V_ADD(a, b) _mm512_add_epi32(a, b)
#define V_AND(a, b) _mm512_and_si512(a, b)
#define V_OR(a, b) _mm512_or_si512(a, b)
#define V_SET1(x) _mm512_set1_epi32(x)
#define V_SRA(v, n) _mm512_srai_epi32(v, n)
#define V_SLL(v, n) _mm512_slli_epi32(v, n)
#define F_FROM(v) _mm512_cvtepi32_ps(v)
#define F_ADD(a, b) _mm512_add_ps(a, b)
#define F_MUL(a, b) _mm512_mul_ps(a, b)
#define F_CLIP(f, low, high) _mm512_min_ps(high, _mm512_max_ps(low, f))
#define F_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define F_SET1(x) _mm512_set1_ps(x)
#define F_ZERO() _mm512_setzero_ps()
#define F_LOADU(p) _mm512_loadu_ps(p)
#define F_STOREU(p, f) _mm512_storeu_ps(p, f)
#define F_STREAM(p, f) _mm512_stream_ps(p, f)
#define F_POSITIVE(f) _mm512_cmp_ps_mask(f, _mm512_setzero_ps(), _CMP_GT_OQ)
#define F_ONES(bits) \
    _mm512_maskz_mov_ps((__mmask16)((bits)[0] | (bits)[1] << 8), _mm512_set1_ps(1.0f))
#define V_ZIPLO(a, b) _mm512_unpacklo_epi16(a, b)
#define V_ZIPHI(a, b) _mm512_unpackhi_epi16(a, b)
#define V_FIRST(lo, hi) \
    _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), hi)
#define V_SECOND(lo, hi) \
    _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), hi)
#define F_FIRST(lo, hi) \
    _mm512_castsi512_ps(V_FIRST(_mm512_castps_si512(lo), _mm512_castps_si512(hi)))
#define F_SECOND(lo, hi) \
    _mm512_castsi512_ps(V_SECOND(_mm512_castps_si512(lo), _mm512_castps_si512(hi)))
