import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dimmix.training import augment
from dimmix.training.augment import Batches, affine, cutout, jitter, mix
from dimmix.training.data import Images
from dimmix.training.recipe import Augment

MEAN, STD = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
NAMES = ("a", "b", "c", "d")


def batches(recipe: Augment, count: int = 16, size: int = 8) -> tuple[Batches, Tensor]:
    """Batches whose normalised values are the bytes, and those bytes as (N, 3, H, W)."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    images = Images(pixels, np.arange(count) % len(NAMES), NAMES)
    return Batches(images, recipe, MEAN, STD, torch.device("cpu")), torch.from_numpy(pixels).permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("crop", [0, 3])
def test_plain_batches_are_the_normalised_images(crop: int) -> None:
    data, pixels = batches(Augment(crop=crop))
    data.mean, data.std = torch.full_like(data.mean, 100), torch.full_like(data.std, 50)
    x, labels = data.plain(torch.tensor([3, 1]))
    torch.testing.assert_close(x, (pixels[[3, 1]].float() - 100) / 50)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == [3, 1]


def test_flip_mirrors_about_half_of_the_images() -> None:
    data, pixels = batches(Augment(crop=0), count=200)
    x, _ = data.augmented(torch.arange(200))
    mirrored = (x == pixels.flip(3)).flatten(1).all(1)
    assert ((x == pixels).flatten(1).all(1) ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


@pytest.mark.parametrize("fill", ["reflect", "zero"])
def test_crops_are_windows_of_the_padded_image(fill: str) -> None:
    data, pixels = batches(Augment(flip=False, crop=2, crop_fill=fill))  # type: ignore[arg-type]
    mode = "reflect" if fill == "reflect" else "constant"
    padded = torch.nn.functional.pad(pixels.float(), (2, 2, 2, 2), mode=mode)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1).movedim(1, 3).flatten(1, 2)  # (N, 25, 3, 8, 8)
    x, _ = data.augmented(torch.arange(16))
    found = (windows == x[:, None]).flatten(2).all(2)
    assert found.any(1).all()
    assert len(set(found.int().argmax(1).tolist())) > 5


def test_cutout_blanks_one_square_an_image() -> None:
    blank = cutout(torch.ones(50, 3, 16, 16), 4, 1.0) == 0
    areas = blank[:, 0].flatten(1).sum(1)
    assert torch.equal(blank[:, 0], blank[:, 2])
    assert areas.max() == 16
    assert areas.min() >= 4
    assert 10 < (cutout(torch.ones(50, 3, 16, 16), 4, 0.5) == 0).flatten(1).any(1).sum() < 40


def test_affine_leaves_about_an_eighth_untouched_and_stays_in_range() -> None:
    x = torch.rand(400, 3, 8, 8)
    y = affine(x, 1.0)
    same = (x - y).abs().flatten(1).amax(1) < 1e-4
    assert 10 < same.sum() < 50  # none of four independent draws: 25 of 400
    assert y.min() >= 0
    assert y.max() <= 1


def test_geometry_of_a_half_turns_shears_and_scales_by_up_to_half_of_the_most_either_way() -> None:
    line = (2 * torch.arange(9.0) + 1) / 9 - 1
    ramps = torch.stack([line.expand(9, 9), line[:, None].expand(9, 9)])  # where each pixel lies, in x and in y
    moved = affine(ramps.expand(4000, 2, 9, 9), 0.5)
    columns = [moved[:, :, 4, 5] - moved[:, :, 4, 3], moved[:, :, 5, 4] - moved[:, :, 3, 4]]
    matrix = torch.stack(columns, 2) / (4 / 9)  # (N, 2, 2), read off around the centre
    (a, b), (c, d) = matrix.permute(1, 2, 0)

    def is_alone(*differences: Tensor) -> Tensor:
        """Images with no other draw: a sixteenth of them, and as many with none at all."""
        return torch.stack(differences).abs().amax(0) < 1e-4

    draws = {
        math.pi / 6: torch.atan2(c, a)[is_alone(a - d, b + c, a.square() + c.square() - 1)],
        0.3: b[is_alone(a - 1, c, d - 1)],
        0.3 + 1e-9: c[is_alone(a - 1, b, d - 1)],
        math.log(1.3): a[is_alone(a - d, b, c)].log(),
    }
    for most, drawn in draws.items():
        assert drawn.min().item() == pytest.approx(-most / 2, rel=0.1)
        assert drawn.max().item() == pytest.approx(most / 2, rel=0.1)


def test_affine_of_small_magnitude_moves_little() -> None:
    ramp = torch.linspace(0, 1, 16).expand(8, 3, 16, 16)
    assert (affine(ramp, 0.01) - ramp).abs().max() < 0.02


def test_affine_is_a_rotation_of_a_shear_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    angle, shear_x, shear_y, log_zoom = 0.4, 0.2, -0.3, 0.1
    draws = iter([angle, shear_x, shear_y, log_zoom])
    monkeypatch.setattr(augment, "_draw", lambda count, most, device: torch.full((count,), next(draws)))
    x = torch.rand(1, 3, 9, 9)
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = math.exp(log_zoom) * rotation @ torch.tensor([[1, shear_x], [shear_y, 1]])
    grid = F.affine_grid(torch.cat([matrix, torch.zeros(2, 1)], 1)[None], [1, 3, 9, 9], align_corners=False)
    expected = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(affine(x, 1.0), expected)


def test_jitter_of_gray_keeps_it_gray_and_a_quarter_of_it_untouched() -> None:
    gray = torch.rand(400, 1, 4, 4).mul(255).expand(-1, 3, -1, -1)
    y = jitter(gray, 0.5)
    assert (y - y[:, :1]).abs().max() < 1e-3
    assert 70 < ((y - gray).abs().flatten(1).amax(1) < 1e-3).sum() < 130  # saturation is nothing to gray
    assert y.min() >= 0
    assert y.max() <= 255


def test_jitter_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    draws = iter([-0.3, 0.25, 0.4])  # brightness, contrast, saturation
    monkeypatch.setattr(augment, "_draw", lambda count, most, device: torch.full((count,), next(draws)))
    x = torch.rand(2, 3, 8, 8) * 0.5 + 0.2
    expected = functional.adjust_saturation(functional.adjust_brightness(x, 0.7), 1.4)
    expected = functional.adjust_contrast(expected, 1.25)
    torch.testing.assert_close(jitter(x * 255, 1.0) / 255, expected, atol=2e-3, rtol=0)


def constant_images(count: int) -> tuple[Tensor, Tensor]:
    """Images that hold their own label everywhere, so that their mean tells the mixture."""
    labels = torch.arange(count) % 4
    return labels.float().view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous(), labels


@pytest.mark.parametrize("recipe", [Augment(mixup=1.0), Augment(cutmix=1.0), Augment(mixup=0.4, cutmix=1.0)])
def test_mixed_targets_are_the_shares_of_the_pixels(recipe: Augment) -> None:
    x, labels = constant_images(64)
    mixed, target = mix(x, labels, recipe, 4)
    torch.testing.assert_close(target.sum(1), torch.ones(64))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), target @ torch.arange(4.0), atol=1e-4, rtol=1e-4)
    assert (target.max(1).values < 0.999).sum() > 16


def test_cutmix_pastes_whole_pixels_and_mixup_blends_them() -> None:
    x, labels = constant_images(64)
    pasted, _ = mix(x, labels, Augment(cutmix=1.0), 4)
    assert set(pasted.unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    blended, _ = mix(x, labels, Augment(mixup=1.0), 4)
    assert (blended.flatten(1).std(1) < 1e-6).all()


def test_draws_of_a_large_alpha_are_near_a_half() -> None:
    x, labels = constant_images(64)
    pasted, _ = mix(x, labels, Augment(cutmix=1e4), 4)
    assert (pasted != x)[:, 0].flatten(1).sum(1).max() == 11 * 11  # half of the area has a side of 16 * sqrt(1 / 2)
    _, target = mix(x, labels, Augment(mixup=1e4), 4)
    assert target.max(1).values.max() < 0.55


def test_half_of_the_images_are_mixed_at_probability_a_half_and_each_way_of_mixing_gets_half_of_them() -> None:
    x, labels = constant_images(64)
    mixed, _ = mix(x, labels, Augment(mixup=1.0, mix_probability=0.5), 4)
    assert 16 < (mixed == x).flatten(1).all(1).sum() < 48
    mixed, _ = mix(x, labels, Augment(mixup=1.0, cutmix=1.0), 4)
    assert 16 < (mixed == mixed.round()).flatten(1).all(1).sum() < 48


def test_nothing_is_mixed_at_probability_zero() -> None:
    x, labels = constant_images(8)
    mixed, target = mix(x, labels, Augment(mixup=1.0, cutmix=1.0, mix_probability=0.0), 4)
    assert torch.equal(mixed, x)
    assert torch.equal(target.argmax(1), labels)
    assert torch.equal(target.max(1).values, torch.ones(8))


def test_each_augmentation_has_its_own_strength_and_colours_change_before_they_are_normalised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, tuple[object, ...]] = {}

    def noted(name: str) -> Callable[..., Tensor]:
        return lambda x, *strength: seen.update({name: (*strength, x.max().item() > 1)}) or x

    for name in ("affine", "jitter", "cutout"):
        monkeypatch.setattr(augment, name, noted(name))
    data, _ = batches(Augment(geometry=0.1, color=0.2, cutout=3, cutout_probability=0.4))
    data.mean, data.std = torch.full_like(data.mean, 100), torch.full_like(data.std, 500)
    data.augmented(torch.arange(16))
    assert seen == {"affine": (0.1, True), "jitter": (0.2, True), "cutout": (3, 0.4, False)}


def test_a_weak_batch_has_flip_and_crop_alone() -> None:
    data, pixels = batches(Augment(crop=0, cutout=4, mixup=1.0, color=1.0, geometry=1.0))
    x, labels = data.augmented(torch.arange(16), strong=False)
    assert ((x == pixels) | (x == pixels.flip(3))).flatten(1).all()
    assert labels.tolist() == [n % 4 for n in range(16)]


def test_draws_follow_the_seed() -> None:
    data, _ = batches(Augment(cutout=2, mixup=1.0, cutmix=1.0, color=0.5, geometry=0.5))

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return data.augmented(torch.arange(16))[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
