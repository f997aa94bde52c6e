/* The last tokens of one sequence, its rows, look at all of it, causally; keys and values lie in pages:
 *
 *   out[row, h] = softmax(scale * query[h, row] . key[t]) value[t]   over the tokens t up to the row that it sees
 *
 * One call serves one layer and one chunk of a prompt. Many rows read the same keys, so arithmetic is the limit: for
 * each key head, keys are laid out anew once, side by side for a vector of scores, and all rows of the key head's query
 * heads go by tiles through two plain products, scores and mixed values, with softmax between them block by block.
 * bfloat16 goes in pairs where the processor multiplies them, weights too; otherwise all is widened to float32.
 *
 * A row's sums run in one order wherever the chunk begins and whatever the threads are: blocks begin at multiples of
 * their length, and what a row does not see adds zero. Called through ctypes.
 */
#include "attention.h"
#include <stdlib.h>

#define ROWS 24                /* of a tile: scores of a block stay in the first-level cache */
#define AT_ONCE 6              /* rows whose sums are in registers */
#define ABREAST (WIDE ? 4 : 2) /* vectors of sums of each */
#define IN_PAIRS(half) ((half) && PAIRS)
#define PER_WORD(half) (IN_PAIRS(half) ? 2 : 1) /* elements that one 32-bit word holds: a pair, or a float */
#define UNROLL _Pragma("GCC unroll 8")

typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

/* Number of parts of so many that hold n. */
INLINE int64_t parts(int64_t n, int64_t many) { return (n + many - 1) / many; }

/* One key head, from token `begin` on. keys: vector v of word i, of tokens LANES * v.., is keys[v * depth + i];
 * values: vector v of token word j is values[j * width + v]. depth: words of a key; width: vectors of a value. */
typedef struct {
    vec *keys, *values;
    int64_t begin, end, depth, width;
} sequence;

/* One tile: rows of (token, query head), their words, running softmax and mixed values. */
typedef struct {
    uint32_t *query; /* (ROWS, depth) */
    vec *mixed;      /* (ROWS, width) */
    vec scores[ROWS][BLOCK / LANES];
    vec sum[ROWS];
    float most[ROWS];
} tile;

/* ---- products ---- */

/* sums[r][v] += a[r] . b[v], word by word, for all rows r and vectors v of words.
 * Word i of row r is a[r * a_row + i], of vector v b[i * step + v * apart]; sums are sums[r * sums_row + v]. */
typedef struct {
    int64_t rows, vectors, words;
    const uint32_t *a;
    int64_t a_row;
    const vec *b;
    int64_t step, apart;
    vec *sums;
    int64_t sums_row;
} product;

INLINE vec add_words(const int half, vec sum, uint32_t a, vec b) {
    vec all = (vec)((uvec){0} + a);
#if WIDE
    if (!IN_PAIRS(half)) return (vec)_mm512_fmadd_ps((__m512)all, (__m512)b, (__m512)sum);
#endif
    return add_product(IN_PAIRS(half), sum, all, b);
}

/* `rows` rows from r on and `n` vectors from v on, both numbers constants: their sums are in registers. */
INLINE void multiply(const int half, const int rows, const int n, const product *p, int64_t r0, int64_t v0) {
    const uint32_t *a = p->a + r0 * p->a_row;
    const vec *b = p->b + v0 * p->apart;
    vec *sums = p->sums + r0 * p->sums_row + v0, sum[AT_ONCE * ABREAST];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < n; v++) sum[r * n + v] = sums[r * p->sums_row + v];
    for (int64_t i = 0; i < p->words; i++) {
        vec line[ABREAST];
        UNROLL for (int v = 0; v < n; v++) line[v] = b[i * p->step + v * p->apart];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < n; v++)
                sum[r * n + v] = add_words(half, sum[r * n + v], a[r * p->a_row + i], line[v]);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < n; v++) sums[r * p->sums_row + v] = sum[r * n + v];
}

INLINE void multiply_rows(const int half, const int n, const product *p, int64_t v) {
    int64_t r = 0;
    for (; r + AT_ONCE <= p->rows; r += AT_ONCE) multiply(half, AT_ONCE, n, p, r, v);
    for (; r + 2 <= p->rows; r += 2) multiply(half, 2, n, p, r, v);
    if (r < p->rows) multiply(half, 1, n, p, r, v);
}

INLINE void multiply_all(const int half, product p) {
    int64_t v = 0;
    for (; v + ABREAST <= p.vectors; v += ABREAST) multiply_rows(half, ABREAST, &p, v);
    for (; v < p.vectors; v++) multiply_rows(half, 1, &p, v);
}

/* ---- words ---- */

/* The `depth` words of a head of d elements; the last one's second element is zero where d is odd. */
INLINE void words_of(const int half, const char *from, int64_t d, uint32_t *to, int64_t depth) {
    if (half && !PAIRS) {
        for (int64_t i = 0; i < d; i++) to[i] = (uint32_t)((const uint16_t *)from)[i] << 16;
        return;
    }
    to[depth - 1] = 0;
    memcpy(to, from, SIZE(half) * d);
}

/* Where token t of the call's sequence lies, in pages of keys or values of so long heads. */
INLINE const char *token_at(const int half, const call *c, char *pages, int64_t t, int64_t d, int64_t head) {
    return page_at(half, pages, c->tables[t / PAGE], d, head, c) + t % PAGE * d * SIZE(half);
}

/* Each word of LANES tokens side by side; tokens from the end on are zero. */
INLINE void turn_keys(const int half, const call *c, int64_t head, const sequence *s) {
    uint32_t words[LANES][MAX_D];
    for (int64_t t = s->begin; t < s->end; t += LANES) {
        uint32_t *to = (uint32_t *)(s->keys + (t - s->begin) / LANES * s->depth);
        for (int64_t n = 0; n < LANES; n++)
            if (t + n < s->end) words_of(half, token_at(half, c, c->keys, t + n, c->d, head), c->d, words[n], s->depth);
            else memset(words[n], 0, 4 * s->depth);
        for (int64_t i = 0; i < s->depth; i++)
            for (int64_t n = 0; n < LANES; n++) to[i * LANES + n] = words[n][i];
    }
}

/* One token's values, or two neighbours' in pairs, as words. */
INLINE void lay_word(const int half, const char *value, const char *next, int64_t d_v, uint32_t *to) {
    const uint16_t *low = (const uint16_t *)value, *high = (const uint16_t *)next;
    if (!half) memcpy(to, value, 4 * d_v);
    else if (!PAIRS)
        for (int64_t i = 0; i < d_v; i++) to[i] = (uint32_t)low[i] << 16;
    else if (next)
        for (int64_t i = 0; i < d_v; i++) to[i] = low[i] | (uint32_t)high[i] << 16;
    else
        for (int64_t i = 0; i < d_v; i++) to[i] = low[i];
}

/* Rows of whole vectors, zero behind d_v and for tokens from the end on. */
INLINE void lay_values(const int half, const call *c, int64_t head, const sequence *s) {
    const int per = PER_WORD(half);
    int64_t last = s->begin + parts(s->end - s->begin, PAGE) * PAGE, ragged = c->d_v % LANES != 0;
    for (int64_t t = s->begin; t < last; t += per) {
        vec *to = s->values + (t - s->begin) / per * s->width;
        if (ragged || t >= s->end) memset(to, 0, s->width * sizeof(vec));
        if (t >= s->end) continue;
        const char *next = per == 2 && t + 1 < s->end ? token_at(half, c, c->values, t + 1, c->d_v, head) : NULL;
        lay_word(half, token_at(half, c, c->values, t, c->d_v, head), next, c->d_v, (uint32_t *)to);
    }
}

/* ---- one tile ---- */

/* What a row is: its token, counted from the sequence's beginning, and its query head. */
INLINE int64_t token_of(const call *c, int64_t row) { return c->lengths[0] - c->rows + row / c->group; }

INLINE int64_t head_of(const call *c, int64_t head, int64_t row) { return head * c->group + row % c->group; }

/* First token that a row sees. */
INLINE int64_t start_of(const call *c, int64_t row) {
    int64_t start = c->window > 0 ? token_of(c, row) + 1 - c->window : 0;
    return start > 0 ? start : 0;
}

/* The tile's rows begin at row `first` of the key head. */
INLINE void begin(const int half, const call *c, int64_t head, int64_t first, int64_t rows, const sequence *s,
                  tile *t) {
    for (int64_t r = 0; r < rows; r++) {
        int64_t row = first + r, place = head_of(c, head, row) * c->query_head + row / c->group * c->query_row;
        words_of(half, c->query + place * SIZE(half), c->d, t->query + r * s->depth, s->depth);
        t->most[r] = -__builtin_inff();
        t->sum[r] = spread(0);
    }
    memset(t->mixed, 0, rows * s->width * sizeof(vec));
}

/* Weights of `n` vectors as words: pairs of bfloat16, in place, or the floats that they are. */
INLINE void to_words(const int half, vec *weights, int64_t n) {
#if PAIRS
    if (half)
        for (int64_t v = 0; v < n; v += 2) {
            __m512 behind = v + 1 < n ? (__m512)weights[v + 1] : _mm512_setzero_ps();
            weights[v / 2] = (vec)_mm512_cvtne2ps_pbh(behind, (__m512)weights[v]);
        }
#endif
    (void)half, (void)weights, (void)n;
}

/* The block that begins at token `from`; the tile's rows see no token from `end` on. */
INLINE void attend_block(const int half, const call *c, int64_t first, int64_t rows, int64_t from, int64_t end,
                         const sequence *s, tile *t) {
    const int64_t pages = parts(least(end - from, BLOCK), PAGE), n = pages * PAGE / LANES, row = BLOCK / LANES;
    const int64_t vector = (from - s->begin) / LANES, word = (from - s->begin) / PER_WORD(half);
    for (int64_t r = 0; r < rows; r++) memset(t->scores[r], 0, n * sizeof(vec));
    multiply_all(half, (product){.rows = rows, .vectors = n, .words = s->depth, .a = t->query, .a_row = s->depth,
                                 .b = s->keys + vector * s->depth, .step = 1, .apart = s->depth,
                                 .sums = t->scores[0], .sums_row = row});
    for (int64_t r = 0; r < rows; r++) {
        int64_t start = start_of(c, first + r), stop = token_of(c, first + r) + 1;
        float fade = weigh((float *)t->scores[r], pages, from, start, stop, c, t->most + r, t->sum + r);
        if (fade != 1)
            for (int64_t v = 0; v < s->width; v++) t->mixed[r * s->width + v] *= fade;
        to_words(half, t->scores[r], n);
    }
    multiply_all(half, (product){.rows = rows, .vectors = s->width, .words = pages * PAGE / PER_WORD(half),
                                 .a = (const uint32_t *)t->scores[0], .a_row = row * LANES,
                                 .b = s->values + word * s->width, .step = s->width, .apart = 1,
                                 .sums = t->mixed, .sums_row = s->width});
}

/* out[0:d_v] = sums * scale */
INLINE void finish(const int half, const vec *sums, float scale, char *out, int64_t d_v) {
    for (int64_t i = 0; i < d_v; i += LANES, sums++, out += LANES * SIZE(half)) {
        vec line = *sums * scale;
        size_t size = least(LANES, d_v - i) * SIZE(half);
        if (!half) memcpy(out, &line, size);
        else {
            halves narrow = __builtin_convertvector(rounded(line) >> 16, halves);
            memcpy(out, &narrow, size);
        }
    }
}

INLINE void attend(const int half, const call *c, int64_t head, int64_t first, int64_t rows, const sequence *s,
                   tile *t) {
    int64_t end = token_of(c, first + rows - 1) + 1;
    begin(half, c, head, first, rows, s, t);
    for (int64_t from = start_of(c, first) / BLOCK * BLOCK; from < end; from += BLOCK)
        attend_block(half, c, first, rows, from, end, s, t);
    for (int64_t r = 0; r < rows; r++) {
        int64_t place = (first + r) / c->group * c->kv_heads * c->group + head_of(c, head, first + r);
        finish(half, t->mixed + r * s->width, 1.0f / total(t->sum[r]), c->out + place * c->d_v * SIZE(half), c->d_v);
    }
}

/* ---- one key head ---- */

INLINE void *taken(char **space, int64_t vectors) {
    void *found = *space;
    *space += vectors * (int64_t)sizeof(vec);
    return found;
}

/* Every `slices`-th tile of a key head from the `slice`-th on. Returns 0 if there is no memory. */
INLINE int attend_head(const int half, const call *c, int64_t head, int64_t slice, int64_t slices) {
    sequence s = {.begin = start_of(c, 0) / BLOCK * BLOCK, .end = c->lengths[0],
                  .depth = parts(c->d, PER_WORD(half)), .width = parts(c->d_v, LANES)};
    int64_t tokens = parts(s.end - s.begin, PAGE) * PAGE, rows = c->rows * c->group;
    int64_t keys = tokens / LANES * s.depth, values = tokens / PER_WORD(half) * s.width;
    int64_t queries = parts(ROWS * s.depth, LANES), mixed = ROWS * s.width;
    char *space = aligned_alloc(64, parts((keys + values + queries + mixed) * sizeof(vec), 64) * 64), *next = space;
    if (!space) return 0;
    s.keys = taken(&next, keys), s.values = taken(&next, values);
    tile t;
    t.query = taken(&next, queries), t.mixed = taken(&next, mixed);
    turn_keys(half, c, head, &s);
    lay_values(half, c, head, &s);
    for (int64_t first = slice * ROWS; first < rows; first += slices * ROWS)
        attend(half, c, head, first, least(ROWS, rows - first), &s, &t);
    free(space);
    return 1;
}

/* tables: (1, most) and lengths: (1,) of the sequence; rows are its last tokens, already in pages. Gives 0, or 1 if
 * tokens are in no page, or if there is no memory to lay keys and values out in. */
INLINE int64_t prefill(const int half, const call *c) {
    if (c->d > MAX_D || c->d_v > MAX_D || !is_there(c, 0) || c->lengths[0] < c->rows) return 1;
    int64_t slices = c->num_threads > 1 ? parts(c->num_threads, c->kv_heads) : 1, missing = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : missing) num_threads(c->num_threads) if (c->num_threads > 1)
    for (int64_t i = 0; i < c->kv_heads * slices; i++)
        missing += !attend_head(half, c, i / slices, i % slices, slices);
    return missing > 0;
}

int64_t attention_prefill_f32(const call *c) { return prefill(0, c); }

int64_t attention_prefill_bf16(const call *c) { return prefill(1, c); }
