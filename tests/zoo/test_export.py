"""Every kind of export answers as the model does and carries its metadata; nothing unverified keeps its name."""

import copy
import io
import json
import pickle
import re
import sys
import zipfile

import numpy as np
import onnx
import pytest
import timm
import torch

from dimmix import Classifier
from dimmix.datasets import open_dataset
from dimmix.errors import DimmixError
from dimmix.export import BATCHES, _largest_difference, export_model, is_convolutional, sample_dataset, split_dataset
from dimmix.images import sample_images
from dimmix.pt2 import _EXPRESSION
from dimmix.runtime import TorchRuntime, load_model, load_runtime

from ..conftest import CIFAR10, LABELS


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_model(tiny.architecture, checkpoint=tiny.checkpoint)


@pytest.fixture(scope="module")
def images(loaded):
    return np.stack([loaded[1].preprocess(image) for image in sample_images()])


@pytest.fixture(scope="module")
def reference(tiny):
    return Classifier(tiny.architecture, "cpu", tiny.checkpoint)


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_an_exported_file_answers_as_the_model_with_its_labels(kind, loaded, reference, archive, tiny_onnx, cifar_rows):
    again = Classifier(str({"pt2": archive, "onnx": tiny_onnx}[kind]), "cpu")
    assert again.labels == list(LABELS)
    assert again.runtime.spec.preprocess == loaded[1].preprocess
    assert again.runtime.spec.card["tag"] == "random"
    photos = [image for image, _ in cifar_rows[:5]]
    expected = [[p.score for p in answer] for answer in reference.predict(photos)]
    np.testing.assert_allclose([[p.score for p in answer] for answer in again.predict(photos)], expected, atol=1e-5)
    np.testing.assert_allclose(again.embed(photos), reference.embed(photos), atol=1e-5)


def test_an_archive_answers_in_lanes_side_by_side(archive, reference, cifar_rows, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)  # whatever machine this is
    again = Classifier(str(archive), "cpu")
    photos = [image for image, _ in cifar_rows]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert again.runtime.lanes(32) == 2
        found = [[p.score for p in result.predictions] for result in again.stream(photos, batch_size=32)]
    finally:
        torch.set_num_threads(threads)
    expected = [[p.score for p in answer] for answer in reference.predict(photos)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_exporting_leaves_the_model_as_it_was(loaded, images, tmp_path):
    model = copy.deepcopy(loaded[0]).train()
    export_model(model, loaded[1], "safetensors", tmp_path / "m.safetensors", images, atol=1e-6)
    assert model.training
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in loaded[0].state_dict().items())


def test_safetensors_carry_labels_and_preprocessing_without_a_card_beside_them(loaded, images, tiny, tmp_path):
    export_model(*loaded, "safetensors", tmp_path / "m.safetensors", images, atol=1e-6)
    again = Classifier(tiny.architecture, "cpu", tmp_path / "m.safetensors")
    assert again.labels == list(LABELS)
    assert again.runtime.spec.preprocess == loaded[1].preprocess


def test_a_timm_dir_is_loaded_by_timm(loaded, images, tmp_path):
    export_model(*loaded, "timm-dir", tmp_path / "folder", images, atol=1e-6)
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    with torch.inference_mode():
        np.testing.assert_array_equal(model(torch.from_numpy(images)), loaded[0](torch.from_numpy(images)))
    assert sorted(path.suffix for path in (tmp_path / "folder").iterdir()) == [".json", ".safetensors"]
    with pytest.raises(DimmixError, match="there is something already"):
        export_model(*loaded, "timm-dir", tmp_path / "folder", images, atol=1e-6)


def test_a_difference_over_atol_leaves_the_old_file(loaded, images, tmp_path, monkeypatch):
    (tmp_path / "m.safetensors").write_text("old")
    monkeypatch.setattr("dimmix.export._largest_difference", lambda *arguments: 0.5)
    with pytest.raises(DimmixError, match=r"differs from the model by 5\.00e-01, more than --atol 0\.1"):
        export_model(*loaded, "safetensors", tmp_path / "m.safetensors", images, atol=0.1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def _groups(path):
    """Of each convolution in a file, in their order."""
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    return [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "group"]


def test_int8_of_a_mixer_is_dynamic_and_stays_near_the_model(tmp_path, images, loaded):
    torch.manual_seed(0)
    model = timm.create_model("butterfly_mixer_nano_32", num_classes=10, depth=1, conv_stem=False).eval()
    written = export_model(model, loaded[1], "onnx", tmp_path / "m.onnx", images, atol=0.2, calibration=[images])
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not is_convolutional(model)
    assert operators >= {"DynamicQuantizeLinear", "MatMulInteger"}
    assert not [group for group in _groups(tmp_path / "m.onnx") if group > 1]  # int8 is quick with products
    assert 0 < written.difference <= 0.2


def test_int8_of_a_vit_leaves_its_attention(tmp_path, images, loaded):
    torch.manual_seed(0)
    model = timm.create_model("vit_butterfly_nano_patch4_32", num_classes=10).eval()
    written = export_model(model, loaded[1], "onnx", tmp_path / "m.onnx", images, atol=0.5, calibration=[images])
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert operators >= {"DynamicQuantizeLinear", "MatMulInteger", "Attention"}
    assert 0 < written.difference <= 0.5


def test_levels_of_a_mixer_are_convolutions_in_groups_of_whole_vectors(tmp_path, images, loaded):
    torch.manual_seed(0)
    model = timm.create_model("butterfly_mixer_nano_32", num_classes=10, depth=1, conv_stem=False).eval()
    written = export_model(model, loaded[1], "onnx", tmp_path / "m.onnx", images, atol=1e-4)
    # The patches; then two levels of two products each, over 64 tokens in pairs of blocks of 8 and over 192 channels.
    assert _groups(tmp_path / "m.onnx") == [1] + [4] * 4 + [12] * 4
    assert written.difference <= 1e-4


def test_threads_of_onnxruntime_do_not_wait_actively_for_the_next_run(tiny_onnx):
    options = load_runtime(str(tiny_onnx), device="cpu").session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_most_weights_of_a_resnet_are_convolutions(loaded):
    assert is_convolutional(loaded[0])


def test_a_sample_of_a_data_set_is_drawn_from_all_of_it_and_split():
    dataset = open_dataset(str(CIFAR10))
    sample = sample_dataset(dataset, 40)
    names = {item.source for item in sample}
    assert (len(names), sample.length) == (40, 40)
    assert names & {item.source for item in list(dataset)[40:]}
    calibration, rest = split_dataset(sample)
    assert (len(list(calibration)), len(list(rest))) == (10, 30)
    assert {item.source for item in calibration} | {item.source for item in rest} == names


@pytest.fixture(scope="module")
def archive(loaded, images, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "m.pt2"
    export_model(*loaded, "pt2", path, images, atol=1e-5)
    return path


def rewritten(archive, path, name, change):
    """A copy of the archive with one part changed or added."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        names = [*old.namelist(), *({name} - set(old.namelist()))]
        for part in names:
            content = old.read(part) if part in old.namelist() else b""
            new.writestr(part, change(content) if part == name else content)
    return path


class Harmful:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("data/sample_inputs/model.pt", lambda old: pickle.dumps(Harmful()), "sample inputs are a pickle"),
        ("data/weights/model.pt", lambda old: pickle.dumps(Harmful()), "which no export of dimmix does"),
        ("data/aotinductor/model/a.so", lambda old: b"", "which no export of dimmix does"),
        (
            "data/weights/model_weights_config.json",
            lambda old: old.replace(b'"use_pickle": false', b'"use_pickle": true', 1),
            "weights is a pickle",
        ),
        (
            "models/model.json",
            lambda old: json.dumps(json.loads(old) | {"x": {"expr_str": "open('/tmp/x')"}}).encode(),
            "no plain expression",
        ),
        (
            "models/model.json",
            lambda old: re.sub(rb"\"Symbol\('s\d+'[^\"]*", b'"print(chr(65)+chr(66))', old, count=1),
            "no plain expression",
        ),
        (
            "models/model.json",
            lambda old: re.sub(rb"torch\.ops\.aten\.conv2d\.\w+", b"torch.os.system", old, count=1),
            "it calls 'torch.os.system'",
        ),
    ],
)
def test_an_archive_that_could_run_code_is_refused(archive, tmp_path, part, change, reason, capsys):
    root = zipfile.ZipFile(archive).namelist()[0].partition("/")[0]
    path = rewritten(archive, tmp_path / "bad.pt2", f"{root}/{part}", change)
    with pytest.raises(DimmixError, match=reason):
        load_runtime(str(path))
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_second_file_of_one_name_is_refused(archive, tmp_path):
    path = tmp_path / "bad.pt2"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for part in old.namelist():
            if part.endswith("sample_inputs/model.pt"):
                new.writestr(part, pickle.dumps(Harmful()))
            new.writestr(part, old.read(part))
    with pytest.raises(DimmixError, match="two files of one name"):
        load_runtime(str(path))


def test_what_was_checked_is_what_is_loaded(archive, tmp_path, monkeypatch):
    path = tmp_path / "m.pt2"
    path.write_bytes(archive.read_bytes())
    loaded = []
    load = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda file, **options: loaded.append(file) or load(file, **options))
    load_runtime(str(path))
    assert isinstance(loaded[0], io.BytesIO)
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(loaded[0]) as new:
        assert {name: old.read(name) for name in old.namelist()} == {name: new.read(name) for name in new.namelist()}


@pytest.mark.parametrize(
    ("expression", "plain"),
    [
        ("Mul(Integer(64), Symbol('s34', positive=True, integer=True))", True),
        ("2*s0 + s1//4", True),
        ("exec(chr(1))", False),
        ("open('s1','s2')", False),
        ("Symbol('open')", False),
        ("9**9**9", False),
        ("s1.real", False),
    ],
)
def test_expressions_of_shapes(expression, plain):
    assert bool(_EXPRESSION.fullmatch(expression)) == plain


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_another_file_under_an_exports_suffix_is_one_line(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"hello")
    with pytest.raises(DimmixError, match=rf"x\{suffix}: not a"):
        load_runtime(str(path))


def test_an_archive_of_logits_alone_is_one_line(loaded, tmp_path):
    program = torch.export.export(torch.nn.Flatten(), (torch.zeros(2, 3),))
    program.example_inputs = None
    torch.export.save(program, tmp_path / "m.pt2", extra_files={"dimmix": loaded[1].to_json()})
    with pytest.raises(DimmixError, match=r"m\.pt2: no labels, preprocessing and features in it; make it with"):
        load_runtime(str(tmp_path / "m.pt2"))


def test_an_export_without_its_library_says_what_to_install(loaded, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DimmixError, match=r"export to onnx needs onnx: pip install 'dimmix\[export\]'"):
        export_model(*loaded[:2], "onnx", tmp_path / "model.onnx", images, atol=1e-3)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_gives_nan_for_some_batch_is_no_match(loaded, images):
    class Broken(TorchRuntime):
        def logits(self, batch):
            return super().logits(batch) * (np.nan if len(batch) == BATCHES[-1] else 1)

    runtimes = [kind(*loaded, torch.device("cpu")) for kind in (TorchRuntime, Broken)]
    assert np.isnan(_largest_difference(*runtimes, images))
