/* AVX-VNNI: vpdpwssd on 256 bits, for CPUs without AVX-512. */

#define ISA avxvnni
#define ISA_NAME "avxvnni"
#define TARGET __attribute__((target("avxvnni,avx2,fma")))
#define MACS_PER_CYCLE 32
#include "avx256.inc.h"
#define V_DOT(acc, a, b) _mm256_dpwssd_avx_epi32(acc, a, b)
#include "gemm_tile.h"
