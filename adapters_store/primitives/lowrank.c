/* y[t] += sum_p weight[p] * B_p (A_p x[t])  for the pairs p of the mix that token t belongs to.
 *
 * One call serves one site and one batch, whatever its mixture of compositions. The batch comes as panels of tokens
 * (native.py, `Plan`); inside a panel the work goes adapter by adapter, over all tokens that use it whatever else they
 * use. So an adapter's factors are read once per panel: a step of 64 requests with 64 compositions of 32 adapters reads
 * 32 adapters, not 64 or 256. Nothing is copied or folded per batch; the cost follows the adapters that are active and
 * not the number resident.
 *
 * A token's sums run in one fixed order, over its own adapters in the order of slots and over each adapter's columns and
 * ranks, in whatever company and panel it is: a row never sees its neighbours, bit for bit.
 * Sums are float32; x and y are float32 or bfloat16. Plain C with GCC/Clang vector types: no intrinsics, so any CPU with
 * vectors profits; lowrank_bf16.c has the products for processors that multiply bfloat16. Called through ctypes.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PANEL 256    /* tokens of a panel at most; PANEL in native.py */
#define AT_ONCE 4    /* tokens that share one reading of a factor from the first-level cache */
#define CHUNK 128    /* columns of y worked on at a time: 16 rows of B times 128 stay in the first-level cache */
#define SCRATCH 32768 /* floats of y kept while it is summed, where y itself is not float32 */
#define FETCHED 65536 /* bytes of the next adapter's A asked for ahead */
#define LANES 16     /* floats of one vector */

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t u16x32 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8") /* loops over sums: unrolled early enough that the sums live in registers */

/* One adapter at one site. a: (d_in, lanes) with lanes = rank rounded up to 8 or a multiple of 16, zero-filled.
 * b: (rank, d_out), the adapter's scale folded in. rank 0: the adapter does not touch this site. */
typedef struct {
    const void *a;
    const void *b;
    int64_t rank;
    int64_t lanes;
} entry;

/* Who uses which adapter in a batch; made once per batch and read by all sites. */
typedef struct {
    int64_t num_panels;
    int64_t num_threads;
    const int64_t *panels; /* (num_panels + 1, 2) first token and first group of each */
    const int64_t *tokens; /* (num_tokens,) row in x and y */
    const int64_t *groups; /* (num_groups + 1, 2) slot, and the first of its uses; a panel's groups in order of slots */
    const int64_t *uses;   /* (num_uses, 2) index into tokens, index into weights */
} plan;

/* One call: a batch at a site. */
typedef struct {
    const plan *batch;
    const char *x;
    char *y;
    int64_t x_stride, y_stride, d_in, d_out; /* in elements */
    const float *weights;
    const entry *bank;
} site;

/* ---- float32 ---- */

/* hidden[t][0:lanes] = weight[t] * (x[t] . a), for `tokens` tokens (a compile-time constant). Four sums, each of every
 * fourth column, because one chain of additions would wait for itself where a single token is served. */
#define SHRINK(NAME, VECTOR)                                                                                        \
    INLINE void NAME(int tokens, const void *const *x, int64_t d_in, const float *a, int64_t lanes,                 \
                     const float *weights, float *hidden) {                                                         \
        const float *rows[AT_ONCE];                                                                                 \
        VECTOR sum[4][AT_ONCE], all[AT_ONCE];                                                                       \
        UNROLL for (int t = 0; t < tokens; t++) rows[t] = x[t];                                                     \
        UNROLL for (int s = 0; s < 4; s++) UNROLL for (int t = 0; t < tokens; t++) sum[s][t] = (VECTOR){0};         \
        int64_t i = 0;                                                                                              \
        for (; i + 4 <= d_in; i += 4)                                                                               \
            UNROLL for (int s = 0; s < 4; s++) {                                                                    \
                VECTOR row = *(const VECTOR *)(a + (i + s) * lanes);                                                \
                UNROLL for (int t = 0; t < tokens; t++) sum[s][t] += row * rows[t][i + s];                          \
            }                                                                                                       \
        UNROLL for (int t = 0; t < tokens; t++) all[t] = (sum[0][t] + sum[1][t]) + (sum[2][t] + sum[3][t]);         \
        for (; i < d_in; i++) {                                                                                     \
            VECTOR row = *(const VECTOR *)(a + i * lanes);                                                          \
            UNROLL for (int t = 0; t < tokens; t++) all[t] += row * rows[t][i];                                     \
        }                                                                                                           \
        UNROLL for (int t = 0; t < tokens; t++) *(VECTOR *)(hidden + t * lanes) = all[t] * weights[t];              \
    }
SHRINK(shrink16, v16)
SHRINK(shrink8, v8)

INLINE void shrink_f32(int tokens, const void *const *x, int64_t d_in, const entry *adapter, const float *weights,
                       float *hidden) {
    if (adapter->lanes == 8) shrink8(tokens, x, d_in, adapter->a, 8, weights, hidden);
    else
        for (int64_t j = 0; j < adapter->lanes; j += LANES)
            shrink16(tokens, x, d_in, (const float *)adapter->a + j, adapter->lanes, weights, hidden + j);
}

/* y[t][0 : 16 * vectors] += hidden[t] . rows of b. */
INLINE void expand_vectors(int tokens, int vectors, float *const *y, int64_t column, const float *hidden, int64_t lanes,
                           const float *b, int64_t rank, int64_t d_out) {
    v16 sum[AT_ONCE][8];
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < vectors; v++) sum[t][v] = *(const v16 *)(y[t] + column + v * LANES);
    for (int64_t j = 0; j < rank; j++)
        UNROLL for (int v = 0; v < vectors; v++) {
            v16 row = *(const v16 *)(b + j * d_out + v * LANES);
            UNROLL for (int t = 0; t < tokens; t++) sum[t][v] += row * hidden[t * lanes + j];
        }
    UNROLL for (int t = 0; t < tokens; t++)
        UNROLL for (int v = 0; v < vectors; v++) *(v16 *)(y[t] + column + v * LANES) = sum[t][v];
}

/* The columns c .. c + columns of y and b; y[t] points to column 0 of what is kept, b to column `first` of the site. */
INLINE void expand_f32(int tokens, float *const *y, int64_t c, int64_t columns, const float *hidden,
                       const entry *adapter, int64_t first, int64_t d_out) {
    const float *b = (const float *)adapter->b + first;
    int64_t lanes = adapter->lanes, rank = adapter->rank, end = c + columns;
    if (tokens <= 2)
        for (; c + 8 * LANES <= end; c += 8 * LANES) expand_vectors(tokens, 8, y, c, hidden, lanes, b + c, rank, d_out);
    for (; c + 4 * LANES <= end; c += 4 * LANES) expand_vectors(tokens, 4, y, c, hidden, lanes, b + c, rank, d_out);
    for (; c + LANES <= end; c += LANES) expand_vectors(tokens, 1, y, c, hidden, lanes, b + c, rank, d_out);
    for (; c < end; c++)
        for (int t = 0; t < tokens; t++) {
            float sum = y[t][c];
            for (int64_t j = 0; j < rank; j++) sum += b[j * d_out + c] * hidden[t * lanes + j];
            y[t][c] = sum;
        }
}

/* The two products of a kernel, for 1 to AT_ONCE tokens. */
typedef struct {
    void (*shrink)(int64_t tokens, const void *const *x, int64_t d_in, const entry *adapter, const float *weights,
                   float *hidden);
    void (*expand)(int64_t tokens, float *const *y, int64_t c, int64_t columns, const float *hidden,
                   const entry *adapter, int64_t first, int64_t d_out);
    int64_t ranks_of_row;     /* 1, or 2 where factors come in pairs */
    int wants_f32, gives_f32; /* x must come in float32; y is float32 */
} arithmetic;

static void shrink_any_f32(int64_t tokens, const void *const *x, int64_t d_in, const entry *adapter,
                           const float *weights, float *hidden) {
    if (tokens == 4) shrink_f32(4, x, d_in, adapter, weights, hidden);
    else if (tokens == 3) shrink_f32(3, x, d_in, adapter, weights, hidden);
    else if (tokens == 2) shrink_f32(2, x, d_in, adapter, weights, hidden);
    else shrink_f32(1, x, d_in, adapter, weights, hidden);
}

static void expand_any_f32(int64_t tokens, float *const *y, int64_t c, int64_t columns, const float *hidden,
                           const entry *adapter, int64_t first, int64_t d_out) {
    if (tokens == 4) expand_f32(4, y, c, columns, hidden, adapter, first, d_out);
    else if (tokens == 3) expand_f32(3, y, c, columns, hidden, adapter, first, d_out);
    else if (tokens == 2) expand_f32(2, y, c, columns, hidden, adapter, first, d_out);
    else expand_f32(1, y, c, columns, hidden, adapter, first, d_out);
}

/* ---- bfloat16 as stored ---- */

static void widen(const uint16_t *from, int64_t n, float *to) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        *(u16x32 *)(to + i) = __builtin_convertvector(*(const u16x16 *)(from + i), u16x32) << 16;
    for (; i < n; i++) {
        uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

/* Round to nearest, ties to even. */
static void narrow(const float *from, int64_t n, uint16_t *to) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        u16x32 bits = *(const u16x32 *)(from + i);
        bits += 0x7fff + ((bits >> 16) & 1);
        *(u16x16 *)(to + i) = __builtin_convertvector(bits >> 16, u16x16);
    }
    for (; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, 4);
        to[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

/* ---- panels ---- */

typedef struct {
    int64_t tokens, first_token, first_group, last_group;
    const void *x[PANEL]; /* where each token's x lies */
    float *y[PANEL];      /* where its y is summed */
    float *hidden;        /* (uses, lanes) group by group: weight * A x */
} panel;

INLINE int64_t slot_of(const plan *batch, int64_t group) { return batch->groups[2 * group]; }
INLINE int64_t uses_of(const plan *batch, int64_t group) { return batch->groups[2 * group + 1]; }

/* What memory should bring meanwhile: rows of a factor, asked for a share at a time while another factor is worked on.
 * The processor foresees long runs of addresses, but an adapter is short and the next one lies anywhere. */
typedef struct {
    const char *at;
    int64_t rows, row_bytes, stride, lines; /* stride: bytes from row to row; lines: asked for so far */
} ahead;

INLINE void fetch(ahead *next, int64_t share, int64_t shares) {
    if (next->rows == 0) return;
    int64_t per_row = (next->row_bytes + 63) / 64, to = next->rows * per_row * (share + 1) / shares;
    int64_t row = next->lines / per_row, line = next->lines % per_row;
    for (; next->lines < to; next->lines++) {
        __builtin_prefetch(next->at + row * next->stride + 64 * line);
        if (++line == per_row) line = 0, row++;
    }
}

/* The first group from g on whose adapter touches this site; last_group if there is none. */
INLINE int64_t next_group(const site *here, const panel *now, int64_t g) {
    while (g < now->last_group && here->bank[slot_of(here->batch, g)].rank == 0) g++;
    return g;
}

INLINE ahead rows_of_b(const site *here, const arithmetic *by, const panel *now, int64_t g, int64_t first,
                       int64_t columns) {
    if (g == now->last_group) return (ahead){0};
    const entry *adapter = here->bank + slot_of(here->batch, g);
    return (ahead){(const char *)adapter->b + 4 * first, adapter->rank / by->ranks_of_row, 4 * columns, 4 * here->d_out, 0};
}

INLINE ahead rows_of_a(const site *here, const arithmetic *by, const panel *now, int64_t g) {
    if (g == now->last_group) return rows_of_b(here, by, now, next_group(here, now, now->first_group), 0, here->d_out < 2048 ? here->d_out : 2048);
    const entry *adapter = here->bank + slot_of(here->batch, g);
    int64_t bytes = here->d_in * adapter->lanes * 4 / by->ranks_of_row;
    return (ahead){adapter->a, 1, bytes < FETCHED ? bytes : FETCHED, 0, 0};
}

static void shrink_panel(const site *here, const arithmetic *by, const panel *now) {
    const plan *batch = here->batch;
    float *hidden = now->hidden;
    for (int64_t g = next_group(here, now, now->first_group), after; g < now->last_group; g = after) {
        const entry *adapter = here->bank + slot_of(batch, g);
        after = next_group(here, now, g + 1);
        ahead next = rows_of_a(here, by, now, after);
        int64_t begin = uses_of(batch, g), end = uses_of(batch, g + 1);
        for (int64_t u = begin; u < end; u += AT_ONCE) {
            int64_t n = end - u < AT_ONCE ? end - u : AT_ONCE;
            const void *x[AT_ONCE];
            float weights[AT_ONCE];
            for (int64_t t = 0; t < n; t++) {
                x[t] = now->x[batch->uses[2 * (u + t)] - now->first_token];
                weights[t] = here->weights[batch->uses[2 * (u + t) + 1]];
            }
            fetch(&next, u - begin + n - 1, end - begin);
            by->shrink(n, x, here->d_in, adapter, weights, hidden);
            hidden += n * adapter->lanes;
        }
    }
}

/* Columns first .. first + columns of the panel's y. */
static void expand_panel(const site *here, const arithmetic *by, const panel *now, int64_t first, int64_t columns) {
    const plan *batch = here->batch;
    const float *hidden = now->hidden;
    int64_t chunks = (columns + CHUNK - 1) / CHUNK;
    for (int64_t g = next_group(here, now, now->first_group), after; g < now->last_group; g = after) {
        const entry *adapter = here->bank + slot_of(batch, g);
        after = next_group(here, now, g + 1);
        ahead next = rows_of_b(here, by, now, after, first, columns);
        int64_t begin = uses_of(batch, g), end = uses_of(batch, g + 1);
        for (int64_t i = 0; i < chunks; i++) {
            int64_t c = i * CHUNK, width = columns - c < CHUNK ? columns - c : CHUNK;
            for (int64_t u = begin; u < end; u += AT_ONCE) {
                int64_t n = end - u < AT_ONCE ? end - u : AT_ONCE;
                float *y[AT_ONCE];
                for (int64_t t = 0; t < n; t++) y[t] = now->y[batch->uses[2 * (u + t)] - now->first_token];
                fetch(&next, i * (end - begin) + u - begin + n - 1, chunks * (end - begin));
                by->expand(n, y, c, width, hidden + (u - begin) * adapter->lanes, adapter, first, here->d_out);
            }
        }
        hidden += (end - begin) * adapter->lanes;
    }
}

static void run_f32(const site *here, const arithmetic *by, panel *now) {
    for (int64_t t = 0; t < now->tokens; t++) {
        int64_t row = here->batch->tokens[now->first_token + t];
        now->x[t] = here->x + 4 * row * here->x_stride;
        now->y[t] = (float *)here->y + row * here->y_stride;
    }
    shrink_panel(here, by, now);
    expand_panel(here, by, now, 0, here->d_out);
}

/* copies: (tokens, d_in) where x is wanted in float32, else none; then `width` columns of y for each token. */
static void run_bf16(const site *here, const arithmetic *by, panel *now, float *copies, int64_t width) {
    const int64_t *rows = here->batch->tokens + now->first_token;
    for (int64_t t = 0; t < now->tokens; t++) {
        now->x[t] = here->x + 2 * rows[t] * here->x_stride;
        if (by->wants_f32) {
            widen(now->x[t], here->d_in, copies);
            now->x[t] = copies;
            copies += here->d_in;
        }
        now->y[t] = 0;
    }
    shrink_panel(here, by, now);
    for (int64_t t = 0; t < now->tokens; t++) now->y[t] = copies + t * width;
    for (int64_t c = 0; c < here->d_out; c += width) {
        int64_t columns = here->d_out - c < width ? here->d_out - c : width;
        uint16_t *y = (uint16_t *)here->y + c;
        for (int64_t t = 0; t < now->tokens; t++) {
            if (t + 2 < now->tokens) /* a piece of a row is too short for the processor to foresee */
                for (int64_t at = 0; at < columns; at += 32) __builtin_prefetch(y + rows[t + 2] * here->y_stride + at, 1);
            widen(y + rows[t] * here->y_stride, columns, now->y[t]);
        }
        expand_panel(here, by, now, c, columns);
        for (int64_t t = 0; t < now->tokens; t++) narrow(now->y[t], columns, y + rows[t] * here->y_stride);
    }
}

/* At least so many floats of this thread's own memory, kept from call to call: fresh pages would cost as much as the
 * products of a panel. Null if there is no more. */
static float *scratch(int64_t floats) {
    static _Thread_local float *kept;
    static _Thread_local int64_t size;
    if (floats > size) {
        free(kept);
        size = (floats + 4095) / 4096 * 4096;
        kept = aligned_alloc(64, (size_t)size * sizeof(float));
        if (!kept) size = 0;
    }
    return kept;
}

/* False if there is no memory for it. */
static int run_panel(const site *here, const arithmetic *by, int64_t index) {
    const plan *batch = here->batch;
    const int64_t *at = batch->panels + 2 * index;
    panel now = {.tokens = at[2] - at[0], .first_token = at[0], .first_group = at[1], .last_group = at[3]};
    int64_t hidden = 0, copies = 0, width = 0;
    for (int64_t g = now.first_group; g < now.last_group; g++)
        hidden += (uses_of(batch, g + 1) - uses_of(batch, g)) * here->bank[slot_of(batch, g)].lanes;
    if (hidden == 0) return 1;
    if (!by->gives_f32) {
        width = (SCRATCH / now.tokens + CHUNK - 1) / CHUNK * CHUNK;
        copies = now.tokens * (width + (by->wants_f32 ? here->d_in : 0));
    }
    now.hidden = scratch(hidden + copies);
    if (!now.hidden) return 0;
    if (by->gives_f32) run_f32(here, by, &now);
    else run_bf16(here, by, &now, now.hidden + hidden, width);
    return 1;
}

static int64_t run(const site *here, const arithmetic *by) {
    const plan *batch = here->batch;
    int64_t failed = 0;
    _Pragma("omp parallel for schedule(static) num_threads(batch->num_threads) if(batch->num_threads > 1)")
    for (int64_t i = 0; i < batch->num_panels; i++)
        if (!run_panel(here, by, i)) failed = 1;
    return failed;
}

/* The entry points: 0, or 1 if memory ran out. */
#define ADD(NAME, ...)                                                                                               \
    int64_t NAME(const plan *batch, const void *x, int64_t x_stride, void *y, int64_t y_stride, int64_t d_in,      \
                 int64_t d_out, const float *weights, const entry *bank) {                                         \
        static const arithmetic by = {__VA_ARGS__};                                                                 \
        site here = {batch, x, y, x_stride, y_stride, d_in, d_out, weights, bank};                                  \
        return run(&here, &by);                                                                                     \
    }
ADD(lowrank_add_f32, shrink_any_f32, expand_any_f32, 1, 1, 1)
ADD(lowrank_add_bf16, shrink_any_f32, expand_any_f32, 1, 1, 0)

/* lowrank_bf16.c: the products of bfloat16 pairs, where the processor has them. */
int64_t lowrank_pairs_bf16(void);
void lowrank_shrink_pairs(int64_t tokens, const void *const *x, int64_t d_in, const entry *adapter,
                          const float *weights, float *hidden);
void lowrank_expand_pairs(int64_t tokens, float *const *y, int64_t c, int64_t columns, const float *hidden,
                          const entry *adapter, int64_t first, int64_t d_out);
ADD(lowrank_add_bf16_pairs, lowrank_shrink_pairs, lowrank_expand_pairs, 2, 0, 0)
