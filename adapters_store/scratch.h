/* A thread's own memory for what a call works on. */
#pragma once
#include <stdint.h>
#include <stdlib.h>

/* At least so many bytes, whole lines of the cache, kept from call to call; NULL if there is no more. */
static char *scratch(int64_t bytes) {
    static _Thread_local char *kept;
    static _Thread_local int64_t size;
    if (bytes > size) {
        free(kept);
        size = (bytes + 65535) / 65536 * 65536;
        kept = aligned_alloc(64, (size_t)size);
        if (!kept) size = 0;
    }
    return kept;
}
