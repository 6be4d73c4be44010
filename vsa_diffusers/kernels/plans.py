"""How a call runs: what `plan` in `tuning.py` settles, and the launchers do without asking again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """How a kernel runs that walks lists of tiles.

    Args:
        layout: where it reads the rows that it walks: `"direct"` from the call's tensors, `"tiled"` from a copy in tile
            order, `"descriptor"` from that copy through tensor descriptors (compute capability 9.0 or later).
        warps, stages: warps of a program, and buffers of its main loop's pipeline.
        keys: keys of one step (queries, where it walks those), at most; a power of two.
        registers: most registers of a thread, so that more programs share a multiprocessor (CUDA only).
        partial_stages: buffers where it walks partial tiles.
        partial_keys: as `keys`, where it walks partial tiles and context tokens.
        programs: of the Hopper kernel, which takes query tiles in turns, where it can run; 0: not that kernel.
        sync_chunks: chunks of each tile list. All programs of the Hopper kernel synchronise before each chunk, so that
            they share keys in L2; 0: no synchronisation.
    """

    layout: str = "direct"
    warps: int = 4
    stages: int = 2
    keys: int = 64
    registers: int | None = None
    partial_stages: int = 1
    partial_keys: int = 128
    programs: int = 0
    sync_chunks: int = 0

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launcher takes of it."""
        return _options(self.warps, self.stages, self.registers)

    @property
    def reads_copy(self) -> bool:
        """Whether it reads a copy in tile order."""
        return self.layout != "direct"


@dataclass(frozen=True)
class BlockLaunch:
    """How a kernel runs that takes a block of `block_m` rows and walks the others, `block_n` in a step."""

    block_m: int
    block_n: int
    warps: int
    stages: int | None = None
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launcher takes of it."""
        return _options(self.warps, self.stages, self.registers)


@dataclass(frozen=True)
class TopKLaunch:
    """How the top-k runs: scores of a row at once, and key tiles that it compacts and lists at a time."""

    keys: int
    chunk: int
    list_chunk: int
    warps: int


@dataclass(frozen=True)
class HopperLaunch:
    """How the Hopper kernel runs.

    Args:
        programs: they take query tiles in turns.
        stages: pairs of key and value buffers.
        warps, registers: of the consumer warps, and per thread of all warps on average.
        producer_warps: where all is fetched through descriptors, and where some rows are fetched one by one.
        producer_registers: of a producer thread; consumers get what that leaves.
        sync_chunks: as in `Launch`.
    """

    programs: int
    stages: int
    warps: int
    registers: int
    producer_warps: tuple[int, int]
    producer_registers: int
    sync_chunks: int


@dataclass(frozen=True)
class Plan:
    """How one forward call runs. Where `hopper` is given, that kernel takes the video queries instead of `sparse`."""

    sparse: Launch
    hopper: HopperLaunch | None
    context: Launch | None  # of the launch that takes the context queries, where they need one of their own
    heads: int  # heads that go through all kernels at a time
    precision: str  # of the products between tile means
    pool_warps: int
    scores: BlockLaunch
    quarter_scores: BlockLaunch
    top_k: TopKLaunch
    workspace_bytes: int  # for scores


@dataclass(frozen=True)
class BackwardLaunch:
    """How the two large kernels of the backward pass run.

    Args:
        query: the gradient of the query, which reads key and value.
        key: the gradients of key and value, which read query and the output's gradient.
    """

    query: Launch
    key: Launch


@dataclass(frozen=True)
class BackwardPlan(BackwardLaunch):
    """How one backward call runs."""

    heads: int  # heads that go through all kernels at a time
    precision: str  # of products of tile means
    pool_warps: int
    coarse: BlockLaunch
    preprocess_warps: int
    rebuild: BlockLaunch
    transpose: BlockLaunch
    order: BlockLaunch
    pooled: BlockLaunch
    pooled_splits: int  # parts of the query tiles, each a program of its own for every block of pooled keys


def _options(warps: int, stages: int | None, registers: int | None) -> dict[str, int]:
    given = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    return {name: number for name, number in given.items() if number is not None}
