/* AVX2: vpmaddwd and vpaddd. */

#define ISA avx2
#define ISA_NAME "avx2"
#define TARGET __attribute__((target("avx2,fma")))
#include "avx256.inc.h"
#define V_DOT(acc, a, b) acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a, b))
#include "gemm_tile.h"
