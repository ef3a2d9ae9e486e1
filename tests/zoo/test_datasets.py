"""Every layout gives the same samples; labels are matched by name or number, or refused with both sides shown."""

import io
import os
import pickle
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dimmix.datasets import LabelledImages, match_labels, open_dataset
from dimmix.errors import DimmixError
from dimmix.images import open_image

from ..conftest import CIFAR10, LABELS


def test_class_folders_have_sorted_classes_and_all_images(class_folders):
    dataset = open_dataset(str(class_folders))
    samples = list(dataset)
    assert dataset.labels == LABELS
    assert [sample.label for sample in samples] == [label for label in range(10) for _ in range(6)]
    assert samples[0].source.startswith(f"{class_folders}/airplane/")


def test_a_split_is_a_folder_above_the_classes(class_folders, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(class_folders)
    assert open_dataset(str(tmp_path)).split == "val"
    assert open_dataset(str(tmp_path), split="train").split == "train"
    with pytest.raises(DimmixError, match=r"no split 'test' among train, val"):
        open_dataset(str(tmp_path), split="test")


def test_parquet_has_the_labels_of_its_metadata(cifar_rows):
    dataset = open_dataset(str(CIFAR10))
    samples = list(dataset)
    assert (dataset.labels, dataset.length, len(samples)) == (LABELS, 60, 60)
    assert np.array_equal(np.asarray(open_image(samples[7].image)), np.asarray(cifar_rows[7][0]))
    assert samples[7].label == cifar_rows[7][1]


def test_a_folder_of_shards_is_read_whole_and_its_held_out_split_first(tmp_path):
    for name in ("test-00000-of-00002", "test-00001-of-00002", "train-00000-of-00001"):
        (tmp_path / f"{name}.parquet").write_bytes(CIFAR10.read_bytes())
    dataset = open_dataset(str(tmp_path))
    assert (dataset.split, dataset.length) == ("test", 120)
    assert open_dataset(str(tmp_path), split="train").length == 60


def test_columns_may_be_named_and_labels_be_text(tmp_path):
    pa = pytest.importorskip("pyarrow")
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    table = pa.table({"n": [1, 2], "kind": ["cat", "dog"], "photo": pa.array([file.getvalue()] * 2, pa.binary())})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    dataset = open_dataset(str(tmp_path / "x.parquet"), label_column="kind")
    assert (dataset.labels, [sample.label for sample in dataset]) == (("cat", "dog"), [0, 1])
    with pytest.raises(DimmixError, match="no label column foo among n, kind"):
        open_dataset(str(tmp_path / "x.parquet"), label_column="foo")


def cifar_archive(path, meta, batches, **extra):
    """A CIFAR python archive as the original is: protocol 2, bytes for keys."""
    with tarfile.open(path, "w:gz") as archive:
        for name, value in {**meta, **batches, **extra}.items():
            content = pickle.dumps(value, protocol=2)
            entry = tarfile.TarInfo(f"cifar/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_cifar_python_archives_are_read(tmp_path, cifar_rows):
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1).reshape(-1) for image, _ in cifar_rows[:5]])
    batch = {b"data": pixels, b"labels": [label for _, label in cifar_rows[:5]]}
    cifar_archive(tmp_path / "c.tar.gz", {"batches.meta": {b"label_names": list(LABELS)}}, {"test_batch": batch})
    dataset = open_dataset(str(tmp_path / "c.tar.gz"))
    samples = list(dataset)
    assert (dataset.split, dataset.labels, dataset.length) == ("test", LABELS, 5)
    assert np.array_equal(np.asarray(samples[3].image), np.asarray(cifar_rows[3][0]))


def test_a_split_that_a_cifar_archive_lacks_is_wrong_usage(tmp_path):
    cifar_archive(tmp_path / "c.tar.gz", {"batches.meta": {b"label_names": list(LABELS)}}, {})
    with pytest.raises(DimmixError, match="no split 'nope' among train, test") as caught:
        open_dataset(str(tmp_path / "c.tar.gz"), split="nope")
    assert caught.value.exit_code == 2


def test_a_cifar_archive_can_run_no_code(tmp_path):
    cifar_archive(tmp_path / "c.tar.gz", {"batches.meta": {b"label_names": print}}, {"test_batch": {}})
    with pytest.raises(DimmixError, match="print has no business in a CIFAR archive"):
        open_dataset(str(tmp_path / "c.tar.gz"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "no class folders"),
        (lambda path: path.write_text("x"), "neither a folder"),
    ],
)
def test_what_is_no_data_set_is_one_line(tmp_path, make, reason):
    make(tmp_path / "x")
    with pytest.raises(DimmixError, match=reason):
        open_dataset(str(tmp_path / "x"))


def test_a_broken_parquet_file_is_one_line(tmp_path):
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(DimmixError, match="not a parquet file"):
        open_dataset(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (
            {"image": [b"y"], "label": ["dog"]},
            r"b\.parquet: has 'label' as string, where train-a\.parquet has it as int64",
        ),
        (
            {"picture": [b"y"], "label": [1]},
            r"b\.parquet: has no column 'image', where train-a\.parquet has it as binary",
        ),
    ],
)
def test_shards_of_different_columns_are_one_line(tmp_path, second, reason):
    pa = pytest.importorskip("pyarrow")
    for name, columns in (("a", {"image": [b"x"], "label": [0]}), ("b", second)):
        pa.parquet.write_table(pa.table(columns), tmp_path / f"train-{name}.parquet")
    with pytest.raises(DimmixError, match=reason):
        open_dataset(str(tmp_path))


def test_more_shards_than_a_process_may_open(tmp_path):
    pa, resource = pytest.importorskip("pyarrow"), pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 200
    for number in range(30):
        table = pa.table({"image": [b"x"], "label": [f"class {number:02}"]})
        pa.parquet.write_table(table, tmp_path / f"train-{number:02}.parquet")
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, hard))
    try:
        assert [sample.label for sample in open_dataset(str(tmp_path))] == list(range(30))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_parquet_file_that_is_damaged_inside_is_one_line(tmp_path):
    content = bytearray(CIFAR10.read_bytes())
    content[4:20_000] = bytes(19_996)
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DimmixError, match=r"x\.parquet: a broken parquet file"):
        list(open_dataset(str(tmp_path / "x.parquet")))


def test_columns_are_chosen_by_what_they_hold(tmp_path):
    pa = pytest.importorskip("pyarrow")
    columns = {"id": [1], "box": [{"x": 1}], "label": [3], "photo": pa.array([b"x"], pa.large_binary())}
    pa.parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    (sample,) = open_dataset(str(tmp_path / "x.parquet"))
    assert (sample.image, sample.label) == (b"x", 3)
    pa.parquet.write_table(pa.table({"label": [3]}), tmp_path / "x.parquet")
    with pytest.raises(DimmixError, match="none of its columns holds images"):
        open_dataset(str(tmp_path / "x.parquet"))


def named(*labels):
    return LabelledImages("data", "test", labels or None, 0, lambda: iter(()))


def test_labels_are_matched_by_name_in_any_order_and_subset():
    assert match_labels(named("Dog", "fire_truck"), "m", ["cat", "dog", "fire truck"]) == [1, 2]


def test_labels_are_matched_by_number_where_one_side_has_no_names():
    assert match_labels(named(), "m", ["cat", "dog"]) is None
    assert match_labels(named("a", "b"), "m", ["0", "1"]) is None
    assert match_labels(named("0", "2"), "m", ["a", "b", "c"]) == [0, 2]


@pytest.mark.parametrize(("data", "model"), [(("cat", "cow"), ["cat", "dog"]), (("a", "b", "c"), ["0", "1"])])
def test_a_mismatch_shows_both_sides(data, model):
    with pytest.raises(DimmixError) as caught:
        match_labels(named(*data), "m", model)
    assert all(name in str(caught.value) for name in (*data, *model))
    assert "\n" not in str(caught.value)


def test_numbers_for_names_are_indices_however_they_are_sorted():
    folders = sorted(map(str, range(12)))
    assert match_labels(named(*folders), "m", [str(index) for index in range(12)]) == [int(name) for name in folders]


@pytest.mark.parametrize("names", ["0 1 10 11 2", "1 2 3", "A B a b", "crane dog crane"])
def test_the_same_names_are_the_same_classes(names):
    assert match_labels(named(*names.split()), "m", names.split()) == list(range(len(names.split())))


def test_names_that_differ_in_case_alone_are_told_apart_or_refused():
    assert match_labels(named("b", "A"), "m", ["A", "B", "a", "b"]) == [3, 0]
    for data, model in ((("A", "C"), ["a", "A", "c"]), (("a", "A"), ["a", "b"])):
        with pytest.raises(DimmixError, match="but m knows"):
            match_labels(named(*data), "m", model)


def test_a_class_may_be_called_as_a_split_is(tmp_path, class_folders):
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(next((class_folders / "cat").iterdir()).read_bytes())
    dataset = open_dataset(str(tmp_path))
    assert (dataset.split, dataset.labels, len(list(dataset))) == ("all", ("car", "train"), 2)


def test_options_that_a_source_cannot_follow_are_refused(tmp_path, class_folders):
    (tmp_path / "test.parquet").write_bytes(CIFAR10.read_bytes())
    assert open_dataset(str(tmp_path / "test.parquet"), split="test").split == "test"
    with pytest.raises(DimmixError, match="no split 'train' among test"):
        open_dataset(str(tmp_path / "test.parquet"), split="train")
    with pytest.raises(DimmixError, match="folders have no columns"):
        open_dataset(str(class_folders), label_column="label")


@pytest.mark.parametrize(
    "metadata",
    [b"not json", b"[]", b'{"info": null}', b'{"info": {"features": []}}', b'{"info": {"features": {"label": ["x"]}}}'],
)
def test_metadata_that_are_not_the_hubs_are_passed_over(tmp_path, metadata):
    table = pq.read_table(CIFAR10).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, tmp_path / "x.parquet")
    assert open_dataset(str(tmp_path / "x.parquet")).labels is None


def test_a_damaged_cifar_archive_is_one_line(tmp_path):
    path = tmp_path / "c.tar.gz"
    noise = np.random.default_rng(0).integers(0, 256, (50, 3072), dtype=np.uint8)
    batch = {b"data": noise, b"labels": [0] * 50}
    cifar_archive(path, {"batches.meta": {b"label_names": list(LABELS)}}, {"test_batch": batch})
    whole = path.read_bytes()
    for at in range(200, len(whole), len(whole) // 25):
        path.write_bytes(whole[:at] + bytes(255 - byte for byte in whole[at : at + 40]) + whole[at + 40 :])
        with pytest.raises(DimmixError, match=r"c\.tar\.gz: not a whole CIFAR python archive") as caught:
            open_dataset(str(path))
        assert "\n" not in str(caught.value)
    cifar_archive(path, {"batches.meta": {b"label_names": list(LABELS)}}, {"test_batch": [1, 2]})
    with pytest.raises(DimmixError, match="not a whole CIFAR python archive"):
        open_dataset(str(path))


def test_shards_in_a_folder_for_each_split_are_of_that_split(tmp_path):
    pa = pytest.importorskip("pyarrow")
    for split, count in (("train", 6), ("test", 3)):
        folder = tmp_path / "default" / split
        folder.mkdir(parents=True)
        table = pa.table({"image": [b"x"] * count, "label": list(range(count))})
        pa.parquet.write_table(table, folder / "0000.parquet")
    datasets = [open_dataset(str(tmp_path), split=split) for split in (None, "train")]
    assert [(dataset.split, dataset.length) for dataset in datasets] == [("test", 3), ("train", 6)]


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"id": [7, 8], "class": ["cat", "dog"]}, "class"),
        ({"width": [7, 8], "Category": ["cat", "dog"]}, "Category"),
        ({"__index_level_0__": [7, 8], "answer": ["cat", "dog"]}, "answer"),
        ({"class_name": ["cat", "dog"], "label_id": [7, 8]}, "label_id"),
        ({"num_labels": [1, 1], "label": ["cat", "dog"], "label_count": [1, 1]}, "label"),
        ({"__key__": ["a", "b"], "__url__": ["c", "d"], "cls": [7, 8]}, "cls"),
        ({"filename": ["a", "b"], "y": [7, 8], "by": [1, 1]}, "y"),
    ],
)
def test_the_column_of_labels_is_found_by_its_name(tmp_path, columns, chosen):
    pa = pytest.importorskip("pyarrow")
    for dictionary in (False, True):
        table = pa.table({"image": [b"x"] * 2} | columns)
        for at, field in enumerate(table.schema):
            if dictionary and pa.types.is_string(field.type):
                table = table.set_column(at, field.name, table.column(at).dictionary_encode())
        pa.parquet.write_table(table, tmp_path / "x.parquet")
        dataset = open_dataset(str(tmp_path / "x.parquet"))
        assert dataset.label_column == chosen
        expected = (("cat", "dog"), [0, 1]) if isinstance(columns[chosen][0], str) else (None, [7, 8])
        assert (dataset.labels, [sample.label for sample in dataset]) == expected


def test_columns_that_may_each_hold_labels_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": [b"x"], "id": [1], "kind": ["cat"]})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DimmixError, match=r"id, kind may each hold labels; name one with --label-column") as raised:
        open_dataset(str(tmp_path / "x.parquet"))
    assert raised.value.exit_code == 2


def test_texts_in_a_dictionary_are_texts_in_every_shard(tmp_path):
    pa = pytest.importorskip("pyarrow")
    labels = pa.array(["cat", "dog"])
    for number, column in enumerate((labels, labels.dictionary_encode())):
        table = pa.table({"image": [b"x"] * 2, "label": column})
        pa.parquet.write_table(table, tmp_path / f"test-{number}.parquet")
    assert [sample.label for sample in open_dataset(str(tmp_path))] == [0, 1, 0, 1]


@pytest.mark.parametrize("names", [("cifar10-train", "cifar10-test"), ("train_0", "test_0"), ("a.train.0", "a.test.0")])
def test_the_split_may_stand_anywhere_in_a_files_name(tmp_path, names):
    for name in names:
        (tmp_path / f"{name}.parquet").write_bytes(CIFAR10.read_bytes())
    datasets = [open_dataset(str(tmp_path)), open_dataset(str(tmp_path), split="train")]
    assert [(dataset.split, dataset.length) for dataset in datasets] == [("test", 60), ("train", 60)]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("mnist_test", "fashion_test"), "fashion_test, mnist_test"),
        (("train", "train_small"), "train, train_small"),
        (("test/train_x", "train/0000"), "test, train"),
        (("train/a_test", "test/a_test"), "test, train"),
    ],
)
def test_names_of_several_sets_are_no_splits(tmp_path, names, splits):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.parquet").write_bytes(CIFAR10.read_bytes())
    (tmp_path / "._test.parquet").write_bytes(b"macOS")
    with pytest.raises(DimmixError, match=f"no split 'nothing' among {splits};"):
        open_dataset(str(tmp_path), split="nothing")
    assert all(open_dataset(str(tmp_path), split=split).length == 60 for split in splits.split(", "))


def test_hidden_folders_are_no_classes(tmp_path, class_folders):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    (tmp_path / "train" / ".cache").mkdir()
    for folder in class_folders.iterdir():
        (tmp_path / "test" / folder.name).symlink_to(folder)
    (tmp_path / "test" / ".ipynb_checkpoints").mkdir()
    assert open_dataset(str(tmp_path)).labels == open_dataset(str(class_folders)).labels
    with pytest.raises(DimmixError, match=r"no split 'train' among test;"):
        open_dataset(str(tmp_path), split="train")


def test_integers_are_classes_before_texts_are(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": [b"x"] * 2, "filename": ["0.png", "1.png"], "target": [1, 0]})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    dataset = open_dataset(str(tmp_path / "x.parquet"))
    assert [sample.label for sample in dataset] == [1, 0]


def test_names_of_classes_are_text_whatever_the_metadata_have(tmp_path):
    metadata = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1, 2]}}}}'
    table = pq.read_table(CIFAR10).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, tmp_path / "x.parquet")
    assert open_dataset(str(tmp_path / "x.parquet")).labels == ("1", "2")


@pytest.mark.parametrize(("names", "said"), [(["image", "image", "label"], "image"), (["image", "k", "k"], "k")])
def test_columns_of_one_name_are_one_line(tmp_path, names, said):
    pa = pytest.importorskip("pyarrow")
    kinds = {"image": [b"x"], "label": [0], "k": [0]}
    pq.write_table(pa.Table.from_arrays([pa.array(kinds[name]) for name in names], names), tmp_path / "x.parquet")
    with pytest.raises(DimmixError, match=f"2 of its columns are called {said}"):
        open_dataset(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    ("names", "pixels", "labels"),
    [
        (list(LABELS), np.uint8, [0]),
        (list(LABELS), np.float64, [0, 0]),
        (list(LABELS), np.uint8, ["a", "b"]),
        (5, np.uint8, [0, 0]),
    ],
)
def test_a_cifar_archive_of_other_contents_is_one_line(tmp_path, names, pixels, labels):
    batch = {b"data": np.zeros((2, 3072), pixels), b"labels": labels}
    cifar_archive(tmp_path / "c.tar.gz", {"batches.meta": {b"label_names": names}}, {"test_batch": batch})
    with pytest.raises(DimmixError, match="not a whole CIFAR python archive"):
        open_dataset(str(tmp_path / "c.tar.gz"))


def test_class_folders_without_splits_have_none_to_choose(class_folders):
    with pytest.raises(DimmixError, match="no split 'dev'; its class folders are of no split"):
        open_dataset(str(class_folders), split="dev")
