"""Sites: the places of a backbone where adapters act, attached by name to any nn.Module.

Attaching swaps the class of each linear layer and norm for a subclass whose forward adds what the current batch's
mixes contribute: out = y + sum_k w_k * delta_k(x, y). Names, parameters and state_dict stay as they were, and with no
batch set the forward is the original one. Training and serving run through these same objects.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from adapters_store import linear_layers, memory, rms_norm
from adapters_store.errors import KeysError, NoSiteError, UnknownSiteError
from adapters_store.mixing import MixedBatch
from adapters_store.places import blocks, is_linear, layers_by_name, widths
from adapters_store.primitives import Bank, Entry, Place, primitive
from adapters_store.primitives.norm import is_norm


class Site:
    """One place and the adapters resident there, by primitive."""

    def __init__(self, owner: "Sites", place: Place) -> None:
        self.owner = owner
        self.place = place
        self.banks: dict[str, Bank] = {}
        self.entries: dict[int, list[Entry]] = {}

    def put(self, slot: int, entries: Sequence[Entry]) -> None:
        """Make an adapter's entries resident under a slot."""
        for entry in entries:
            if entry.primitive not in self.banks:
                bank = primitive(entry.primitive).bank
                self.banks[entry.primitive] = bank(self.place, self.owner.dtype, self.owner.device)
                self.banks = dict(sorted(self.banks.items()))  # sums run in one order, whatever was loaded first
            self.banks[entry.primitive].put(slot, entry)
        if self.owner.keeps_reference:
            self.entries[slot] = list(entries)

    def drop(self, slot: int) -> None:
        """Forget a slot; nothing of it stays behind."""
        for bank in self.banks.values():
            bank.drop(slot)
        self.entries.pop(slot, None)

    def apply(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the current batch's contributions to y, or give y itself if there are none. May change y in place."""
        batch = self.owner.batch
        if batch is None or not batch.active:
            return y
        banks = [bank for bank in self.banks.values() if bank.serves(batch)]
        if not banks and not (self.owner.reference and self.entries):
            return y
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if flat_y.shape[0] != batch.num_tokens:
            raise AssertionError(
                f"our bug: {self.place.name} ran on {flat_y.shape[0]} tokens in a batch of {batch.num_tokens}"
            )
        if self.owner.reference:
            return self._reference(flat_x, flat_y, batch).view_as(y)
        # each delta is of the backbone's own output; and a module may hand on its input, which others still read
        shares = len(banks) > 1 or flat_y.data_ptr() == flat_x.data_ptr()
        out = flat_y.clone() if shares else flat_y
        for bank in banks:
            out = bank.add(out, flat_x, flat_y, batch)
        return out.view_as(y)

    def _reference(self, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """The law, written down: row by row, adapter by adapter."""
        out = y.clone()
        for start, length, index in zip(batch.row_start, batch.lengths, batch.mix_of_row, strict=True):
            rows = slice(start, start + length)
            for pair in range(len(batch.pair_slot)) if index >= 0 else ():
                if batch.pair_mix[pair] != index:
                    continue
                weight = batch.pair_weight[self.place.layer, pair]
                for entry in self.entries.get(int(batch.pair_slot[pair]), ()):
                    delta = primitive(entry.primitive).delta(self.place, entry, x[rows], y[rows])
                    out[rows] += (weight * delta).to(out.dtype)
        return out


class Sites(Mapping[str, Site]):
    """All sites of one backbone, by module path. At most one batch runs at a time."""

    def __init__(self, backbone: nn.Module, hidden_size: int, *, keeps_reference: bool = False) -> None:
        """Attach to every linear layer and norm; other modules on demand (`add`).

        hidden_size: width of hidden states, for modules that do not tell theirs. keeps_reference: also keep entries
        as they came, so that `mixing(…, reference=True)` can run the slow specification.
        """
        parameter = next(backbone.parameters())
        self.backbone = backbone
        self.hidden_size = hidden_size
        self.dtype = parameter.dtype
        self.device = parameter.device
        self.keeps_reference = keeps_reference
        self.batch: MixedBatch | None = None
        self.reference = False
        self.version = 0  # grows with every change of what is attached or resident
        self._running = threading.Lock()
        self._sites: dict[str, Site] = {}
        self._excluded: dict[str, str] = {}
        self._layers = layers_by_name(backbone)
        self.num_layers = max(self._layers.values(), default=0) + 1
        self._swap_all()

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def linear_layers(self) -> list[nn.Module]:
        """Those whose own output linear_layers.py computes, in the backbone's order."""
        modules = (site.place.module for site in self._sites.values())
        return [module for module in modules if _is_plain_linear(type(module).__mro__[1])]

    def _swap_all(self) -> None:
        for name, module in self.backbone.named_modules():
            if is_linear(module) or is_norm(module):
                self._attach(name, module)

    def _attach(self, name: str, module: nn.Module) -> None:
        d_in, d_out = widths(module, self.hidden_size)
        self.version += 1
        site = Site(self, Place(name, module, d_in, d_out, self._layers[name]))
        self._sites[name] = site
        module.__dict__["_espalier_site"] = site
        module.__class__ = _sited(type(module), _forward_of(module))  # type: ignore[arg-type]  # mypy takes nn.Module for unhashable

    def detach(self) -> None:
        """Give every module its own class back."""
        for name in list(self._sites):
            self._release(name)

    def _release(self, name: str) -> None:
        self.version += 1
        module = self._sites.pop(name).place.module
        linear_layers.put_back(module)
        module.__class__ = type(module).__mro__[1]
        del module.__dict__["_espalier_site"]

    def exclude(self, name: str, reason: str) -> None:
        """Serve no adapters at this module; the reason is told to whoever brings one."""
        self._excluded[name] = reason
        if name in self._sites:
            self._release(name)

    def add(self, name: str) -> Site:
        """The site of this name; a block is attached to when first asked for. Raises UnknownSiteError."""
        if name in self._excluded:
            raise UnknownSiteError(f"{name!r} cannot be a site: {self._excluded[name]}")
        if name not in self._sites:
            if name not in blocks(self.backbone):
                some = ", ".join(list(self._sites)[:6])
                raise UnknownSiteError(f"the backbone has no linear layer, norm or block {name!r}; it has {some}, …")
            self._attach(name, self.backbone.get_submodule(name))
        return self._sites[name]

    def check(self, entries: Sequence[Entry]) -> None:
        """Refuse entries that do not fit. Raises UnknownSiteError, ShapeError, KeysError, UnsupportedError."""
        seen = set()
        for entry in entries:
            primitive(entry.primitive).check(self.add(entry.site).place, entry)
            if (entry.site, entry.primitive) in seen:
                raise KeysError(f"two {entry.primitive} entries at {entry.site}: join them (low ranks concatenate)")
            seen.add((entry.site, entry.primitive))

    def put(self, slot: int, entries: Sequence[Entry]) -> None:
        """Make an adapter resident under a slot, at all its sites, in place of what was there.

        Raises NoSiteError if it has no site. Half an adapter never stays.
        """
        if not entries:
            raise NoSiteError("the adapter touches no site of the backbone")
        by_site: dict[str, list[Entry]] = {}
        for entry in entries:
            by_site.setdefault(entry.site, []).append(entry)
        self.drop(slot)
        try:
            with memory.side_by_side(sum(tensor.nbytes for entry in entries for tensor in entry.tensors.values())):
                for name, here in by_site.items():
                    self.add(name).put(slot, here)
                    self.version += 1
        except BaseException:
            self.drop(slot)
            raise

    def drop(self, slot: int) -> None:
        """Forget a slot at all sites."""
        self.version += 1
        for site in self._sites.values():
            site.drop(slot)

    @contextmanager
    def mixing(self, batch: MixedBatch, *, reference: bool = False) -> Iterator[None]:
        """While inside, the backbone's forward runs with this batch's mixes. Not reentrant, by design."""
        if not self._running.acquire(blocking=False):
            raise AssertionError("our bug: two batches at once on one backbone")
        self.batch, self.reference = batch, reference
        try:
            yield
        finally:
            self.batch, self.reference = None, False
            self._running.release()


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """What computes a module's own output: a kernel's where it gives the same."""
    if _is_plain_linear(type(module)):
        return linear_layers.forward
    return rms_norm.forward if is_norm(module) and rms_norm.serves(module) else type(module).forward


def _is_plain_linear(cls: type[nn.Module]) -> bool:
    """True for nn.Linear and transformers' Conv1D, whose subclasses may do something else."""
    return cls is nn.Linear or (cls.__name__ == "Conv1D" and cls.__bases__ == (nn.Module,))


@functools.cache
def _sited(cls: type[nn.Module], own: Callable[..., Any]) -> type[nn.Module]:
    """The subclass of a module class whose forward goes through its site. own: see _forward_of."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        site: Site = self._espalier_site
        if site.owner.batch is None:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, tuple):
            return (site.apply(x, output[0]), *output[1:])
        return site.apply(x, output)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def exclude_odd(sites: Sites, run: Callable[[], object], num_tokens: int) -> None:
    """Exclude the modules that do not see each of the batch's tokens, by watching one forward.

    Norms of single heads, tables of relative positions and experts run on something else; there, a row's mix has no
    meaning, or another one than at training. run: a forward of num_tokens tokens without mixes.
    """
    modules = {name: site.place.module for name, site in sites.items()}
    modules |= {name: sites.backbone.get_submodule(name) for name in blocks(sites.backbone)}
    seen: dict[str, set[int]] = {name: set() for name in modules}
    handles = [modules[name].register_forward_hook(functools.partial(_watch, seen[name])) for name in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name, counts in seen.items():
        if counts != {num_tokens}:
            what = f"runs on {sorted(counts)} vectors" if counts else "does not run"
            sites.exclude(name, f"it {what} in a forward of {num_tokens} tokens")


def _watch(counts: set[int], module: nn.Module, args: object, output: Any) -> None:  # noqa: ARG001  # torch's signature
    first = output[0] if isinstance(output, tuple) else output
    counts.add(first.numel() // first.shape[-1] if isinstance(first, Tensor) else -1)


def num_filled(sites: Sites) -> int:
    """How many (site, slot) pairs are filled: 0 once everything is unloaded. For tests and metrics."""
    return sum(len(bank.slots) for site in sites.values() for bank in site.banks.values())
