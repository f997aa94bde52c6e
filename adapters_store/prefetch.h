/* Asking for memory that is read soon: how, and lists of what the next call reads, for a kernel that leaves memory idle
 * while it computes.
 *
 * How differs between processors. Measured on Zen 4 and Zen 5; others are served like Zen 4. Zen 5 is known here by
 * what it alone has of those that have AVX512-BF16: compilers of its time do not know it by name.
 */
#pragma once
#include <stdint.h>

#if defined(__AVX512VP2INTERSECT__) && defined(__AVX512BF16__)
#define NEAREST 3      /* cache that is asked for what is read next (3: the first level, 2: the second), */
#define LINE_STEP 64   /* bytes from a line that is asked for to the next one */
#define BUSY_ROWS 3    /* rows from which on a linear layer asks for its weights: fewer wait, and are foreseen */
#define IDLE_ROWS 15   /* rows from which on it leaves memory idle, and asks for what others read */
#define TWO_LINES 10   /* rows of a tile from which on there is time to ask for two such lines per word */
#else
#define NEAREST 2      /* fewer lines can be on their way to the first level than keep memory busy */
#define LINE_STEP 128  /* the processor brings the other line; asking for it leaves no room for what is read now */
#define BUSY_ROWS 7
#define IDLE_ROWS 12
#define TWO_LINES 7
#endif

/* Ask for a line that is read next. */
#define ASK_FOR(line) __builtin_prefetch(line, 0, NEAREST)

#define RUNS 128 /* RUNS in linear.py */

typedef struct {
    const char *from;
    int64_t lines; /* of 64 bytes */
} memory_run;

typedef struct {
    int64_t num_runs, lines; /* lines: of all runs */
    memory_run runs[RUNS];
} prefetch_list;
