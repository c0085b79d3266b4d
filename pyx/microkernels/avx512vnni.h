/* AVX-512-VNNI: vpdpwssd, multiply and accumulate in one instruction. */

#define ISA avx512vnni
#define ISA_NAME "avx512vnni"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))
#define MACS_PER_CYCLE 64
#include "avx512.inc.h"
#define V_DOT(acc, a, b) _mm512_dpwssd_epi32(acc, a, b)
#include "gemm_tile.h"
