import pytest
import torch

from vsa_diffusers import VSAConfig, video_sparse_attention


def test_auto_is_the_block_that_wastes_least():
    query, key, value = (torch.randn(1, 6 * 5 * 4, 1, 16) for _ in range(3))
    options = {"combine": "merge", "top_k": 1}
    auto = video_sparse_attention(query, key, value, (6, 5, 4), block_size="auto", **options)
    assert torch.equal(auto, video_sparse_attention(query, key, value, (6, 5, 4), block_size=(3, 5, 4), **options))


def test_auto_does_not_go_with_a_gate():
    query = torch.randn(1, 64, 1, 16)
    with pytest.raises(ValueError, match="gates are trained for one block size"):
        video_sparse_attention(query, query, query, (4, 4, 4), gate=query, block_size="auto")
    with pytest.raises(ValueError, match="gates are trained for one block size"):
        VSAConfig(combine="gate", block_size="auto")


def test_auto_survives_json():
    config = VSAConfig(block_size="auto")
    assert VSAConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="block_size='largest' is unknown"):
        VSAConfig(block_size="largest")
