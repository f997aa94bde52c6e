/* lowrank.c for bfloat16 on processors with bfloat16 dot products (AVX512-BF16): same call, same tiles, same order.
 *
 * The dot product takes two neighbouring elements at a time, so factors come in pairs: an entry's a is
 * (d_in / 2, lanes, 2) and its b (rank / 2, d_out, 2), odd sizes filled with zeros. Sums are float32; x, the factors and
 * A x are bfloat16, as they are in the backbone's own product. Elsewhere this file is empty and lowrank.c serves.
 */
#include <stdint.h>
#include <string.h>

int64_t lowrank_pairs_bf16(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512BF16__
#include <immintrin.h>

#define TILE 16
#define MAX_RANK 512
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const uint16_t *a;
    const uint16_t *b;
    int64_t rank;
    int64_t lanes;
} entry;

/* Two neighbours of x in every lane; the last of an odd row stands beside a zero. */
INLINE int32_t pair_at(const uint16_t *x, int64_t i, int64_t d_in) {
    int32_t pair = 0;
    memcpy(&pair, x + i, i + 1 < d_in ? 4 : 2);
    return pair;
}

/* hidden[t][0:16] = x[t] . a[:, 0:16] for `tokens` tokens (a compile-time constant). */
INLINE void shrink16(int tokens, const uint16_t *x, int64_t x_stride, int64_t d_in, const uint16_t *a, int64_t lanes,
                     float *hidden) {
    __m512 sum[TILE];
    for (int t = 0; t < tokens; t++) sum[t] = _mm512_setzero_ps();
    int64_t even = d_in & ~(int64_t)1;
    for (int64_t i = 0; i < d_in; i += 2) {
        __m512bh row = (__m512bh)_mm512_loadu_si512(a + i * lanes);
        for (int t = 0; t < tokens; t++) {
            int32_t pair;
            if (i < even) memcpy(&pair, x + t * x_stride + i, 4);
            else pair = pair_at(x + t * x_stride, i, d_in);
            sum[t] = _mm512_dpbf16_ps(sum[t], row, (__m512bh)_mm512_set1_epi32(pair));
        }
    }
    for (int t = 0; t < tokens; t++) _mm512_storeu_ps(hidden + t * MAX_RANK, sum[t]);
}

INLINE void shrink8(int tokens, const uint16_t *x, int64_t x_stride, int64_t d_in, const uint16_t *a, float *hidden) {
    __m256 sum[TILE];
    for (int t = 0; t < tokens; t++) sum[t] = _mm256_setzero_ps();
    int64_t even = d_in & ~(int64_t)1;
    for (int64_t i = 0; i < d_in; i += 2) {
        __m256bh row = (__m256bh)_mm256_loadu_si256((const __m256i *)(a + i * 8));
        for (int t = 0; t < tokens; t++) {
            int32_t pair;
            if (i < even) memcpy(&pair, x + t * x_stride + i, 4);
            else pair = pair_at(x + t * x_stride, i, d_in);
            sum[t] = _mm256_dpbf16_ps(sum[t], row, (__m256bh)_mm256_set1_epi32(pair));
        }
    }
    for (int t = 0; t < tokens; t++) _mm256_storeu_ps(hidden + t * MAX_RANK, sum[t]);
}

INLINE void shrink_some(int tokens, const uint16_t *x, int64_t x_stride, int64_t d_in, const entry *adapter,
                        float *hidden) {
    if (adapter->lanes == 8) {
        shrink8(tokens, x, x_stride, d_in, adapter->a, hidden);
        return;
    }
    for (int64_t j = 0; j < adapter->lanes; j += 16)
        shrink16(tokens, x, x_stride, d_in, adapter->a + 2 * j, adapter->lanes, hidden + j);
}

static void shrink(int64_t tokens, const uint16_t *x, int64_t x_stride, int64_t d_in, const entry *adapter,
                   float *hidden) {
    int64_t t = 0;
    if (tokens == TILE) { /* sixteen sums at once hide the latency of the dot product */
        shrink_some(TILE, x, x_stride, d_in, adapter, hidden);
        return;
    }
    for (; t + 8 <= tokens; t += 8)
        shrink_some(8, x + t * x_stride, x_stride, d_in, adapter, hidden + t * MAX_RANK);
    for (; t + 4 <= tokens; t += 4)
        shrink_some(4, x + t * x_stride, x_stride, d_in, adapter, hidden + t * MAX_RANK);
    for (; t < tokens; t++) shrink_some(1, x + t * x_stride, x_stride, d_in, adapter, hidden + t * MAX_RANK);
}

/* y[t][column : column + 16 * vectors] += pairs of hidden . rows; `mask` cuts the last vector of a ragged row. */
INLINE void expand_some(int tokens, int vectors, __mmask16 mask, const int32_t *hidden, const uint16_t *const *rows,
                        int64_t pairs, int64_t column, uint16_t *y, int64_t y_stride) {
    __m512 sum[4][4];
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++) {
            __m256i half = _mm256_maskz_loadu_epi16(mask, y + t * y_stride + column + 16 * v);
            sum[t][v] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
    for (int64_t j = 0; j < pairs; j++)
        for (int v = 0; v < vectors; v++) {
            __m512bh row = (__m512bh)_mm512_maskz_loadu_epi32(mask, rows[j] + 2 * (column + 16 * v));
            for (int t = 0; t < tokens; t++)
                sum[t][v] = _mm512_dpbf16_ps(sum[t][v], row, (__m512bh)_mm512_set1_epi32(hidden[t * MAX_RANK + j]));
        }
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++)
            _mm256_mask_storeu_epi16(y + t * y_stride + column + 16 * v, mask, (__m256i)_mm512_cvtneps_pbh(sum[t][v]));
}

INLINE void expand_rows(int tokens, const int32_t *hidden, const uint16_t *const *rows, int64_t pairs, int64_t d_out,
                        uint16_t *y, int64_t y_stride) {
    int64_t c = 0;
    for (; c + 64 <= d_out; c += 64) expand_some(tokens, 4, 0xffff, hidden, rows, pairs, c, y, y_stride);
    for (; c + 16 <= d_out; c += 16) expand_some(tokens, 1, 0xffff, hidden, rows, pairs, c, y, y_stride);
    if (c < d_out)
        expand_some(tokens, 1, (__mmask16)((1u << (d_out - c)) - 1), hidden, rows, pairs, c, y, y_stride);
}

static void expand(int64_t tokens, const int32_t *hidden, const uint16_t *const *rows, int64_t pairs, int64_t d_out,
                   uint16_t *y, int64_t y_stride) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4)
        expand_rows(4, hidden + t * MAX_RANK, rows, pairs, d_out, y + t * y_stride, y_stride);
    for (; t < tokens; t++) expand_rows(1, hidden + t * MAX_RANK, rows, pairs, d_out, y + t * y_stride, y_stride);
}

/* Sixteen weighted floats as bfloat16, in place of as many pairs. */
INLINE void weigh(const float *from, float weight, int64_t rank, uint16_t *to) {
    for (int64_t j = 0; j < rank; j += 16) {
        __mmask16 mask = rank - j >= 16 ? 0xffff : (__mmask16)((1u << (rank - j)) - 1);
        __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + j), _mm512_set1_ps(weight));
        _mm256_mask_storeu_epi16(to + j, mask, (__m256i)_mm512_cvtneps_pbh(scaled));
    }
    if (rank & 1) to[rank] = 0;
}

/* The mix's pairs first..last for one tile; their lanes fit in MAX_RANK. */
static void round_of(const uint16_t *x, int64_t x_stride, uint16_t *y, int64_t y_stride, int64_t d_in, int64_t d_out,
                     int64_t tokens, const entry *bank, const int64_t *slots, const float *weights, int64_t first,
                     int64_t last) {
    float hidden[TILE * MAX_RANK];
    int32_t weighed[TILE * MAX_RANK];
    const uint16_t *rows[MAX_RANK];
    int64_t at = 0, pairs = 0;
    for (int64_t p = first; p < last; p++) {
        const entry *adapter = bank + slots[p];
        if (adapter->rank == 0) continue;
        shrink(tokens, x, x_stride, d_in, adapter, hidden + at);
        for (int64_t t = 0; t < tokens; t++)
            weigh(hidden + t * MAX_RANK + at, weights[p], adapter->rank, (uint16_t *)(weighed + t * MAX_RANK + pairs));
        for (int64_t j = 0; j < adapter->rank; j += 2) rows[pairs++] = adapter->b + j * d_out;
        at += adapter->lanes;
    }
    expand(tokens, weighed, rows, pairs, d_out, y, y_stride);
}

void lowrank_add_bf16_pairs(const uint16_t *x, int64_t x_stride, uint16_t *y, int64_t y_stride, int64_t d_in,
                            int64_t d_out, const int64_t *tiles, int64_t num_tiles, const int64_t *mix_offset,
                            const int64_t *slots, const float *weights, const entry *bank, int64_t num_threads) {
    (void)num_threads;
    _Pragma("omp parallel for schedule(static) num_threads(num_threads) if(num_threads > 1)")
    for (int64_t i = 0; i < num_tiles; i++) {
        int64_t start = tiles[i * 3], tokens = tiles[i * 3 + 1], mix = tiles[i * 3 + 2];
        int64_t first = mix_offset[mix], end = mix_offset[mix + 1];
        while (first < end) {
            int64_t last = first, lanes = 0;
            while (last < end && lanes + bank[slots[last]].lanes <= MAX_RANK) lanes += bank[slots[last++]].lanes;
            if (lanes > 0)
                round_of(x + start * x_stride, x_stride, y + start * y_stride, y_stride, d_in, d_out, tokens, bank,
                         slots, weights, first, last);
            first = last;
        }
    }
}
#endif
