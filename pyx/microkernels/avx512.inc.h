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
#define F_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define F_SET1(x) _mm512_set1_ps(x)
#define F_ZERO() _mm512_setzero_ps()
#define F_LOADU(p) _mm512_loadu_ps(p)
#define F_STOREU(p, f) _mm512_storeu_ps(p, f)
#define F_STREAM(p, f) _mm512_stream_ps(p, f)
