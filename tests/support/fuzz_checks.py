"""How far a call may lie from the fp64 oracle, by rounding alone, and whether it lies closer.

Shapes: B batch, H heads, S sequence, N tiles, K kept tiles, D head_dim.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass, field
from unittest import mock

import torch

from fuzz_cases import Case, make_tensors
from oracle import SCORES, attention, quarter_means, tile_means
from vsa_diffusers import selection, torch_backward, torch_impl, video_sparse_attention

# Half the distance between 1 and the next number.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST = {torch.float64: 0.0, torch.float32: 1e-38, torch.float16: 2.0**-24, torch.bfloat16: 1e-38}
# Sums of n random terms err by about sqrt(n) roundings, and n is at most a few thousand here; of equal terms, by n.
SUMS = 16
# Weights, products with them, and the output are rounded one after another.
STEPS = 4
# The kernels multiply means of 16-bit inputs with 11 bits.
MEANS_IN_KERNELS = 2.0**-10
# Where rounding could change weights by more than this, a comparison says nothing.
TOO_VAGUE = 0.05


class Wrong(AssertionError):
    """What a case shows to be wrong."""


@dataclass
class Report:
    """What was compared. `errors`: worst error by dtype and kind, relative to the size of what was added up."""

    cases: int = 0
    rows: int = 0
    vague_rows: int = 0
    choices: int = 0
    near_ties: int = 0
    random_choices: int = 0  # near-ties included, where inputs are random and of the usual size
    random_near_ties: int = 0
    errors: dict[tuple[str, str], float] = field(default_factory=dict)
    closest: float = 0.0  # worst error as a share of what is allowed
    failures: list[str] = field(default_factory=list)

    def note(self, what: str, dtype: torch.dtype, error: float, share: float) -> None:
        """Remember an error and its share of what is allowed, if they are the worst so far."""
        key = str(dtype).removeprefix("torch."), what
        self.errors[key] = max(self.errors.get(key, 0.0), error)
        self.closest = max(self.closest, share)

    def summary(self) -> str:
        """One line."""
        errors = ", ".join(f"{dtype} {what} {error:.1e}" for (dtype, what), error in sorted(self.errors.items()))
        return (
            f"{self.cases} cases, {len(self.failures)} failures; {self.rows} rows compared, {self.vague_rows} excluded "
            f"({self.vague_rows / max(1, self.rows + self.vague_rows):.2%}) as rounding alone could change them; "
            f"{self.choices} selections compared, {self.near_ties} excluded "
            f"({self.near_ties / max(1, self.choices + self.near_ties):.2%}, of random inputs "
            f"{self.random_near_ties / max(1, self.random_choices):.2%}) as near-ties; "
            f"worst relative error: {errors}; worst share of the tolerance: {self.closest:.2f}"
        )


@contextlib.contextmanager
def memory_full_of_nan():
    """New memory holds NaN, so that an element that nobody wrote is found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operations without a deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def chunks_of(size: int):
    """The PyTorch implementation works on chunks of at least so many bytes."""
    with contextlib.ExitStack() as stack:
        for module in (selection, torch_impl, torch_backward):
            stack.enter_context(mock.patch.object(module, "MIN_CHUNK_BYTES", size))
        yield


def check(case: Case, implementation: str, device: str, report: Report, *, gradients: bool) -> None:
    """Run a case and raise `Wrong` where it is not what the oracle says."""
    tensors = make_tensors(case, device)
    *given, mask = tensors
    leaves = [x.detach().requires_grad_() for x in given if x is not None]
    query, key, value, gate = (*leaves, None)[:4]
    options = {"gate": gate, "context_mask": mask, "implementation": implementation, **case.call()}
    with chunks_of(case.chunk_bytes), memory_full_of_nan():
        output = video_sparse_attention(query, key, value, case.video_shape, **options)
        indices = output.grad_fn.saved_tensors[5]
        if implementation != "torch" or case.seed % 4 == 0:
            with torch.no_grad():
                alone = video_sparse_attention(query, key, value, case.video_shape, **options)
            if not alone.equal(output):
                raise Wrong("the output without gradients is another")
    if (output.shape, output.dtype) != (query.shape, query.dtype):
        raise Wrong(f"an output {output.dtype} {tuple(output.shape)}")
    with torch.no_grad():
        exact = _Exact(case, query, key, value, gate, mask, implementation != "torch")
        kept = exact.check_selection(indices, report)
        exact.check_output(output, kept, report)
    if gradients:
        grad_output = torch.randn(
            query.shape, generator=torch.Generator(device).manual_seed(case.seed + 1), device=device
        )
        grad_output = grad_output.to(case.dtype)
        with chunks_of(case.chunk_bytes), memory_full_of_nan():
            grads = torch.autograd.grad(output, leaves, grad_output)
        exact.check_gradients(grads, grad_output, kept, report)
    report.cases += 1


class _Exact:
    """The inputs of a call, and how far their logits may be off."""

    def __init__(self, case: Case, query, key, value, gate, mask, in_kernels: bool):
        self.case, self.in_kernels = case, in_kernels
        self.tensors = query, key, value, gate, mask
        self.grid, self.kept = case.settled
        self.wide = max(case.dtype, torch.float32, key=lambda dtype: dtype.itemsize)
        self.unit, self.wide_unit = ROUNDING[case.dtype], ROUNDING[self.wide]
        self.sums = (SUMS + query.shape[1] / 2) * self.wide_unit  # of weighted values
        self.form = {"block_size": self.grid.block_size, "before": case.context[0]}
        scale = abs(case.logit_scale)
        norms = [x.detach().double().norm(dim=-1).transpose(1, 2) for x in (query, key)]  # [B, H, S]
        means = [tile_means(x.detach(), self.grid.video_shape, **self.form).norm(dim=-1) for x in (query, key)]
        longest = norms[1].amax(-1, keepdim=True)
        # Products of tokens are added up in fp32, or fp64.
        tokens = SUMS * self.wide_unit * scale * norms[0] * longest
        self.means = tokens.amax(-1, keepdim=True)  # [B, H, 1]: how far logits between means may be off
        if in_kernels and case.dtype.itemsize == 2:
            highest = [x.amax(-1, keepdim=True) for x in means]
            self.means = self.means + MEANS_IN_KERNELS * scale * highest[0] * highest[1]
        # A pooled key is rounded as the inputs are, and so is its weight in PyTorch.
        if case.combine == "merge":
            pooled = self.unit * scale * norms[0] * means[1].amax(-1, keepdim=True)
            tokens = tokens + pooled + self.unit * math.log(max(2, self.grid.tile_capacity))
        self.logits = tokens + (self.means if case.combine in ("gate", "sum") else 0)  # [B, H, S]

    def check_selection(self, indices: torch.Tensor, report: Report) -> torch.Tensor:
        """Ascending and distinct, and no tile left out scores higher than one kept by more than rounding can tell."""
        query, key, *_ = self.tensors
        batch, _, heads, _ = query.shape
        if indices.shape != (batch, heads, self.grid.num_tiles, self.kept) or indices.dtype != torch.int32:
            raise Wrong(f"indices {indices.dtype} {tuple(indices.shape)}")
        if not ((indices >= 0) & (indices < self.grid.num_tiles)).all() or not (indices.diff(dim=-1) > 0).all():
            raise Wrong("indices are not ascending tiles")
        score = SCORES[self.case.selection]
        scores = score(query, key, self.grid.video_shape, scale=self.case.logit_scale, **self.form)
        kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(3, indices.long(), True)
        if self.kept < self.grid.num_tiles:
            doubt = 2 * self._score_rounding(query, key)
            ranked = scores.sort(-1, descending=True).values
            near = ranked[..., self.kept - 1] - ranked[..., self.kept] <= doubt
            missed = scores.masked_fill(kept, -math.inf).amax(-1) - scores.masked_fill(~kept, math.inf).amin(-1)
            report.near_ties += int(near.sum())
            report.choices += int((~near).sum())
            if self.case.content == "normal" and self.case.spread >= 1 and abs(self.case.logit_scale) > 0.01:
                report.random_near_ties += int(near.sum())
                report.random_choices += near.numel()
            if not (missed <= doubt).all():
                raise Wrong(
                    f"a tile left out scores higher than one kept by {float((missed - doubt).max()):.2e} too much"
                )
        return kept

    def _score_rounding(self, query, key) -> torch.Tensor:
        """How far scores may be off, `[B, H, 1]`."""
        if self.case.selection == "mean":
            return self.means
        quarters = [quarter_means(x, self.grid.video_shape, **self.form)[0].norm(dim=-1) for x in (query, key)]
        highest = [x.amax(-1, keepdim=True) for x in quarters]
        largest = SUMS * self.wide_unit * (math.log(self.grid.tile_capacity) * 2 + 1)
        products = SUMS * self.wide_unit
        if self.in_kernels and self.case.dtype.itemsize == 2:  # quarters are rounded as the inputs are
            products += 2 * self.unit + MEANS_IN_KERNELS
        return self.means + products * abs(self.case.logit_scale) * highest[0] * highest[1] + largest

    def _attention(self, query, key, value, gate, mask, kept):
        form = self.form | {"combine": self.case.combine, "scale": self.case.logit_scale}
        return attention(query, key, value, gate, mask, kept, self.grid.video_shape, **form)[0]

    def check_output(self, output: torch.Tensor, kept: torch.Tensor, report: Report) -> None:
        """Every row errs by no more than roundings of what it adds up; the oracle has the sizes in one more column."""
        query, key, value, gate, mask = (None if x is None else x.detach() for x in self.tensors)
        sized = torch.cat([value.double(), value.double().norm(dim=-1, keepdim=True)], -1)
        if gate is not None:
            gate = torch.cat([gate.double(), gate.double().abs().amax(-1, keepdim=True)], -1)
        right = self._attention(query, key, sized, gate, mask, kept)
        right, size = right[..., :-1], right[..., -1].abs()
        # Weights and outputs below the smallest numbers vanish.
        lost = output.shape[-1] + sized[..., -1].sum(1, keepdim=True)
        size = size + SMALLEST[self.case.dtype] / self.unit * lost
        error = (output.double() - right).norm(dim=-1) / size.clamp_min(1e-300)
        allowed = STEPS * self.unit + self.sums + 2 * self.logits.transpose(1, 2)
        fits = right.abs().amax(-1) < torch.finfo(self.case.dtype).max / 4
        clear = (allowed < TOO_VAGUE) & fits
        report.rows += int(clear.sum())
        report.vague_rows += int((~clear).sum())
        if not output[fits].isfinite().all():
            raise Wrong("the output is not finite")
        self._judge("output", error[clear], allowed[clear], report)

    def check_gradients(self, grads, grad_output: torch.Tensor, kept: torch.Tensor, report: Report) -> None:
        """Every head's gradients err by no more than roundings of the largest summands."""
        *given, mask = self.tensors
        exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
        leaves = [x for x in exact if x is not None]
        output = self._attention(*exact, mask, kept)
        right = torch.autograd.grad(output, leaves, grad_output.double())
        # Gradients of equal keys cancel, so that the roundings of all summands are left of them.
        allowed = 2 * STEPS * self.unit + 2 * self.sums + 4 * self.logits.amax(-1)  # [B, H]
        query, key, value = (x.detach().double().norm(dim=-1).amax(1) for x in given[:3])  # [B, H]
        scale = abs(self.case.logit_scale)
        into = grad_output.double().norm(dim=-1).amax(1)
        gates = 1.0 if exact[3] is None else exact[3].detach().abs().amax((1, 3)).clamp_min(1.0)
        largest = (scale * into * value * key * gates, scale * into * value * query * gates, into * gates, into * value)
        # The gradient of a weight is rounded as the inputs are, before the scale: it may be too large, or vanish.
        most = torch.finfo(self.case.dtype).max / 4
        holds = 2 * into * value * gates < most
        lost = SMALLEST[self.case.dtype] / self.unit * output.shape[1]
        names = ("query", "key", "value", "gate")
        factors = (scale * key, scale * query, 1.0, 1.0)
        # An output that overflowed has no gradient.
        sound = (allowed < TOO_VAGUE) & (output.detach().abs().amax((1, 3)) < most)
        for name, ours, theirs, summand, factor in zip(names, grads, right, largest, factors, strict=False):
            clear = sound & (theirs.abs().amax((1, 3)) < most)
            if name in ("query", "key"):
                clear &= holds
            size = theirs.norm(dim=(1, 3)) + summand + lost * (1 + factor)
            error = (ours.double() - theirs).norm(dim=(1, 3)) / size.clamp_min(1e-300)
            report.rows += int(clear.sum())
            report.vague_rows += int((~clear).sum())
            self._judge(f"gradient of {name}", error[clear], allowed[clear], report)

    def _judge(self, what: str, error: torch.Tensor, allowed: torch.Tensor, report: Report) -> None:
        if not error.numel():
            return
        share = error / allowed
        report.note(what.split(maxsplit=1)[0], self.case.dtype, float(error.max()), float(share.max()))
        if not (share <= 1).all():
            worst = int(share.nan_to_num(math.inf).argmax())
            raise Wrong(f"{what} is off by {float(error[worst]):.2e} where {float(allowed[worst]):.2e} is allowed")
