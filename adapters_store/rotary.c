/* Rotary position embeddings: y = x * cos + rotate_half(x) * sin, where rotate_half of (a, b) is (-b, a).
 *
 * Torch makes it of nine passes, each a call of its own that a decoding step pays at every layer. Rounded where model
 * libraries round, to the dtype of x: both products and their sum. So products and sums are not fused
 * (-ffp-contract=off), and the result is theirs bit for bit. Plain C: compilers make vectors of it. Called through
 * ctypes.
 */
#include "wide.h"

/* One call. x and y: (heads, tokens, d), so many elements from head to head and from token to token; cos, sin:
 * (tokens, d). */
typedef struct {
    const void *x, *cos, *sin;
    void *y;
    int64_t heads, tokens, d, x_head, x_token, y_head, y_token, num_threads;
} call;

#define ROTARY(TYPE, KIND)                                                                                        \
    static inline TYPE turned_##KIND(TYPE x, TYPE cos, float other, TYPE sin) {                                   \
        const TYPE along = narrow_##KIND(wide_##KIND(x) * wide_##KIND(cos));                                      \
        const TYPE across = narrow_##KIND(other * wide_##KIND(sin));                                              \
        return narrow_##KIND(wide_##KIND(along) + wide_##KIND(across));                                           \
    }                                                                                                             \
    static void rotate_##KIND(const TYPE *restrict x, const TYPE *restrict cos, const TYPE *restrict sin,         \
                              int64_t half, TYPE *restrict y) {                                                   \
        for (int64_t i = 0; i < half; i++) {                                                                      \
            y[i] = turned_##KIND(x[i], cos[i], -wide_##KIND(x[half + i]), sin[i]);                                \
            y[half + i] = turned_##KIND(x[half + i], cos[half + i], wide_##KIND(x[i]), sin[half + i]);            \
        }                                                                                                         \
    }                                                                                                             \
    int64_t rotary_##KIND(const call *c) {                                                                        \
        const TYPE *x = c->x, *cos = c->cos, *sin = c->sin;                                                       \
        TYPE *y = c->y;                                                                                           \
        _Pragma("omp parallel for schedule(static) num_threads(c->num_threads) if(c->num_threads > 1)")           \
        for (int64_t t = 0; t < c->tokens; t++)                                                                   \
            for (int64_t h = 0; h < c->heads; h++)                                                                \
                rotate_##KIND(x + h * c->x_head + t * c->x_token, cos + t * c->d, sin + t * c->d, c->d / 2,       \
                              y + h * c->y_head + t * c->y_token);                                                \
        return 0;                                                                                                 \
    }
ROTARY(float, f32)
ROTARY(bf16, bf16)
