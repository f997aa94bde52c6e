/* The two products of lowrank.c for bfloat16 on processors with bfloat16 dot products (AVX512-BF16).
 *
 * The dot product takes two neighbouring elements at a time, so factors come in pairs: an entry's a is
 * (d_in / 2, lanes, 2) and its b (rank / 2, d_out, 2), odd sizes filled with zeros. Sums are float32; x, the factors and
 * weight * A x are bfloat16, as they are in the backbone's own product. Elsewhere these are empty and lowrank.c serves.
 */
#include <stdint.h>
#include <string.h>

#ifndef __AVX512BF16__
int64_t lowrank_pairs_bf16(void) { return 0; }
void lowrank_shrink_pairs(void) {}
void lowrank_expand_pairs(void) {}
#else
#include <immintrin.h>

#define AT_ONCE 4 /* as in lowrank.c */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8") /* as in lowrank.c */

typedef struct {
    const uint16_t *a;
    const uint16_t *b;
    int64_t rank;
    int64_t lanes;
} entry;

int64_t lowrank_pairs_bf16(void) { return 1; }

/* Two neighbours of x in every lane. */
INLINE __m512bh pair_at(const uint16_t *x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

/* hidden[t] = the lanes of weight[t] * (x[t] . a) that `mask` keeps, as bfloat16; four sums as in lowrank.c. With 8 lanes
 * the loads are masked: the next row stands behind them. */
INLINE void shrink_lanes(int tokens, const void *const *x, int64_t d_in, const uint16_t *a, int64_t lanes,
                         __mmask16 mask, const float *weights, uint16_t *hidden) {
    const uint16_t *rows[AT_ONCE];
    __m512 sum[4][AT_ONCE], all[AT_ONCE];
    UNROLL for (int t = 0; t < tokens; t++) rows[t] = x[t];
    UNROLL for (int s = 0; s < 4; s++) UNROLL for (int t = 0; t < tokens; t++) sum[s][t] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 8 <= d_in; i += 8)
        UNROLL for (int s = 0; s < 4; s++) {
            __m512bh row = (__m512bh)_mm512_maskz_loadu_epi32(mask, a + (i + 2 * s) * lanes);
            UNROLL for (int t = 0; t < tokens; t++)
                sum[s][t] = _mm512_dpbf16_ps(sum[s][t], row, pair_at(rows[t] + i + 2 * s));
        }
    UNROLL for (int t = 0; t < tokens; t++)
        all[t] = _mm512_add_ps(_mm512_add_ps(sum[0][t], sum[1][t]), _mm512_add_ps(sum[2][t], sum[3][t]));
    for (; i < d_in; i += 2) {
        __m512bh row = (__m512bh)_mm512_maskz_loadu_epi32(mask, a + i * lanes);
        UNROLL for (int t = 0; t < tokens; t++) {
            uint16_t last[2] = {rows[t][i], i + 1 < d_in ? rows[t][i + 1] : 0}; /* an odd row ends beside a zero */
            all[t] = _mm512_dpbf16_ps(all[t], row, pair_at(last));
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) {
        __m512 weighed = _mm512_mul_ps(all[t], _mm512_set1_ps(weights[t]));
        _mm256_mask_storeu_epi16(hidden + 2 * t * lanes, mask, (__m256i)_mm512_cvtneps_pbh(weighed));
    }
}

INLINE void shrink(int tokens, const void *const *x, int64_t d_in, const entry *adapter, const float *weights,
                   float *hidden) {
    int64_t lanes = adapter->lanes;
    if (lanes == 8) shrink_lanes(tokens, x, d_in, adapter->a, 8, 0xff, weights, (uint16_t *)hidden);
    else
        for (int64_t j = 0; j < lanes; j += 16)
            shrink_lanes(tokens, x, d_in, adapter->a + 2 * j, lanes, 0xffff, weights, (uint16_t *)hidden + j);
}

/* y[t][column : column + 16 * vectors] += pairs of hidden . rows; `mask` cuts the last vector of a ragged row. */
INLINE void expand_vectors(int tokens, int vectors, __mmask16 mask, float *const *y, int64_t column,
                           const int32_t *hidden, int64_t lanes, const uint16_t *b, int64_t pairs, int64_t d_out) {
    __m512 sum[AT_ONCE][8];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < vectors; v++) sum[t][v] = _mm512_maskz_loadu_ps(mask, y[t] + column + 16 * v);
    for (int64_t j = 0; j < pairs; j++)
        UNROLL for (int v = 0; v < vectors; v++) {
            __m512bh row = (__m512bh)_mm512_maskz_loadu_epi32(mask, b + 2 * (j * d_out + 16 * v));
            UNROLL for (int t = 0; t < tokens; t++)
                sum[t][v] = _mm512_dpbf16_ps(sum[t][v], row, (__m512bh)_mm512_set1_epi32(hidden[t * lanes + j]));
        }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < vectors; v++) _mm512_mask_storeu_ps(y[t] + column + 16 * v, mask, sum[t][v]);
}

INLINE void expand(int tokens, float *const *y, int64_t c, int64_t columns, const int32_t *hidden,
                   const entry *adapter, int64_t first, int64_t d_out) {
    const uint16_t *b = adapter->b + 2 * first;
    int64_t lanes = adapter->lanes, pairs = (adapter->rank + 1) / 2, end = c + columns;
    if (tokens <= 2)
        for (; c + 128 <= end; c += 128)
            expand_vectors(tokens, 8, 0xffff, y, c, hidden, lanes, b + 2 * c, pairs, d_out);
    for (; c + 64 <= end; c += 64) expand_vectors(tokens, 4, 0xffff, y, c, hidden, lanes, b + 2 * c, pairs, d_out);
    for (; c + 16 <= end; c += 16) expand_vectors(tokens, 1, 0xffff, y, c, hidden, lanes, b + 2 * c, pairs, d_out);
    if (c < end)
        expand_vectors(tokens, 1, (__mmask16)((1u << (end - c)) - 1), y, c, hidden, lanes, b + 2 * c, pairs, d_out);
}

void lowrank_shrink_pairs(int64_t tokens, const void *const *x, int64_t d_in, const entry *adapter,
                          const float *weights, float *hidden) {
    if (tokens == 4) shrink(4, x, d_in, adapter, weights, hidden);
    else if (tokens == 3) shrink(3, x, d_in, adapter, weights, hidden);
    else if (tokens == 2) shrink(2, x, d_in, adapter, weights, hidden);
    else shrink(1, x, d_in, adapter, weights, hidden);
}

void lowrank_expand_pairs(int64_t tokens, float *const *y, int64_t c, int64_t columns, const float *hidden,
                          const entry *adapter, int64_t first, int64_t d_out) {
    const int32_t *pairs = (const int32_t *)hidden;
    if (tokens == 4) expand(4, y, c, columns, pairs, adapter, first, d_out);
    else if (tokens == 3) expand(3, y, c, columns, pairs, adapter, first, d_out);
    else if (tokens == 2) expand(2, y, c, columns, pairs, adapter, first, d_out);
    else expand(1, y, c, columns, pairs, adapter, first, d_out);
}
#endif
