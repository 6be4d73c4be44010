"""Rows are copied by 16 bytes where that fits, and are right where it does not."""

import pytest
import torch

from vsa_diffusers.parallel import _copy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [8, 6, 5])
@pytest.mark.parametrize("first", [0, 1])
def test_a_part_of_the_heads_arrives_as_it_was(dtype, head_dim, first):
    torch.manual_seed(0)
    source = torch.randn(2, 7, 4, head_dim).to(dtype)[:, :, first : first + 2].transpose(0, 1)
    whole = torch.zeros(7, 2, 3, 2, head_dim, dtype=dtype)
    _copy(whole[:, :, 1], source)
    assert torch.equal(whole[:, :, 1], source)
    assert not whole[:, :, ::2].any()


def test_nothing_is_copied_of_no_heads():
    target = torch.ones(3, 1, 0, 8)
    _copy(target, target.clone())
