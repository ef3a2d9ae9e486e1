"""The design calculator against the paper's numbers."""

import pytest

from dimmix.errors import DimmixError
from dimmix.widths import designs, matching, mean_connections, square_width, sweep, sweep_channels


@pytest.mark.parametrize(
    ("connections", "C", "S"),
    [(2**18, 16, 173), (2**18, 32, 113), (2**18, 48, 83), (2**21, 16, 504), (2**21, 32, 346), (2**21, 64, 226)],
)
def test_the_pairs_of_figure_5(connections, C, S):
    assert designs(connections, 1, channels=C)[0].tokens == S
    assert designs(connections, 1, tokens=C)[0].channels == S


@pytest.mark.parametrize("gamma", [1, 2, 4.57])
def test_matching_solves_for_the_connections(gamma):
    S = matching(1e6, gamma, 30)
    assert mean_connections(S, 30, gamma, gamma) == pytest.approx(1e6)


def test_the_width_is_largest_where_c_equals_s():
    best = square_width(2**18, 1) ** 2
    assert best == pytest.approx(2**12)
    assert all(C * matching(2**18, 1, C) < best for C in (16, 32, 48, 63, 65, 83, 173))


def test_designs_of_the_paper_table():
    mixer, simple, rp, sparse, masked = designs(344_064, 2, channels=48)
    omega, m = 344_064, 64 * 48
    assert (mixer.tokens, mixer.channels, mixer.width, mixer.connections) == (64, 48, m, omega)
    assert mixer.density == sparse.density == omega / (2 * m * m)
    assert mixer.macs == rp.macs == sparse.macs == 4 * omega
    assert mixer.params == 2 * 2 * (64**2 + 48**2)
    assert rp.memory - mixer.memory == 4 * 2 * 8 * m
    assert sparse.params == 4 * omega
    assert sparse.memory == 4 * omega * 8 + 4 * (2 * 3 * m + 4)
    assert masked.memory == 4 * 2 * m * m * 5
    assert simple.width > mixer.width
    assert (simple.tokens, simple.params, simple.memory) == (98, 98**2 + 48**2, 4 * (98**2 + 48**2))
    assert simple.connections == pytest.approx(omega, rel=0.01)


def test_the_sparse_design_is_the_memory_of_the_model():
    import timm

    model = timm.create_model("sw_mlp_mixer_c48_32", depth=1)
    stored = [t for name, t in model.blocks.state_dict().items() if "mlp" in name and not name.endswith("bias")]
    assert sum(t.numel() * t.element_size() for t in stored) == designs(344_064, 2, channels=48)[3].memory


def test_the_sweep_is_the_papers():
    assert sweep_channels(2**18, 1) == (16, 32, 48)
    assert sweep_channels(2**21, 1) == (16, 32, 64)
    pairs = sweep(2**18, 1, (16, 32, 48))
    assert pairs == [(16, 173), (32, 113), (48, 83), (64, 64), (83, 48), (113, 32), (173, 16)]


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((0, 1), "at least 1 connection"),
        ((1000, 0), "gamma above 0"),
        ((1000, -1), "gamma above 0"),
        ((float("nan"), 1), "at least 1 connection"),
        ((float("inf"), 1), "below 1e\\+15"),
        ((1000, 1, 0), "--channels 0: must be at least 1"),
        ((1000, 1, None, -3), "--tokens -3: must be at least 1"),
        ((100, 1, 500), r"--channels 500: too few connections; that needs at least 125250"),
        ((1, 1e6), r"too few connections; that needs at least 1e\+06"),
        ((1000, 1, 4, 4), "give one"),
    ],
)
def test_impossible_combinations_are_one_clear_line(args, match):
    with pytest.raises(DimmixError, match=match) as error:
        designs(*args)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
