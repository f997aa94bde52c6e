/* y[t] += sum_p weight[p] * B_p (A_p x[t])  for the pairs p of the mix that token t belongs to.
 *
 * One call serves one site and one batch, whatever its mixture of compositions. The batch comes as panels of tokens
 * (panels.py); inside a panel the work goes adapter by adapter, over all tokens that use it, whatever else they use. So
 * an adapter's factors come from memory once per panel: a step that decodes 64 requests with 64 compositions of 32
 * adapters reads 32 adapters, not 64 or 256, and reading them is most of its cost. Nothing is copied or folded per
 * batch; the cost follows the adapters that are active and not the number resident.
 *
 * A token's sums run in one fixed order, over its own adapters in the order of slots, over the columns and ranks of
 * each, and on from y itself, in whatever company and panel it is. So a row never sees its neighbours, bit for bit.
 * That is why products and sums are fused by name or not at all (-ffp-contract=off): a compiler left to choose does it
 * for two tokens and not for one.
 * Sums are float32; x and y are float32 or bfloat16. Plain C with GCC/Clang vector types, so any CPU with vectors
 * profits; lowrank_bf16.c has the products for processors that multiply bfloat16. Called through ctypes (native.py).
 */
#include <stdint.h>
#include <string.h>
#include "../prefetch.h"
#include "../scratch.h"
#ifdef __FMA__
#include <immintrin.h>
#endif

#define PANEL 256     /* tokens of a panel at most; PANEL in panels.py */
#define AT_ONCE 4     /* tokens that share one reading of B from the first-level cache */
#define SHARING 8     /* tokens that share one reading of A, which fills that cache */
#define BLOCK 128     /* columns of B that lie together; BLOCK in native.py */
#define CHUNK 64      /* columns of y worked on at a time: 64 rows of B as long stay in the first-level cache; or, */
#define FEW 8         /* where so few tokens use an adapter, a block: B comes from memory as one run */
#define STRIP 512     /* columns of y kept in float32 while they are summed, where y cannot hold sums: at least, */
#define SUMS 65536    /* or as many as make so many floats: all in the second-level cache */
#define AHEAD 4096    /* bytes of A until what is asked for now is used */

/* Floats of one vector: longer than the processor's, the compiler would take them apart through memory. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float floats8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

/* sum + a * b */
#ifdef __AVX512F__
#define FUSED(a, b, sum) ((floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(sum)))
#define ALL(number) ((floats)_mm512_set1_ps(number))
#define HOLD(x) __asm__("" : "+v"(x)) /* in a register: the compiler would else read it anew for each of its products */
#elif defined(__FMA__)
#define FUSED(a, b, sum) ((floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(sum)))
#define ALL(number) ((floats)_mm256_set1_ps(number))
#else
#define FUSED(a, b, sum) ((sum) + (a) * (b))
#define ALL(number) ((number) - (floats){0})
#endif
#ifndef HOLD
#define HOLD(x)
#endif
#define FUSED8(a, b, sum) ((floats8)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(sum)))
#define ALL8(number) ((floats8)_mm256_set1_ps(number))

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8") /* loops over sums: unrolled so early that the sums live in registers */

/* One adapter at one site. a: (d_in, lanes) with lanes = rank rounded up to 8 or a multiple of 16, zero-filled.
 * b: blocks of BLOCK columns one behind the other, the last of those that are left; each (rank, its columns). The
 * adapter's scale is folded in. rank 0: the adapter does not touch this site. */
typedef struct {
    const void *a;
    const void *b;
    int64_t rank;
    int64_t lanes;
} entry;

/* The adapters at one site, by slot. It stays where it is while slots are filled and emptied; entries may move. */
typedef struct {
    const entry *entries;
    int64_t num_slots;
} bank;

/* Who uses which adapter in a batch; made once per batch and read by all sites. */
typedef struct {
    int64_t num_panels;
    int64_t num_threads;
    const int64_t *panels; /* (num_panels + 1, 2) first token and first group of each */
    const int64_t *tokens; /* (num_tokens,) row in x and y */
    const int64_t *groups; /* (num_groups + 1, 2) slot, and the first of its uses; a panel's groups in order of slots */
    const int64_t *uses;   /* (num_uses, 2) index into tokens, index into a layer's weights */
    const float *weights;  /* (layers, num_pairs) */
    int64_t num_pairs;
} plan;

/* One call: a batch at a site. */
typedef struct {
    const plan *batch;
    const bank *adapters;
    const char *x;
    char *y;
    int64_t x_stride, y_stride; /* elements from token to token */
    int64_t d_in, d_out, layer;
} site;

/* One adapter and those of a panel's tokens that use it. */
typedef struct {
    const entry *adapter;
    const int64_t *uses;
    int64_t num_uses;
    float *hidden; /* (num_uses, lanes) weight * A x */
} part;

/* Parts that are added to the same tokens, of which the uses from `at` on are served now. */
typedef struct {
    const part *parts;
    int64_t num_parts;
    int64_t at;
    int64_t d_out, shift, end; /* shift: the column of b that belongs to column 0 of y; end: the one behind the last */
    int asks;                  /* for what is read next, */
    const char *next;          /* behind b; NULL if it is not known */
} addends;

/* The two products of a kernel, for 1 to SHARING and 1 to AT_ONCE tokens. */
typedef struct {
    /* hidden[t][0:lanes] = weights[t] * A x[t]; next: what is read after A, NULL if A was just read */
    void (*shrink)(int64_t tokens, const void *const *x, int64_t d_in, const entry *adapter, const float *weights,
                   float *hidden, const char *next);
    /* y[t][c:end] += hidden . b; half: y is bfloat16 */
    void (*expand)(int64_t tokens, int half, char *const *y, int64_t c, int64_t end, const addends *add);
    int half;         /* x and y of the site are bfloat16 */
    int half_factors; /* and so are the factors, in pairs (lowrank_bf16.c); otherwise x is copied to float32 first */
} arithmetic;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- b by columns, in bytes: a number of it takes 4, a float or a pair of bfloat16 ---- */

INLINE int64_t block_of(int64_t column) { return column / BLOCK * BLOCK; }

/* Where the first row of b has a column. */
INLINE const char *column_of(const char *b, int64_t rows, int64_t column) {
    return b + 4 * (block_of(column) * rows + column % BLOCK);
}

/* From a row of b to the next one, where a column lies. */
INLINE int64_t row_bytes(const addends *add, int64_t column) {
    return 4 * least(add->d_out - block_of(column), BLOCK);
}

/* From a column of b to what is asked for meanwhile: the next block, behind the last one what comes next. */
INLINE int64_t ahead_of(const addends *add, const char *b, int64_t rows, int64_t column) {
    const int64_t block = block_of(column);
    if (!add->asks) return 0;
    if (block + BLOCK < add->end) return 4 * BLOCK * rows;
    return add->next ? add->next - column_of(b, rows, block) : 0;
}

/* ---- vectors of y, of which bfloat16 is only a way to be stored ---- */

/* The first n of LANES, zeros behind them. */
INLINE floats load(const float *from, int64_t n) {
    if (n == LANES) return *(const floats *)from;
    floats some = {0};
    memcpy(&some, from, 4 * (size_t)n);
    return some;
}

INLINE void store(float *to, int64_t n, floats value) {
    if (n == LANES) *(floats *)to = value;
    else memcpy(to, &value, 4 * (size_t)n);
}

INLINE floats load_bf16(const uint16_t *from, int64_t n) {
    halves some = {0};
    if (n == LANES) some = *(const halves *)from;
    else memcpy(&some, from, 2 * (size_t)n);
    return (floats)(__builtin_convertvector(some, words) << 16);
}

/* Round to nearest, ties to even; what was bfloat16 comes back as it was. */
INLINE void store_bf16(uint16_t *to, int64_t n, floats value) {
    words bits = (words)value;
    bits += 0x7fff + ((bits >> 16) & 1);
    halves rounded = __builtin_convertvector(bits >> 16, halves);
    if (n == LANES) *(halves *)to = rounded;
    else memcpy(to, &rounded, 2 * (size_t)n);
}

static void widen_row(const uint16_t *from, int64_t columns, float *to) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) store(to + c, LANES, load_bf16(from + c, LANES));
    if (c < columns) store(to + c, columns - c, load_bf16(from + c, columns - c));
}

static void narrow_row(const float *from, int64_t columns, uint16_t *to) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) store_bf16(to + c, LANES, load(from + c, LANES));
    if (c < columns) store_bf16(to + c, columns - c, load(from + c, columns - c));
}

/* ---- the products with factors in float32 ---- */

/* The row of A from which on its end is asked for already and what comes next is, if anything is to be asked for. */
INLINE int64_t turn_of(int64_t d_in, int64_t row_bytes, const char *next) {
    return next ? d_in - least(d_in, AHEAD / row_bytes) : INT64_MAX;
}

/* `tokens` is a compile-time constant here and below. Two sums, each of every other column, because one chain of
 * additions would wait for itself where a single token is served. */
#define SHRINK(NAME, VECTOR, FUSED, ALL)                                                                             \
    INLINE void NAME(int tokens, const void *const *x, int64_t d_in, const float *a, int64_t lanes,                  \
                     const float *weights, float *hidden, const char *next) {                                        \
        const float *rows[SHARING];                                                                                  \
        VECTOR sum[2][SHARING], all[SHARING];                                                                        \
        UNROLL for (int t = 0; t < tokens; t++) rows[t] = x[t];                                                      \
        UNROLL for (int s = 0; s < 2; s++) UNROLL for (int t = 0; t < tokens; t++) sum[s][t] = (VECTOR){0};          \
        int64_t i = 0, turn = turn_of(d_in, 4 * lanes, next), ahead = next ? AHEAD : 0;                              \
        for (; i + 2 <= d_in; i += 2) {                                                                              \
            if (i >= turn) ahead = next - (const char *)(a + i * lanes), turn = INT64_MAX;                           \
            UNROLL for (int s = 0; s < 2; s++) {                                                                     \
                VECTOR row = *(const VECTOR *)(a + (i + s) * lanes);                                                 \
                ASK_FOR((const char *)(a + (i + s) * lanes) + ahead);                                                \
                UNROLL for (int t = 0; t < tokens; t++) sum[s][t] = FUSED(row, ALL(rows[t][i + s]), sum[s][t]);      \
            }                                                                                                        \
        }                                                                                                            \
        UNROLL for (int t = 0; t < tokens; t++) all[t] = sum[0][t] + sum[1][t];                                      \
        for (; i < d_in; i++) {                                                                                      \
            VECTOR row = *(const VECTOR *)(a + i * lanes);                                                           \
            UNROLL for (int t = 0; t < tokens; t++) all[t] = FUSED(row, ALL(rows[t][i]), all[t]);                    \
        }                                                                                                            \
        UNROLL for (int t = 0; t < tokens; t++) *(VECTOR *)(hidden + t * lanes) = all[t] * weights[t];               \
    }
SHRINK(shrink_lanes, floats, FUSED, ALL)
#if LANES > 8
SHRINK(shrink8, floats8, FUSED8, ALL8)
#else
#define shrink8 shrink_lanes
#endif

INLINE void shrink_some(int tokens, const void *const *x, int64_t d_in, const entry *adapter, const float *weights,
                        float *hidden, const char *next) {
    if (LANES > 8 && adapter->lanes == 8) shrink8(tokens, x, d_in, adapter->a, 8, weights, hidden, next);
    else
        for (int64_t j = 0; j < adapter->lanes; j += LANES)
            shrink_lanes(tokens, x, d_in, (const float *)adapter->a + j, adapter->lanes, weights, hidden + j, next);
}

/* Calls F(1, …) to F(8, …), each with its number of tokens as a constant. */
#define BY_TOKENS(F, tokens, ...)                                                                                    \
    switch (tokens) {                                                                                                \
        case 1: F(1, __VA_ARGS__); break;                                                                            \
        case 2: F(2, __VA_ARGS__); break;                                                                            \
        case 3: F(3, __VA_ARGS__); break;                                                                            \
        case 4: F(4, __VA_ARGS__); break;                                                                            \
        case 5: F(5, __VA_ARGS__); break;                                                                            \
        case 6: F(6, __VA_ARGS__); break;                                                                            \
        case 7: F(7, __VA_ARGS__); break;                                                                            \
        default: F(8, __VA_ARGS__);                                                                                  \
    }

static void shrink(int64_t tokens, const void *const *x, int64_t d_in, const entry *adapter, const float *weights,
                   float *hidden, const char *next) {
    BY_TOKENS(shrink_some, tokens, x, d_in, adapter, weights, hidden, next)
}

/* From column c on as many vectors, each of n columns: LANES, or fewer in the last one of a ragged row. */
INLINE void expand_vectors(int half, int tokens, int vectors, int64_t n, char *const *y, int64_t c,
                           const addends *add) {
    floats sum[AT_ONCE][8];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[t][v] = half ? load_bf16((const uint16_t *)y[t] + c + v * LANES, n)
                             : load((const float *)y[t] + c + v * LANES, n);
    for (const part *p = add->parts; p < add->parts + add->num_parts; p++) {
        const int64_t rank = p->adapter->rank, lanes = p->adapter->lanes, column = add->shift + c;
        const int64_t to_next = row_bytes(add, column), ahead = ahead_of(add, p->adapter->b, rank, column);
        const char *b = column_of(p->adapter->b, rank, column);
        const float *hidden = p->hidden + add->at * lanes;
        for (int64_t j = 0; j < rank; j++, b += to_next) {
            floats row[8];
            UNROLL for (int v = 0; v < vectors; v++) {
                row[v] = load((const float *)b + v * LANES, n);
                HOLD(row[v]);
                ASK_FOR(b + 4 * v * LANES + ahead);
            }
            UNROLL for (int t = 0; t < tokens; t++) {
                floats same = ALL(hidden[t * lanes + j]);
                HOLD(same);
                UNROLL for (int v = 0; v < vectors; v++) sum[t][v] = FUSED(row[v], same, sum[t][v]);
            }
        }
    }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < vectors; v++) {
            if (half) store_bf16((uint16_t *)y[t] + c + v * LANES, n, sum[t][v]);
            else store((float *)y[t] + c + v * LANES, n, sum[t][v]);
        }
}

INLINE void expand_some(int half, int tokens, char *const *y, int64_t c, int64_t end, const addends *add) {
    if (tokens <= 2)
        for (; c + 8 * LANES <= end; c += 8 * LANES) expand_vectors(half, tokens, 8, LANES, y, c, add);
    for (; c + 4 * LANES <= end; c += 4 * LANES) expand_vectors(half, tokens, 4, LANES, y, c, add);
    for (; c + LANES <= end; c += LANES) expand_vectors(half, tokens, 1, LANES, y, c, add);
    if (c < end) expand_vectors(half, tokens, 1, end - c, y, c, add);
}

static void expand(int64_t tokens, int half, char *const *y, int64_t c, int64_t end, const addends *add) {
    if (tokens == 4 && half) expand_some(1, 4, y, c, end, add);
    else if (tokens == 4) expand_some(0, 4, y, c, end, add);
    else if (tokens == 3 && half) expand_some(1, 3, y, c, end, add);
    else if (tokens == 3) expand_some(0, 3, y, c, end, add);
    else if (tokens == 2 && half) expand_some(1, 2, y, c, end, add);
    else if (tokens == 2) expand_some(0, 2, y, c, end, add);
    else if (half) expand_some(1, 1, y, c, end, add);
    else expand_some(0, 1, y, c, end, add);
}

/* ---- panels ---- */

/* One panel at one site. */
typedef struct {
    const site *here;
    const arithmetic *by;
    int64_t first_token, tokens;
    const void *x[PANEL]; /* where the x of each token lies, */
    char *y[PANEL];       /* and its y */
    int64_t num_parts;
    part *parts;   /* in the order of slots; those whose adapters touch this site */
    float *copies; /* (tokens, d_in) where x is copied */
    int64_t strip; /* columns */
    float *sums;   /* (tokens, strip) where y cannot hold sums */
} panel;

/* What is read after a part's A: the next one's, behind the last the first b. */
INLINE const char *after_a(const panel *now, const part *p) {
    return p + 1 < now->parts + now->num_parts ? (p + 1)->adapter->a : now->parts->adapter->b;
}

static void shrink_part(const panel *now, const part *p) {
    const plan *batch = now->here->batch;
    const float *of_layer = batch->weights + now->here->layer * batch->num_pairs;
    for (int64_t u = 0, n; u < p->num_uses; u += n) {
        n = least(p->num_uses - u, SHARING);
        const void *x[SHARING];
        float weights[SHARING];
        for (int64_t t = 0; t < n; t++) {
            x[t] = now->x[p->uses[2 * (u + t)] - now->first_token];
            weights[t] = of_layer[p->uses[2 * (u + t) + 1]];
        }
        now->by->shrink(n, x, now->here->d_in, p->adapter, weights, p->hidden + u * p->adapter->lanes,
                        u ? NULL : after_a(now, p));
    }
}

/* Ask for `columns` columns of y of the uses from `at` on: in each token's row they are too short a run of addresses to
 * be foreseen. */
INLINE void fetch_y(const panel *now, int half, char *const *y, const part *p, int64_t at, int64_t c, int64_t columns) {
    int64_t size = half ? 2 : 4;
    for (int64_t u = at; u < least(at + AT_ONCE, p->num_uses); u++)
        for (int64_t i = 0; i < size * columns; i += 64)
            __builtin_prefetch(y[p->uses[2 * u] - now->first_token] + size * c + i, 1);
}

/* Rows of a part's b. */
INLINE int64_t rows_of(const panel *now, const part *p) {
    return now->by->half_factors ? (p->adapter->rank + 1) / 2 : p->adapter->rank;
}

/* Add parts of the same tokens to `columns` columns of y, in y the first, in b the one behind `shift`; a chunk of
 * columns of b stays in the first-level cache for all tokens. */
static void expand_parts(const panel *now, int half, char *const *y, const part *parts, int64_t num_parts,
                         int64_t shift, int64_t columns) {
    const part *after = parts + num_parts;
    const int64_t step = parts->num_uses > FEW ? CHUNK : BLOCK;
    addends add = {.parts = parts, .num_parts = num_parts, .d_out = now->here->d_out, .shift = shift,
                   .end = shift + columns, .asks = 1};
    if (after < now->parts + now->num_parts) add.next = column_of(after->adapter->b, rows_of(now, after), shift);
    for (int64_t c = 0, width; c < columns; c += width, add.at = 0, add.asks = 1) {
        width = least(columns - c, step);
        for (int64_t n; (n = least(parts->num_uses - add.at, AT_ONCE)) > 0; add.at += n, add.asks = 0) {
            char *rows[AT_ONCE];
            for (int64_t t = 0; t < n; t++) rows[t] = y[parts->uses[2 * (add.at + t)] - now->first_token];
            fetch_y(now, half, y, parts, add.at + n, c, width);
            now->by->expand(n, half, rows, c, c + width, &add);
        }
    }
}

/* Sums that leave the registers between a token's adapters: kept in float32, a strip of columns at a time, so that a
 * token is rounded once, as it is where all its adapters are added at once. */
static void expand_in_strips(const panel *now) {
    const site *here = now->here;
    char *sums[PANEL];
    for (int64_t t = 0; t < now->tokens; t++) sums[t] = (char *)(now->sums + t * now->strip);
    for (int64_t c = 0; c < here->d_out; c += now->strip) {
        int64_t columns = least(here->d_out - c, now->strip);
        for (int64_t t = 0; t < now->tokens; t++) widen_row((uint16_t *)now->y[t] + c, columns, (float *)sums[t]);
        for (const part *p = now->parts; p < now->parts + now->num_parts; p++)
            expand_parts(now, 0, sums, p, 1, c, columns);
        for (int64_t t = 0; t < now->tokens; t++) narrow_row((float *)sums[t], columns, (uint16_t *)now->y[t] + c);
    }
}

static void expand_panel(const panel *now) {
    const part *end = now->parts + now->num_parts;
    int half = now->by->half, same = now->tokens > FEW; /* same: all adapters are for all of many tokens */
    for (const part *p = now->parts; p < end; p++) same &= p->num_uses == now->tokens;
    if (same) expand_parts(now, half, now->y, now->parts, now->num_parts, 0, now->here->d_out);
    else if (half) expand_in_strips(now);
    else
        for (const part *p = now->parts; p < end; p++) expand_parts(now, 0, now->y, p, 1, 0, now->here->d_out);
}

static void run_panel(panel *now) {
    const site *here = now->here;
    int64_t size = now->by->half ? 2 : 4;
    for (int64_t t = 0; t < now->tokens; t++) {
        int64_t row = here->batch->tokens[now->first_token + t];
        now->x[t] = here->x + size * row * here->x_stride;
        now->y[t] = here->y + size * row * here->y_stride;
        if (now->by->half && !now->by->half_factors) {
            float *copy = now->copies + t * here->d_in;
            widen_row(now->x[t], here->d_in, copy);
            now->x[t] = copy;
        }
    }
    for (const part *p = now->parts; p < now->parts + now->num_parts; p++) shrink_part(now, p);
    expand_panel(now);
}

/* The adapter of a slot; one of rank 0 for slots that the site has never heard of. */
static const entry *at_slot(const bank *adapters, int64_t slot) {
    static const entry none;
    return slot < adapters->num_slots ? adapters->entries + slot : &none;
}

/* Find the parts, and room for what a panel needs. False if there is no memory for it. */
static int prepare_and_run(const site *here, const arithmetic *by, int64_t index) {
    const plan *batch = here->batch;
    const int64_t *at = batch->panels + 2 * index, *groups = batch->groups + 2 * at[1];
    int64_t num_groups = at[3] - at[1], hidden = 0;
    for (int64_t g = 0; g < num_groups; g++) {
        const entry *adapter = at_slot(here->adapters, groups[2 * g]);
        if (adapter->rank > 0) hidden += (groups[2 * g + 3] - groups[2 * g + 1]) * adapter->lanes;
    }
    if (hidden == 0) return 1;
    panel now = {here, by, .first_token = at[0], .tokens = at[2] - at[0]};
    int64_t parts = (num_groups * (int64_t)sizeof(part) + 63) / 64 * 64; /* whole lines */
    now.strip = SUMS / now.tokens / BLOCK * BLOCK;
    if (now.strip < STRIP) now.strip = STRIP;
    now.strip = least(now.strip, (here->d_out + LANES - 1) / LANES * LANES);
    int64_t sums = by->half ? now.tokens * now.strip : 0;
    int64_t copies = by->half && !by->half_factors ? now.tokens * here->d_in : 0;
    char *room = scratch(parts + 4 * (sums + hidden + copies));
    if (!room) return 0;
    now.parts = (part *)room;
    now.sums = (float *)(room + parts);
    float *next = now.sums + sums;
    now.copies = next + hidden;
    for (int64_t g = 0; g < num_groups; g++) {
        const entry *adapter = at_slot(here->adapters, groups[2 * g]);
        if (adapter->rank == 0) continue;
        int64_t first = groups[2 * g + 1], num_uses = groups[2 * g + 3] - first;
        now.parts[now.num_parts++] = (part){adapter, batch->uses + 2 * first, num_uses, next};
        next += num_uses * adapter->lanes;
    }
    run_panel(&now);
    return 1;
}

static int64_t run(const site *here, const arithmetic *by) {
    int64_t failed = 0, num_threads = here->batch->num_threads;
    (void)num_threads; /* without OpenMP */
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1) reduction(| : failed)
    for (int64_t i = 0; i < here->batch->num_panels; i++)
        failed |= !prepare_and_run(here, by, i);
    return failed;
}

/* A site, and where to list what the call for it reads. */
typedef struct {
    const site *here;
    prefetch_list *list;
    int64_t number_bytes; /* of factors */
} listing;

/* is_new: no other panel can have listed it. */
static void enter(prefetch_list *list, const void *from, int64_t bytes, int is_new) {
    for (int64_t i = 0; !is_new && i < list->num_runs; i++)
        if (list->runs[i].from == from) return;
    if (list->num_runs == RUNS) return;
    list->runs[list->num_runs++] = (memory_run){from, (bytes + 63) / 64};
    list->lines += (bytes + 63) / 64;
}

/* List A of each adapter in use, then B of each. */
int64_t lowrank_list(const listing *to) {
    const plan *batch = to->here->batch;
    const int64_t num_groups = batch->num_panels ? batch->panels[2 * batch->num_panels + 1] : 0;
    to->list->num_runs = to->list->lines = 0;
    for (int is_b = 0; is_b < 2; is_b++)
        for (int64_t g = 0; g < num_groups; g++) {
            const entry *adapter = at_slot(to->here->adapters, batch->groups[2 * g]);
            const int64_t numbers = is_b ? adapter->rank * to->here->d_out : to->here->d_in * adapter->lanes;
            const void *factor = is_b ? adapter->b : adapter->a;
            if (adapter->rank > 0) enter(to->list, factor, numbers * to->number_bytes, batch->num_panels == 1);
        }
    return 0;
}

/* The entry points give 0, or 1 if memory ran out. */
#define ADD(NAME, ...)                                                                                               \
    int64_t NAME(const site *here) {                                                                                 \
        static const arithmetic by = {__VA_ARGS__};                                                                  \
        return run(here, &by);                                                                                       \
    }
ADD(lowrank_add_f32, shrink, expand, 0, 0)
ADD(lowrank_add_bf16, shrink, expand, 1, 0)

#ifdef __AVX512BF16__
#include "lowrank_bf16.c"
ADD(lowrank_add_bf16_pairs, shrink_pairs, expand_pairs, 1, 1)
#endif
