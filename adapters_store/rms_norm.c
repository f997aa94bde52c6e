/* RMSNorm: y = weight * x / sqrt(mean of x^2 + eps), one row after the other.
 *
 * Torch makes it of six passes, each a call of its own that a decoding step pays for every norm. Here a row is read
 * twice, the second time from the first-level cache. Rounded where model libraries round: x over its root mean square,
 * computed in float32, to the dtype of x, and the product with the weight once more.
 *
 * A row's sums run in one order, whatever the other rows are. Plain C: compilers make vectors of it. Called through
 * ctypes.
 */
#include <math.h>
#include "wide.h"

#define LANES 32 /* sums side by side */

/* One call. x and y: (rows, d), weight: (d,). */
typedef struct {
    const void *x, *weight;
    void *y;
    int64_t rows, d, num_threads;
    float eps;
} call;

#define RMS_NORM(TYPE, KIND)                                                                                      \
    static float inverse_rms_##KIND(const TYPE *x, int64_t d, float eps) {                                        \
        float sums[LANES] = {0}, sum = 0;                                                                         \
        int64_t i = 0;                                                                                            \
        for (; i + LANES <= d; i += LANES)                                                                        \
            for (int j = 0; j < LANES; j++) sums[j] += wide_##KIND(x[i + j]) * wide_##KIND(x[i + j]);             \
        for (int j = 0; i + j < d; j++) sums[j] += wide_##KIND(x[i + j]) * wide_##KIND(x[i + j]);                 \
        for (int half = LANES / 2; half; half /= 2)                                                               \
            for (int j = 0; j < half; j++) sums[j] += sums[j + half];                                             \
        sum = sums[0] / (float)d;                                                                                 \
        return 1.0f / sqrtf(sum + eps);                                                                           \
    }                                                                                                             \
    int64_t rms_norm_##KIND(const call *c) {                                                                      \
        const int64_t d = c->d;                                                                                   \
        _Pragma("omp parallel for schedule(static) num_threads(c->num_threads) if(c->num_threads > 1)")           \
        for (int64_t row = 0; row < c->rows; row++) {                                                             \
            const TYPE *restrict from = (const TYPE *)c->x + row * d, *restrict weight = c->weight;               \
            TYPE *restrict to = (TYPE *)c->y + row * d;                                                           \
            const float scale = inverse_rms_##KIND(from, d, c->eps);                                              \
            for (int64_t i = 0; i < d; i++) {                                                                     \
                float hat = wide_##KIND(narrow_##KIND(wide_##KIND(from[i]) * scale));                             \
                to[i] = narrow_##KIND(wide_##KIND(weight[i]) * hat);                                              \
            }                                                                                                     \
        }                                                                                                         \
        return 0;                                                                                                 \
    }
RMS_NORM(float, f32)
RMS_NORM(bf16, bf16)
