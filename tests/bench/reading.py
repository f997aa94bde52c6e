"""How fast the kernels of a decoding step read: a step's tape played call by call, next to a plain sum.

Up to some rows a kernel waits for memory, so what it reads per second says whether the processor is asked for it in its
own way (adapters_store/prefetch.h); with more it computes. Random Llamas of 8 layers, sequences of 200 tokens, each
under four of 32 adapters (rank 16, all linear layers); GB/s of one thread.
Run: python -m tests.bench.reading
"""

import ctypes
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from adapters_store.mixing import Mix
from adapters_store.tape import Tape, _Kernels
from server.generation.batcher import Batcher
from tests.bench.generate_floor import peak_bandwidth, shapes
from tests.bench.generate_models import LAYERS, RANK, VOCABULARY, compositions
from tests.bench.steps import LENGTH, Line, main, step_of, taped_engine

MODELS = ((512, "float32"), (512, "bfloat16"), (1024, "float32"))
ROWS = (1, 4, 8, 11, 16)
KERNELS = ("linear", "lowrank_add", "attention_decode")


def measured(rounds: int) -> Iterator[Line]:
    """A line for each model and number of rows."""
    for hidden, dtype in MODELS:
        batcher, tapes = taped_engine(hidden, dtype, max(ROWS))
        for rows in ROWS:
            mixes = compositions(rows, 4)
            step = step_of(batcher, mixes)
            for _ in range(3):
                step()
            _buffers, tape = next(reversed(tapes._tapes.values()))
            seconds, read = played(tape, rounds), bytes_of(batcher, hidden, mixes)
            speeds = {name: round(read[name] / seconds[name] / 1e9, 1) for name in KERNELS}
            yield {"width": hidden, "dtype": dtype, "rows": rows, **speeds, "sum": round(peak_bandwidth() / 1e9, 1)}


@torch.inference_mode()
def played(tape: Tape, rounds: int) -> dict[str, float]:
    """Median seconds per step of all calls of each kernel."""
    steps = [_played_once(tape) for _ in range(rounds)]
    return {name: statistics.median(step[name] for step in steps) for name in KERNELS}


def _played_once(tape: Tape) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for run in tape._runs:
        if not isinstance(run, _Kernels):
            run()
            continue
        for kernel, arguments in run._kept:
            given, start = ctypes.byref(arguments), time.perf_counter()
            kernel(given)
            seconds[re.split("_f32|_bf16", kernel.__name__)[0]] += time.perf_counter() - start
    return seconds


def bytes_of(batcher: Batcher, hidden: int, mixes: Sequence[Mix]) -> dict[str, int]:
    """What a step reads by each kernel; it computes all logits."""
    size, config = batcher.decoder.encoder.dtype.itemsize, batcher.decoder.language.model.config
    slots = {slot for mix in mixes for slot in mix.slots}
    heads = 2 * config.num_key_value_heads * config.head_dim
    return {
        "linear": size * (LAYERS * sum(d_in * d_out for d_in, d_out in shapes(hidden)) + VOCABULARY * hidden),
        "lowrank_add": LAYERS * size * len(slots) * RANK * sum(d_in + d_out for d_in, d_out in shapes(hidden)),
        "attention_decode": LAYERS * size * len(mixes) * LENGTH * heads,
    }


if __name__ == "__main__":
    main("reading", __doc__, 41, measured)
