"""Where the time of a generation step goes: parts of the engine, timed from outside in CPU time of the thread."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import nn
from transformers.models.llama import modeling_llama

from adapters_store import rotary
from adapters_store.language import LanguageModel
from adapters_store.sites import Site
from server.generation import batcher as batcher_module
from server.generation.attention import PagedAttention
from server.generation.batcher import Batcher
from server.generation.decoder import Decoder
from tests.bench.generate_models import Request
from tests.bench.generate_variants import Variant

# Part -> whose function it is.
STEP: dict[str, tuple[Any, str]] = {
    "step": (Batcher, "step"),
    "forward": (Decoder, "forward"),
    "sampling": (batcher_module, "choose"),
}
# Parts of the forward; MODULES are parts too.
INSIDE: dict[str, tuple[Any, str]] = {
    "attention": (PagedAttention, "__call__"),
    "adapters": (Site, "apply"),
    "rotary": (rotary, "rotate"),
    "logits": (LanguageModel, "logits"),
}
MODULES: dict[str, type[nn.Module]] = {"linear": nn.Linear, "norms": modeling_llama.LlamaRMSNorm}


@contextmanager
def timed(parts: dict[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """While inside, the CPU seconds spent in each part are summed up."""
    seconds = dict.fromkeys(parts, 0.0)
    with ExitStack() as stack:
        for part, (owner, name) in parts.items():
            wrapped = _timing(getattr(owner, name), part, seconds)
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        yield seconds


def _timing(call: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[part] += time.thread_time() - start

    return wrapped


@contextmanager
def timed_modules(backbone: nn.Module) -> Iterator[dict[str, float]]:
    """While inside, the CPU seconds spent in each kind of module of a backbone are summed up, adapters included."""
    starts: list[float] = []
    seconds = dict.fromkeys(MODULES, 0.0)

    def ended(part: str) -> None:
        seconds[part] += time.thread_time() - starts.pop()

    with ExitStack() as stack:
        for part, module in itertools.product(MODULES, backbone.modules()):
            if isinstance(module, MODULES[part]):
                before = module.register_forward_pre_hook(lambda *_: starts.append(time.thread_time()))
                after = module.register_forward_hook(lambda *_, part=part: ended(part))
                stack.callback(before.remove)
                stack.callback(after.remove)
        yield seconds


def profile(variant: Variant, backbone: nn.Module, requests: Sequence[Request]) -> dict[str, float]:
    """Shares of a step's time, in a run of its own: timing the parts makes it slower by a percent or so."""
    with timed(STEP | INSIDE) as seconds, timed_modules(backbone) as modules:
        variant(requests)
    inside = modules | {part: seconds[part] for part in INSIDE}
    inside["linear"] -= seconds["adapters"]  # they act at linear layers, and within them
    inside["other_in_forward"] = seconds["forward"] - sum(inside.values())
    outside = {"sampling": seconds["sampling"]}
    outside["other_outside"] = seconds["step"] - seconds["forward"] - seconds["sampling"]
    return {part: round(share / seconds["step"], 4) for part, share in (inside | outside).items()}
