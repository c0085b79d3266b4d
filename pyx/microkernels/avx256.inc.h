/* What the 256-bit instruction sets share; a header of theirs adds ISA, TARGET and V_DOT. */

#define MR 4
#define NV 2
#define LANES 8
#define VI __m256i
#define VF __m256
#define V_REGISTER "x"
#define V_ZERO() _mm256_setzero_si256()
#define V_LOAD(p) _mm256_load_si256((const __m256i *)(p))
#define V_LOADU(p) _mm256_loadu_si256((const __m256i *)(p))
#define V_STOREU(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define V_PAIR(p) _mm256_set1_epi32(load_s32(p))
#define V_ADD(a, b) _mm256_add_epi32(a, b)
#define V_AND(a, b) _mm256_and_si256(a, b)
#define V_OR(a, b) _mm256_or_si256(a, b)
#define V_SET1(x) _mm256_set1_epi32(x)
#define V_SRA(v, n) _mm256_srai_epi32(v, n)
#define V_SLL(v, n) _mm256_slli_epi32(v, n)
#define F_FROM(v) _mm256_cvtepi32_ps(v)
#define F_ADD(a, b) _mm256_add_ps(a, b)
#define F_MUL(a, b) _mm256_mul_ps(a, b)
#define F_CLIP(f, low, high) _mm256_min_ps(high, _mm256_max_ps(low, f))
#define F_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define F_SET1(x) _mm256_set1_ps(x)
#define F_ZERO() _mm256_setzero_ps()
#define F_LOADU(p) _mm256_loadu_ps(p)
#define F_STOREU(p, f) _mm256_storeu_ps(p, f)
#define F_STREAM(p, f) _mm256_stream_ps(p, f)
#define F_POSITIVE(f) _mm256_movemask_ps(_mm256_cmp_ps(f, _mm256_setzero_ps(), _CMP_GT_OQ))
#define F_EIGHT _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128)
#define F_ONES(bits)                                                                       \
    _mm256_and_ps(_mm256_set1_ps(1.0f),                                                    \
                  _mm256_castsi256_ps(_mm256_cmpeq_epi32(                                  \
                      _mm256_and_si256(_mm256_set1_epi32((bits)[0]), F_EIGHT), F_EIGHT)))
#define V_ZIPLO(a, b) _mm256_unpacklo_epi16(a, b)
#define V_ZIPHI(a, b) _mm256_unpackhi_epi16(a, b)
#define V_FIRST(lo, hi) _mm256_permute2x128_si256(lo, hi, 0x20)
#define V_SECOND(lo, hi) _mm256_permute2x128_si256(lo, hi, 0x31)
#define F_FIRST(lo, hi) _mm256_permute2f128_ps(lo, hi, 0x20)
#define F_SECOND(lo, hi) _mm256_permute2f128_ps(lo, hi, 0x31)
