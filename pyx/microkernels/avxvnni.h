/* AVX-VNNI: vpdpwssd on 256 bits, for CPUs without AVX-512. */

#define ISA avxvnni
#define ISA_NAME "avxvnni"
#define TARGET __attribute__((target("avxvnni,avx2,fma")))
#include "avx256.inc.h"
#define V_DOT(acc, a, b) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b))
#include "gemm_tile.h"
