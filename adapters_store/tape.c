/* Calls kernels one after the other, as a tape has them (tape.py). Called through ctypes. */
#include <stdint.h>

/* A kernel and the struct of its arguments; kernels give 0, or something else if they failed. */
typedef struct {
    int64_t (*kernel)(const void *arguments);
    const void *arguments;
} call;

/* 0, or which call failed, counted from 1. */
int64_t play(const call *calls, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (calls[i].kernel(calls[i].arguments)) return i + 1;
    return 0;
}
