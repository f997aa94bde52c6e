/* y[t] += sum_p weight[p] * B_p (A_p x[t])  for the pairs p of the mix that token t belongs to.
 *
 * One call serves one site and one batch, whatever its mixture of compositions. Tokens come in tiles that share a mix;
 * a tile reads its x once, keeps every A_p x in the first-level cache, and reads and writes its y once.
 * Nothing is copied, folded or padded per batch: adapters are read from where they lie, so the cost follows the ranks
 * that are active and not the number of adapters resident.
 *
 * The sums of a token run in one fixed order whatever its neighbours are, so a row never sees them, bit for bit.
 * Arithmetic is float32; x and y are float32 or bfloat16 (suffix of the entry point).
 * Plain C with GCC/Clang vector types: no intrinsics, so any CPU with vectors profits. Called through ctypes.
 */
#include <stdint.h>
#include <string.h>

#define TILE 16      /* tokens of a tile at most; Python builds tiles of this size (native.py) */
#define LANES 16     /* floats of one vector */
#define BLOCK 256    /* columns of x worked on at a time: 16 x 256 floats stay in the first-level cache */
#define MAX_RANK 512 /* rank slots of a tile held at once; a wider mix is done in several rounds */

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef uint32_t u16x32 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));

#define INLINE static inline __attribute__((always_inline))

/* One adapter at one site. a: (d_in, lanes) with lanes = rank rounded up to 8 or a multiple of 16, zero-filled.
 * b: (rank, d_out), the adapter's scale folded in. rank 0: the adapter does not touch this site. */
typedef struct {
    const float *a;
    const float *b;
    int64_t rank;
    int64_t lanes;
} entry;

INLINE v16 load_bf16(const uint16_t *from) {
    u16x16 half = *(const u16x16 *)from;
    return (v16)(__builtin_convertvector(half, u16x32) << 16);
}

INLINE uint16_t round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store_bf16(uint16_t *to, v16 value) {
    u16x32 bits = (u16x32)value;
    bits += 0x7fff + ((bits >> 16) & 1); /* round to nearest, ties to even */
    *(u16x16 *)to = __builtin_convertvector(bits >> 16, u16x16);
}

INLINE float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* hidden[t][0:16] += x[t] . a[:, 0:16] over one block of columns, for `tokens` tokens (a compile-time constant). */
INLINE void shrink16(int tokens, const float *x, int64_t x_stride, int64_t columns, const float *a, int64_t lanes,
                     float *hidden) {
    v16 sum[8];
    for (int t = 0; t < tokens; t++) sum[t] = *(v16 *)(hidden + t * MAX_RANK);
    for (int64_t i = 0; i < columns; i++) {
        v16 row = *(const v16 *)(a + i * lanes);
        for (int t = 0; t < tokens; t++) sum[t] += row * x[t * x_stride + i];
    }
    for (int t = 0; t < tokens; t++) *(v16 *)(hidden + t * MAX_RANK) = sum[t];
}

INLINE void shrink8(int tokens, const float *x, int64_t x_stride, int64_t columns, const float *a, float *hidden) {
    v8 sum[8];
    for (int t = 0; t < tokens; t++) sum[t] = *(v8 *)(hidden + t * MAX_RANK);
    for (int64_t i = 0; i < columns; i++) {
        v8 row = *(const v8 *)(a + i * 8);
        for (int t = 0; t < tokens; t++) sum[t] += row * x[t * x_stride + i];
    }
    for (int t = 0; t < tokens; t++) *(v8 *)(hidden + t * MAX_RANK) = sum[t];
}

INLINE void shrink_some(int tokens, const float *x, int64_t x_stride, int64_t columns, const entry *adapter,
                        int64_t first, float *hidden) {
    const float *a = adapter->a + first * adapter->lanes;
    if (adapter->lanes == 8) {
        shrink8(tokens, x, x_stride, columns, a, hidden);
        return;
    }
    for (int64_t j = 0; j < adapter->lanes; j += LANES)
        shrink16(tokens, x, x_stride, columns, a + j, adapter->lanes, hidden + j);
}

static void shrink(int64_t tokens, const float *x, int64_t x_stride, int64_t columns, const entry *adapter,
                   int64_t first, float *hidden) {
    int64_t t = 0;
    for (; t + 8 <= tokens; t += 8)
        shrink_some(8, x + t * x_stride, x_stride, columns, adapter, first, hidden + t * MAX_RANK);
    for (; t + 4 <= tokens; t += 4)
        shrink_some(4, x + t * x_stride, x_stride, columns, adapter, first, hidden + t * MAX_RANK);
    for (; t < tokens; t++)
        shrink_some(1, x + t * x_stride, x_stride, columns, adapter, first, hidden + t * MAX_RANK);
}

/* sum[t][v] = hidden[t] . rows over 16*vectors columns, for `tokens` tokens. */
INLINE void expand_sum(int tokens, int vectors, const float *hidden, const float *const *rows, int64_t ranks,
                       int64_t column, v16 sum[4][4]) {
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < vectors; v++) sum[t][v] = (v16){0};
    for (int64_t j = 0; j < ranks; j++)
        for (int v = 0; v < vectors; v++) {
            v16 row = *(const v16 *)(rows[j] + column + v * LANES);
            for (int t = 0; t < tokens; t++) sum[t][v] += row * hidden[t * MAX_RANK + j];
        }
}

#define EXPAND(NAME, TYPE, LOAD, STORE, LOAD1, STORE1)                                                            \
    INLINE void NAME##_some(int tokens, int vectors, const float *hidden, const float *const *rows, int64_t ranks, \
                            int64_t column, TYPE *y, int64_t y_stride) {                                           \
        v16 sum[4][4];                                                                                            \
        expand_sum(tokens, vectors, hidden, rows, ranks, column, sum);                                            \
        for (int t = 0; t < tokens; t++)                                                                          \
            for (int v = 0; v < vectors; v++) {                                                                   \
                TYPE *at = y + t * y_stride + column + v * LANES;                                                 \
                STORE(at, LOAD(at) + sum[t][v]);                                                                  \
            }                                                                                                     \
    }                                                                                                             \
    INLINE void NAME##_rows(int tokens, const float *hidden, const float *const *rows, int64_t ranks,             \
                            int64_t d_out, TYPE *y, int64_t y_stride) {                                            \
        int64_t c = 0;                                                                                            \
        for (; c + 4 * LANES <= d_out; c += 4 * LANES)                                                            \
            NAME##_some(tokens, 4, hidden, rows, ranks, c, y, y_stride);                                          \
        for (; c + LANES <= d_out; c += LANES) NAME##_some(tokens, 1, hidden, rows, ranks, c, y, y_stride);       \
        for (; c < d_out; c++)                                                                                    \
            for (int t = 0; t < tokens; t++) {                                                                    \
                float sum = 0;                                                                                    \
                for (int64_t j = 0; j < ranks; j++) sum += rows[j][c] * hidden[t * MAX_RANK + j];                 \
                STORE1(y + t * y_stride + c, LOAD1(y + t * y_stride + c) + sum);                                  \
            }                                                                                                     \
    }                                                                                                             \
    static void NAME(int64_t tokens, const float *hidden, const float *const *rows, int64_t ranks, int64_t d_out, \
                     TYPE *y, int64_t y_stride) {                                                                 \
        int64_t t = 0;                                                                                            \
        for (; t + 4 <= tokens; t += 4)                                                                           \
            NAME##_rows(4, hidden + t * MAX_RANK, rows, ranks, d_out, y + t * y_stride, y_stride);                \
        for (; t < tokens; t++)                                                                                   \
            NAME##_rows(1, hidden + t * MAX_RANK, rows, ranks, d_out, y + t * y_stride, y_stride);                \
    }

#define LOAD_F32(at) (*(v16 *)(at))
#define STORE_F32(at, value) (*(v16 *)(at) = (value))
#define LOAD1_F32(at) (*(at))
#define STORE1_F32(at, value) (*(at) = (value))
#define STORE1_BF16(at, value) (*(at) = round_bf16(value))
#define LOAD1_BF16(at) widen(*(at))
EXPAND(expand_f32, float, LOAD_F32, STORE_F32, LOAD1_F32, STORE1_F32)
EXPAND(expand_bf16, uint16_t, load_bf16, store_bf16, LOAD1_BF16, STORE1_BF16)

/* A block of x as float32: itself, or a widened copy. */
INLINE const float *block_f32(const float *x, int64_t stride, int64_t tokens, int64_t columns, float *copy,
                              int64_t *copy_stride) {
    (void)tokens, (void)columns, (void)copy;
    *copy_stride = stride;
    return x;
}

INLINE const float *block_bf16(const uint16_t *x, int64_t stride, int64_t tokens, int64_t columns, float *copy,
                               int64_t *copy_stride) {
    for (int64_t t = 0; t < tokens; t++) {
        int64_t i = 0;
        for (; i + LANES <= columns; i += LANES) *(v16 *)(copy + t * BLOCK + i) = load_bf16(x + t * stride + i);
        for (; i < columns; i++) copy[t * BLOCK + i] = widen(x[t * stride + i]);
    }
    *copy_stride = BLOCK;
    return copy;
}

/* The pairs first..last of one tile: shrink all, weigh, expand once. Their lanes fit in MAX_RANK. */
#define ROUND(NAME, TYPE, BLOCK_OF, EXPAND_OF)                                                                    \
    static void NAME(const TYPE *x, int64_t x_stride, TYPE *y, int64_t y_stride, int64_t d_in, int64_t d_out,     \
                     int64_t tokens, const entry *bank, const int64_t *slots, const float *weights, int64_t first, \
                     int64_t last) {                                                                              \
        float hidden[TILE * MAX_RANK], copy[TILE * BLOCK];                                                        \
        const float *rows[MAX_RANK];                                                                              \
        int64_t lanes = 0, ranks = 0, copy_stride;                                                                \
        for (int64_t p = first; p < last; p++) lanes += bank[slots[p]].lanes;                                     \
        for (int64_t t = 0; t < tokens; t++) memset(hidden + t * MAX_RANK, 0, sizeof(float) * (size_t)lanes);     \
        for (int64_t i = 0; i < d_in; i += BLOCK) {                                                               \
            int64_t columns = d_in - i < BLOCK ? d_in - i : BLOCK, at = 0;                                        \
            const float *block = BLOCK_OF(x + i, x_stride, tokens, columns, copy, &copy_stride);                  \
            for (int64_t p = first; p < last; p++) {                                                              \
                const entry *adapter = bank + slots[p];                                                           \
                shrink(tokens, block, copy_stride, columns, adapter, i, hidden + at);                             \
                at += adapter->lanes;                                                                             \
            }                                                                                                     \
        }                                                                                                         \
        int64_t at = 0; /* weigh, and close the gaps that lanes leave behind ranks */                             \
        for (int64_t p = first; p < last; p++) {                                                                  \
            const entry *adapter = bank + slots[p];                                                               \
            for (int64_t j = 0; j < adapter->rank; j++) {                                                         \
                rows[ranks] = adapter->b + j * d_out;                                                             \
                for (int64_t t = 0; t < tokens; t++)                                                              \
                    hidden[t * MAX_RANK + ranks] = hidden[t * MAX_RANK + at + j] * weights[p];                    \
                ranks++;                                                                                          \
            }                                                                                                     \
            at += adapter->lanes;                                                                                 \
        }                                                                                                         \
        EXPAND_OF(tokens, hidden, rows, ranks, d_out, y, y_stride);                                               \
    }
ROUND(round_f32, float, block_f32, expand_f32)
ROUND(round_bf16_, uint16_t, block_bf16, expand_bf16)

/* tiles: (num_tiles, 3) of start, tokens, mix. mix_offset: (num_mixes + 1,) into slots and weights.
 * An entry's lanes never exceed MAX_RANK (checked where banks are filled). */
#define ADD(NAME, TYPE, ROUND_OF)                                                                                 \
    void NAME(const TYPE *x, int64_t x_stride, TYPE *y, int64_t y_stride, int64_t d_in, int64_t d_out,            \
              const int64_t *tiles, int64_t num_tiles, const int64_t *mix_offset, const int64_t *slots,           \
              const float *weights, const entry *bank, int64_t num_threads) {                                     \
        (void)num_threads;                                                                                        \
        _Pragma("omp parallel for schedule(static) num_threads(num_threads) if(num_threads > 1)")                 \
        for (int64_t i = 0; i < num_tiles; i++) {                                                                 \
            int64_t start = tiles[i * 3], tokens = tiles[i * 3 + 1], mix = tiles[i * 3 + 2];                      \
            int64_t first = mix_offset[mix], end = mix_offset[mix + 1];                                           \
            while (first < end) {                                                                                 \
                int64_t last = first, lanes = 0;                                                                  \
                while (last < end && lanes + bank[slots[last]].lanes <= MAX_RANK) lanes += bank[slots[last++]].lanes; \
                if (lanes > 0)                                                                                    \
                    ROUND_OF(x + start * x_stride, x_stride, y + start * y_stride, y_stride, d_in, d_out, tokens, \
                             bank, slots, weights, first, last);                                                  \
                first = last;                                                                                     \
            }                                                                                                     \
        }                                                                                                         \
    }
ADD(lowrank_add_f32, float, round_f32)
ADD(lowrank_add_bf16, uint16_t, round_bf16_)
