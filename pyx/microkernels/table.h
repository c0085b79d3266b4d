/* Every microkernel, the best first: adding one takes its header and one line below. */
#ifndef DFP_TABLE_H
#define DFP_TABLE_H

#include <string.h>
#include "microkernel.h"

static inline int32_t load_s32(const int16_t *p) {
    int32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Two of the int16 that it may alias. */
typedef uint32_t pair_s16 __attribute__((may_alias, aligned(2)));

#include "portable.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Compilers too old for an instruction set leave its kernel out. */
#if defined(__clang__)
#define DFP_KNOWN_SINCE(gcc, clang) (__clang_major__ >= (clang))
#else
#define DFP_KNOWN_SINCE(gcc, clang) (__GNUC__ >= (gcc))
#endif
#if DFP_KNOWN_SINCE(8, 7)
#define DFP_HAS_AVX512VNNI 1
#endif
#if DFP_KNOWN_SINCE(11, 12)
#define DFP_HAS_AVXVNNI 1
#define DFP_HAS_AMX 1
#endif

#include "avx2.h"
#include "avx512bw.h"
#ifdef DFP_HAS_AVX512VNNI
#include "avx512vnni.h"
#endif
#ifdef DFP_HAS_AVXVNNI
#include "avxvnni.h"
#endif
#ifdef DFP_HAS_AMX
#include "amx.h"
#include "amx_emulator.h"
#else
enum { amx_emulated = 0 };
#endif

static int cpu_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static int cpu_avxvnni(void) {
    unsigned a, b, c, d;
    return cpu_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
static int cpu_avx512bw(void) {
    return cpu_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static int cpu_avx512vnni(void) {
    /* The same compilers do not know the feature's name. */
    unsigned a, b, c, d;
    return cpu_avx512bw() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1);
}
/* The kernel grants tiles to a process that asks for them, once. */
static int amx_granted(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    static int granted = -1;
    if (granted < 0)
        granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}
static int cpu_amx(void) {
    unsigned a, b, c, d;
    if (!cpu_avx512vnni()) return 0;
    return amx_emulated || (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3 &&
                            amx_granted());
}
#endif

/* Its lanes are counted as on little-endian machines. */
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#include <arm_neon.h>
#include "neon.h"
#define DFP_HAS_NEON 1
#endif

static int cpu_any(void) { return 1; }

typedef struct {
    const char *name;
    const dfp_kernel *kernel; /* NULL: the compiler was too old */
    int (*supported)(void);
} dfp_isa;

static const dfp_isa dfp_isas[] = {
#if defined(__x86_64__)
#ifdef DFP_HAS_AMX
    {"amx", &dfp_kernel__amx, cpu_amx},
#else
    {"amx", NULL, cpu_amx},
#endif
#ifdef DFP_HAS_AVX512VNNI
    {"avx512vnni", &dfp_kernel__avx512vnni, cpu_avx512vnni},
#else
    {"avx512vnni", NULL, cpu_avx512vnni},
#endif
    {"avx512bw", &dfp_kernel__avx512bw, cpu_avx512bw},
#ifdef DFP_HAS_AVXVNNI
    {"avxvnni", &dfp_kernel__avxvnni, cpu_avxvnni},
#else
    {"avxvnni", NULL, cpu_avxvnni},
#endif
    {"avx2", &dfp_kernel__avx2, cpu_avx2},
#endif
#ifdef DFP_HAS_NEON
    {"neon", &dfp_kernel__neon, cpu_any},
#endif
    {"portable", &dfp_kernel__portable, cpu_any},
};

enum { DFP_ISAS = sizeof dfp_isas / sizeof dfp_isas[0] };

#endif
