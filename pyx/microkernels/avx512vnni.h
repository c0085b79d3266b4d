/* AVX-512-VNNI: vpdpwssd, multiply and accumulate in one instruction. */

#define ISA avx512vnni
#define ISA_NAME "avx512vnni"
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))
#include "avx512.inc.h"
/* Assembly, because gcc 12 copies every accumulator twice a round around the intrinsic. */
#define V_DOT(acc, a, b) __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b))
#include "gemm_tile.h"
