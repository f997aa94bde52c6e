"""A forward on the CPU, recorded once and played again without Python's part in it: what a CUDA graph is on a GPU.

`record` runs a forward and notes what computes in it: torch's operators, which a dispatch mode sees, and the calls of
our own kernels, which come through `call`. Everything they make lies in an `Arena`, where it lies again when the tape
plays. So a forward can be played that depends on nothing but the content of tensors that stay where they are; where
Python looks at a number of a tensor, there is no tape. What looks past torch (`tolist`) is not seen: whoever records
must compare what is played with a forward.

Between layers a step streams hundreds of megabytes, and Python's own objects are out of the caches each time it goes
on: a step of 8 layers spends 4 to 5 ms in Python, its tape 0.5 ms (Zen 4).
"""

import ctypes
import enum
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disabled_modes  # no public way

from adapters_store import compiled, pointwise
from adapters_store.arena import Arena, Room

_TAKING = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
_VARYING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}

P = ParamSpec("P")
T = TypeVar("T")
KernelCall = tuple[Any, ctypes.Structure]  # a C function and the struct that it takes


class _Effect(enum.Enum):
    """What an operator does."""

    WRITES = enum.auto()  # into what it is given
    LOOKS = enum.auto()  # at what it is given, from another side; some copy it if they must
    TAKES = enum.auto()  # memory, whose numbers mean nothing yet
    MAKES = enum.auto()  # something new
    VARIES = enum.auto()  # in what it gives: by the numbers, or by chance; dropout, if it is off, is not there


@functools.cache
def _effect_of(operator: OpOverload) -> _Effect:
    schema = operator._schema  # noqa: SLF001  # no public way to ask
    if schema.is_mutable:
        return _Effect.WRITES
    if any(given.alias_info for given in schema.returns):
        return _Effect.LOOKS
    if not _VARYING.isdisjoint(operator.tags):
        return _Effect.VARIES
    return _Effect.TAKES if schema.name in _TAKING else _Effect.MAKES


class _Call(ctypes.Structure):
    """The C struct `call`."""

    _fields_ = [("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p)]


class _Kernels:
    """Calls of kernels one behind the other, as one call (tape.c)."""

    def __init__(self, calls: Sequence[KernelCall]) -> None:
        self._kept = calls
        addresses = [
            (ctypes.cast(kernel, ctypes.c_void_p).value, ctypes.addressof(arguments)) for kernel, arguments in calls
        ]
        self._calls = (_Call * len(calls))(*(_Call(*pair) for pair in addresses))
        self._play = _load().play

    def __call__(self) -> None:
        failed = self._play(self._calls, len(self._calls))
        if failed:
            name = getattr(self._kept[failed - 1][0], "__name__", "a kernel")
            raise MemoryError(f"{name} found no memory for its work")


@functools.cache
def _load() -> Any:
    """The library that plays; raises one of compiled.FAILURES."""
    library = ctypes.CDLL(str(compiled.build("tape", [Path(__file__).with_name("tape.c")])))
    library.play.argtypes, library.play.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    return library


class Tape:
    """What was recorded. Valid while all tensors live on that the forward did not make itself."""

    def __init__(self, calls: Sequence[Callable[[], Any] | KernelCall], kept: Sequence[Any], result: Tensor) -> None:
        """calls: operators to call, and kernels with their arguments, which may point to what is kept.

        result: what the forward gave, in the arena.
        """
        self.num_calls = len(calls)
        self._kept = kept
        self._runs: list[Callable[[], Any]] = []
        kernels: list[KernelCall] = []
        for call in calls:
            if isinstance(call, tuple):
                kernels.append(call)
                continue
            self._runs += [_Kernels(kernels), call] if kernels else [call]
            kernels = []
        self._runs += [_Kernels(kernels)] if kernels else []
        self.result = result

    def play(self) -> Tensor:
        """Compute everything again; what the forward gives, until this or another tape of its arena plays.

        Raises MemoryError if a kernel finds no memory.
        """
        for run in self._runs:
            run()
        return self.result


class _Recording(threading.local):
    now: "_Recorder | None" = None


_recording = _Recording()


def call(kernel: Any, arguments: ctypes.Structure) -> int:
    """Call a kernel, a C function of one struct, which gives 0 or tells that it failed; only note it while recording.

    arguments: numbers, and addresses of what outlives the tape or lies in tensors that the forward made.
    """
    recorder = _recording.now
    if recorder is not None:
        recorder.calls.append((kernel, arguments))
        return 0
    failed: int = kernel(ctypes.byref(arguments))
    return failed


def last() -> Callable[[], Any] | KernelCall | None:
    """What this thread has noted last; None if it does not record."""
    calls = _recording.now.calls if _recording.now else []
    return calls[-1] if calls else None


def note_before_last(noted: KernelCall) -> None:
    """While recording, note a call in front of the last one."""
    if _recording.now is not None:
        _recording.now.calls.insert(-1, noted)


def apart(check: Callable[P, T]) -> Callable[P, T]:
    """Let a function run for itself while this thread records: what checks a kernel at its first use, say."""

    @functools.wraps(check)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if _recording.now is None:
            return check(*args, **kwargs)
        before, _recording.now = _recording.now, None
        try:
            with disabled_modes():
                return check(*args, **kwargs)
        finally:
            _recording.now = before

    return run


def record(forward: Callable[[], Tensor], arena: Arena) -> Tape | str:
    """The tape of a forward, or why there is none. What the forward computes meanwhile means nothing.

    Kernels do not run: Python goes through all layers at once and stays in the caches.
    """
    recorder = _recording.now = _Recorder(arena)
    try:
        with recorder:
            result = forward()
    except Exception as error:  # noqa: BLE001  # it may not bear numbers that mean nothing
        return f"{type(error).__name__}: {error}"
    finally:
        _recording.now = None
    if recorder.failure is None and not arena.holds(result):
        return "what it gives is not of its making"
    return recorder.failure or Tape(recorder.calls, recorder.kept, arena.standing(result))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own lack types
    """Runs each operator, moves what it made into the arena, and notes how to make it there again."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], Any] | KernelCall] = []
        self.kept: list[Any] = []  # views of what lies outside the arena: kernels know them by address only
        self.failure: str | None = None
        self._arena, self._room = arena, Room(arena)

    def __torch_dispatch__(
        self, operator: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result, does = operator(*args, **kwargs), _effect_of(operator)
        if self.failure is not None:
            return result
        if does in (_Effect.LOOKS, _Effect.VARIES) and _is_part_of(result, args):
            self.kept += [] if self._arena.holds(args[0]) else [result]
            return result
        if does is _Effect.WRITES:
            self._note(operator, args, kwargs)
            return result
        if does is _Effect.VARIES or not isinstance(result, Tensor):
            self.failure = f"{operator} does not give a tensor of the same shape each time"
            return result
        return self._moved(operator, args, kwargs, result, is_filled=does is not _Effect.TAKES)

    def _note(self, operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        standing = self._arena.standing
        self.calls.append(functools.partial(operator, *_mapped(standing, args), **_mapped(standing, kwargs)))

    def _moved(
        self, operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, *, is_filled: bool
    ) -> Tensor:
        """What an operator made, in the arena; noted if its numbers mean something."""
        moved = self._room.like(result)
        if moved is None:
            self.failure = f"what it makes does not fit into {len(self._arena.bytes)} bytes"
            return result
        if is_filled:
            self._note_into(operator, args, kwargs, result, moved)
        return moved

    def _note_into(
        self, operator: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, moved: Tensor
    ) -> None:
        """Note how `moved` is filled: by a kernel, by the operator if it writes the same bits there, or by a copy."""
        kernel = pointwise.call_of(operator, args, kwargs, moved)
        if kernel is not None:
            return self.calls.append(kernel)
        form = _writing_form(operator)
        if form is not None:
            form(*args, **kwargs, out=moved)
            if _same_bits(moved, result):
                return self._note(form, args, {**kwargs, "out": moved})
        moved.copy_(result)
        return self._note(functools.partial(_copied, operator), (moved, *args), kwargs)


def _copied(operator: Callable[..., Tensor], into: Tensor, *args: Any, **kwargs: Any) -> None:
    into.copy_(operator(*args, **kwargs))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """True also for numbers that are none."""
    a, b = (part.contiguous().flatten().view(torch.uint8) for part in (a, b))
    return torch.equal(a, b)


@functools.cache
def _writing_form(operator: OpOverload) -> OpOverload | None:
    """The overload with the same arguments and `out`, if there is one."""
    packet, wanted = operator.overloadpacket, _arguments(operator)
    for name in packet.overloads():
        other: OpOverload = getattr(packet, name)
        if _arguments(other) == [*wanted, ("out", "Tensor")]:
            return other
    return None


def _arguments(operator: OpOverload) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in operator._schema.arguments]  # noqa: SLF001


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same with every tensor changed, in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(change, part) for part in value)
    if isinstance(value, dict):
        return {name: _mapped(change, part) for name, part in value.items()}
    return value


def _is_part_of(result: Any, args: tuple[Any, ...]) -> bool:
    """True if what an operator gave is a view, or views, of its first argument."""
    parts = result if isinstance(result, list | tuple) else [result]
    if not all(isinstance(part, Tensor) for part in (*args[:1], *parts)):
        return False
    storage = args[0].untyped_storage().data_ptr()
    return all(part.untyped_storage().data_ptr() == storage for part in parts)
