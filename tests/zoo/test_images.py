"""Images of every Pillow mode, upright; broken ones as one-line errors; folders, globs and lists of them."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dimmix.images import ImageError, find_images, open_image

RED = (200, 30, 60)


def pixel(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return value


@pytest.mark.parametrize(
    ("mode", "colour", "expected", "tolerance"),
    [
        ("1", 1, (255, 255, 255), 0),
        ("L", 77, (77, 77, 77), 0),
        ("LA", (0, 0), (255, 255, 255), 0),
        ("RGB", RED, RED, 0),
        ("RGBA", (*RED, 255), RED, 0),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204), 1),
        ("RGBa", (0, 0, 0, 0), (255, 255, 255), 0),
        ("RGBX", (*RED, 0), RED, 0),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0), 0),
        ("YCbCr", (76, 85, 255), (254, 0, 0), 2),
        ("HSV", (0, 255, 255), (255, 0, 0), 0),
        ("LAB", (255, 128, 128), (255, 255, 255), 3),
        ("I;16", 257 * 130, (130, 130, 130), 0),
        ("I", 257 * 130, (130, 130, 130), 0),
        ("I", 130, (130, 130, 130), 0),
        ("F", 0.5, (128, 128, 128), 0),
        ("F", 130.0, (130, 130, 130), 0),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, expected, tolerance):
    found = pixel(open_image(Image.new(mode, (4, 4), colour)))
    assert np.abs(np.subtract(found, expected)).max() <= tolerance


def test_palette_with_transparency_lies_over_white():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([10, 20, 30, 200, 30, 60])
    image.putpixel((1, 1), 1)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=0)
    decoded = open_image(file.getvalue())
    assert pixel(decoded) == (255, 255, 255)
    assert decoded.getpixel((1, 1)) == RED


def test_16_bit_png_keeps_its_greys(tmp_path):
    Image.fromarray(np.array([[0, 257 * 128, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png", "L")).tolist() == [[0, 128, 255]]


def test_a_transparent_grey_of_16_bits_lies_over_white(tmp_path):
    image = Image.fromarray(np.array([[0, 300, 65535]], np.uint16))
    image.save(tmp_path / "deep.png", transparency=300)
    assert np.asarray(open_image(tmp_path / "deep.png", "L")).tolist() == [[0, 255, 255]]


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)


def test_arrays_and_tensors_are_images():
    torch = pytest.importorskip("torch")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(open_image(pixels)), pixels)
    assert np.array_equal(np.asarray(open_image(torch.from_numpy(pixels).permute(2, 0, 1))), pixels)


def huge_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def png_bytes() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (png_bytes()[:900], "truncated"),
        (huge_png(), "bomb"),
    ],
)
def test_a_broken_file_is_one_line_with_its_name(tmp_path, content, reason):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(path)
    assert caught.value.source == str(path)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a directory"):
        open_image(tmp_path)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folders_are_searched_to_the_bottom_past_other_files_and_links_back_up(tmp_path):
    touch(tmp_path / "b.png", tmp_path / "a.JPG", tmp_path / "notes.txt", tmp_path / "deep" / "er" / "c.webp")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    found = list(find_images([str(tmp_path)]))
    assert [os.path.relpath(str(path), tmp_path) for path in found] == ["a.JPG", "b.png", "deep/er/c.webp"]


def test_what_programs_leave_in_folders_is_passed_over(tmp_path):
    left = [".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png", "._a.png", "deep/._b.png"]
    touch(tmp_path / "a.png", tmp_path / "deep" / "b.png", *(tmp_path / name for name in left))
    found = list(find_images([str(tmp_path)]))
    assert [os.path.relpath(str(path), tmp_path) for path in found] == ["a.png", "deep/b.png"]
    assert len(list(find_images([str(tmp_path / ".ipynb_checkpoints")]))) == 1


def test_globs_and_lists_name_images(tmp_path):
    touch(tmp_path / "a.png", tmp_path / "deep" / "b.png")
    listing = tmp_path / "list.txt"
    listing.write_text(f"{tmp_path}/a.png\n\n{tmp_path}/none.png\n")
    assert sorted(map(str, find_images([f"{tmp_path}/**/*.png"]))) == [f"{tmp_path}/a.png", f"{tmp_path}/deep/b.png"]
    assert list(find_images([f"@{listing}"])) == [f"{tmp_path}/a.png", f"{tmp_path}/none.png"]


def test_what_names_nothing_is_an_error_in_its_place(tmp_path):
    found = list(find_images([str(tmp_path), f"{tmp_path}/*.gif", f"@{tmp_path}/none.txt", "x.png"]))
    assert [isinstance(item, ImageError) for item in found] == [True, True, True, False]
    assert [str(item).split(": ")[1] for item in found[:3]] == [
        "a folder without images",
        "no file matches",
        "No such file or directory",
    ]


def test_a_list_that_names_itself_or_nothing_is_an_error_in_its_place(tmp_path):
    (tmp_path / "self.txt").write_text(f"a.png\n@{tmp_path}/other.txt\n")
    (tmp_path / "other.txt").write_text(f"@{tmp_path}/self.txt\nb.png\n")
    first, again, last = find_images([f"@{tmp_path}/self.txt"])
    assert (first, last, str(again)) == ("a.png", "b.png", f"@{tmp_path}/self.txt: a list that names itself")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    found = [str(item) for item in find_images([f"@{tmp_path}/empty.txt", f"{tmp_path}/fold*"])]
    assert [text.split(": ")[1] for text in found] == ["an empty list", "no file matches"]
