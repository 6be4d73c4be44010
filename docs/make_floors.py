"""The tables of floors, of wasted work and of gradients in `docs/lab/floors.md`: pure arithmetic, no GPU.

python docs/make_floors.py          # prints those that are no longer current
python docs/make_floors.py --write  # and puts them into the page
"""

import math

import torch

from make_tables import Table, line, main, spaced
from vsa_diffusers.bench.shapes import SHAPES
from vsa_diffusers.tiles import TileGrid, fitting_block_size

MATRIX_FLOPS = 790e12
COPY_BYTES = 4.3e12
RATIOS = (0.5, 0.3, 0.2, 0.1)


def tables() -> list[Table]:
    """All three."""
    page = "docs/lab/floors.md"
    return [
        Table(page, "Forward", floors()),
        Table(page, "Forward", waste(), 1),
        Table(page, "Backward", gradients()),
    ]


def floors() -> list[str]:
    """Milliseconds for the products, dense and per ratio, and for moving query, key, value, gate and output once."""
    lines = []
    for name, shape in SHAPES.items():
        dense = shape.dense_flops / MATRIX_FLOPS * 1e3
        moved = 5 * 2 * shape.batch * shape.heads * shape.head_dim * shape.tokens / COPY_BYTES * 1e3
        cells = [f"{dense:.3f}", *(f"{dense * ratio:.3f}" for ratio in RATIOS), f"{moved:.3f}"]
        lines.append(line([name, spaced(shape.tokens), *cells]))
    return lines


def waste() -> list[str]:
    """Rows and keys that the kernel works on, over those there are, for (4, 4, 4) and for the automatic block."""
    lines = []
    for name, shape in SHAPES.items():
        grid = TileGrid(shape.video_shape, (4, 4, 4))
        rows, keys = _excess(grid)
        block = fitting_block_size(shape.video_shape)
        automatic = math.prod(_excess(TileGrid(shape.video_shape, block)))
        cells = (f"{rows:.2f}", f"{keys:.2f}", f"{rows * keys:.2f}", str(block), f"{automatic:.2f}")
        lines.append(line([name, spaced(grid.num_tiles), *cells]))
    return lines


def gradients() -> list[str]:
    """Milliseconds of the backward pass per ratio: its five products, and the seven that the two kernels make.

    And for moving query, key, value, gate, output and its gradient in, and four gradients out.
    """
    lines = []
    for name, shape in SHAPES.items():
        dense = shape.dense_flops / MATRIX_FLOPS * 1e3
        moved = 10 * 2 * shape.batch * shape.heads * shape.head_dim * shape.tokens / COPY_BYTES * 1e3
        cells = [f"{dense * ratio * 2.5:.2f} / {dense * ratio * 3.5:.2f}" for ratio in RATIOS]
        lines.append(line([name, f"{dense * 2.5:.2f}", *cells, f"{moved:.2f}"]))
    return lines


def _excess(grid: TileGrid) -> tuple[float, float]:
    sizes = (grid.token_index() >= 0).sum(1)
    rows = grid.num_tiles * 2 ** math.ceil(math.log2(grid.tile_capacity))
    keys = int((torch.ceil(sizes / 16) * 16).sum())
    return rows / grid.num_tokens, keys / grid.num_tokens


if __name__ == "__main__":
    main(tables())
