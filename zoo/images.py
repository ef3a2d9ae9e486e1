"""From anything that holds an image to an upright 8-bit one, and from folders and lists to the images in them."""

import glob
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from .errors import DimmixError

SUFFIXES = frozenset(
    """.apng .avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pcx .pgm .png .pnm .ppm .qoi .tga .tif .tiff
    .webp""".split()  # noqa: SIM905
)
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""More than this many pixels is taken for a decompression bomb, as Pillow does."""

_SORTED_AT_ONCE = 4096


def is_litter(name: str, folder: bool) -> bool:
    """Whether a file or folder is of those that macOS, notebooks and others leave beside images."""
    return name.startswith("._") or (folder and (name.startswith(".") or name == "__MACOSX"))


class ImageError(DimmixError):
    """An image that cannot be read: `source` says which, `reason` why not."""

    def __init__(self, source: str, reason: object) -> None:
        super().__init__(f"{source}: {reason}")
        self.source, self.reason = source, str(reason)


def open_image(source: Any, mode: str = "RGB") -> Image.Image:
    """Decode a path, encoded bytes, an open file, a PIL image or a uint8 array to one that is upright.

    Arrays are (H, W) or (H, W, C), tensors (C, H, W).
    `mode` is `RGB` or `L`. Transparency is laid over white; 16-bit and float images are scaled to 8 bits.

    Raises:
        ImageError: the image is missing, broken, not an image, or too large.
    """
    name = describe(source)
    try:
        if isinstance(source, Image.Image):
            return _to_mode(source, mode)
        if isinstance(source, str | os.PathLike) or hasattr(source, "read"):
            with Image.open(source) as image:
                return _to_mode(image, mode)
        if isinstance(source, bytes | bytearray | memoryview):
            with Image.open(io.BytesIO(source)) as image:
                return _to_mode(image, mode)
        return _to_mode(_from_array(source), mode)
    except Image.DecompressionBombError:
        raise ImageError(name, f"more than {MAX_PIXELS // 10**6} million pixels: a decompression bomb?") from None
    except Image.UnidentifiedImageError:
        raise ImageError(name, "not an image (no format that Pillow reads)") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ImageError(name, reason[:1].lower() + reason[1:]) from error
    except _NotAnImageError as error:
        raise ImageError(name, error) from None
    except Exception as error:  # a broken file makes Pillow's plugins raise nearly anything
        raise ImageError(name, f"broken image ({type(error).__name__}: {error})") from error


def sample_images() -> list[Image.Image]:
    """Ten photographs of 32 x 32 pixels: parts of examples/cat.jpg, the whole of it first."""
    with Image.open(Path(__file__).with_name("samples.png")) as strip:
        return [strip.crop((left, 0, left + 32, 32)) for left in range(0, strip.width, 32)]


def describe(source: Any) -> str:
    """A short name of an image's source, for messages and result rows."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, ImageError):
        return source.source
    kind = f"{source.mode} image" if isinstance(source, Image.Image) else type(source).__name__
    return getattr(source, "filename", "") or f"<{kind}>"


class _NotAnImageError(ValueError):
    """An array that holds no image; the message says why."""


def _from_array(source: Any) -> Image.Image:
    array = np.asarray(source.cpu() if hasattr(source, "cpu") else source)
    if array.dtype != np.uint8:
        raise _NotAnImageError(f"{array.dtype} of shape {array.shape}: pixels must be uint8")
    if array.ndim == 3 and hasattr(source, "cpu"):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or 0 in array.shape:
        raise _NotAnImageError(f"an array of shape {np.shape(source)} is not an image")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    image.load()
    if 0 in image.size:
        raise _NotAnImageError(f"{image.width}x{image.height} pixels are no image")
    image = _upright(image)
    if image.mode == mode and "transparency" not in image.info:
        return image if image.readonly == 0 else image.copy()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bits(image)
    elif image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        image = ImageCms.applyTransform(image, to_rgb) or image
    elif image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
        rgba = (image.convert(straight) if straight else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF says nothing about the pixels
        return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.float64)
    if isinstance(through := image.info.get("transparency"), int):
        pixels[pixels == through] = 65535
    if image.mode == "F":
        top = 1.0 if np.nanmax(pixels, initial=0) <= 1 else 255.0
    else:
        top = 65535.0 if image.mode != "I" or pixels.max(initial=0) > 255 else 255.0
    return Image.fromarray((np.nan_to_num(pixels / top).clip(0, 1) * 255 + 0.5).astype(np.uint8))


def find_images(sources: Iterable[str], lists: tuple[str, ...] = ()) -> Iterator[str | ImageError]:
    """The images that files, folders (searched to the bottom), globs and `@list.txt` name, lazily.

    Files of a folder or glob come sorted, in runs of a few thousand, so that a folder of a million starts at once. In a
    folder, hidden folders and what macOS leaves (`._*`, `__MACOSX`) are passed over. What cannot be listed, or holds no
    image, comes as an error in its place. `lists` are those that are being read.
    """
    for source in sources:
        try:
            if "\0" in source:
                yield ImageError(source, "no file can have this name")
            elif source.startswith("@") and not os.path.exists(source):
                yield from _listed(source, lists)
            elif os.path.isdir(source):
                yield from _walk(source)
            elif glob.has_magic(source) and not os.path.exists(source):
                yield from _glob(source)
            else:
                yield source
        except OSError as error:
            yield ImageError(source, error.strerror)


def _listed(source: str, lists: tuple[str, ...]) -> Iterator[str | ImageError]:
    path = os.path.realpath(source[1:])
    if path in lists:
        yield ImageError(source, "a list that names itself")
        return
    with open(source[1:], encoding="utf-8-sig", errors="surrogateescape") as lines:
        names = (line.strip() for line in lines if line.strip())
        first = next(names, None)
        if first is None:
            yield ImageError(source, "an empty list")
        elif "\0" in first:
            yield ImageError(source, "not a list of names, one a line, in UTF-8")
        else:
            yield from find_images(itertools.chain([first], names), (*lists, path))


def _glob(pattern: str) -> Iterator[str | ImageError]:
    names = (name for name in glob.iglob(pattern, recursive=True) if os.path.isfile(name) or os.path.islink(name))
    first = next(names, None)
    if first is None:
        yield ImageError(pattern, "no file matches")
        return
    rest = itertools.chain([first], names)
    while run := sorted(itertools.islice(rest, _SORTED_AT_ONCE)):
        yield from run


def _kind(entry: os.DirEntry[str]) -> "str | ImageError":
    """What is listed: a folder, a file, or an error for what is neither, as a pipe that would be waited for."""
    try:
        if entry.is_dir():
            return "folder"
        regular = entry.is_file() or not os.path.exists(entry.path)  # a broken link says so when it is opened
        return "file" if regular else ImageError(entry.path, "not a regular file")
    except OSError as error:
        return ImageError(entry.path, error.strerror)


def _walk(top: str) -> Iterator[str | ImageError]:
    folders, seen, found = [top], set(), 0
    while folders:
        folder = folders.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a symbolic link back up
                continue
            seen.add((status.st_dev, status.st_ino))
            inner = []
            with os.scandir(folder) as entries:
                while run := sorted(itertools.islice(entries, _SORTED_AT_ONCE), key=lambda entry: entry.name):
                    for entry in run:
                        kind = _kind(entry)
                        if is_litter(entry.name, folder=kind == "folder"):
                            continue
                        if kind == "folder":
                            inner.append(entry.path)
                        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES or isinstance(kind, ImageError):
                            found += 1
                            yield kind if isinstance(kind, ImageError) else entry.path
            folders += sorted(inner, reverse=True)
        except OSError as error:
            found += 1
            yield ImageError(folder, error.strerror)
    if not found:
        yield ImageError(top, "a folder without images")
