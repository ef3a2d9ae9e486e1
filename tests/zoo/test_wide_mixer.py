"""Wide mixers, RP-Mixers and SW-MLPs: counts by formula, frozen random numbers that travel, training."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dimmix.layers.sparse_linear import SparseLinear, random_connections
from dimmix.profile import count_macs
from dimmix.wide_mixer import WideMixer

SMALL = {"img_size": 8, "patch_size": 4, "tokens": 6, "channels": 5, "num_classes": 3}


def _params(model):
    return sum(p.numel() for p in model.parameters())


def _mlp(n_in, hidden, n_out):
    return n_in * hidden + hidden + hidden * n_out + n_out


@pytest.mark.parametrize(
    ("name", "patch", "S", "C"), [("wide_mixer_ss8_32", 8, 16, 986), ("wide_mixer_ssw_32", 4, 64, 487)]
)
def test_parameters_follow_from_patch_tokens_and_channels(name, patch, S, C):
    stem, block = 3 * patch**2 * C + C, 4 * C + _mlp(S, 4 * S, S) + _mlp(C, 4 * C, C)
    assert _params(timm.create_model(name, num_classes=10, device="meta")) == stem + 2 * block + 2 * C + 10 * C + 10


def test_parameters_where_the_tokens_are_not_the_patches():
    S0, S, C = 4, 6, 5
    stem, head = 48 * C + C, 3 * C + 3
    skip = S0 * S + 2 * C
    first = _mlp(S0, 9, S) + skip + _mlp(C, 10, C)
    second = _mlp(S, 9, S) + _mlp(C, 10, C)
    model = WideMixer(**SMALL, depth=2, token_ratio=1.5, channel_ratio=2.0)
    assert _params(model) == stem + first + second + 4 * 2 * C + 2 * C + head
    assert model.blocks[0](torch.randn(2, S0, C)).shape == (2, S, C)


def test_s_mixer_has_one_linear_for_each_axis():
    S, C = 4, 5
    model = WideMixer(**SMALL | {"tokens": None}, depth=3, order="s_mixer", token_ratio=9.0)
    assert _params(model.blocks) == 3 * (S * S + S + C * C + C + 2 * C)


def test_mixer_b_w_for_224_pixels_has_a_hidden_layer_of_4_57_times_each_axis():
    model = timm.create_model("wide_mixer_bw_224", device="meta")
    token, channel = model.blocks[0].mix[0].mlp, model.blocks[1].mix[0].mlp
    assert (token[0].weight.shape, channel[0].weight.shape) == ((1170, 256), (2687, 588))
    assert len(model.blocks) == 16


@pytest.mark.parametrize("order", ["mlp_mixer", "s_mixer"])
def test_the_sparse_mlp_has_as_many_connections_as_the_wide_mixer(order):
    S, C, gamma = 4, 5, 2 if order == "mlp_mixer" else 1
    args = SMALL | {"tokens": None, "order": order, "token_ratio": 2.0, "channel_ratio": 2.0}
    model = WideMixer(**args, mixing="sparse", depth=2)
    linears = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert len(linears) == (8 if order == "mlp_mixer" else 4)
    assert sum(m.weight.numel() for m in linears) == len(linears) * gamma * (C * S**2 + C**2 * S) // 2


def test_a_random_permutation_surrounds_each_mlp_and_no_two_are_alike():
    model = WideMixer(**SMALL, mixing="rp")
    orders = [tuple(buffer.tolist()) for name, buffer in model.named_buffers() if name.endswith("order")]
    assert len(orders) == len(set(orders)) == 8
    assert [len(order) for order in orders] == [20, 30, *[30] * 6]


@pytest.mark.parametrize(("mixing", "buffer"), [("rp", "order"), ("sparse", "columns")])
def test_frozen_random_numbers_travel_with_the_checkpoint(tmp_path, mixing, buffer):
    model, other = (WideMixer(**SMALL, mixing=mixing, seed=seed).eval() for seed in (0, 1))
    x = torch.randn(2, 3, 8, 8)
    names = [name for name, _ in model.named_buffers() if name.endswith(buffer)]
    assert names
    assert not any(torch.equal(model.state_dict()[name], other.state_dict()[name]) for name in names)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))


def test_frozen_random_numbers_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = WideMixer(**SMALL, mixing="sparse", seed=5).state_dict()
    torch.manual_seed(2)
    second = WideMixer(**SMALL, mixing="sparse", seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first if key.endswith(("columns", "starts")))


@pytest.mark.parametrize(("outputs", "inputs", "count"), [(7, 5, 35), (7, 5, 1), (40, 30, 200), (3000, 2000, 500)])
def test_random_connections_are_distinct_places_of_the_matrix(outputs, inputs, count):
    columns, starts = random_connections(inputs, outputs, count, seed=3)
    rows = torch.repeat_interleave(torch.arange(outputs), starts.diff())
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == count == len(columns)
    assert 0 <= columns.min() <= columns.max() < inputs


def test_random_connections_are_uniform_over_rows_and_columns():
    columns, starts = random_connections(400, 300, 60_000, seed=0)  # 200 a row and 150 a column in the mean
    for counts, p in ((starts.diff(), 0.5), (torch.bincount(columns, minlength=400), 0.5)):
        n = 120_000 / len(counts)
        assert counts.double().var().item() == pytest.approx(n * p * (1 - p), rel=0.3)


def test_a_sparse_linear_is_its_masked_matrix_and_only_its_weights_learn():
    layer = SparseLinear(6, 8, 20).double()
    rows = torch.repeat_interleave(torch.arange(8), layer.starts.diff())
    matrix = torch.zeros(8, 6, dtype=torch.float64)
    matrix[rows, layer.columns.long()] = layer.weight[0].detach()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert (layer(x) - matrix @ x - layer.bias[:, None]).abs().max() < 1e-12
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).square().sum().backward()
    assert layer.weight.grad.shape == (1, 20)
    assert layer.weight.grad.abs().min() > 0


@pytest.mark.parametrize(("inputs", "outputs", "connections"), [(6, 8, 20), (9, 4, 3), (2, 30, 59)])
@pytest.mark.parametrize("how", ["eager", "func"])
def test_the_gradients_of_a_sparse_linear_are_those_of_its_masked_matrix(inputs, outputs, connections, how):
    layer = SparseLinear(inputs, outputs, connections, seed=3).double()
    rows = torch.repeat_interleave(torch.arange(outputs), layer.starts.diff())
    weight = layer.weight.detach()[0].requires_grad_()
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64).index_put((rows, layer.columns.long()), weight)
    x = torch.randn(5, inputs, dtype=torch.float64).t().requires_grad_()  # strided
    by = torch.randn(outputs, 5, dtype=torch.float64)
    expected = torch.autograd.grad(((matrix @ x) * by).sum(), [x, weight])
    if how == "eager":
        got = torch.autograd.grad((layer(x) * by).sum(), [x, layer.weight])
    else:
        loss = lambda x, w: (torch.func.functional_call(layer, {"weight": w}, (x,)) * by).sum()  # noqa: E731
        got = torch.func.grad(loss, (0, 1))(x, layer.weight)
    assert (got[0] - expected[0]).abs().max() < 1e-12
    assert (got[1][0] - expected[1]).abs().max() < 1e-12


def test_a_sparse_linear_refuses_second_derivatives_in_place_of_wrong_ones():
    layer, x = SparseLinear(6, 8, 20), torch.randn(6, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_a_sparse_linear_stores_grows_with_its_connections_not_with_its_width():
    layer = SparseLinear(31_168, 124_672, 50_000)
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert stored == 50_000 * (4 + 4) + 4 * 124_673 + 4 * 124_672


def test_macs_count_the_connections():
    model = timm.create_model("sw_mlp_mixer_c48_32", num_classes=10)
    omega = 2 * (48 * 64**2 + 48**2 * 64) // 2
    assert count_macs(model, (3, 32, 32)) == 12 * omega + 64 * 48 * 48 + 48 * 10


@pytest.mark.parametrize("mixing", ["mixer", "rp", "sparse"])
@pytest.mark.parametrize("order", ["mlp_mixer", "s_mixer"])
def test_it_learns_to_tell_random_images_apart(order, mixing):
    torch.manual_seed(0)
    model = WideMixer(**SMALL, order=order, mixing=mixing, token_ratio=2.0, channel_ratio=2.0)
    x, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_a_sparse_model_trains_under_autocast():
    model = WideMixer(**SMALL, mixing="sparse")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 8, 8)).float().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokens": 0}, "tokens=0, channels=5"),
        ({"channels": 0}, "channels=0"),
        ({"token_ratio": 0.01}, "no hidden features"),
        ({"order": "other"}, "order='other'"),
        ({"mixing": "none"}, "mixing='none'"),
        ({"mixing": "sparse", "connections": 10**6}, "1000000 connections do not fit"),
        ({"patch_size": 3}, "patch_size=3 does not divide"),
    ],
)
def test_impossible_models_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        WideMixer(**SMALL | change)
