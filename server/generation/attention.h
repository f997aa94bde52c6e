/* What attention.c and prefill.c share: one call's arguments, vectors of floats or of bfloat16, softmax by blocks.
 *
 * Arithmetic is float32; queries, keys, values and output are float32 or bfloat16. Plain C with GCC/Clang vector types;
 * ragged ends and products of bfloat16 pairs have a form of their own for AVX-512.
 */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE 1
#define LANES 16 /* floats of a register; vectors longer than that compilers take apart badly (10 times slower) */
#define SUMS 16  /* vectors summed up side by side, all in registers */
#else
#define WIDE 0
#define SUMS 8
#ifdef __AVX__
#define LANES 8
#else
#define LANES 4
#endif
#endif
#if WIDE && defined(__AVX512BF16__)
#define PAIRS 1
#else
#define PAIRS 0
#endif

#define PAGE 16                    /* tokens of a page (pages.py) */
#define BLOCK_PAGES 8              /* pages whose scores are made before their values are read */
#define BLOCK (BLOCK_PAGES * PAGE) /* tokens of a block */
#define MAX_D 1024                 /* longest head */

#define VECTOR(n) __attribute__((vector_size(4 * (n)), aligned(2), may_alias)) /* bfloat16 heads of odd length */
typedef float vec VECTOR(LANES);
typedef int32_t ivec VECTOR(LANES);
typedef uint32_t uvec VECTOR(LANES);
typedef float four VECTOR(4);

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* One call. Strides count elements. tables: (sequences, most), the pages of each; lengths: (sequences,) in tokens.
 * query: (heads, rows, d), key: (kv_heads, rows, d), value: (kv_heads, rows, d_v); key NULL: both are in pages already.
 * keys: (pages, kv_heads, PAGE, d), values: (pages, kv_heads, PAGE, d_v), out: (rows, heads, d_v), where heads are
 * group * kv_heads. window, softcap: 0 for none. Rows are the last tokens of a sequence each, or of one sequence. */
typedef struct {
    const char *query;
    int64_t query_head, query_row;
    const char *key;
    int64_t key_head, key_row;
    const char *value;
    int64_t value_head, value_row;
    char *keys, *values, *out;
    int64_t pages, kv_heads, group, d, d_v;
    const int64_t *tables;
    int64_t most, rows;
    const int64_t *lengths;
    int64_t num_threads, window;
    float scale, softcap;
} call;

/* Whether all that will be read of a sequence is there: a wrong page would be another's, or nobody's memory. */
INLINE int is_there(const call *c, int64_t sequence) {
    int64_t length = c->lengths[sequence];
    if (length < 1 || length > c->most * PAGE) return 0;
    for (int64_t p = 0; p * PAGE < length; p++) {
        int64_t page = c->tables[sequence * c->most + p];
        if (page < 0 || page >= c->pages) return 0;
    }
    return 1;
}

/* ---- vectors. `half` is a constant wherever these are used: 0 for float32, 1 for bfloat16 ----
 *
 * A line is a vector of a query, key or value as it lies in memory: floats, or words of two bfloat16 neighbours, of
 * which `low` and `high` are the floats. So nothing is shuffled to widen bfloat16, nor to round it again. */

#define SIZE(half) ((half) ? 2 : 4)
#define LINE(half) ((half) ? 2 * LANES : LANES) /* elements of a line */

INLINE vec spread(float value) { return value - (vec){0}; }

INLINE vec choose(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }

INLINE vec low(vec line) { return (vec)((uvec)line << 16); }

INLINE vec high(vec line) { return (vec)((uvec)line & 0xffff0000); }

/* The line's first `count` elements, zeros behind them; LINE of them is a plain load. */
INLINE vec load(const int half, const char *from, int64_t count) {
    if (count >= LINE(half)) return *(const vec *)from;
#if WIDE
    if (half) return (vec)_mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), from);
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
    vec some = {0};
    for (int64_t i = 0; i < count * SIZE(half) / 2; i++) memcpy((char *)&some + 2 * i, from + 2 * i, 2);
    return some;
#endif
}

/* The bits of x as bfloat16, to nearest and ties to even, in the high halves. */
INLINE uvec rounded(vec x) {
    uvec bits = (uvec)x;
    return (uvec)choose(x == x, (vec)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000), (vec)(bits | 0x400000));
}

INLINE char *page_at(const int half, char *pages, int64_t page, int64_t d, int64_t head, const call *c) {
    return pages + (page * c->kv_heads + head) * PAGE * d * SIZE(half);
}

/* ---- arithmetic ---- */

/* exp(x) for x <= 0, within 2 units of the last place; 0 below -87, NaN of NaN. */
INLINE vec exp_of(vec x) {
    vec shifted = x * 1.44269504f + 12582912.0f; /* the integer nearest to x / ln 2 in the low bits */
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vec power = (vec)(((uvec)shifted + 127) << 23);
    return choose(x < -87.0f, spread(0), p * power);
}

/* cap * tanh(x / cap) */
INLINE vec capped(vec x, float cap) {
    vec twice = x * (2.0f / cap);
    vec e = exp_of(choose(twice > 0, -twice, twice));
    vec size = cap * (1.0f - e) / (1.0f + e);
    return choose(x > 0, size, -size);
}

INLINE float highest(vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

INLINE float total(vec x) {
    four parts[LANES / 4];
    memcpy(parts, &x, sizeof x);
    for (int i = 1; i < LANES / 4; i++) parts[0] += parts[i];
    return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

INLINE vec add_product(const int half, vec sum, vec a, vec b) {
    if (!half) return sum + a * b;
#if PAIRS
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + low(a) * low(b) + high(a) * high(b);
#endif
}

/* Scores of `pages` pages from token `begin` on become weights exp(score - max), 0 for tokens out of [start, end).
 * most, sum: the head's max and the sum of its weights so far. Returns what earlier weights must be multiplied by. */
static float weigh(float *scores, int64_t pages, int64_t begin, int64_t start, int64_t end, const call *c, float *most,
                   vec *sum) {
    static const int32_t lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int32_t first = (int32_t)(start - begin), last = (int32_t)(end - begin);
    vec top = spread(*most);
    for (int32_t i = 0; i < pages * PAGE; i += LANES) {
        vec x = *(vec *)(scores + i) * c->scale;
        if (c->softcap > 0) x = capped(x, c->softcap);
        ivec token = *(const ivec *)lanes + i;
        x = choose((token < first) | (token >= last), spread(-__builtin_inff()), x);
        top = choose(x > top, x, top);
        *(vec *)(scores + i) = x;
    }
    float before = *most, origin;
    *most = highest(top);
    origin = *most > -__builtin_inff() ? *most : 0; /* nothing seen so far: all weights are 0 */
    float fade = exp_of(spread(before - origin))[0];
    *sum *= fade;
    for (int32_t i = 0; i < pages * PAGE; i += LANES) {
        vec weight = exp_of(*(vec *)(scores + i) - origin);
        *(vec *)(scores + i) = weight;
        *sum += weight;
    }
    return fade;
}
