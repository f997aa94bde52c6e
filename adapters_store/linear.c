/* A linear layer whose weights lie in strips: y = x W^T + b.
 *
 *   y[row, o] = sum over i of x[row, i] W[o, i] + b[o]
 *
 * A strip is 32 outputs side by side, input after input (bfloat16: pair of inputs after pair), so one strip is one run
 * of memory that is read once, in order, as fast as memory gives it. A tile of up to 14 rows of x meets it with its
 * sums in registers: per step two lines of weights are loaded, and one number (one pair) of each row goes to all lanes.
 * In nn.Linear's own layout a tile holds few outputs and more lines of x than the first-level cache, and a sum over
 * lanes ends every product.
 *
 * A sum runs in one order, whatever the other rows and the threads are, so a row's result is the same bit for bit.
 * Sums are float32, rounded once at the end. For processors with AVX-512, bfloat16 where it has dot products of it
 * (AVX512-BF16); elsewhere the functions are missing. Called through ctypes.
 */
#include <string.h>
#include "prefetch.h"
#include "scratch.h"
#include "strips.h"

const int64_t linear_idle_rows = IDLE_ROWS;

#ifdef STRIPS

#define MOST 14      /* rows of a tile at most: 28 sums, 2 lines of weights and a row's number are 31 of 32 registers */
#define ROWS 12      /* rows of a tile where there are several */
#define BLOCK 96     /* rows that meet a strip one tile after another, at most */
#define KEPT 393216  /* bytes of such rows; they stay in the second-level cache, beside the strip */
#define AHEAD 8192   /* bytes until weights that are asked for now are used */
#define ALIASED 4096 /* bytes: what lies so far apart wants the same lines of the first-level cache */

/* What a caller gives: as below; x_row: elements from row to row. */
typedef struct {
    const char *weight, *bias, *x;
    char *y;
    int64_t d_in, d_out, x_row, rows, num_threads;
    const prefetch_list *others; /* what to ask for beside; or NULL */
} arguments;

/* Some rows of it. weight: (strips, words, 32 words), where a word is a float or a pair, zeros where W has none;
 * bias: (d_out,) or NULL; x: rows of as many words, x_row bytes apart; y: (rows, d_out). */
typedef struct {
    const char *weight, *bias;
    int64_t words, d_out;
    const char *x;
    int64_t x_row, rows, block; /* rows in all, and of a block */
    char *y;
    const prefetch_list *others;
} call;

/* ---- `half` is a constant wherever these are used: 0 for float32, 1 for bfloat16 ---- */

INLINE __m512 load_outputs(const int half, const char *from, __mmask16 mask) {
    if (!half) return _mm512_maskz_loadu_ps(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

INLINE void store_outputs(const int half, char *to, __mmask16 mask, __m512 sums) {
#if PAIRS
    if (half) {
        _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(sums));
        return;
    }
#endif
    _mm512_mask_storeu_ps(to, mask, sums);
}

/* y of `n` rows (a constant) from `row` on, for a strip's outputs. */
INLINE void finish(const int half, const int n, const call *c, int64_t row, int64_t strip, __m512 sum[][2]) {
    UNROLL for (int j = 0; j < 2; j++) {
        const int64_t o = strip * OUTPUTS + 16 * j, left = c->d_out - o;
        const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
        const __m512 bias = c->bias ? load_outputs(half, c->bias + o * SIZE(half), mask) : _mm512_setzero_ps();
        UNROLL for (int t = 0; t < n; t++)
            store_outputs(half, c->y + ((row + t) * c->d_out + o) * SIZE(half), mask, _mm512_add_ps(sum[t][j], bias));
    }
}

/* What a strip asks for beside its own weights: its share of a list. */
typedef struct {
    const memory_run *run;
    const char *line;
    int64_t of_run, left; /* lines of the run from this one on, and of the share */
} share;

static share share_of(const prefetch_list *list, int64_t strip, int64_t strips) {
    int64_t before = list->lines * strip / strips;
    share s = {list->runs, NULL, 0, list->lines * (strip + 1) / strips - before};
    if (s.left == 0) return s;
    for (; before >= s.run->lines; s.run++) before -= s.run->lines;
    s.line = s.run->from + 64 * before;
    s.of_run = s.run->lines - before;
    return s;
}

/* The next lines of a share that has some left: neighbours, for as many words of `most` as they last, so many each. */
static const char *take(share *s, int lines, int64_t most, int64_t *words) {
    if (s->of_run <= 0) {
        s->run++;
        s->line = s->run->from;
        s->of_run = s->run->lines;
    }
    *words = least((least(s->of_run, s->left) + lines - 1) / lines, most);
    const char *line = s->line;
    s->line += 64 * lines * *words;
    s->of_run -= lines * *words;
    s->left -= lines * *words;
    return line;
}

/* The products of `n` rows with a word of each of a strip's outputs. i: bytes from the rows' beginnings to theirs. */
INLINE void add_products(const int half, const int n, const char *const *x, int64_t x_row, int64_t i, const char *w,
                         __m512 sum[][2]) {
    __m512 weight[2];
    UNROLL for (int j = 0; j < 2; j++) {
        weight[j] = _mm512_loadu_ps(w + 64 * j);
        HOLD(weight[j]);
    }
    UNROLL for (int t = 0; t < n; t++) {
        float number;
        memcpy(&number, x[t / 3] + t % 3 * x_row + i, 4);
        __m512 same = _mm512_set1_ps(number);
        HOLD(same);
        UNROLL for (int j = 0; j < 2; j++) sum[t][j] = add_product(half, sum[t][j], same, weight[j]);
    }
}

/* `n` rows from `row` on meet a strip. ahead: bytes from the weights in use to those asked for; asks: lines of others
 * that are asked for beside, per word. */
INLINE void multiply(const int half, const int n, const int asks, const call *c, int64_t row, int64_t strip,
                     int64_t ahead, share *others) {
    const int64_t x_row = c->x_row;
    const char *w = c->weight + strip * c->words * 4 * OUTPUTS, *end = w + c->words * 4 * OUTPUTS;
    const char *x[5]; /* every third row: the two behind it are reached by one addition in the address */
    UNROLL for (int t = 0; t < n; t += 3) x[t / 3] = c->x + (row + t) * x_row;
    __m512 sum[MOST][2];
    UNROLL for (int t = 0; t < n; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    int64_t i = 0, words;
    while (asks && w < end && others->left > 0) {
        const char *line = take(others, asks, (end - w) / (4 * OUTPUTS), &words);
        for (const char *stop = w + words * 4 * OUTPUTS; w < stop; w += 4 * OUTPUTS, i += 4, line += 64 * asks) {
            UNROLL for (int j = 0; j < 2; j++) ASK_FOR(w + ahead + 64 * j);
            UNROLL for (int j = 0; j < asks; j++) __builtin_prefetch(line + 64 * j, 0, 2);
            add_products(half, n, x, x_row, i, w, sum);
        }
    }
    for (; w < end; w += 4 * OUTPUTS, i += 4) {
        if (n >= BUSY_ROWS) UNROLL for (int j = 0; j < 2; j++) ASK_FOR(w + ahead + 64 * j);
        add_products(half, n, x, x_row, i, w, sum);
    }
    finish(half, n, c, row, strip, sum);
}

INLINE void multiply_rows(const int half, const int asks, int64_t n, const call *c, int64_t row, int64_t strip,
                          int64_t ahead, share *others) {
#define CASE(N)                                                                                                      \
    case N: multiply(half, N, N < BUSY_ROWS ? 0 : asks, c, row, strip, ahead, others); break;
    switch (n) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
    }
#undef CASE
}

/* Rows of a block, of so many bytes each: whole tiles. */
INLINE int64_t block_of(int64_t bytes) {
    const int64_t rows = KEPT / bytes / ROWS * ROWS;
    return rows < 2 * ROWS ? 2 * ROWS : least(rows, BLOCK);
}

/* The rows of a block meet a strip, in tiles of about the same size. Tiles behind the first find its weights in the
 * second-level cache, so larger ones have time to ask for two lines per word; a lone one reads them, and asks for
 * one. */
INLINE void multiply_block(const int half, const call *c, int64_t block, int64_t strip) {
    const int64_t first = block * c->block, rows = least(c->rows - first, c->block);
    const int64_t tiles = rows <= MOST ? 1 : (rows + ROWS - 1) / ROWS;
    share others = {0};
    if (c->others && block == 0) others = share_of(c->others, strip, (c->d_out + OUTPUTS - 1) / OUTPUTS);
    for (int64_t i = 0; i < tiles; i++) {
        int64_t row = i * rows / tiles, n = (i + 1) * rows / tiles - row, ahead = i ? 0 : AHEAD;
        row += first;
        const int has_time = i > 0 && n >= TWO_LINES;
        if (others.left <= 0 || (i == 0 && tiles > 1)) multiply_rows(half, 0, n, c, row, strip, ahead, NULL);
        else if (has_time && others.left > c->words) multiply_rows(half, 2, n, c, row, strip, ahead, &others);
        else multiply_rows(half, 1, n, c, row, strip, ahead, &others);
    }
}

/* x with its rows at a better distance where they would else all want the same lines of the first-level cache, and
 * with whole words where the last one would else be half of the next row's. NULL if there is no memory for that. */
static const char *spread(const char *x, int64_t bytes, int64_t rows, int64_t *row, int64_t num_threads) {
    const int64_t from = *row, apart = (bytes + 63) / 64 * 64 + 64;
    if ((rows < 2 || from % ALIASED) && bytes % 4 == 0) return x;
    char *to = scratch(rows * apart); /* the caller's, in whatever thread */
    if (!to) return NULL;
    (void)num_threads; /* without OpenMP */
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        memcpy(to + r * apart, x + r * from, (size_t)bytes);
        memset(to + r * apart + bytes, 0, 4);
    }
    *row = apart;
    return to;
}

/* 0, or 1 if memory ran out. */
#define LINEAR(NAME, HALF)                                                                                           \
    int64_t NAME(const arguments *a) {                                                                               \
        const int64_t threads = a->num_threads, size = SIZE(HALF), bytes = a->d_in * size;                           \
        const int64_t strips = (a->d_out + OUTPUTS - 1) / OUTPUTS, block = block_of(bytes), most = block * threads;  \
        for (int64_t first = 0; first < a->rows; first += most) {                                                    \
            int64_t n = least(a->rows - first, most), row = a->x_row * size, blocks = (n + block - 1) / block;       \
            const char *x = spread(a->x + first * row, bytes, n, &row, threads);                                     \
            if (!x) return 1;                                                                                        \
            char *y = a->y + first * a->d_out * size;                                                                \
            const prefetch_list *others = first == 0 && (threads == 1 || n > MOST) ? a->others : NULL;               \
            const call c = {a->weight, a->bias, (bytes + 3) / 4, a->d_out, x, row, n, block, y, others};             \
            _Pragma("omp parallel for schedule(static) num_threads(threads) if(threads > 1)")                        \
            for (int64_t i = 0; i < blocks * strips; i++) multiply_block(HALF, &c, i / strips, i % strips);          \
        }                                                                                                            \
        return 0;                                                                                                    \
    }
LINEAR(linear_f32, 0)
#if PAIRS
LINEAR(linear_bf16, 1)
#endif

#endif
