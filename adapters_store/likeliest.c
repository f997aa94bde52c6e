/* The likeliest token: argmax over o of the sum over i of x[row, i] W[o, i], without computing most of the sums.
 *
 * A greedy step needs the largest logit of each row, and a head reads all its weights for it: in small models a fifth to
 * a half of what a step reads. Here W lies once more in 8 bits, q with a scale for each output, and x is taken in 16:
 *
 *   sum = scale[o] t[row] (q . x16)  up to  slack[o] |x| + norm[o] |x - t x16|
 *
 * by Cauchy and Schwarz, where slack is the norm of what 8 bits lose of W[o], and what float sums may lose. An output
 * whose sum cannot be the largest is out of the question; of the others, few, the sums are computed as linear.c computes
 * them, bit for bit. So the token is the one that the logits give, whatever x is: where bounds say nothing, or x is no
 * number, all sums are computed.
 *
 * The products in 8 bits read a quarter of what float32 reads, and are made four at a time (AVX512-VNNI). Elsewhere the
 * functions are missing. Called through ctypes.
 */
#include <math.h>
#include <string.h>
#include "scratch.h"
#include "strips.h"
#if defined(STRIPS) && defined(__AVX512VNNI__)

#define HALVES 2    /* of a strip: 16 outputs, a vector */
#define LANES 16
#define ROWS 6      /* of a tile: 24 sums and 2 lines of weights are 26 of 32 registers */
#define BLOCK 96    /* rows that meet a strip one tile after another, at most */
#define AHEAD 8192  /* bytes until weights that are asked for now are used */
#define BUSY 3      /* rows from which on they are asked for: fewer wait for memory, which the processor foresees */
#define LARGE 1e37f /* below, no sum overflows */
#define TINY 1e-30f /* more than sums lose of numbers that are too small to be normal */
#define UP 1.00001f /* for what is rounded here, and must not be less than it is */

/* What a caller gives. q: (strips, words of 4 inputs, 32 outputs, 4); of each output: scale, slack, norm (of W[o]) and
 * total (of q); weight: as in linear.c; x: rows, x_row elements apart; tokens: (rows,), -1 where the largest sum is not
 * a finite number; counts: halves of strips whose sums were computed, and all there are, added to. */
typedef struct {
    const int8_t *q;
    const float *scale, *slack, *norm;
    const int32_t *total;
    const char *weight, *x;
    int64_t *tokens, *counts;
    int64_t d_in, d_out, x_row, rows, num_threads;
    float most; /* of the norms */
} arguments;

/* A row, as the two products take it. */
typedef struct {
    char *x;             /* words of the exact product, zeros where the last one has no number */
    uint8_t *bytes;      /* of x16 + 32768: the high ones of 4 inputs, then their low ones */
    float *upper;        /* (halves,) no sum of a half is more */
    float t, norm, lost; /* lost: |x - t x16| */
    int is_bounded;
} row;

static int64_t words_of(int64_t d_in, int64_t inputs) { return (d_in + inputs - 1) / inputs; }
static int64_t lines_of(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Bytes of a row's own memory, whole lines each. */
static int64_t x_bytes(const arguments *a) { return lines_of(4 * a->d_in + 4); }
static int64_t byte_bytes(const arguments *a) { return lines_of(2 * a->d_in + 2 * LANES); }
static int64_t strips_of(const arguments *a) { return words_of(a->d_out, OUTPUTS); }
static int64_t upper_bytes(const arguments *a) { return lines_of(4 * HALVES * strips_of(a)); }
static int64_t row_bytes(const arguments *a) { return x_bytes(a) + byte_bytes(a) + upper_bytes(a) + 64; }

/* ---- x in 16 bits ---- */

INLINE __m512 load_x(const int half, const char *x, int64_t i, __mmask16 mask) {
    if (!half) return _mm512_maskz_loadu_ps(mask, x + 4 * i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + 2 * i)), 16));
}

INLINE __mmask16 mask_of(int64_t left) { return left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0; }

/* sum + a^2, in double */
INLINE __m512d add_squares(__m512d sum, __m512 a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
    return _mm512_fmadd_pd(high, high, _mm512_fmadd_pd(low, low, sum));
}

INLINE void narrow_x(const int half, const arguments *a, row *r) {
    __m512 most = _mm512_setzero_ps();
    __m512d squares = _mm512_setzero_pd(), lost = squares;
    for (int64_t i = 0; i < a->d_in; i += LANES) {
        const __m512 x = load_x(half, r->x, i, mask_of(a->d_in - i));
        most = _mm512_max_ps(most, _mm512_abs_ps(x));
        squares = add_squares(squares, x);
    }
    r->norm = (float)sqrt(_mm512_reduce_add_pd(squares)) * UP;
    r->t = _mm512_reduce_max_ps(most) / 32767;
    r->is_bounded = r->t > TINY && r->norm * a->most < LARGE; /* false also for what is no number */
    if (!r->is_bounded) r->t = 1;
    const __m512 t = _mm512_set1_ps(r->t), inverse = _mm512_set1_ps(1 / r->t);
    for (int64_t i = 0; i < 4 * words_of(a->d_in, 4); i += LANES) {
        const __m512 x = load_x(half, r->x, i, mask_of(a->d_in - i));
        const __m512i x16 = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
        lost = add_squares(lost, _mm512_fnmadd_ps(_mm512_cvtepi32_ps(x16), t, x));
        const __m512i bytes = _mm512_add_epi32(x16, _mm512_set1_epi32(32768));
        const __m128i high = _mm512_cvtepi32_epi8(_mm512_srli_epi32(bytes, 8)), low = _mm512_cvtepi32_epi8(bytes);
        _mm_storeu_si128((__m128i *)(r->bytes + 2 * i), _mm_unpacklo_epi32(high, low));
        _mm_storeu_si128((__m128i *)(r->bytes + 2 * i + 16), _mm_unpackhi_epi32(high, low));
    }
    r->lost = (float)sqrt(_mm512_reduce_add_pd(lost)) * UP;
}

/* ---- bounds ---- */

/* The upper bound of a half's sums for a row. */
INLINE void bound(const arguments *a, const row *r, int64_t half_strip, __m512i high, __m512i low) {
    const int64_t o = half_strip * LANES;
    const __mmask16 mask = mask_of(a->d_out - o);
    const __m512 none = _mm512_set1_ps(-INFINITY);
    high = _mm512_sub_epi32(high, _mm512_slli_epi32(_mm512_loadu_si512(a->total + o), 7)); /* 32768 = 128 * 256 */
    const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low));
    const __m512 near = _mm512_mul_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(a->scale + o), _mm512_set1_ps(r->t)));
    __m512 off = _mm512_mul_ps(_mm512_loadu_ps(a->slack + o), _mm512_set1_ps(r->norm));
    off = _mm512_fmadd_ps(_mm512_loadu_ps(a->norm + o), _mm512_set1_ps(r->lost), off);
    off = _mm512_fmadd_ps(off, _mm512_set1_ps(UP), _mm512_set1_ps(TINY));
    r->upper[half_strip] = _mm512_reduce_max_ps(_mm512_mask_add_ps(none, mask, near, off));
}

/* sum + the products of 4 inputs. By name, because the compiler's own function leaves it to keep sums in memory. */
INLINE __m512i add_four(__m512i sum, __m512i x, __m512i weight) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weight));
    return sum;
}

/* `n` rows, a constant, meet a strip of q. apart: bytes from row to row. */
INLINE void bound_rows(const int n, const arguments *a, const row *rows, int64_t apart, int64_t strip) {
    const int64_t words = words_of(a->d_in, 4);
    const int8_t *w = a->q + strip * words * 4 * OUTPUTS, *end = w + words * 4 * OUTPUTS;
    const uint8_t *x[2]; /* every third row: the two behind it are reached by one addition in the address */
    __m512i sum[ROWS][HALVES][2];
    UNROLL for (int t = 0; t < n; t += 3) x[t / 3] = rows[t].bytes;
    UNROLL for (int t = 0; t < n; t++)
        UNROLL for (int j = 0; j < HALVES; j++) sum[t][j][0] = sum[t][j][1] = _mm512_setzero_si512();
    for (int64_t i = 0; w < end; i += 8, w += 4 * OUTPUTS) {
        __m512i weight[HALVES];
        UNROLL for (int j = 0; j < HALVES; j++) {
            weight[j] = _mm512_loadu_si512(w + 64 * j);
            if (n >= BUSY) __builtin_prefetch(w + AHEAD + 64 * j, 0, 2);
        }
        UNROLL for (int t = 0; t < n; t++)
            UNROLL for (int k = 0; k < 2; k++) {
                int32_t four;
                memcpy(&four, x[t / 3] + t % 3 * apart + i + 4 * k, 4);
                const __m512i same = _mm512_set1_epi32(four);
                UNROLL for (int j = 0; j < HALVES; j++) sum[t][j][k] = add_four(sum[t][j][k], same, weight[j]);
            }
    }
    UNROLL for (int t = 0; t < n; t++)
        UNROLL for (int j = 0; j < HALVES; j++)
            bound(a, rows + t, strip * HALVES + j, sum[t][j][0], sum[t][j][1]);
}

/* All rows meet a strip of q. */
static void bound_strip(const arguments *a, const row *rows, int64_t num_rows, int64_t strip) {
    const int64_t tiles = (num_rows + ROWS - 1) / ROWS, apart = row_bytes(a);
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t first = i * num_rows / tiles;
        const row *r = rows + first;
#define CASE(N) case N: bound_rows(N, a, r, apart, strip); break;
        switch ((i + 1) * num_rows / tiles - first) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
    }
}

/* ---- the sums that may be the largest ---- */

/* As it is stored among logits. */
INLINE float rounded(const int half, float sum) {
#if PAIRS
    if (half) return _mm_cvtss_f32(_mm_castsi128_ps(_mm_slli_epi32((__m128i)_mm_cvtneps_pbh(_mm_set_ss(sum)), 16)));
#endif
    return sum;
}

/* The largest sum so far, and whose it is. W is finite: a sum is no number only where x is not, and then none is. */
typedef struct {
    float sum;
    int64_t token;
} best;

INLINE void consider(const int half, const arguments *a, int64_t half_strip, __m512 sums, best *found) {
    float each[LANES];
    _mm512_storeu_ps(each, sums);
    for (int64_t o = half_strip * LANES, k = 0; k < LANES && o < a->d_out; k++, o++) {
        const float sum = rounded(half, each[k]);
        if (sum > found->sum || (sum == found->sum && o < found->token)) {
            found->sum = sum;
            found->token = o;
        }
    }
}

/* The sums of a half, as linear.c makes them. */
INLINE void compute(const int half, const arguments *a, const row *r, int64_t half_strip, best *found) {
    const int64_t words = words_of(a->d_in, 4 / SIZE(half));
    const char *w = a->weight + half_strip / HALVES * words * 4 * OUTPUTS + half_strip % HALVES * 64;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < words; i++, w += 4 * OUTPUTS) {
        float number;
        memcpy(&number, r->x + 4 * i, 4);
        sum = add_product(half, sum, _mm512_set1_ps(number), _mm512_loadu_ps(w));
    }
    consider(half, a, half_strip, sum, found);
}

/* The token of a row; how many halves were computed. The half of the highest bound comes first: few bounds of others
 * are above the largest of its sums. */
INLINE int64_t choose(const int half, const arguments *a, const row *r, int64_t *token) {
    const int64_t num_halves = words_of(a->d_out, LANES);
    int64_t first = 0, computed = 1;
    best found = {-INFINITY, a->d_out};
    for (int64_t h = 1; h < num_halves; h++)
        if (r->upper[h] > r->upper[first]) first = h;
    compute(half, a, r, first, &found);
    for (int64_t h = 0; h < num_halves; h++)
        if (h != first && !(r->is_bounded && rounded(half, r->upper[h]) < found.sum)) {
            compute(half, a, r, h, &found);
            computed++;
        }
    *token = isinf(found.sum) ? -1 : found.token;
    return computed;
}

/* ---- calls ---- */

INLINE void begin_row(const int half, const arguments *a, row *r, char *room, const char *x) {
    const int64_t bytes = a->d_in * SIZE(half);
    r->x = room;
    r->bytes = (uint8_t *)(room + x_bytes(a));
    r->upper = (float *)(r->bytes + byte_bytes(a));
    memcpy(r->x, x, (size_t)bytes);
    memset(r->x + bytes, 0, 4);
    narrow_x(half, a, r);
}

/* Up to BLOCK rows from `first` on; 1 if memory ran out. */
INLINE int64_t run(const int half, const arguments *a, int64_t first, int64_t n) {
    const int64_t strips = strips_of(a), of_row = row_bytes(a), threads = a->num_threads;
    row rows[BLOCK];
    int64_t computed = 0;
    char *room = scratch(n * of_row);
    if (!room) return 1;
    (void)threads; /* without OpenMP */
    for (int64_t t = 0; t < n; t++)
        begin_row(half, a, rows + t, room + t * of_row, a->x + (first + t) * a->x_row * SIZE(half));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t s = 0; s < strips; s++) bound_strip(a, rows, n, s);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) reduction(+ : computed)
    for (int64_t t = 0; t < n; t++) computed += choose(half, a, rows + t, a->tokens + first + t);
    a->counts[0] += computed;
    a->counts[1] += n * words_of(a->d_out, LANES);
    return 0;
}

/* 0, or 1 if memory ran out. */
#define LIKELIEST(NAME, HALF)                                                                                        \
    int64_t NAME(const arguments *a) {                                                                               \
        for (int64_t first = 0; first < a->rows; first += BLOCK)                                                     \
            if (run(HALF, a, first, least(a->rows - first, BLOCK))) return 1;                                        \
        return 0;                                                                                                    \
    }
LIKELIEST(likeliest_f32, 0)
#if PAIRS
LIKELIEST(likeliest_bf16, 1)
#endif

#endif
