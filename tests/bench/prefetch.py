"""A decoding step whose linear layers ask for the factors that are read next, and the same without asking, in turns.

Random Llamas of 8 layers, sequences of 200 tokens, each under a composition of one or four of 32 adapters (rank 16, all
linear layers); milliseconds of CPU time of one thread.
Run: python -m tests.bench.prefetch
"""

from collections.abc import Iterator
from unittest import mock

from adapters_store import linear
from tests.bench.generate_models import compositions
from tests.bench.steps import Line, compared, main, step_of, taped_engine, through

MODELS = ((512, "float32"), (1024, "float32"), (1024, "bfloat16"))
ROWS = (12, 14, 16, 24, 32, 64)


def measured(rounds: int) -> Iterator[Line]:
    """A line for each model, number of rows and number of adapters in a composition."""
    for hidden, dtype in MODELS:
        batcher, asking = taped_engine(hidden, dtype, max(ROWS))
        silent = batcher.decoder._taped(batcher.decoder.max_length)
        for rows in ROWS:
            for top_k in (1, 4):
                step = step_of(batcher, compositions(rows, top_k))
                ways = {"silent": through(batcher, silent, step), "asking": through(batcher, asking, step)}
                with mock.patch.object(linear, "idle_rows", return_value=max(ROWS) + 1):
                    ways["silent"]()  # records
                setting = {"width": hidden, "dtype": dtype, "rows": rows, "adapters": top_k}
                yield compared(setting, ways, rounds)


if __name__ == "__main__":
    main("prefetch", __doc__, 15, measured)
