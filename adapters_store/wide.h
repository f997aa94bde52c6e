/* A row's numbers as float, and back: float32 is itself, bfloat16 the high half of a float. For kernels that are plain C
 * over either (rms_norm.c, rotary.c), which name them by kind: wide_f32, narrow_bf16.
 */
#pragma once
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float wide_f32(float x) { return x; }
static inline float narrow_f32(float x) { return x; }

static inline float wide_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

/* To nearest, ties to even. */
static inline bf16 narrow_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bf16 near = (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    return x != x ? 0x7fc0 : near;
}
