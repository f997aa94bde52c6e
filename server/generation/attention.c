/* One new token each of many sequences looks at its sequence's keys and values, which lie in pages:
 *
 *   out[row, h] = softmax(scale * query[h, row] . key[t]) value[t]   over the tokens t that the row sees
 *
 * One call serves one layer and all rows. Pages are read where they lie and in that order, once for all query heads of
 * a key head, and what comes a little later is asked for meanwhile: memory is the limit, not arithmetic.
 *
 * A row's sums run in one order, whatever the other rows, the numbers of its pages and the threads are, so its result
 * is the same bit for bit. Arithmetic is float32; queries, keys, values and output are float32 or bfloat16.
 * Plain C with GCC/Clang vector types; sums of a vector's elements, ragged ends and products of bfloat16 pairs have a
 * form of their own for AVX-512. Called through ctypes.
 */
#include "../../adapters_store/prefetch.h"
#include "attention.h"

#define GROUP 8                           /* query heads done together at most */
#define TOGETHER 32                       /* key heads of a task at most */
#define AHEAD 4096                        /* bytes of keys or values until what is asked for now is read */
#define SPACE (2 * GROUP * MAX_D / LANES) /* vectors that hold a task's queries and sums */

#define UNROLL _Pragma("GCC unroll 16") /* loops over sums: unrolled so early that the sums live in registers */

/* Keeps a line in a register: the compiler would else read it anew for each of its products. */
#if WIDE
#define HOLD(line) __asm__("" : "+v"(line))
#else
#define HOLD(line) (void)(line)
#endif

#if WIDE
/* Four vectors as one: element i of every four is the sum of vector i's elements in that lane. */
INLINE __m512 four_in_lanes(const vec *x) {
    __m512 a = (__m512)x[0], b = (__m512)x[1], c = (__m512)x[2], d = (__m512)x[3];
    __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
}

INLINE __m512 lanes_added(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* to[i] = the sum of the elements of x[i] */
INLINE void totals(const vec *x, float *to) {
    __m512 left = lanes_added(four_in_lanes(x), four_in_lanes(x + 4));
    __m512 right = lanes_added(four_in_lanes(x + 8), four_in_lanes(x + 12));
    _mm512_storeu_ps(to, lanes_added(left, right));
}
#else
INLINE void totals(const vec *x, float *to) {
    for (int i = 0; i < SUMS; i++) to[i] = total(x[i]);
}
#endif

/* Ask for a run of memory. */
INLINE void fetch(const char *run, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += LINE_STEP) ASK_FOR(run + b);
}

/* ---- scores ---- */

/* A page's scores[h][0:PAGE] of `heads` query heads (a constant, 1, 2 or 4); as much at `next` is fetched meanwhile.
 * query: (heads, lines). */
INLINE void score(const int half, const int heads, const vec *query, int64_t lines, const char *keys, int64_t d,
                  float *scores, const char *next) {
    const int at_once = SUMS / heads; /* keys */
    const int64_t row = d * SIZE(half);
    for (int64_t j = 0; j < PAGE; j += at_once) {
        const char *key[(SUMS + 2) / 3]; /* every third: the two behind it are reached by one addition in the address */
        UNROLL for (int k = 0; k < at_once; k += 3) key[k / 3] = keys + (j + k) * row;
        vec sum[SUMS];
        float sums[SUMS];
        UNROLL for (int s = 0; s < SUMS; s++) sum[s] = spread(0);
        fetch(next + j * row, at_once * row);
        UNROLL for (int k = 0; k < at_once; k++) {
            const vec *at = query;
            for (int64_t i = 0; i < row; i += (int64_t)sizeof(vec), at++) {
                vec line = load(half, key[k / 3] + k % 3 * row + i, (row - i) / SIZE(half));
                HOLD(line);
                UNROLL for (int h = 0; h < heads; h++)
                    sum[h * at_once + k] = add_product(half, sum[h * at_once + k], line, at[h * lines]);
            }
        }
        totals(sum, sums);
        UNROLL for (int h = 0; h < heads; h++) memcpy(scores + h * BLOCK + j, sums + h * at_once, 4 * at_once);
    }
}

INLINE void score_heads(const int half, int64_t heads, const vec *query, int64_t lines, const char *keys, int64_t d,
                        float *scores, const char *next) {
    int64_t h = 0;
#define HEADS(N) score(half, N, query + h * lines, lines, keys, d, scores + h * BLOCK, h ? keys : next)
    for (; h + 4 <= heads; h += 4) HEADS(4);
    for (; h + 2 <= heads; h += 2) HEADS(2);
    if (h < heads) HEADS(1);
#undef HEADS
}

/* ---- values. Sums are floats: a line of bfloat16 has two vectors of them, its low and its high elements ---- */

#define PARTS(half) ((half) ? 2 : 1)

/* mixed[h][columns] += sum over tokens first..last of weights[h] * values[:, columns]; fetches as much at `next`.
 * `heads` and `lines` are constants; `columns` is LINE * lines, or less at the ragged end of a value. */
INLINE void mix(const int half, const int heads, const int lines, int64_t columns, const float *weights,
                const char *values, int64_t first, int64_t last, int64_t d_v, vec *mixed, int64_t width,
                const char *next) {
    const int n = lines * PARTS(half);
    vec sum[SUMS];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < n; v++) sum[h * n + v] = mixed[h * width + v];
    for (int64_t j = first; j < last; j++) {
        fetch(next + j * d_v * SIZE(half), columns * SIZE(half));
        UNROLL for (int i = 0; i < lines; i++) {
            const char *from = values + (j * d_v + LINE(half) * i) * SIZE(half);
            vec line = load(half, from, columns - LINE(half) * i);
            HOLD(line);
            UNROLL for (int h = 0; h < heads; h++) {
                vec *to = sum + h * n + i * PARTS(half);
                to[0] += (half ? low(line) : line) * weights[h * BLOCK + j];
                if (half) to[1] += high(line) * weights[h * BLOCK + j];
            }
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < n; v++) mixed[h * width + v] = sum[h * n + v];
}

/* One page, all columns, as many at a time as registers hold. */
INLINE void mix_columns(const int half, const int heads, const float *weights, const char *values, int64_t first,
                        int64_t last, int64_t d_v, vec *mixed, int64_t width, const char *next) {
    const int room = SUMS / heads / PARTS(half);
    int64_t c = 0;
#define COLUMNS(LINES)                                                                                            \
    for (; (room >= LINES || LINES == 1) && c + LINES * LINE(half) <= d_v; c += LINES * LINE(half)) {             \
        mix(half, heads, LINES, LINES * LINE(half), weights, values + c * SIZE(half), first, last, d_v, mixed,    \
            width, next + c * SIZE(half));                                                                        \
        mixed += LINES * PARTS(half);                                                                             \
    }
    COLUMNS(8)
    COLUMNS(4)
    COLUMNS(2)
    COLUMNS(1)
    if (c < d_v)
        mix(half, heads, 1, d_v - c, weights, values + c * SIZE(half), first, last, d_v, mixed, width,
            next + c * SIZE(half));
}

INLINE void mix_heads(const int half, int64_t heads, const float *weights, const char *values, int64_t first,
                      int64_t last, int64_t d_v, vec *mixed, int64_t width, const char *next) {
    int64_t h = 0;
#define HEADS(N)                                                                                                  \
    mix_columns(half, N, weights + h * BLOCK, values, first, last, d_v, mixed + h * width, width, h ? values : next)
    for (; h + 4 <= heads; h += 4) HEADS(4);
    for (; h + 2 <= heads; h += 2) HEADS(2);
    if (h < heads) HEADS(1);
#undef HEADS
}

/* ---- one row ---- */

/* Key heads first..last of one row, and `heads` query heads of each from the `from`-th on, at most GROUP.
 * lines: of a query; width: vectors of sums of a value. */
typedef struct {
    const call *c;
    const int64_t *table;
    int64_t row, first, last, from, heads, start, end, pages, lines, width;
} task;

/* What one key head's query heads have so far. */
typedef struct {
    vec sum[GROUP];
    float most[GROUP];
    vec *query, *mixed; /* (heads, lines), (heads, width) */
} state;

/* First token that a row sees. */
INLINE int64_t first_seen(const call *c, int64_t row) {
    int64_t start = c->window > 0 ? c->lengths[row] - c->window : 0;
    return start > 0 ? start : 0;
}

INLINE void append(const int half, const call *c, int64_t row, int64_t head) {
    int64_t last = c->lengths[row] - 1, page = c->tables[row * c->most + last / PAGE];
    char *key = page_at(half, c->keys, page, c->d, head, c) + last % PAGE * c->d * SIZE(half);
    char *value = page_at(half, c->values, page, c->d_v, head, c) + last % PAGE * c->d_v * SIZE(half);
    memcpy(key, c->key + (head * c->key_head + row * c->key_row) * SIZE(half), c->d * SIZE(half));
    memcpy(value, c->value + (head * c->value_head + row * c->value_row) * SIZE(half), c->d_v * SIZE(half));
}

INLINE void begin(const int half, const task *t, int64_t head, state *s, vec *space) {
    const call *c = t->c;
    s->query = space;
    s->mixed = space + t->heads * t->lines;
    for (int64_t h = 0; h < t->heads; h++) {
        int64_t query_head = head * c->group + t->from + h;
        const char *from = c->query + (query_head * c->query_head + t->row * c->query_row) * SIZE(half);
        for (int64_t i = 0; i < t->lines; i++)
            s->query[h * t->lines + i] = load(half, from + (int64_t)sizeof(vec) * i, c->d - i * LINE(half));
        for (int64_t v = 0; v < t->width; v++) s->mixed[h * t->width + v] = spread(0);
        s->most[h] = -__builtin_inff();
        s->sum[h] = spread(0);
    }
}

/* Keys are read, or values, page by page and in each head by head, as they lie in memory. What is read AHEAD bytes after
 * one head's of page p, of pages up to `end`; then come those at `next`. Only a hint: any address is right. */
INLINE const char *ahead(const int half, const task *t, char *pages, int64_t d, int64_t p, int64_t head, int64_t end,
                         const char *next) {
    const int64_t size = PAGE * d * SIZE(half);
    for (int64_t left = AHEAD; left > 0; left -= size)
        if (++head == t->last) head = t->first, p++;
    if (p < end) return page_at(half, pages, t->table[p], d, head, t->c);
    return next + ((p - end) * (t->last - t->first) + head - t->first) * size;
}

/* The keys that are read after the block that ends at page p: the next block's, or the next task's. */
INLINE const char *keys_behind(const int half, const task *t, int64_t p) {
    const call *c = t->c;
    if (p < t->pages) return page_at(half, c->keys, t->table[p], c->d, t->first, c);
    const int64_t row = t->row + (t->last == c->kv_heads);
    if (row == c->rows) return c->keys;
    return page_at(half, c->keys, c->tables[row * c->most + first_seen(c, row) / PAGE], c->d, t->last % c->kv_heads, c);
}

/* Pages p..end of a task, at most BLOCK_PAGES, whose scores are made before their values are read. */
INLINE void attend_block(const int half, const task *t, int64_t p, int64_t end, state *states) {
    const call *c = t->c;
    const int64_t apart = t->heads * BLOCK;
    const char *values = page_at(half, c->values, t->table[p], c->d_v, t->first, c), *next = keys_behind(half, t, end);
    float scores[TOGETHER * GROUP * BLOCK]; /* (heads of the task, query heads of each, BLOCK) */
    for (int64_t i = p; i < end; i++)
        for (int64_t head = t->first; head < t->last; head++)
            score_heads(half, t->heads, states[head - t->first].query, t->lines,
                        page_at(half, c->keys, t->table[i], c->d, head, c), c->d,
                        scores + (head - t->first) * apart + (i - p) * PAGE,
                        ahead(half, t, c->keys, c->d, i, head, end, values));
    for (int64_t n = 0; n < t->last - t->first; n++)
        for (int64_t h = 0; h < t->heads; h++) {
            float *own = scores + n * apart + h * BLOCK;
            state *s = states + n;
            float fade = weigh(own, end - p, p * PAGE, t->start, t->end, c, s->most + h, s->sum + h);
            for (int64_t v = 0; v < t->width; v++) s->mixed[h * t->width + v] *= fade;
        }
    for (int64_t i = p; i < end; i++) {
        const int64_t first = t->start - i * PAGE, last = t->end - i * PAGE; /* tokens of the page that it sees */
        for (int64_t head = t->first; head < t->last; head++)
            mix_heads(half, t->heads, scores + (head - t->first) * apart + (i - p) * PAGE,
                      page_at(half, c->values, t->table[i], c->d_v, head, c), first > 0 ? first : 0,
                      least(last, PAGE), c->d_v, states[head - t->first].mixed, t->width,
                      ahead(half, t, c->values, c->d_v, i, head, end, next));
    }
}

/* out[0:d_v] = sums * scale */
INLINE void finish(const int half, const vec *sums, float scale, char *out, int64_t d_v) {
    for (int64_t i = 0; i < d_v; i += LINE(half), sums += PARTS(half)) {
        vec line = sums[0] * scale;
        if (half) line = (vec)((rounded(line) >> 16) | rounded(sums[1] * scale));
        if (d_v - i >= LINE(half)) *(vec *)(out + i * SIZE(half)) = line;
        else memcpy(out + i * SIZE(half), &line, (d_v - i) * SIZE(half));
    }
}

INLINE void attend(const int half, const task *t) {
    const call *c = t->c;
    state states[TOGETHER];
    vec space[SPACE];
    int64_t size = t->heads * (t->lines + t->width);
    for (int64_t head = t->first; head < t->last; head++)
        begin(half, t, head, states + head - t->first, space + (head - t->first) * size);
    for (int64_t p = t->start / PAGE; p < t->pages; p += BLOCK_PAGES)
        attend_block(half, t, p, least(t->pages, p + BLOCK_PAGES), states);
    for (int64_t head = t->first; head < t->last; head++)
        for (int64_t h = 0; h < t->heads; h++) {
            const state *s = states + head - t->first;
            char *out = c->out + ((t->row * c->kv_heads + head) * c->group + t->from + h) * c->d_v * SIZE(half);
            finish(half, s->mixed + h * t->width, 1.0f / total(s->sum[h]), out, c->d_v);
        }
}

/* Key heads of a task: what keeps in the first-level cache, or one where threads would else have nothing to do. */
INLINE int64_t heads_together(const int half, const call *c) {
    int64_t lines = (c->d + LINE(half) - 1) / LINE(half) + (c->d_v + LINE(half) - 1) / LINE(half) * PARTS(half);
    int64_t fit = SPACE / 2 / (least(c->group, GROUP) * lines);
    if (c->num_threads > 1 && c->rows < 4 * c->num_threads) return 1;
    return fit < 1 ? 1 : least(least(fit, TOGETHER), c->kv_heads);
}

INLINE void attend_heads(const int half, const call *c, int64_t row, int64_t first, int64_t last) {
    task t = {.c = c, .table = c->tables + row * c->most, .row = row, .first = first, .last = last,
              .start = first_seen(c, row), .end = c->lengths[row], .pages = (c->lengths[row] + PAGE - 1) / PAGE,
              .lines = (c->d + LINE(half) - 1) / LINE(half),
              .width = (c->d_v + LINE(half) - 1) / LINE(half) * PARTS(half)};
    for (int64_t head = first; c->key && head < last; head++) append(half, c, row, head);
    for (t.from = 0; t.from < c->group; t.from += GROUP) {
        t.heads = least(c->group - t.from, GROUP);
        attend(half, &t);
    }
}

static int is_sound(const call *c) {
    if (c->d > MAX_D || c->d_v > MAX_D) return 0;
    for (int64_t row = 0; row < c->rows; row++)
        if (!is_there(c, row)) return 0;
    return 1;
}

/* The entry points give 0, or 1, nothing read, if tokens are in no page or heads too long. */
#define DECODE(NAME, HALF)                                                                                        \
    int64_t NAME(const call *c) {                                                                                 \
        if (!is_sound(c)) return 1;                                                                               \
        int64_t n = heads_together(HALF, c), parts = (c->kv_heads + n - 1) / n;                                   \
        _Pragma("omp parallel for schedule(dynamic) num_threads(c->num_threads) if(c->num_threads > 1)")          \
        for (int64_t i = 0; i < c->rows * parts; i++) {                                                           \
            int64_t first = i % parts * n;                                                                        \
            attend_heads(HALF, c, i / parts, first, least(first + n, c->kv_heads));                               \
        }                                                                                                         \
        return 0;                                                                                                 \
    }
DECODE(attention_decode_f32, 0)
DECODE(attention_decode_bf16, 1)

/* New keys or values (heads, tokens) of `bytes` each, the strides in bytes too; pages: (num_pages, heads, PAGE). */
typedef struct {
    const char *new;
    const int64_t *places;
    char *pages;
    int64_t head_stride, token_stride, tokens, num_pages, heads, bytes;
} appended;

/* pages[places[t] / PAGE, :, places[t] % PAGE] = new[:, t]; 0, or 1, nothing written, if a place is out of the pages. */
int64_t attention_append(const appended *a) {
    for (int64_t t = 0; t < a->tokens; t++)
        if (a->places[t] < 0 || a->places[t] >= a->num_pages * PAGE) return 1;
    for (int64_t t = 0; t < a->tokens; t++) {
        const int64_t page = a->places[t] / PAGE, within = a->places[t] % PAGE;
        char *to = a->pages + (page * a->heads * PAGE + within) * a->bytes;
        for (int64_t h = 0; h < a->heads; h++)
            memcpy(to + h * PAGE * a->bytes, a->new + h * a->head_stride + t * a->token_stride, a->bytes);
    }
    return 0;
}
