/* A linear layer of few rows: y = x W^T + b, with W as nn.Linear keeps it.
 *
 *   y[row, o] = sum over i of x[row, i] W[o, i] + b[o]
 *
 * A few rows do little with each weight, so weights are read from memory once, in the order in which they lie: a block
 * of 4 of their rows meets all rows of x, up to 6 at a time, whose 24 sums stay in registers, while weights that come
 * soon are fetched. They are fetched into the second-level cache: fewer lines can be on their way to the first than it
 * takes to keep memory busy. Nothing is laid out anew; bfloat16 is multiplied in the neighbouring pairs in which it
 * lies.
 *
 * A sum runs in one order, whatever the other rows and the threads are, so a row's result is the same bit for bit.
 * Sums are float32, rounded once at the end. For processors with AVX-512, bfloat16 where it has dot products of it
 * (AVX512-BF16); elsewhere the functions are missing. Called through ctypes.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#ifdef __AVX512BF16__
#define PAIRS 1
#else
#define PAIRS 0
#endif
#define OUTPUTS 4 /* rows of W done together */
#define MOST 6    /* rows of x done together at most: 24 sums, 4 weights and x are 29 of 32 registers */
#define AHEAD 2   /* blocks until weights that are fetched now are used */
#define ALIASED 4096 /* bytes: what lies so far apart wants the same lines of the first-level cache */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8") /* loops over sums: unrolled so early that the sums live in registers */

/* One call. weight: (d_out, d_in), bias: (d_out,) or NULL, x: (rows, d_in), its rows x_row bytes apart;
 * y: (rows, d_out). */
typedef struct {
    const char *weight, *bias;
    int64_t d_in, d_out;
    const char *x;
    int64_t x_row, rows;
    char *y;
} call;

/* ---- `half` is a constant wherever these are used: 0 for float32, 1 for bfloat16 ---- */

#define SIZE(half) ((half) ? 2 : 4)
#define LINE(half) ((half) ? 32 : 16)  /* elements of a register */

/* The first `count` elements, zeros behind them. */
INLINE __m512 load_some(const int half, const char *from, int64_t count) {
    if (half) return (__m512)_mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), from);
    return _mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
}

INLINE __m512 load(const int half, const char *from, int64_t count) {
    return count == LINE(half) ? _mm512_loadu_ps(from) : load_some(half, from, count);
}

INLINE __m512 add_product(const int half, __m512 sum, __m512 a, __m512 b) {
#if PAIRS
    if (half) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    return _mm512_fmadd_ps(a, b, sum);
}

/* Four vectors as one: element i of every four is the sum of vector i's elements in that lane. */
INLINE __m512 four_in_lanes(const __m512 *x) {
    __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    return _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
}

INLINE __m512 lanes_added(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* The outputs that a bias or y has from one place on: floats of `mask`, as many as the block has outputs. */
INLINE __m128 load_outputs(const int half, const char *from, __mmask8 mask) {
    if (!half) return _mm_maskz_loadu_ps(mask, from);
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, from)), 16));
}

INLINE void store_outputs(const int half, char *to, __mmask8 mask, __m128 sums) {
#if PAIRS
    if (half) {
        _mm_mask_storeu_epi16(to, mask, (__m128i)_mm_cvtneps_pbh(sums));
        return;
    }
#endif
    _mm_mask_storeu_ps(to, mask, sums);
}

/* Keeps a number in a register: the compiler would else read it anew for each of its products. */
#define HOLD(x) __asm__("" : "+v"(x))

/* Some rows of x from `row` on meet outputs from `o` on. */
typedef struct {
    const call *c;
    int64_t row, o;
    const char *fetch; /* weights to fetch meanwhile: `lines` rows of W, as far on as this tile works */
    int64_t lines;
} tile;

/* y of the tile's `n` rows and `outputs` outputs (both constants). */
INLINE void finish(const int half, const int n, const int outputs, const tile *at, __m512 sum[][OUTPUTS]) {
    const call *c = at->c;
    const __mmask8 mask = (1 << outputs) - 1;
    const __m128 bias = c->bias ? load_outputs(half, c->bias + at->o * SIZE(half), mask) : _mm_setzero_ps();
    __m512 four[8];
    UNROLL for (int t = 0; t < 8; t++) { /* where rows or outputs are missing the last ones fill in */
        __m512 *own = sum[t < n ? t : n - 1];
        UNROLL for (int j = outputs; j < OUTPUTS; j++) own[j] = own[0];
        four[t] = four_in_lanes(own);
    }
    UNROLL for (int t = 0; t < n; t += 4) {
        float sums[16];
        _mm512_storeu_ps(
            sums, lanes_added(lanes_added(four[t], four[t + 1]), lanes_added(four[t + 2], four[t + 3])));
        for (int s = 0; s < (n - t < 4 ? n - t : 4); s++)
            store_outputs(half, c->y + ((at->row + t + s) * c->d_out + at->o) * SIZE(half), mask,
                          _mm_add_ps(_mm_loadu_ps(sums + 4 * s), bias));
    }
}

INLINE void multiply(const int half, const int n, const int outputs, const tile *at) {
    const call *c = at->c;
    const int64_t w_row = c->d_in * SIZE(half), x_row = c->x_row, lines = at->lines;
    const char *w = c->weight + at->o * w_row, *fetch = at->fetch;
    const char *x = c->x + at->row * x_row, *x3 = x + 3 * x_row;
    __m512 sum[MOST][OUTPUTS], weight[OUTPUTS];
    UNROLL for (int t = 0; t < n; t++)
        UNROLL for (int j = 0; j < outputs; j++) sum[t][j] = _mm512_setzero_ps();
#define STEP(count)                                                                                                  \
    UNROLL for (int j = 0; j < outputs; j++) weight[j] = load(half, w + j * w_row, count);                           \
    UNROLL for (int t = 0; t < n; t++) {                                                                             \
        __m512 line = load(half, t < 3 ? x + t * x_row : x3 + (t - 3) * x_row, count);                               \
        HOLD(line);                                                                                                  \
        UNROLL for (int j = 0; j < outputs; j++) sum[t][j] = add_product(half, sum[t][j], line, weight[j]);          \
    }
    int64_t left = c->d_in;
    for (; left >= LINE(half); left -= LINE(half), w += 64, x += 64, x3 += 64) {
        for (int64_t f = 0; f < lines; f++) __builtin_prefetch(fetch + f * w_row, 0, 2);
        fetch += 64;
        STEP(LINE(half))
    }
    if (left) {
        STEP(left)
    }
#undef STEP
    finish(half, n, outputs, at, sum);
}

INLINE void multiply_rows(const int half, const int outputs, int64_t n, const tile *at) {
    if (n == 6) multiply(half, 6, outputs, at);
    else if (n == 5) multiply(half, 5, outputs, at);
    else if (n == 4) multiply(half, 4, outputs, at);
    else if (n == 3) multiply(half, 3, outputs, at);
    else if (n == 2) multiply(half, 2, outputs, at);
    else multiply(half, 1, outputs, at);
}

/* All rows, for a block's outputs. The lines of a block that comes soon are fetched in equal parts meanwhile. */
INLINE void multiply_block(const int half, const int outputs, const call *c, int64_t o) {
    const int64_t tiles = (c->rows + MOST - 1) / MOST, w_row = c->d_in * SIZE(half);
    const char *next = c->weight + (o + AHEAD * OUTPUTS) * w_row;
    for (int64_t i = 0; i < tiles; i++) {
        int64_t row = i * c->rows / tiles, line = i * OUTPUTS / tiles;
        tile at = {.c = c, .row = row, .o = o, .fetch = next + line * w_row,
                   .lines = (i + 1) * OUTPUTS / tiles - line};
        multiply_rows(half, outputs, (i + 1) * c->rows / tiles - row, &at);
    }
}

/* x with its rows at a better distance, where they would else all want the same lines of the first-level cache. As it
 * came if there is no memory for that. */
static const char *spread(const char *x, int64_t bytes, int64_t rows, int64_t *row) {
    static _Thread_local char *kept;
    static _Thread_local int64_t size;
    const int64_t apart = (bytes + 63) / 64 * 64 + 64;
    if (rows < 2 || *row % ALIASED) return x;
    if (rows * apart > size) {
        free(kept);
        kept = aligned_alloc(64, (size_t)(rows * apart));
        size = kept ? rows * apart : 0;
    }
    if (!kept) return x;
    for (int64_t r = 0; r < rows; r++) memcpy(kept + r * apart, x + r * *row, (size_t)bytes);
    *row = apart;
    return kept;
}

#define LINEAR(NAME, HALF)                                                                                           \
    void NAME(const char *weight, const char *bias, int64_t d_in, int64_t d_out, const char *x, int64_t x_row,       \
              int64_t rows, char *y, int64_t num_threads) {                                                          \
        int64_t row = x_row * SIZE(HALF);                                                                            \
        x = spread(x, d_in * SIZE(HALF), rows, &row);                                                                \
        const call c = {weight, bias, d_in, d_out, x, row, rows, y};                                                 \
        const int64_t whole = d_out / OUTPUTS * OUTPUTS;                                                             \
        _Pragma("omp parallel for schedule(static) num_threads(num_threads) if(num_threads > 1)")                    \
        for (int64_t o = 0; o < whole; o += OUTPUTS) multiply_block(HALF, OUTPUTS, &c, o);                           \
        for (int64_t o = whole; o < d_out; o++) multiply_block(HALF, 1, &c, o);                                      \
    }
LINEAR(linear_f32, 0)
#if PAIRS
LINEAR(linear_bf16, 1)
#endif

#endif
