"""The wide MLP of a mixing layer equals the layer, and Monarch matrices equal what they are made from."""

import pytest
import torch

from dimmix.layers import ButterflyLinear
from dimmix.wide import (
    KroneckerOperator,
    commutation,
    effective_mlp,
    from_monarch,
    mixer_monarch,
    project_to_monarch,
    to_monarch,
    unvec,
    vec,
)
from dimmix.wide_mixer import WideMixer

S0, S, C = 4, 6, 5


def _model(**kwargs):
    torch.manual_seed(0)
    args = {"img_size": 8, "patch_size": 4, "tokens": S, "channels": C, "token_ratio": 1.5, "channel_ratio": 2.0}
    return WideMixer(**args | kwargs).eval().double()


@pytest.mark.parametrize("mixing", ["mixer", "rp", "sparse"])
@pytest.mark.parametrize("order", ["mlp_mixer", "s_mixer"])
@pytest.mark.parametrize("tokens", [None, S])
def test_the_wide_mlp_on_vec_x_equals_every_mixing_layer(order, mixing, tokens):
    model = _model(order=order, mixing=mixing, tokens=tokens)
    x = torch.randn(3, S0, C, dtype=torch.float64)
    for block in model.blocks:
        normed, mixed = block.norm(x), block.mix(block.norm(x))
        wide = effective_mlp(block)
        assert wide.layers[0].operator.shape[1] == x.shape[1] * C
        assert (unvec(wide(vec(normed)), mixed.shape[1]) - mixed).abs().max() < 1e-12
        x = block(x)


def test_the_connections_of_a_wide_mlp_are_the_entries_of_all_its_layers_that_are_not_zero():
    wide = effective_mlp(_model().blocks[0])
    entries = [int((layer.operator.dense() != 0).sum()) for layer in wide.layers]
    assert len(entries) == 2
    assert wide.connections == sum(entries)


@pytest.mark.parametrize("mixing", ["mixer", "rp", "sparse"])
def test_the_wide_mlp_shares_weights_and_biases(mixing):
    block = _model(mixing=mixing, tokens=None).blocks[1]
    x, wide = torch.randn(3, S0, C, dtype=torch.float64), effective_mlp(block)
    with torch.no_grad():
        for parameter in block.mix.parameters():
            parameter.normal_()
    assert (unvec(wide(vec(x)), S0) - block.mix(x)).abs().max() < 1e-12
    wide(vec(x)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.mix.parameters())
    assert wide(vec(x[:0])).shape == (0, S0 * C)


def _first_operator(block):
    return effective_mlp(block).layers[0].operator


def test_token_and_channel_mixing_are_kronecker_products():
    token, channel = _model(tokens=None).blocks[:2]
    W, V = token.mix[0].mlp[0].weight, channel.mix[0].mlp[0].weight.mT
    left, right = _first_operator(token), _first_operator(channel)
    assert torch.equal(left.dense(), torch.kron(torch.eye(C, dtype=W.dtype), W))
    assert torch.equal(right.dense(), torch.kron(V.mT.contiguous(), torch.eye(S0, dtype=W.dtype)))
    assert (left.density, right.density) == (1 / C, 1 / S0)
    assert left.nonzeros == (left.dense() != 0).sum()


def test_random_permutations_move_the_blocks_and_keep_their_spectrum():
    plain, shuffled = (_first_operator(_model(tokens=None, mixing=mixing).blocks[0]) for mixing in ("mixer", "rp"))
    assert shuffled.density == plain.density
    singular = torch.linalg.svdvals(shuffled.dense())
    assert (singular - torch.linalg.svdvals(plain.dense())).abs().max() < 1e-12
    assert (shuffled.dense() != plain.dense()).any()
    assert shuffled.spectral_norm() == pytest.approx(singular[0].item(), rel=1e-5)


def test_the_mask_of_a_sparse_layer_is_where_its_weights_are():
    block = _model(mixing="sparse", connections=40).blocks[1]
    operator = _first_operator(block)
    assert (operator.dense() != 0).sum() == operator.nonzeros == 40
    assert operator.spectral_norm() == pytest.approx(torch.linalg.matrix_norm(operator.dense(), 2).item(), rel=0.01)


def test_commutation_transposes():
    x = torch.randn(2, S, C)
    assert torch.equal(vec(x)[:, commutation(S, C)], vec(x.mT))
    assert torch.equal(unvec(vec(x), S), x)


def test_a_wide_matrix_is_not_made_dense():
    with pytest.raises(ValueError, match="use matvec"):
        KroneckerOperator(torch.zeros(512, 512), 487).dense()
    with pytest.raises(TypeError, match="Linear is not a block"):
        effective_mlp(torch.nn.Linear(2, 2))


def test_the_linear_mixer_is_the_monarch_matrix_of_its_factors():
    W, V, x = (torch.randn(shape, dtype=torch.float64) for shape in ((S, S), (C, C), (S, C)))
    monarch = mixer_monarch(W, V)
    J = torch.eye(S * C, dtype=torch.float64)[commutation(S, C)]
    R, L = torch.block_diag(*monarch.right), torch.block_diag(*monarch.left)
    assert (monarch.dense() - J.T @ L @ J @ R).abs().max() < 1e-12
    assert (monarch.dense() - torch.kron(V.T.contiguous(), W)).abs().max() < 1e-12
    assert (monarch.matvec(vec(x)) - vec(W @ x @ V)).abs().max() < 1e-12


def test_an_s_mixer_without_activation_is_the_monarch_matrix():
    block = _model(order="s_mixer", tokens=None).blocks[0]
    first, second = (layer.operator.dense() for layer in effective_mlp(block).layers)
    W, V = block.mix[0].mlp[0].weight, block.mix[1].mlp[0].weight.mT
    assert (second @ first - mixer_monarch(W, V).dense()).abs().max() < 1e-12


@pytest.mark.parametrize(("n", "radix"), [(36, 6), (32, 8), (24, 6)])
def test_butterfly_linear_and_monarch_convert_both_ways(n, radix):
    layer = ButterflyLinear(n, n, radix, bias=False, dtype=torch.float64)
    monarch = to_monarch(layer)
    assert (monarch.dense() - layer.dense_equivalent()).abs().max() < 1e-12
    assert torch.equal(from_monarch(monarch).dense_equivalent(), layer.dense_equivalent())


def test_a_square_mixer_becomes_a_butterfly_linear_and_others_say_why_not():
    W, V, U = (torch.randn(size, size, dtype=torch.float64) for size in (6, 6, 4))
    layer = from_monarch(mixer_monarch(W, V))
    assert (layer.dense_equivalent() - torch.kron(V.T.contiguous(), W)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="blocks of 6 and 4"):
        from_monarch(mixer_monarch(W, U))
    with pytest.raises(ValueError, match="two levels"):
        to_monarch(ButterflyLinear(8, 8, 2))


@pytest.mark.parametrize(("n", "radix"), [(9, 3), (16, 4), (32, 8), (24, 6)])
def test_projection_of_a_monarch_matrix_is_itself(n, radix):
    weight = ButterflyLinear(n, n, radix, bias=False, dtype=torch.float64).dense_equivalent()
    assert (project_to_monarch(weight, radix).dense() - weight).abs().max() < 1e-12


def test_projection_is_the_optimum_of_every_block():
    weight = torch.randn(16, 16, dtype=torch.float64)
    lost = sum(
        torch.linalg.svdvals(weight[q::4, 4 * p : 4 * p + 4])[1:].square().sum() for p in range(4) for q in range(4)
    )
    assert (project_to_monarch(weight).dense() - weight).square().sum() == pytest.approx(lost.item(), rel=1e-12)


def test_descent_from_many_starts_finds_nothing_nearer_than_the_projection():
    torch.manual_seed(1)
    weight = torch.randn(4, 4, dtype=torch.float64)
    best = (project_to_monarch(weight, 2).dense() - weight).square().sum().item()
    found = []
    for _ in range(4):
        layer = ButterflyLinear(4, 4, 2, bias=False, dtype=torch.float64)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def loss(layer=layer, optimizer=optimizer):
            optimizer.zero_grad()
            error = (layer(torch.eye(4, dtype=torch.float64)).T - weight).square().sum()
            error.backward()
            return error

        optimizer.step(loss)
        found.append(loss().item())
    assert best <= min(found) + 1e-9
    assert min(found) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "radix", "match"), [((4, 6), None, "square"), ((12, 12), 3, "radix 3"), ((7, 7), None, "radix 7")]
)
def test_projection_refuses_what_has_no_two_levels(weight, radix, match):
    with pytest.raises(ValueError, match=match):
        project_to_monarch(torch.zeros(weight), radix)
