/* AMX for CPUs without it, so that every machine can check the bits of AMX's kernels: an instruction
 * the CPU does not know raises SIGILL, and the handler does what the instruction would have done
 * (Intel SDM volume 2, "Intel AMX"). Thousands of times slower than the real thing. */
#ifndef DFP_AMX_EMULATOR_H
#define DFP_AMX_EMULATOR_H

#include <signal.h>
#include <ucontext.h>

static int amx_emulated;
static struct sigaction amx_before;

static __thread struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} amx_configured;
static __thread uint8_t amx_tiles[8][16][64];

/* A general register, by its number in an instruction. */
static int64_t amx_register(const greg_t *regs, int number) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};
    return regs[order[number]];
}

#define AMX_EMULATOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vnni")))

/* The first or the last two bytes of every int32, as int16. */
AMX_EMULATOR_TARGET static inline __m512i amx_widen(__m512i bytes, int last, int is_signed) {
    const __m512i low = _mm512_slli_epi32(bytes, last ? 8 : 24);
    const __m512i high = last ? bytes : _mm512_slli_epi32(bytes, 16);
    const __m512i mask = _mm512_set1_epi32(65535);
    const __m512i a = is_signed ? _mm512_srai_epi32(low, 24) : _mm512_srli_epi32(low, 24);
    const __m512i b = is_signed ? _mm512_srai_epi32(high, 24) : _mm512_srli_epi32(high, 24);
    return _mm512_or_si512(_mm512_and_si512(a, mask), _mm512_slli_epi32(b, 16));
}

/* c += a * b, bytes of a and b signed or not. */
AMX_EMULATOR_TARGET static void amx_dot(int c, int a, int b, int a_signed, int b_signed) {
    const int steps = amx_configured.bytes[a] / 4;
    __m512i columns[16][2];
    for (int k = 0; k < steps; k++)
        for (int i = 0; i < 2; i++)
            columns[k][i] = amx_widen(_mm512_loadu_si512(amx_tiles[b][k]), i, b_signed);
    for (int m = 0; m < amx_configured.rows[c]; m++) {
        __m512i sums = _mm512_loadu_si512(amx_tiles[c][m]);
        for (int k = 0; k < steps; k++) {
            int32_t bytes;
            memcpy(&bytes, &amx_tiles[a][m][4 * k], 4);
            for (int i = 0; i < 2; i++)
                sums = _mm512_dpwssd_epi32(
                    sums, amx_widen(_mm512_set1_epi32(bytes), i, a_signed), columns[k][i]);
        }
        _mm512_storeu_si512(amx_tiles[c][m], sums);
    }
}

/* Returns the length of the AMX instruction at `at` after doing it, or 0. */
static int amx_do(const uint8_t *at, const greg_t *regs) {
    /* VEX, three bytes: R X B and map 0F38; W = 0, vvvv, L = 0, pp. */
    if (at[0] != 0xc4 || (at[1] & 31) != 2 || (at[2] & 0x84)) return 0;
    const int x = at[1] & 0x40 ? 0 : 8, base_high = at[1] & 0x20 ? 0 : 8;
    const int third = ~at[2] >> 3 & 15, prefix = at[2] & 3;
    const int opcode = at[3], mod = at[4] >> 6, reg = at[4] >> 3 & 7, rm = at[4] & 7;
    int length = 5;
    int64_t address = 0, stride = 0;
    if (mod != 3) {
        int base = rm;
        if (rm == 4) {
            const int scale = at[5] >> 6, index = (at[5] >> 3 & 7) + x;
            base = at[5] & 7;
            if (index != 4) stride = amx_register(regs, index) * (1 << scale);
            length++;
        }
        if (mod == 0 && base == 5) {
            /* A displacement without a base; relative to the next instruction without a SIB. */
            int32_t displacement;
            memcpy(&displacement, at + length, 4);
            length += 4;
            address = displacement + (rm == 4 ? 0 : (int64_t)(uintptr_t)at + length);
        } else {
            address = amx_register(regs, base + base_high);
            if (mod == 1) address += (int8_t)at[length++];
            if (mod == 2) {
                int32_t displacement;
                memcpy(&displacement, at + length, 4);
                length += 4;
                address += displacement;
            }
        }
    }
    if (opcode == 0x49 && mod != 3 && prefix == 0) {            /* ldtilecfg */
        memcpy(&amx_configured, (void *)(uintptr_t)(address + stride), sizeof amx_configured);
        memset(amx_tiles, 0, sizeof amx_tiles);
        return length;
    }
    if (opcode == 0x49 && mod == 3 && prefix == 0) {            /* tilerelease */
        memset(&amx_configured, 0, sizeof amx_configured);
        return length;
    }
    /* A tile that is not configured is an illegal instruction on a real CPU too. */
    if (amx_configured.palette != 1 || !amx_configured.rows[reg]) return 0;
    if (opcode == 0x49 && mod == 3 && prefix == 3) {            /* tilezero */
        memset(amx_tiles[reg], 0, sizeof amx_tiles[reg]);
        return length;
    }
    if (opcode == 0x4b && mod != 3 && (prefix == 3 || prefix == 2)) { /* tileloadd, tilestored */
        for (int i = 0; i < amx_configured.rows[reg]; i++) {
            void *row = (void *)(uintptr_t)(address + i * stride);
            if (prefix == 3) memcpy(amx_tiles[reg][i], row, amx_configured.bytes[reg]);
            else memcpy(row, amx_tiles[reg][i], amx_configured.bytes[reg]);
        }
        return length;
    }
    if (opcode == 0x5e && mod == 3 && third < 8) {              /* tdpb?? */
        if (prefix == 3) amx_dot(reg, rm, third, 1, 1);
        else if (prefix == 2) amx_dot(reg, rm, third, 1, 0);
        else if (prefix == 1) amx_dot(reg, rm, third, 0, 1);
        else amx_dot(reg, rm, third, 0, 0);
        return length;
    }
    return 0;
}

static void amx_on_illegal(int signal, siginfo_t *info, void *context) {
    ucontext_t *const u = (ucontext_t *)context;
    greg_t *const regs = u->uc_mcontext.gregs;
    const uint8_t *const first = (const uint8_t *)(uintptr_t)regs[REG_RIP], *at = first;
    /* A signal costs more than what it is for: those that follow are done at once. */
    for (int length; (length = amx_do(at, regs)) > 0;) at += length;
    regs[REG_RIP] = (greg_t)(uintptr_t)at;
    if (at != first) return;
    /* Somebody else's: let the handler before, or the default, have the same instruction. */
    (void)info;
    sigaction(signal, &amx_before, NULL);
}

static void amx_emulate(void) {
    struct sigaction action;
    if (amx_emulated) return;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = amx_on_illegal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &action, &amx_before);
    amx_emulated = 1;
}

#endif
