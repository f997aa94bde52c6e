/* Weights in strips, and what all kernels over them do with a word: linear.c, likeliest.c.
 *
 * A strip is 32 outputs side by side, word after word, where a word is a float32 or two bfloat16 of neighbouring
 * inputs: (words, 32 words). STRIPS is defined for processors with AVX-512, PAIRS is 1 where it has dot products of
 * bfloat16 (AVX512-BF16).
 */
#pragma once
#include <stdint.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define STRIPS
#include <immintrin.h>

#ifdef __AVX512BF16__
#define PAIRS 1
#else
#define PAIRS 0
#endif
#define OUTPUTS 32 /* of a strip; STRIP in linear.py */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 14") /* loops over sums: unrolled so early that the sums live in registers */

/* Keeps a number in a register: the compiler would else read it anew for each of its products. */
#define HOLD(x) __asm__("" : "+v"(x))

/* `half` is a constant wherever these are used: 0 for float32, 1 for bfloat16. */

#define SIZE(half) ((half) ? 2 : 4)

INLINE __m512 add_product(const int half, __m512 sum, __m512 a, __m512 b) {
#if PAIRS
    if (half) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    return _mm512_fmadd_ps(a, b, sum);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
