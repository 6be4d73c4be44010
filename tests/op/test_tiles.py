import itertools
import math

import pytest
import torch

from oracle import tile_numbers
from vsa_diffusers.tiles import TileGrid, check_block_size, check_video_shape, fitting_block_size, num_selected_tiles


@pytest.mark.parametrize("video_shape", [(4, 4, 4), (5, 6, 7), (1, 1, 1), (21, 30, 52), (3, 9, 2)])
@pytest.mark.parametrize("block_size", [(4, 4, 4), (3, 5, 4), (1, 8, 8), (1, 1, 1)])
def test_every_token_is_in_one_slot_of_the_tile_that_its_coordinates_name(video_shape, block_size):
    grid = TileGrid(video_shape, block_size)
    index = grid.token_index()
    assert index.shape == (grid.num_tiles, grid.tile_capacity)
    tile, _ = torch.nonzero(index >= 0, as_tuple=True)
    tokens = index[index >= 0]
    assert tokens.sort().values.equal(torch.arange(grid.num_tokens))
    assert tile.equal(tile_numbers(video_shape, block_size)[tokens])
    assert (index >= 0).any(1).all()


def test_tokens_inside_a_tile_are_numbered_t_major():
    index = TileGrid((4, 4, 4), (2, 2, 2)).token_index()
    assert index[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert index[1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]


def test_padding_is_the_share_of_empty_slots():
    assert TileGrid((21, 30, 52), (4, 4, 4)).padding == pytest.approx(1 - 32760 / 39936)
    assert TileGrid((8, 8, 8), (4, 4, 4)).padding == 0


@pytest.mark.parametrize(
    ("ratio", "tiles", "kept"), [(0.1, 30, 3), (0.1, 31, 4), (1.0, 7, 7), (1e-9, 7, 1), (0.5, 1, 1)]
)
def test_kept_tiles_are_the_ceiling_without_float_noise(ratio, tiles, kept):
    assert num_selected_tiles(tiles, ratio) == kept


def test_kept_tiles_agree_with_exact_arithmetic_for_every_percentage():
    for tiles, percent in itertools.product(range(1, 700), range(1, 101)):
        assert num_selected_tiles(tiles, percent / 100) == max(1, math.ceil(percent * tiles / 100 - 1e-12))


@pytest.mark.parametrize("block_size", [(4, 4), (4, 4, 0), (4, 4, 4.5), "444", None, (8, 8, 4), (-1, 4, 4), 4])
def test_a_wrong_block_size_is_named_with_its_value(block_size):
    with pytest.raises(ValueError, match="block_size=") as error:
        check_block_size(block_size)
    assert "(4, 4, 4)" in str(error.value)


def test_a_missing_video_shape_says_what_to_do():
    with pytest.raises(ValueError, match=r"^video_shape must be set: pass the \(T, H, W\) grid"):
        check_video_shape(None)
    for wrong in ((0, 3, 3), (4, 4, float("inf")), (4, 4.5, 4), (4, "4", 4)):
        with pytest.raises(ValueError, match="video_shape="):
            check_video_shape(wrong)


def test_whole_numbers_of_any_kind_become_ints():
    shape = check_video_shape(iter([torch.tensor(5), 6.0, 7]))
    assert shape == (5, 6, 7)
    assert {type(size) for size in shape} == {int}


@pytest.mark.parametrize(
    ("video_shape", "block"),
    [((21, 30, 52), (3, 5, 4)), ((16, 16, 24), (4, 4, 4)), ((1, 30, 52), (1, 8, 8)), ((1, 1, 1), (1, 1, 1))],
)
def test_the_fitting_block_wastes_least(video_shape, block):
    assert fitting_block_size(video_shape) == block


@pytest.mark.parametrize("most_tokens", [64, 128])
def test_the_fitting_block_stays_within_its_tokens(most_tokens):
    assert math.prod(fitting_block_size((13, 30, 45), most_tokens)) <= most_tokens
