/* AVX-512BW: vpmaddwd and vpaddd on 512 bits. */

#define ISA avx512bw
#define ISA_NAME "avx512bw"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#include "avx512.inc.h"
#define V_DOT(acc, a, b) acc = _mm512_add_epi32(acc, _mm512_madd_epi16(a, b))
#include "gemm_tile.h"
