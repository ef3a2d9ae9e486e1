"""Labelled images to evaluate on: class folders, parquet shards, Hub datasets and the CIFAR python archives."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from .cifar_archive import read_archive
from .errors import DimmixError, first_line
from .images import ImageError, find_images, is_litter

SPLITS = ("test", "validation", "valid", "val", "dev")
"""The splits that are held out, the one to evaluate on first."""

ALL_SPLITS = ("train", *SPLITS)

CALLED = {
    "image": ("image", "img", "jpg", "jpeg", "png", "photo", "picture"),
    "label": ("label", "class", "cls", "target", "category", "y"),
}
"""What columns of images and of classes are called, or have in their names, the likeliest first."""

_SHARD = re.compile(rf"(?:(.+)[-_.])?({'|'.join(ALL_SPLITS)})(?:[-_.](?:of|[0-9]+|[0-9a-f]{{8,}}))*")
"""The name of a Parquet file: of a data set perhaps, of a split, and numbers of shards or digests."""


class Sample(NamedTuple):
    """One image (a path, encoded bytes or pixels), the index of its class, and its name."""

    image: Any
    label: int
    source: str


@dataclass(frozen=True)
class LabelledImages:
    """A data set: iterate it for its samples, as often as needed.

    `labels` is None where classes have no names, `label_column` where there are no columns.
    """

    name: str
    split: str
    labels: tuple[str, ...] | None
    length: int | None
    samples: Callable[[], Iterator[Sample]]
    label_column: str | None = None

    def __iter__(self) -> Iterator[Sample]:
        return self.samples()


def open_dataset(
    data: str, *, split: str | None = None, image_column: str | None = None, label_column: str | None = None
) -> LabelledImages:
    """The data set at `data`: a folder of class folders, a parquet file or folder of shards,
    `hf://org/dataset[/configuration][@revision]`, or a CIFAR python archive (its .tar.gz or the folder in it).

    `split` is by default the held-out one. The columns are by default those that the Hub's metadata say are images and
    classes, or that are named so, integers before texts, or the only ones that could be.

    Raises:
        DimmixError: nothing there that is one of these, or no such split or column.
    """
    if data.startswith("hf://"):
        return _from_hub(data, split, image_column, label_column)
    path = Path(data)
    if not path.exists():
        raise DimmixError(f"{data}: no such file or folder")
    if path.name.endswith((".tar.gz", ".tgz")) or any((path / name).is_file() for name in ("batches.meta", "meta")):
        return _from_cifar(path, split or "test")
    if path.is_file():
        if path.suffix != ".parquet":
            raise DimmixError(f"{data}: neither a folder, a .parquet file nor a CIFAR archive")
        named = _split_of(path)
        if named not in ALL_SPLITS:
            named = split or "all"
        split = _choose_split(data, split, [named])
        return _from_parquet(data, [path], split, image_column, label_column)
    if shards := _find_shards(path):
        prefixed = len({_prefix_of(shard) for shard in shards}) == 1
        chosen = _choose_split(data, split, sorted({_split_of(shard, prefixed) for shard in shards}))
        shards = [shard for shard in shards if _split_of(shard, prefixed) == chosen]
        if len(sets := sorted({_set_of(shard) for shard in shards})) > 1:
            raise DimmixError(f"{data}: {len(sets)} data sets lie in it; name one of {', '.join(map(str, sets))}")
        return _from_parquet(data, shards, chosen, image_column, label_column)
    if image_column or label_column:
        raise DimmixError(f"{data}: folders have no columns; leave --image-column and --label-column out", exit_code=2)
    return _from_folders(path, split)


def match_labels(dataset: LabelledImages, model: str, labels: Sequence[str]) -> list[int] | None:
    """The model's index for each class of the data, matched by name; None where one side has no names.

    The same names match first, numbers too: a model that learnt from the folders 0, 1, 10, 2 has its classes in that
    order. Then a number is an index, and a name may differ in case or in underscores for spaces.

    Raises:
        DimmixError: a class that the model does not know, or knows twice, or by index another number of classes.
    """
    if dataset.labels is None:
        return None
    if tuple(dataset.labels) == tuple(labels):
        return list(range(len(labels)))
    exact = {label: number for number, label in enumerate(labels)}
    if len(exact) == len(labels) and exact.keys() >= set(dataset.labels):
        return [exact[label] for label in dataset.labels]
    if dataset.labels and all(label.isdecimal() for label in dataset.labels):
        if max(map(int, dataset.labels)) >= len(labels):
            raise _mismatch(dataset, model, labels)
        return [int(label) for label in dataset.labels]
    if all(label.isdecimal() for label in labels):
        if len(dataset.labels) != len(labels):
            raise _mismatch(dataset, model, labels)
        return None
    names = [normalized(label) for label in labels]
    wanted = [normalized(label) for label in dataset.labels]
    found, times = {name: number for number, name in enumerate(names)}, Counter(names)
    if any(times[name] != 1 for name in wanted) or len(set(wanted)) != len(wanted):
        raise _mismatch(dataset, model, labels)
    return [found[name] for name in wanted]


def normalized(label: str) -> str:
    """A class's name as it is compared: without regard to case and underscores."""
    return label.casefold().replace("_", " ").strip()


def _mismatch(dataset: LabelledImages, model: str, labels: Sequence[str]) -> DimmixError:
    def show(names: Sequence[str]) -> str:
        return f"{len(names)} classes ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"

    return DimmixError(f"{dataset.name} has {show(dataset.labels or ())} but {model} knows {show(labels)}")


def _choose_split(data: str, split: str | None, found: list[str]) -> str:
    if split is None:
        if len(found) == 1:
            return found[0]
        split = next((name for name in SPLITS if name in found), SPLITS[0])
    if not found:
        raise DimmixError(f"{data}: no split {split!r}; its class folders are of no split", exit_code=2)
    if split not in found:
        raise DimmixError(f"{data}: no split {split!r} among {', '.join(found)}; choose one with --split", exit_code=2)
    return split


def _from_folders(root: Path, split: str | None) -> LabelledImages:
    # A split holds class folders; a class may be called `test` and holds images.
    splits = [name for name in ALL_SPLITS if _class_folders(root / name)]
    if splits or split:
        split = _choose_split(str(root), split, splits)
    folder = root / (split or "")
    classes = _class_folders(folder)
    if not classes:
        raise DimmixError(f"{folder}: no class folders, parquet files or CIFAR archive in it")

    def samples() -> Iterator[Sample]:
        for label, name in enumerate(classes):
            for image in find_images([str(folder / name)]):
                yield Sample(image, label, image.source if isinstance(image, ImageError) else image)

    return LabelledImages(str(root), split or "all", tuple(classes), None, samples)


def _class_folders(folder: Path) -> list[str]:
    """Those in a folder, by name; those that programs leave are no classes."""
    return sorted(path.name for path in folder.glob("*") if path.is_dir() and not is_litter(path.name, folder=True))


def _from_parquet(
    data: str, shards: list[Path], split: str, image_column: str | None, label_column: str | None
) -> LabelledImages:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise DimmixError("reading parquet needs pyarrow: pip install 'dimmix[eval]'") from None
    footers = [_footer(shard) for shard in shards]
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    image_column, label_column, names = _choose_columns(data, schemas[0], image_column, label_column)
    for column in (image_column, label_column):
        _check_alike(column, shards, schemas)
    if names is None:
        found = {name for shard in shards for name in _values(shard, label_column)}
        names = tuple(sorted(name for name in found if name is not None))

    def samples() -> Iterator[Sample]:
        number = 0
        for shard in shards:  # one open at a time: a data set may have more of them than a process may open
            with pq.ParquetFile(shard) as file:
                batches = file.iter_batches(256, columns=[image_column, label_column])
                while rows := _next_rows(batches, shard):
                    for row in rows:
                        yield _sample(row[image_column], row[label_column], names, number)
                        number += 1

    rows = sum(footer.num_rows for footer in footers)
    return LabelledImages(data, split, names or None, rows, samples, label_column)


def _footer(shard: Path) -> Any:
    """Schema and number of rows of a parquet file."""
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(shard)
    except (OSError, ValueError) as error:  # pyarrow's own errors are either
        raise DimmixError(f"{shard}: not a parquet file ({error})") from error


def _check_alike(column: str, shards: list[Path], schemas: list[Any]) -> None:
    """Raises a DimmixError that names the first shard whose `column` is missing or of another type than the first's."""
    expected = _decoded(schemas[0].field(column).type)
    for shard, schema in zip(shards, schemas, strict=True):
        index = schema.get_field_index(column)
        if index < 0 or _decoded(schema.field(index).type) != expected:
            has = f"{column!r} as {schema.field(index).type}" if index >= 0 else f"no column {column!r}"
            raise DimmixError(f"{shard}: has {has}, where {shards[0].name} has it as {expected}")
        if _declared_features(schema).get(column) != _declared_features(schemas[0]).get(column):
            raise DimmixError(
                f"{shard}: declares {column!r} otherwise than {shards[0].name}, with other classes perhaps"
            )


def _decoded(kind: Any) -> Any:
    """What a column's values are: pandas writes categories as numbers in a dictionary of texts."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _values(shard: Path, column: str) -> list[Any]:
    """Every value of a column, once."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard) as file:
        try:
            return file.read([column])[column].unique().to_pylist()
        except (OSError, ValueError) as error:
            raise DimmixError(f"{shard}: a broken parquet file ({error})") from error


def _next_rows(batches: Any, shard: Path) -> list[dict[str, Any]]:
    try:
        return next(batches).to_pylist()
    except StopIteration:
        return []
    except (OSError, ValueError) as error:  # pyarrow's own errors are either
        raise DimmixError(f"{shard}: a broken parquet file ({error})") from error


def _sample(image: Any, label: Any, names: Sequence[str], number: int) -> Sample:
    """From a row: the image is bytes, or bytes and path as the Hub has it; the label a number, a name, or missing."""
    path = image.get("path") if isinstance(image, dict) else None
    encoded = image if isinstance(image, bytes) else (image or {}).get("bytes") or path or b""
    index = names.index(label) if isinstance(label, str) else -1 if label is None else label
    return Sample(encoded, index, path or f"row {number}")


def _choose_columns(
    data: str, schema: Any, image_column: str | None, label_column: str | None
) -> tuple[str, str, tuple[str, ...] | None]:
    """Of an Arrow schema: the column with images, that with classes, and their names; None: they are its texts."""
    import pyarrow as pa

    features = _declared_features(schema)
    binary = {f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)}
    binary |= {f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0}
    kinds = {f.name: _decoded(f.type) for f in schema if not f.name.startswith("__")}  # keys, indices
    texts = [name for name, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    images = [name for name in schema.names if name in binary]
    classes = [name for name, kind in kinds.items() if pa.types.is_integer(kind)] + texts
    image_column = _choose_column(data, "image", image_column, images, features, "Image")
    label_column = _choose_column(data, "label", label_column, classes, features, "ClassLabel")
    for name in (image_column, label_column):
        if schema.names.count(name) > 1:
            raise DimmixError(f"{data}: {schema.names.count(name)} of its columns are called {name}")
    names = None if label_column in texts else tuple(map(str, features.get(label_column, {}).get("names") or ()))
    return image_column, label_column, names


def _find_shards(folder: Path) -> list[Path]:
    """The Parquet files in a folder and below it, without what programs leave beside them."""
    found = []
    for path in folder.glob("**/*.parquet"):
        *above, name = path.relative_to(folder).parts
        if not is_litter(name, folder=False) and not any(is_litter(part, folder=True) for part in above):
            found.append(path)
    return sorted(found)


def _prefix_of(shard: Path) -> str:
    """What stands in a Parquet file's name before the split, as the name of the data set may."""
    named = _SHARD.fullmatch(shard.stem)
    return named[1] or "" if named else ""


def _split_of(shard: Path, prefixed: bool = True) -> str:
    """The split that a Parquet file is of: by its name (train-0-of-2) or its folder's (train/0000).

    With `prefixed`, when no other set's files lie beside it, by the end of its name too (photos_test).
    """
    named, beginning = _SHARD.fullmatch(shard.stem), shard.stem.split("-")[0]
    if named and not named[1]:
        return named[2]
    if beginning not in ALL_SPLITS and shard.parent.name in ALL_SPLITS:
        return shard.parent.name
    return named[2] if named and prefixed else beginning


def _set_of(shard: Path) -> Path:
    """The folder of the data set that a Parquet file is of: its own, or where that is named after a split the next."""
    return shard.parent.parent if shard.parent.name in ALL_SPLITS else shard.parent


def _declared_features(schema: Any) -> dict[str, Any]:
    """What the Hub's metadata say of the columns, where there are such."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _choose_column(data: str, kind: str, asked: str | None, found: list[str], features: Any, feature: str) -> str:
    if asked is None:
        if not found:
            raise DimmixError(f"{data}: none of its columns holds {kind}s")
        declared = [name for name in found if features.get(name, {}).get("_type") == feature]
        called = [name for word in CALLED[kind] for name in found if word == name.lower()]
        called = called or [name for word in CALLED[kind] for name in found if len(word) > 1 and word in name.lower()]
        if len(chosen := declared or called or found) > 1 and chosen is found:
            raise DimmixError(
                f"{data}: {', '.join(found)} may each hold {kind}s; name one with --{kind}-column"
                + (", or in a recipe as data.label" if kind == "label" else ""),
                exit_code=2,
            )
        return chosen[0]
    if asked not in found:
        raise DimmixError(f"{data}: no {kind} column {asked} among {', '.join(found) or 'none'}", exit_code=2)
    return asked


def _from_hub(data: str, split: str | None, image_column: str | None, label_column: str | None) -> LabelledImages:
    try:
        import datasets
    except ImportError:
        raise DimmixError(f"{data} needs the datasets library: pip install 'dimmix[eval]'") from None
    path, _, revision = data.removeprefix("hf://").partition("@")
    organisation, _, name = path.partition("/")
    name, _, configuration = name.partition("/")
    wanted = {"path": f"{organisation}/{name}" if name else organisation, "revision": revision or None}
    try:
        configuration = configuration or datasets.get_dataset_default_config_name(**wanted) or ""
        if not configuration:
            found = datasets.get_dataset_config_names(**wanted)
            asked = f"{data}: {len(found)} data sets lie in it; name one of "
            raise DimmixError(asked + ", ".join(f"hf://{path}/{one}" for one in found), exit_code=2)
        split = _choose_split(data, split, datasets.get_dataset_split_names(config_name=configuration, **wanted))
        table = datasets.load_dataset(name=configuration, split=split, **wanted)
    except DimmixError:
        raise
    except Exception as error:  # the Hub's client, its network and the data's readers each raise their own
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        raise DimmixError(f"{data}: cannot be loaded ({first_line(cause)})") from error
    image_column, label_column, names = _choose_columns(data, table.features.arrow_schema, image_column, label_column)
    if names is None:
        names = tuple(sorted(name for name in table.unique(label_column) if name is not None))
    table = table.cast_column(image_column, datasets.Image(decode=False))

    def samples() -> Iterator[Sample]:
        for number, row in enumerate(table):
            yield _sample(row[image_column], row[label_column], names, number)

    return LabelledImages(data, split, names or None, len(table), samples, label_column)


def _from_cifar(path: Path, split: str) -> LabelledImages:
    _choose_split(str(path), split, ["train", "test"])
    pixels, labels, names = read_archive(path, split)

    def samples() -> Iterator[Sample]:
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            yield Sample(Image.fromarray(image), label, f"{split}/{number}")

    return LabelledImages(str(path), split, names, len(labels), samples)
