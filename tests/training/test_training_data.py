import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_data import encode, toy_pixels, write_shard

from dimmix.errors import DimmixError
from dimmix.training import data as data_module
from dimmix.training.data import Images, load_images
from dimmix.training.recipe import Data

TOY = Data("toy", image_size=16)


def test_shards_are_decoded_in_order(toy: Path) -> None:
    images = load_images(toy, TOY, "train")
    first, second = toy_pixels(25, 0), toy_pixels(15, 1)
    assert np.array_equal(images.pixels, np.concatenate([first[0], second[0]]))
    assert images.labels.tolist() == first[1] + second[1]
    assert images.names == ("dark", "light", "red")


def test_training_rows_of_class_folders_are_mixed_and_keep_their_labels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(("dark", "light", "red")):
            (folder := tmp_path / split / name).mkdir(parents=True)
            for row in range(20):
                Image.new("RGB", (16, 16), (100 * label, row, 0)).save(folder / f"{row:02}.png")
    images, test = load_images(tmp_path, TOY, "train"), load_images(tmp_path, TOY, "test")
    assert test.labels.tolist() == sorted(images.labels.tolist()) == [label for label in range(3) for _ in range(20)]
    assert set(images.labels[-12:].tolist()) == {0, 1, 2}
    assert (images.pixels[:, 0, 0, 0] == 100 * images.labels).all()
    assert len({tuple(pixel) for pixel in images.pixels[:, 0, 0].tolist()}) == 60
    again = load_images(tmp_path, TOY, "train")
    assert np.array_equal(images.pixels, again.pixels)
    assert np.array_equal(images.labels, again.labels)


def test_held_out_labels_count_in_the_names_of_the_training_images() -> None:
    held_out = Images(np.zeros((3, 1, 1, 3), np.uint8), np.array([1, 0, 1]), ("dark", "red"))
    matched = held_out.relabelled(("dark", "light", "red"))
    assert (matched.labels.tolist(), matched.names) == ([2, 0, 2], ("dark", "light", "red"))
    with pytest.raises(DimmixError, match="classes that the training images lack: red"):
        held_out.relabelled(("dark", "light"))
    cranes = Images(held_out.pixels, np.array([0, 2, 1]), ("crane", "light", "crane"))  # as in ImageNet
    assert cranes.relabelled(cranes.names).labels.tolist() == [0, 2, 1]
    with pytest.raises(DimmixError, match="two of them of one name"):
        held_out.relabelled(cranes.names)


def test_the_folder_of_the_shards_will_do(toy: Path) -> None:
    assert len(load_images(toy / "toy", TOY, "train")) == 40


def test_without_a_split_the_held_out_one_is_read(toy: Path) -> None:
    assert len(load_images(toy, TOY, None)) == 12
    next((toy / "toy").glob("test-*")).unlink()
    with pytest.raises(DimmixError, match="no split is held out"):
        load_images(toy, TOY, None)


def test_other_sizes_are_resized(toy: Path) -> None:
    pixels = load_images(toy, Data("toy", image_size=8), "train").pixels
    means = toy_pixels(25, 0)[0].reshape(25, -1).mean(1)
    assert pixels.shape == (40, 8, 8, 3)
    assert np.abs(pixels[:25].reshape(25, -1).mean(1) - means).max() < 3


def test_broken_and_missing_images_are_named_by_row(toy: Path) -> None:
    pixels, labels = toy_pixels(14, 3)
    images: list[bytes | None] = [encode(image) for image in pixels]
    images[2], images[5], images[9] = None, b"no image", encode(pixels[9])[:60]
    write_shard(toy / "toy" / "train-00000-of-2.parquet", images, labels)
    with pytest.raises(DimmixError, match="split train: 3 images are missing or broken: row 2, row 5, row 9 "):
        load_images(toy, TOY, "train")


def test_labels_outside_the_classes_are_named_by_row(toy: Path) -> None:
    pixels, labels = toy_pixels(5, 3)
    write_shard(toy / "toy" / "train-00000-of-2.parquet", [encode(i) for i in pixels], [*labels[:3], 3, -1])
    with pytest.raises(DimmixError, match=r"2 labels are not in 0\.\.2: rows 3, 4"):
        load_images(toy, TOY, "train")


def test_no_such_data_set(tmp_path: Path) -> None:
    with pytest.raises(DimmixError, match="nowhere"):
        load_images(tmp_path / "nowhere", TOY, "train")


def test_the_second_start_reads_the_cache(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = load_images(toy, TOY, "train", cache)
    with monkeypatch.context() as patch:
        patch.delattr(data_module, "_decode")
        assert np.array_equal(load_images(toy, TOY, "train", cache).pixels, first.pixels)
    stored = next(cache.glob("*.pixels.npy"))
    stored.write_bytes(stored.read_bytes()[:500])
    assert np.array_equal(load_images(toy, TOY, "train", cache).pixels, first.pixels)


def test_the_cache_is_left_when_the_recipe_wants_another_size(toy: Path, tmp_path: Path) -> None:
    for size in (16, 8):
        images = load_images(toy, Data("toy", image_size=size), "train", tmp_path / "cache")
        assert images.pixels.shape == (40, size, size, 3)


def test_the_cache_is_left_when_the_data_change(toy: Path, tmp_path: Path) -> None:
    load_images(toy, TOY, "test", tmp_path / "cache")
    pixels, labels = toy_pixels(12, 9)
    write_shard(toy / "toy" / "test-00000-of-2.parquet", [encode(image) for image in pixels], labels)
    assert np.array_equal(load_images(toy, TOY, "test", tmp_path / "cache").pixels, pixels)


def test_the_cache_is_left_when_a_file_that_is_all_the_data_changes(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    for count in (6, 8):
        pixels, labels = toy_pixels(count, count)
        write_shard(file, [encode(image) for image in pixels], labels)
        assert len(load_images(file, TOY, "train", tmp_path / "cache")) == count


def test_the_digest_is_of_pixels_then_labels() -> None:
    pixels, labels = toy_pixels(4, 0)
    images = Images(pixels, np.array(labels), ("a", "b", "c"))
    expected = hashlib.sha256(pixels[:2].tobytes() + np.array(labels)[:2].tobytes()).hexdigest()
    assert images[:2].digest == expected != images.digest


def test_runs_inside_the_data_are_no_part_of_them(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = toy / "toy" / "runs" / "cache"
    first = load_images(toy, TOY, "train", cache)
    (cache.parent / "log.jsonl").write_text("{}")
    monkeypatch.delattr(data_module, "_decode")
    assert np.array_equal(load_images(toy, TOY, "train", cache).pixels, first.pixels)
