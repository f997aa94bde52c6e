"""The engines that the generation benchmark compares. Each takes requests and gives tokens and the CPU time they took.

CPU time is that of the one thread that computes. For transformers' continuous batching that is its manager's own
thread, read through its own clock: the thread that hands requests in and takes tokens out is not counted there, nor
are the manager's start and its cache. The others compute on the calling thread, and all they do is counted.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, ContinuousBatchingConfig, GenerationConfig

from adapters_store.language import LanguageModel
from adapters_store.mixing import Mix
from adapters_store.packing import PACKED, no_mask, packed_attention
from adapters_store.primitives import calibration
from server.generation.batcher import Batcher
from server.generation.decoder import Decoder
from server.generation.sampling import Draw, Sampling
from server.generation.sequence import TokenSequence
from tests.bench.generate_models import NEW, PROMPT, RANK, SCALE, Factors, Request, entries_of

# Of the settings tried (pages of 16, 64, 256 tokens, batches of 256, 512, 1024) the fastest or within 5 % of it in each
# case; prefixes are not shared, as nowhere here; memory for all requests at once.
PAGE_TOKENS, BATCH_TOKENS = 64, 256


@dataclass(frozen=True)
class Run:
    """CPU seconds, and each request's new tokens."""

    seconds: float
    tokens: list[list[int]]


Variant = Callable[[Sequence[Request]], Run]


def engine(model: Any, adapters: Sequence[Factors], num_requests: int) -> Batcher:
    """Our engine on a copy of the model, all adapters resident, memory for all requests at once.

    Its pages are touched, as those of a server that has run for a while: the system makes memory at its first use.
    """
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, no_mask)
    language = LanguageModel(copy.deepcopy(model))
    language.lay_out()
    calibration.calibrate_lowrank(language.encoder.dtype, language.encoder.device)  # as the server does when it starts
    for slot, factors in enumerate(adapters):
        language.encoder.sites.put(slot, entries_of(factors))
    config = model.config
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * 64 * model.dtype.itemsize
    kv_bytes = num_requests * (PROMPT[1] + NEW[1] + PAGE_TOKENS) * token_bytes
    decoder = Decoder(language, kv_bytes=kv_bytes)
    for pages in itertools.chain(*decoder.memory.layers.values()):
        pages.zero_()
    return Batcher(decoder, step_tokens=512, max_sequences=256)


def ours(batcher: Batcher, mix_of: Callable[[int], Mix | None]) -> Variant:
    """Our engine; mix_of: the composition of the request with this index."""

    def run(requests: Sequence[Request]) -> Run:
        start = time.thread_time()
        sequences = [_sequence(batcher, request, mix_of(i)) for i, request in enumerate(requests)]
        for sequence in sequences:
            batcher.add(sequence)
        while batcher.has_work:
            for event in batcher.step():
                if event.error is not None:
                    raise event.error
        tokens = [sequence.ids[sequence.num_prompt :] for sequence in sequences]
        return Run(time.thread_time() - start, tokens)

    return run


def _sequence(batcher: Batcher, request: Request, mix: Mix | None) -> TokenSequence:
    draw = Draw(Sampling(temperature=0), request.ids, batcher.decoder.language.vocab_size)
    return TokenSequence(list(request.ids), mix, draw, max_tokens=request.new_tokens)


def generate(model: Any, **options: Any) -> Variant:
    """One left-padded batch of all requests through `generate`, until the last of them has its tokens."""

    def run(requests: Sequence[Request]) -> Run:
        start = time.thread_time()
        ids, mask = left_padded(requests)
        most = max(request.new_tokens for request in requests)
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False,
                               eos_token_id=None, pad_token_id=0, **options)  # fmt: skip
        new = found[:, ids.shape[1] :].tolist()
        tokens = [row[: request.new_tokens] for row, request in zip(new, requests, strict=True)]
        return Run(time.thread_time() - start, tokens)

    return run


def left_padded(requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """(requests, longest) ids and attention mask."""
    longest = max(len(request.ids) for request in requests)
    rows = [[0] * (longest - len(request.ids)) + request.ids for request in requests]
    mask = [[0] * (longest - len(request.ids)) + [1] * len(request.ids) for request in requests]
    return torch.tensor(rows), torch.tensor(mask)


@contextmanager
def continuous_batching(model: Any, requests: Sequence[Request]) -> Iterator[Variant]:
    """transformers' continuous batching with sdpa; its manager runs while inside, with room for these requests."""
    blocks = sum(-(-(len(request.ids) + request.new_tokens) // PAGE_TOKENS) for request in requests)
    config = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, num_blocks=blocks + 2, max_batch_tokens=BATCH_TOKENS, allow_block_sharing=False,
        max_requests_per_batch=len(requests), use_async_batching=False, use_cuda_graph=False,
        auto_switch_to_flash=False,
    )  # fmt: skip
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=NEW[1])
    manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=config)
    manager.start()
    try:
        yield lambda requests: _through(manager, requests)
    finally:
        manager.stop(block=True)
        manager.destroy()


def _through(manager: Any, requests: Sequence[Request]) -> Run:
    clock = time.pthread_getcpuclockid(manager._generation_thread.ident)
    start = time.clock_gettime(clock)
    names = [manager.add_request(request.ids, max_new_tokens=request.new_tokens) for request in requests]
    found: dict[str, list[int]] = {}
    while len(found) < len(requests):
        result = manager.get_result(timeout=60)
        if result is None and not manager.is_running():
            raise RuntimeError("the manager's thread ended")
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(result.error)
            found[result.request_id] = list(result.generated_tokens)
    return Run(time.clock_gettime(clock) - start, [found[name] for name in names])


def peft_mixed(model: Any, adapters: Sequence[Factors], mixes: Sequence[Mix]) -> Variant:
    """PEFT's mixed batch on a copy of the model: `generate(adapter_names=…)`, one adapter per request.

    mixes: what each request wants. A PEFT model has one weight per adapter and layer, whoever asks, so each different
    composition is an adapter of its own there: its adapters' factors one behind another, their weights in B, which is
    what `add_weighted_adapter(combination_type="cat")` makes.
    """
    distinct = {mix.key: mix for mix in mixes}
    names = {key: str(index) for index, key in enumerate(distinct)}
    targets = sorted({name.rsplit(".", 1)[-1] for name in adapters[0]})
    ranks = {names[key]: RANK * len(mix.slots) for key, mix in distinct.items()}
    configs = {name: LoraConfig(r=r, lora_alpha=SCALE * r, target_modules=targets) for name, r in ranks.items()}
    wrapped: Any = get_peft_model(copy.deepcopy(model), configs["0"], adapter_name="0")
    for name in list(configs)[1:]:
        wrapped.add_adapter(name, configs[name])
    wrapped = wrapped.to(model.dtype).eval()
    for key, mix in distinct.items():
        _fill(wrapped, names[key], _composed(adapters, mix))

    def run(requests: Sequence[Request]) -> Run:
        asked = [names[mix.key] for mix in mixes[: len(requests)]]
        return generate(wrapped, adapter_names=asked)(requests)

    return run


def _composed(adapters: Sequence[Factors], mix: Mix) -> Factors:
    """The factors of a composition."""
    found = {}
    for name in adapters[0]:
        weights = mix.weights[:, int(name.split(".")[1])]  # layers.3.self_attn.q_proj
        pairs = [adapters[slot][name] for slot in mix.slots]
        B = [weight * B.float() for weight, (_A, B) in zip(weights.tolist(), pairs, strict=True)]
        found[name] = (torch.cat([A for A, _B in pairs]), torch.cat(B, dim=1))
    return found


def _fill(wrapped: Any, name: str, factors: Factors) -> None:
    for site, (A, B) in factors.items():
        layer = wrapped.get_submodule(f"base_model.model.model.{site}")
        layer.lora_A[name].weight.data.copy_(A)
        layer.lora_B[name].weight.data.copy_(B)
