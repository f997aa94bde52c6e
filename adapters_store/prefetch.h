/* Memory that the next call reads: a kernel that leaves memory idle while it computes can ask for it meanwhile. */
#pragma once
#include <stdint.h>

#define RUNS 128 /* RUNS in linear.py */

typedef struct {
    const char *from;
    int64_t lines; /* of 64 bytes */
} memory_run;

typedef struct {
    int64_t num_runs, lines; /* lines: of all runs */
    memory_run runs[RUNS];
} prefetch_list;
