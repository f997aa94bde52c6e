/* What a layer does number by number: a + b, a * b, silu(a) = a / (1 + exp(-a)).
 *
 * Torch spends more time on getting ready for a decoding step's few numbers than on them. Rounded as torch rounds, to
 * float32 and from there to the dtype, so the results are its own bit for bit; exp is Sleef's (expf, 1.0 ULP), which
 * torch calls, written down again so that compilers make vectors of it. Not fused (-ffp-contract=off) but where it says
 * fmaf. Called through ctypes.
 */
#include <math.h>
#include "wide.h"

#define SHARE 32768 /* numbers that are worth a thread, as in torch */

/* One call. a, b, y: n numbers each; silu has no b. */
typedef struct {
    const void *a, *b;
    void *y;
    int64_t n, num_threads;
} call;

static inline float power_of_two(int32_t exponent) {
    int32_t bits = (exponent + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return power;
}

static inline float exponential(float x) {
    const float times = rintf(x * 1.442695040888963407359924681001892137426645954152985934135449406931f);
    const float s = fmaf(times, -1.428606765330187045e-06f, fmaf(times, -0.693145751953125f, x));
    float sum = 0.000198527617612853646278381f;
    sum = fmaf(sum, s, 0.00139304355252534151077271f);
    sum = fmaf(sum, s, 0.00833336077630519866943359f);
    sum = fmaf(sum, s, 0.0416664853692054748535156f);
    sum = fmaf(sum, s, 0.166666671633720397949219f);
    sum = fmaf(sum, s, 0.5f);
    sum = 1.0f + fmaf(s * s, sum, s);
    const int32_t whole = (int32_t)times, half = whole >> 1; /* in two: 2^128 is no float */
    const float found = sum * power_of_two(half) * power_of_two(whole - half);
    return x < -104.0f ? 0.0f : x > 100.0f ? INFINITY : found;
}

#define POINTWISE(NAME, TYPE, KIND, RESULT)                                                                          \
    int64_t NAME##_##KIND(const call *c) {                                                                           \
        const TYPE *restrict a = c->a, *restrict b = c->b;                                                           \
        TYPE *restrict to = c->y;                                                                                    \
        (void)b;                                                                                                     \
        _Pragma("omp parallel for schedule(static) num_threads(c->num_threads) if(c->num_threads > 1 && c->n > SHARE)") \
        for (int64_t i = 0; i < c->n; i++) {                                                                         \
            const float x = wide_##KIND(a[i]);                                                                       \
            to[i] = narrow_##KIND(RESULT);                                                                           \
        }                                                                                                            \
        return 0;                                                                                                    \
    }
#define OF_DTYPE(TYPE, KIND)                                                                                         \
    POINTWISE(add, TYPE, KIND, x + wide_##KIND(b[i]))                                                                \
    POINTWISE(mul, TYPE, KIND, x * wide_##KIND(b[i]))                                                                \
    POINTWISE(silu, TYPE, KIND, x / (1.0f + exponential(-x)))
OF_DTYPE(float, f32)
OF_DTYPE(bf16, bf16)
