/* The two products of lowrank.c for bfloat16 on processors with bfloat16 dot products (AVX512-BF16); part of lowrank.c.
 *
 * The dot product takes two neighbouring elements at a time, so factors come in pairs: an entry's a is
 * (d_in / 2, lanes, 2) and the blocks of its b (rank / 2, columns, 2), odd sizes filled with zeros. Sums are float32;
 * x, the factors and weight * A x are bfloat16, as they are in the backbone's own product. A part's hidden holds
 * lanes / 2 pairs for each use, at the beginning of its lanes.
 */

/* Two neighbours of a row as one number, to be spread over all lanes. */
INLINE int32_t pair_at(const uint16_t *x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return pair;
}

/* By vectors of so many BITS: 512 for 16 lanes, 256 for 8. */
#define SHRINK_PAIRS(NAME, BITS, LOAD, STORE)                                                                        \
    INLINE void NAME(int tokens, const void *const *x, int64_t d_in, const uint16_t *a, int64_t lanes,               \
                     const float *weights, uint16_t *hidden, const char *next) {                                     \
        const uint16_t *rows[SHARING];                                                                               \
        __m##BITS sum[2][SHARING], all[SHARING];                                                                     \
        UNROLL for (int t = 0; t < tokens; t++) rows[t] = x[t];                                                      \
        UNROLL for (int s = 0; s < 2; s++)                                                                           \
            UNROLL for (int t = 0; t < tokens; t++) sum[s][t] = _mm##BITS##_setzero_ps();                            \
        int64_t i = 0, turn = turn_of(d_in, 2 * lanes, next), ahead = next ? AHEAD : 0;                              \
        for (; i + 4 <= d_in; i += 4) {                                                                              \
            if (i >= turn) ahead = next - (const char *)(a + i * lanes), turn = INT64_MAX;                           \
            UNROLL for (int s = 0; s < 2; s++) {                                                                     \
                const void *from = a + (i + 2 * s) * lanes;                                                          \
                __m##BITS##bh row = (__m##BITS##bh)LOAD(from);                                                       \
                ASK_FOR((const char *)from + ahead);                                                                 \
                UNROLL for (int t = 0; t < tokens; t++)                                                              \
                    sum[s][t] = _mm##BITS##_dpbf16_ps(                                                               \
                        sum[s][t], row, (__m##BITS##bh)_mm##BITS##_set1_epi32(pair_at(rows[t] + i + 2 * s)));        \
            }                                                                                                        \
        }                                                                                                            \
        UNROLL for (int t = 0; t < tokens; t++)                                                                      \
            all[t] = _mm##BITS##_add_ps(sum[0][t], sum[1][t]);                                                       \
        for (; i < d_in; i += 2) {                                                                                   \
            __m##BITS##bh row = (__m##BITS##bh)LOAD((const void *)(a + i * lanes));                                  \
            UNROLL for (int t = 0; t < tokens; t++) {                                                                \
                uint16_t last[2] = {rows[t][i], i + 1 < d_in ? rows[t][i + 1] : 0}; /* an odd row ends with a zero */\
                all[t] = _mm##BITS##_dpbf16_ps(all[t], row, (__m##BITS##bh)_mm##BITS##_set1_epi32(pair_at(last)));   \
            }                                                                                                        \
        }                                                                                                            \
        UNROLL for (int t = 0; t < tokens; t++)                                                                      \
            STORE((void *)(hidden + 2 * t * lanes),                                                                  \
                  _mm##BITS##_cvtneps_pbh(_mm##BITS##_mul_ps(all[t], _mm##BITS##_set1_ps(weights[t]))));             \
    }
#define STORE_16(at, value) _mm256_storeu_si256(at, (__m256i)(value))
#define STORE_8(at, value) _mm_storeu_si128(at, (__m128i)(value))
SHRINK_PAIRS(shrink_pairs16, 512, _mm512_loadu_si512, STORE_16)
SHRINK_PAIRS(shrink_pairs8, 256, _mm256_loadu_si256, STORE_8)

INLINE void shrink_some_pairs(int tokens, const void *const *x, int64_t d_in, const entry *adapter,
                              const float *weights, float *hidden, const char *next) {
    uint16_t *to = (uint16_t *)hidden;
    if (adapter->lanes == 8) shrink_pairs8(tokens, x, d_in, adapter->a, 8, weights, to, next);
    else
        for (int64_t j = 0; j < adapter->lanes; j += LANES)
            shrink_pairs16(tokens, x, d_in, (const uint16_t *)adapter->a + 2 * j, adapter->lanes, weights, to + j,
                            next);
}

static void shrink_pairs(int64_t tokens, const void *const *x, int64_t d_in, const entry *adapter,
                         const float *weights, float *hidden, const char *next) {
    BY_TOKENS(shrink_some_pairs, tokens, x, d_in, adapter, weights, hidden, next)
}

/* `mask` cuts the last vector of a ragged row. */
INLINE __m512 load_sums(int half, const char *y, int64_t c, __mmask16 mask) {
    if (!half) return _mm512_maskz_loadu_ps(mask, (const float *)y + c);
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)y + c));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* Rounds as store_bf16 does: a token must not see whether its sums left the registers. */
INLINE void store_sums(int half, char *y, int64_t c, __mmask16 mask, __m512 sum) {
    __m512i bits = _mm512_castps_si512(sum), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
    if (half)
        _mm256_mask_storeu_epi16((uint16_t *)y + c, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    else _mm512_mask_storeu_ps((float *)y + c, mask, sum);
}

INLINE void expand_pair_vectors(int half, int tokens, int vectors, __mmask16 mask, char *const *y, int64_t c,
                                const addends *add) {
    __m512 sum[AT_ONCE][8];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < vectors; v++) sum[t][v] = load_sums(half, y[t], c + v * LANES, mask);
    for (const part *p = add->parts; p < add->parts + add->num_parts; p++) {
        const int64_t rows = (p->adapter->rank + 1) / 2, lanes = p->adapter->lanes, column = add->shift + c;
        const int64_t to_next = row_bytes(add, column), ahead = ahead_of(add, p->adapter->b, rows, column);
        const char *b = column_of(p->adapter->b, rows, column);
        const int32_t *hidden = (const int32_t *)(p->hidden + add->at * lanes);
        for (int64_t j = 0; j < rows; j++, b += to_next)
            UNROLL for (int v = 0; v < vectors; v++) {
                __m512bh row = (__m512bh)_mm512_maskz_loadu_epi32(mask, b + 4 * v * LANES);
                ASK_FOR(b + 4 * v * LANES + ahead);
                UNROLL for (int t = 0; t < tokens; t++)
                    sum[t][v] = _mm512_dpbf16_ps(sum[t][v], row, (__m512bh)_mm512_set1_epi32(hidden[t * lanes + j]));
            }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < vectors; v++) store_sums(half, y[t], c + v * LANES, mask, sum[t][v]);
}

INLINE void expand_some_pairs(int half, int tokens, char *const *y, int64_t c, int64_t end, const addends *add) {
    if (tokens <= 2)
        for (; c + 8 * LANES <= end; c += 8 * LANES) expand_pair_vectors(half, tokens, 8, 0xffff, y, c, add);
    for (; c + 4 * LANES <= end; c += 4 * LANES) expand_pair_vectors(half, tokens, 4, 0xffff, y, c, add);
    for (; c + LANES <= end; c += LANES) expand_pair_vectors(half, tokens, 1, 0xffff, y, c, add);
    if (c < end) expand_pair_vectors(half, tokens, 1, (__mmask16)((1u << (end - c)) - 1), y, c, add);
}

static void expand_pairs(int64_t tokens, int half, char *const *y, int64_t c, int64_t end, const addends *add) {
    if (tokens == 4 && half) expand_some_pairs(1, 4, y, c, end, add);
    else if (tokens == 4) expand_some_pairs(0, 4, y, c, end, add);
    else if (tokens == 3 && half) expand_some_pairs(1, 3, y, c, end, add);
    else if (tokens == 3) expand_some_pairs(0, 3, y, c, end, add);
    else if (tokens == 2 && half) expand_some_pairs(1, 2, y, c, end, add);
    else if (tokens == 2) expand_some_pairs(0, 2, y, c, end, add);
    else if (half) expand_some_pairs(1, 1, y, c, end, add);
    else expand_some_pairs(0, 1, y, c, end, add);
}
