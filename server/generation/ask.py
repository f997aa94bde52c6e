"""From what a call wants to sequences that run, and back to nothing: check, admit, lease, submit, let go."""

import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

from server.errors import BadInputError
from server.generation.generation import Choice, Generation, Ticket, Wanted
from server.generation.generator import Generator
from server.generation.sampling import Draw, Sampling
from server.generation.sequence import TokenSequence
from server.generation.text import TextStream
from server.leases import Lease
from server.service import Service


@asynccontextmanager
async def generating(service: Service, wanted: Sequence[Wanted]) -> AsyncIterator[Generation]:
    """The texts of a call, running. Leaving the block, however, cancels what still runs and releases everything.

    Raises BadInputError, OverloadedError, DrainingError, TooManyAdaptersError, or what loading an adapter raises.
    """
    generator = generator_of(service)
    num_choices = sum(one.n for one in wanted)
    if num_choices > service.settings.max_inputs:
        raise BadInputError(f"{num_choices} texts in one call, at most {service.settings.max_inputs} (--max-inputs)")
    for one in wanted:
        generator.check(one.ids, one.stopping.max_tokens)
    ticket = generator.admit(sum(len(one.ids) for one in wanted))
    lease: Lease | None = None
    generation: Generation | None = None

    def release() -> None:
        if lease:
            service.residency.release(lease)

    try:
        manifests = {manifest.digest: manifest for one in wanted for manifest in one.composed.composing}
        lease = await service.residency.lease(list(manifests.values()))
        generation = _generation(service, generator, wanted, lease, ticket)
        generator.submit(generation)
        yield generation
    finally:
        generator.let_go(ticket, generation, release)


def generator_of(service: Service) -> Generator:
    """The server's generator. Raises BadInputError if its backbone does not generate."""
    if service.generator is None:
        raise BadInputError(f"the backbone {service.backbone.name} does not generate here; it classifies and embeds")
    return service.generator


def _generation(
    service: Service, generator: Generator, wanted: Sequence[Wanted], lease: Lease, ticket: Ticket
) -> Generation:
    choices: dict[TokenSequence, Choice] = {}
    for one in wanted:
        mix = generator.interned(lease.mix(one.composed.parts))
        salt = _salt(service, one)
        end_ids = one.stopping.token_ids | (frozenset() if one.stopping.ignore_eos else generator.end_ids)
        first = Draw(one.sampling, one.ids, generator.vocab_size)
        for choice in range(one.n):
            draw = Draw(_seeded(one.sampling, choice), one.ids, generator.vocab_size, like=first) if choice else first
            sequence = TokenSequence(list(one.ids), mix, draw, one.stopping.max_tokens, end_ids, salt)
            text = TextStream(service.backbone.tokenizer, one.ids, one.stopping.strings)
            choices[sequence] = Choice(len(choices), text, one.sampling.logprobs is not None, is_first=choice == 0)
        service.metrics.note_composition([manifest.name for manifest in one.composed.composing])
    return Generation(choices, ticket, sum(len(one.ids) for one in wanted), service.metrics)


def _seeded(sampling: Sampling, choice: int) -> Sampling:
    """Choices of one seed differ from each other, and from those of the next seed."""
    if sampling.seed is None or choice == 0:
        return sampling
    return replace(sampling, seed=Random(f"{sampling.seed} {choice}").getrandbits(63))  # noqa: S311  # guards nothing


def _salt(service: Service, wanted: Wanted) -> bytes | None:
    """With whom a prompt's pages may be shared: equal prompts of any call, other choices of its own, or nobody."""
    if service.settings.prefix_cache:
        return salt_of(service, wanted)
    return secrets.token_bytes(32) if wanted.n > 1 else None


def salt_of(service: Service, wanted: Wanted) -> bytes:
    """Digest of all that keys and values depend on besides tokens: backbone, adapter contents, weights per layer."""
    digest = hashlib.blake2b(digest_size=32)
    backbone = service.backbone.fingerprint
    digest.update(
        f"{backbone.architecture} {backbone.config_digest} {backbone.weights_digest} {backbone.dtype}".encode()
    )
    for manifest, weights in sorted(wanted.composed.parts, key=lambda part: part[0].digest):
        digest.update(manifest.digest.encode())
        digest.update(weights.tobytes())
    return digest.digest()
