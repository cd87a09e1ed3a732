"""Documents that share a sequence and do not see each other."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apt_model.layers.backend import eager_on_cpu


@functools.cache
def varlen() -> Callable[..., Tensor] | None:
    """Return torch's causal attention over documents of any lengths, for CUDA in 16 bits; None: this torch has none."""
    try:
        from torch.nn.attention import varlen as found  # heavy, and not in every torch
    except ImportError:
        return None
    known = inspect.signature(found.varlen_attn).parameters
    return found.varlen_attn if {"window_size", "enable_gqa"} <= {*known} else None  # type: ignore[return-value]


Attention = Callable[..., Tensor]


class Group(NamedTuple):
    """Documents that are computed as sequences of one length; what is behind a shorter one's end nothing sees."""

    number: int
    length: int


class Layout(NamedTuple):
    """Where the positions of a batch are computed: ``taken`` of all positions, in groups one after the other.

    A place behind a document's end takes its last position once more. ``back`` is where each position is found again.
    """

    groups: list[Group]
    taken: Tensor  # (places,) int64
    back: Tensor  # (batch x seq,) int64
    fill: Tensor  # places behind ends


class Documents:
    """Which positions of a batch belong to one document, and their places in it.

    Args:
        numbers: (batch, seq), any integers: equal and side by side where positions are of one document.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        index = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        self.first = torch.where(begins, index, 0).cummax(dim=1).values
        """(batch, seq) int64: where each position's document begins."""
        self.positions = index - self.first
        """(batch, seq) int64: from 0 in each document."""

    @functools.cached_property
    def _lengths(self) -> tuple[Tensor, Tensor]:
        """Where documents begin, of all positions, and their lengths; on CUDA that waits for the device."""
        begins = (self.positions.flatten() == 0).nonzero().flatten()
        return begins, begins.diff(append=begins.new_tensor([self.positions.numel()]))

    @functools.cached_property
    def layout(self) -> Layout | None:
        """How the CPU computes them; None: each sequence is one document."""
        length = self.numbers.shape[1]
        begins, lengths = self._lengths
        if len(begins) == self.numbers.shape[0]:
            return None
        steps = 2.0 ** (lengths.double().log2().floor() - 2).clamp(min=2)  # at most a quarter more than there is
        rounded = (torch.ceil(lengths / steps) * steps).long().clamp(max=length)
        order = rounded.argsort(stable=True)
        begins, lengths, rounded = begins[order], lengths[order], rounded[order]
        kinds, counts = torch.unique_consecutive(rounded, return_counts=True)
        groups = [Group(*sizes) for sizes in zip(counts.tolist(), kinds.tolist(), strict=True)]
        place = torch.arange(int(rounded.sum())) - (rounded.cumsum(0) - rounded).repeat_interleave(rounded)
        last = (lengths - 1).repeat_interleave(rounded)
        taken = begins.repeat_interleave(rounded) + torch.minimum(place, last)
        fill = (place > last).nonzero().flatten()
        back = torch.empty(self.numbers.numel(), dtype=torch.int64)
        real = (place <= last).nonzero().flatten()
        back[taken[real]] = real
        return Layout(groups, taken, back, fill)

    @property
    def padding(self) -> float:
        """Places that attention on the CPU computes for nothing, for each position."""
        return 0.0 if self.layout is None else len(self.layout.fill) / self.numbers.numel()

    @functools.cached_property
    def packed(self) -> tuple[Tensor, int]:
        """Where documents begin, and all end, (documents + 1,) int32, and the most positions that one may have."""
        begins, _ = self._lengths
        total = begins.new_tensor([self.numbers.numel()])
        return torch.cat((begins, total)).to(torch.int32), self.numbers.shape[1]


def sums_within(documents: Documents, x: Tensor) -> Tensor:
    """Return for each position of ``x`` (batch, seq, width) the sum from its document's begin up to it, in float32."""
    sums = x.double().cumsum(dim=1)  # a small difference of large sums
    before = sums.roll(1, dims=1).index_fill(1, torch.zeros(1, dtype=torch.int64, device=x.device), 0.0)
    return (sums - before.gather(1, documents.first.unsqueeze(2).expand_as(sums))).float()


def attention(
    attend: Attention, query: Tensor, key: Tensor, value: Tensor, window: int | None, documents: Documents
) -> Tensor:
    """Causal attention in which a position sees those of its own document.

    On the CPU documents of about one length are sequences of one call of ``attend``: exact, for a position sees none behind it.
    On CUDA, in 16 bits, it is torch's kernel for any lengths. Else, and compiled, ``attend`` masks what is not to be seen.

    Args:
        attend: one of :data:`apt_model.layers.attention.ATTENTION`; for the others see :func:`apt_model.layers.attention.sdpa`.
    """
    if eager_on_cpu(query):
        return _in_groups(attend, query, key, value, window, documents)
    in_16_bits = attend.__name__ == "sdpa" and query.dtype.itemsize == 2 and not torch.compiler.is_compiling()
    if in_16_bits and (kernel := varlen()) is not None:
        begins, longest = documents.packed
        flat = map(_flat, (query, key, value))
        more: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
        sees = (-1 if window is None else window - 1, 0)
        flat_mixed = kernel(*flat, begins, begins, longest, longest, window_size=sees, **more)
        return _in_sequences(flat_mixed, documents)
    return attend(query, key, value, window, documents.numbers)


def _in_groups(
    attend: Attention, query: Tensor, key: Tensor, value: Tensor, window: int | None, documents: Documents
) -> Tensor:
    layout = documents.layout
    if layout is None:
        return attend(query, key, value, window)
    sizes = [group.number * group.length for group in layout.groups]
    parts = []
    there, back = layout.taken, layout.back
    taken = [torch.split(_Moved.apply(_flat(x), there, back, None), sizes) for x in (query, key, value)]  # type: ignore[no-untyped-call]
    for group, *some in zip(layout.groups, *taken, strict=True):
        of_group = (x.view(*group, *x.shape[1:]).transpose(1, 2) for x in some)
        parts.append(attend(*of_group, window).transpose(1, 2).flatten(0, 1))
    mixed: Tensor = _Moved.apply(torch.cat(parts), back, there, layout.fill)  # type: ignore[no-untyped-call]
    return _in_sequences(mixed, documents)


def _flat(x: Tensor) -> Tensor:
    """Return (batch, heads, seq, head_dim) as (batch x seq, heads, head_dim)."""
    return x.transpose(1, 2).flatten(0, 1)


def _in_sequences(x: Tensor, documents: Documents) -> Tensor:
    """Do the opposite."""
    return x.view(*documents.numbers.shape, *x.shape[1:]).transpose(1, 2)


class _Moved(torch.autograd.Function):
    """Rows of ``x`` in the order of ``there``; gradients come by ``back``, where each is found again, and are 0 at ``fill``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, fill: Tensor | None) -> Tensor:
        ctx.back, ctx.fill = back, fill
        return x.index_select(0, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        found = grad.index_select(0, ctx.back)
        return found if ctx.fill is None else found.index_fill_(0, ctx.fill, 0), None, None, None
