"""Which launch the table chooses for a call, on devices that are not there."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("runs with Triton: pip install 'triton>=3.6'", allow_module_level=True)

from vsa_diffusers.kernels.arguments import has_boxes
from vsa_diffusers.kernels.recording import form_of
from vsa_diffusers.kernels.support import Device
from vsa_diffusers.kernels.tuning import plan
from vsa_diffusers.problem import Problem
from vsa_diffusers.tiles import TileGrid, num_selected_tiles

HOPPER = Device((9, 0), descriptors=True, processors=132)


def chosen(
    device,
    video_shape,
    ratio,
    heads=12,
    head_dim=128,
    dtype=torch.bfloat16,
    block_size=(4, 4, 4),
    combine="gate",
    after=0,
):
    grid = TileGrid(video_shape, block_size)
    query = torch.empty(1, grid.num_tokens + after, heads, head_dim, dtype=dtype, device="meta")
    top_k = num_selected_tiles(grid.num_tiles, ratio)
    problem = Problem(grid, top_k, combine, head_dim**-0.5, after=after)
    form = form_of(query)
    return plan(form, form, form, problem, device)


@pytest.mark.parametrize(("head_dim", "layout", "programs"), [(128, "descriptor", 264), (64, "tiled", 396)])
@pytest.mark.parametrize("block_size", [(4, 4, 4), (3, 5, 4)])
def test_hopper_specialises_as_many_programs_as_fit(block_size, head_dim, layout, programs):
    launch = chosen(HOPPER, (21, 30, 52), 0.2, block_size=block_size, head_dim=head_dim).sparse
    assert (launch.layout, launch.programs) == (layout, programs)


@pytest.mark.parametrize(
    ("device", "case"),
    [
        (Device((9, 0), descriptors=True), {}),  # where the specialised kernel does not work
        (Device((10, 0), descriptors=True), {}),
        (Device((8, 0)), {}),
        (Device(), {}),
        (HOPPER, {"dtype": torch.float16}),
        (HOPPER, {"dtype": torch.float32}),
        (HOPPER, {"head_dim": 32}),
        (HOPPER, {"head_dim": 96}),
        (HOPPER, {"block_size": (4, 4, 8)}),
        (HOPPER, {"block_size": (2, 4, 4)}),
    ],
    ids=str,
)
def test_everything_else_takes_the_ordinary_kernel(device, case):
    assert chosen(device, (21, 30, 52), 0.2, **case).sparse.programs == 0


@pytest.mark.parametrize(
    ("case", "programs"), [({}, (264, 264)), ({"after": 5}, (264, 0)), ({"head_dim": 64}, (396, 0))], ids=str
)
def test_short_sequences_are_specialised_only_where_that_is_faster(case, programs):
    shapes = (21, 30, 52), (16, 16, 24)
    assert tuple(chosen(HOPPER, shape, 0.2, **case).sparse.programs for shape in shapes) == programs


@pytest.mark.parametrize(
    ("video_shape", "ratio", "sync_chunks"),
    [
        ((21, 30, 52), 0.02, 0),
        ((21, 30, 52), 0.2, 7),
        ((21, 30, 52), 0.5, 8),
        ((16, 16, 24), 0.5, 5),
        ((16, 16, 24), 0.2, 2),
        ((16, 16, 24), 0.1, 0),
    ],
)
def test_programs_keep_in_step_where_lists_are_long(video_shape, ratio, sync_chunks):
    assert chosen(HOPPER, video_shape, ratio).sparse.sync_chunks == sync_chunks


@pytest.mark.parametrize(("video_shape", "layout"), [((16, 16, 24), "direct"), ((21, 30, 52), "descriptor")])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_long_sequences_are_copied(video_shape, layout, ratio):
    assert chosen(HOPPER, video_shape, ratio, heads=32).sparse.layout == layout


def test_short_sequences_go_through_in_one_part_and_uncopied_on_any_hopper():
    for device in (HOPPER, Device((9, 0), descriptors=True)):
        plan = chosen(device, (16, 16, 24), 0.3, heads=32)
        assert (plan.heads, plan.sparse.layout) == (32, "direct")


def test_a_large_copy_is_made_for_half_of_the_heads_at_a_time():
    assert chosen(HOPPER, (21, 45, 80), 0.2, heads=40).heads == 20


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda x: x, True),
        (lambda x: torch.cat([x, x, x], 2)[:, :, :3], True),  # query of one projection for all three
        (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), True),  # batch item by batch item for every token
        (lambda x: x[:1].expand(2, -1, -1, -1), False),
        (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), False),  # [B, H, S, D] in memory
        (lambda x: torch.nn.functional.pad(x, (0, 8))[..., :128], False),  # heads apart
        (lambda x: torch.nn.functional.pad(x.flatten(2), (4, 4))[..., 4:-4].unflatten(2, (3, 128)), False),  # unaligned
    ],
)
def test_boxes_of_the_video_are_seen_where_heads_lie_side_by_side(change, seen):
    x = change(torch.zeros(2, 6 * 8 * 9, 3, 128, dtype=torch.bfloat16))
    assert has_boxes(form_of(x), TileGrid((6, 8, 9), (4, 4, 4))) == seen
    assert not has_boxes(form_of(x), TileGrid((6, 8, 9), (3, 5, 4)))
