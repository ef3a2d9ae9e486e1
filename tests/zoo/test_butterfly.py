import math
from itertools import pairwise

import pytest

from dimmix.butterfly import ButterflySchedule, square_radix

from .reference import reach

DIVIDING = [
    (n, radix)
    for n in (2, 6, 8, 9, 10, 12, 15, 24, 30, 32, 36, 64, 96, 121)
    for radix in range(2, n + 1)
    if n % radix == 0
]


@pytest.mark.parametrize(
    ("n", "radix", "strides"),
    [
        (8, 2, [1, 2, 4]),
        (64, 8, [1, 8]),
        (121, 11, [1, 11]),
        (1024, 32, [1, 32]),
        (32, 4, [1, 4, 8]),  # 4**3 > 32: the last stride is n / radix
        (128, 8, [1, 8, 16]),
        (24, 4, [1, 3, 6]),  # no power of the radix divides, yet every level is a view
        (7, 7, [1]),
    ],
)
def test_strides(n, radix, strides):
    assert [level.stride for level in ButterflySchedule(n, radix).levels] == strides


@pytest.mark.parametrize(("n", "radix"), DIVIDING)
def test_levels_partition_the_dimensions_into_groups_a_stride_apart(n, radix):
    for level in ButterflySchedule(n, radix).levels:
        members = level.members()
        assert sorted(p for dims in members for p in dims) == list(range(n))
        assert len(members) == level.blocks == n // radix
        if level.order is None:
            assert all(b - a == level.stride for dims in members for a, b in pairwise(dims))


@pytest.mark.parametrize(("n", "radix"), DIVIDING)
def test_every_output_is_reached_after_the_last_level_and_not_before(n, radix):
    schedule = ButterflySchedule(n, radix)
    assert len(schedule) == math.ceil(round(math.log(n, radix), 9))
    assert (reach(schedule, len(schedule)) > 0).all()
    assert (reach(schedule, len(schedule) - 1) == 0).any()


def test_levels_alternate_over_the_depth():
    schedule = ButterflySchedule(64, 8)
    assert [schedule.level(i).stride for i in range(5)] == [1, 8, 1, 8, 1]


@pytest.mark.parametrize(
    ("n", "radix", "nearest"), [(64, 10, "8 and 16"), (64, 65, "64"), (64, 1, "2"), (13, 4, "13"), (121, 0, "11")]
)
def test_a_radix_that_does_not_divide_names_its_neighbours(n, radix, nearest):
    with pytest.raises(ValueError, match=rf"radix {radix} does not divide n={n}; nearest radices that do: {nearest}$"):
        ButterflySchedule(n, radix)


@pytest.mark.parametrize(
    ("n", "radix"), [(64, 8), (128, 16), (256, 16), (1024, 32), (121, 11), (60, 10), (13, 13), (2, 2)]
)
def test_square_radix_is_the_smallest_divisor_from_the_square_root_up(n, radix):
    assert square_radix(n) == radix
    assert len(ButterflySchedule(n, radix)) <= 2


@pytest.mark.parametrize("n", [0, 1])
def test_less_than_two_dimensions_have_no_radix(n):
    with pytest.raises(ValueError, match=f"n={n} is nothing to mix"):
        square_radix(n)


def test_repr_names_the_strides_and_shuffled_levels():
    assert repr(ButterflySchedule(8, 2)) == "ButterflySchedule(n=8, radix=2, strides=[1, 2, 4])"
    assert repr(ButterflySchedule(6, 2)) == "ButterflySchedule(n=6, radix=2, strides=[1, 'shuffled', 'shuffled'])"
