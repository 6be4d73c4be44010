"""The op inside of `torch.compile(fullgraph=True)`: what it is called with must not make one graph after another."""

import pytest
import torch
import torch._dynamo.testing

from oracle import relative_error
from vsa_diffusers import video_sparse_attention
from vsa_diffusers.attention import TELLS_SYMBOLS
from vsa_diffusers.tiles import settle

RATIOS = [(step + 1) / 20 for step in range(20)]
SHAPES = [(5, 8, 12), (6, 9, 13), (7, 10, 16), (8, 12, 20), (4, 6, 10)]


def make_inputs(shape=(5, 8, 12)):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, shape[0] * shape[1] * shape[2], 2, 8, generator=generator).unbind()


def check(layer, arguments, most, *, gradients=False, backend="aot_eager"):
    """Compile `layer`, compare it with itself for all `arguments`, and count its graphs.

    Args:
        arguments: inputs, and one more argument.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for inputs, argument in arguments:
        leaves = [x.clone().requires_grad_(gradients) for x in inputs]
        output, expected = compiled(*leaves, argument), layer(*leaves, argument)
        assert output.equal(expected)
        if gradients:
            ours, right = (torch.autograd.grad(x.square().sum(), leaves) for x in (output, expected))
            assert all(mine.equal(theirs) for mine, theirs in zip(ours, right, strict=True))
    assert counter.frame_count <= most


@pytest.fixture(params=["aot_eager", "eager"])
def backend(request):
    return request.param


@pytest.mark.parametrize("block_size", [(2, 2, 4), "auto"], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", ["top_k", "top_k_ratio"])
def test_twenty_numbers_of_tiles_make_two_graphs(name, gradients, block_size):
    if name == "top_k_ratio" and not TELLS_SYMBOLS:
        pytest.skip("runs with a torch whose compiler tells a symbol from a number, as from 2.8 on")

    def layer(query, key, value, kept):
        options = {name: kept, "block_size": block_size, "combine": "merge"}
        return 1 + video_sparse_attention(query, key, value, (5, 8, 12), **options)

    kept = range(1, 21) if name == "top_k" else RATIOS
    check(layer, [(make_inputs(), number) for number in kept], 2, gradients=gradients)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_number_of_tiles_may_be_the_size_of_a_tensor(gradients):
    def layer(query, key, value, carrier):
        return 1 + video_sparse_attention(query, key, value, (5, 8, 12), top_k=carrier.shape[0] - 1, combine="merge")

    carriers = [torch.empty(1).expand(count + 1) for count in (7, 1, *range(2, 15))]
    graphs = 2 if TELLS_SYMBOLS else 3  # one tile is a graph of its own before torch 2.8
    check(layer, [(make_inputs(), carrier) for carrier in carriers], graphs, gradients=gradients)


@pytest.mark.parametrize("selection", ["mean", "quarters"])
def test_new_video_shapes_make_two_graphs(selection, backend):
    def layer(query, key, value, shape):
        return 1 + video_sparse_attention(query, key, value, shape, combine="merge", selection=selection)

    check(layer, [(make_inputs(shape), shape) for shape in SHAPES], 2, backend=backend)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_block_that_fits_compiles_and_new_video_shapes_make_two_graphs(gradients, backend):
    def layer(query, key, value, shape):
        return 1 + video_sparse_attention(query, key, value, shape, top_k_ratio=0.3, block_size="auto", combine="merge")

    check(layer, [(make_inputs(shape), shape) for shape in SHAPES], 2, gradients=gradients, backend=backend)


def test_what_was_settled_outside_of_the_graph_may_be_the_shape_of_a_tensor():
    def layer(query, key, value, carriers):
        grid, block, kept = carriers
        options = {"block_size": tuple(block.shape), "top_k": kept.shape[0] - 1, "combine": "merge"}
        return 1 + video_sparse_attention(query, key, value, tuple(grid.shape), **options)

    arguments = []
    for shape, ratio in zip(SHAPES, (0.9, 0.2, 0.3, 0.4, 0.1), strict=True):
        block, kept = settle(shape, "auto", ratio)
        arguments.append((make_inputs(shape), [torch.empty(1).expand(size) for size in (shape, block, (kept + 1,))]))
    check(layer, arguments, 2, gradients=True)


@pytest.mark.parametrize("block_size", [(2, 2, 4), (4, 4, 4), "auto"], ids=str)
@pytest.mark.parametrize(("ratio", "top_k"), [(0.3, None), (1.0, None), (0.3, 5), (0.3, 999)])
def test_what_settle_returns_is_what_the_operation_does(block_size, ratio, top_k):
    block, kept = settle((5, 8, 12), block_size, ratio, top_k)
    query, key, value = make_inputs()
    settled = video_sparse_attention(query, key, value, (5, 8, 12), block_size=block, top_k=kept)
    options = {"block_size": block_size, "top_k_ratio": ratio, "top_k": top_k, "combine": "sum"}
    assert settled.equal(video_sparse_attention(query, key, value, (5, 8, 12), **options))


@pytest.mark.parametrize("bad", [{"top_k_ratio": 0.0}, {"top_k": 0}, {"block_size": "largest"}, {"video_shape": None}])
def test_settle_refuses_what_the_operation_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        settle(**({"video_shape": (5, 8, 12), "block_size": "auto"} | bad))


def test_registration_passes_opcheck_where_block_and_ratio_are_settled_late():
    leaves = [x.requires_grad_() for x in make_inputs((3, 4, 5))]
    numbers = ([3, 4, 5], [], 0, "merge", 0.2, 0, 0, "quarters", "torch")
    for ratio in ((0.3, None), (0.0, torch.tensor(0.3, dtype=torch.float64))):
        torch.library.opcheck(torch.ops.vsa_diffusers.attention.default, (*leaves, None, None, *numbers, *ratio))


def test_an_exported_program_serves_other_video_shapes_with_other_blocks():
    class Layer(torch.nn.Module):
        def forward(self, tokens):
            query = tokens.flatten(1, 3)
            options = {"top_k_ratio": 0.3, "block_size": "auto", "combine": "merge"}
            return video_sparse_attention(query, query, query, tuple(tokens.shape[1:4]), **options)

    axes = {axis: torch.export.Dim(name, min=4, max=40) for axis, name in ((1, "T"), (2, "H"), (3, "W"))}
    exported = torch.export.export(Layer(), (torch.randn(1, 5, 8, 12, 2, 8),), dynamic_shapes={"tokens": axes}).module()
    for shape in ((4, 6, 10), (9, 5, 7)):
        tokens = torch.randn(1, *shape, 2, 8)
        assert relative_error(exported(tokens), Layer()(tokens)) == 0
