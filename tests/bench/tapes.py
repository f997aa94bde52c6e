"""A decoding step from a tape, next to the same step through Python: milliseconds of CPU time of one thread, in turns.

Random Llamas of 8 layers, sequences of 200 tokens, no adapters or one of 32 for each row (rank 16, all linear layers).
The least of what Python costs shows where nothing else costs much: few rows, a small model.
Run: python -m tests.bench.tapes
"""

from collections.abc import Iterator

from adapters_store.mixing import Mix
from tests.bench.generate_models import LAYERS
from tests.bench.steps import Line, compared, main, step_of, taped_engine, through

MODELS = ((256, "float32"), (512, "float32"), (512, "bfloat16"), (1024, "float32"), (1024, "bfloat16"))
ROWS = (1, 4, 9, 16)


def measured(rounds: int) -> Iterator[Line]:
    """A line for each model and number of rows, without and with adapters."""
    for hidden, dtype in MODELS:
        batcher, tapes = taped_engine(hidden, dtype, max(ROWS))
        for rows in ROWS:
            for has_adapters in (False, True):
                step = step_of(batcher, [Mix.one_hot(2 * row, LAYERS) if has_adapters else None for row in range(rows)])
                ways = {"python": through(batcher, None, step), "tape": through(batcher, tapes, step)}
                setting = {"width": hidden, "dtype": dtype, "rows": rows, "adapters": has_adapters}
                yield compared(setting, ways, rounds)


if __name__ == "__main__":
    main("tapes", __doc__, 40, measured)
