"""The inspection where the kernels choose the tiles, in bf16."""

import pytest
import torch

from vsa_diffusers.inspection.observation import dense_output, measure
from vsa_diffusers.problem import Problem
from vsa_diffusers.selection import SELECTIONS
from vsa_diffusers.tiles import TileGrid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA GPU"),
]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("combine", ["merge", "sparse"])
def test_the_kernels_tiles_hold_what_the_order_of_the_selection_says(selection, combine):
    torch.manual_seed(0)
    grid = TileGrid((9, 18, 20), (4, 4, 4))
    query, key, value = (torch.randn(2, grid.num_tokens + 7, 3, 64).cuda().bfloat16() for _ in range(3))
    query = 2 * query + key  # so that some tiles matter more than others
    mask = (torch.arange(7) < torch.tensor([[7], [4]])).cuda()
    tiles = torch.arange(grid.num_tiles)
    for kept in (12, grid.num_tiles):
        problem = Problem(grid, kept, combine, 64**-0.5, 0, 7, selection)
        call = query, key, value, None, mask, problem, "triton"
        found = measure(*call, tiles, 5, dense_output(*call))
        assert found["mass"] <= found["best_mass"] + 1e-3
        if kept == grid.num_tiles:
            assert found["mass"] == pytest.approx(1, abs=1e-4)
            assert found["error"] < 1e-2
        else:
            # Kernels score with 11 bits: of two tiles that score alike the other may be kept.
            torch_found = measure(*call[:-1], "torch", tiles, 5, dense_output(*call))
            assert found["mass"] == pytest.approx(torch_found["mass"], abs=5e-3)
            assert found["error"] == pytest.approx(torch_found["error"], rel=0.05)
