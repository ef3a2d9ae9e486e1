"""`dimmix list`, `info`, `benchmark`, `explain` and `doctor`."""

import json

import pytest
import torch
from timm.models import is_model_in_modules

import dimmix as package
from dimmix import benchmark
from dimmix.checkpoints import cards
from dimmix.errors import DimmixError
from dimmix_cli.benchmark import Backend


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_list_shows_every_checkpoint_and_sorts_by_any_column(dimmix):
    found = lines(dimmix("list").out)
    assert [record["name"] for record in found] == sorted(cards())
    if found:
        best = lines(dimmix("list", "--sort=-top1").out)
        assert [r["top1"] for r in best] == sorted((r["top1"] for r in found), reverse=True)
        assert dimmix("list", "--sort", "nothing").code == 2


def test_list_refuses_what_it_cannot_filter_by(dimmix):
    for options, said in (
        (["--architectures", "--dataset", "cifar10"], "--dataset is of checkpoints"),
        (["--family", "resnet"], "--family resnet: the families are butterfly_resnet, "),
    ):
        done = dimmix("list", *options)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert said in done.err


def test_list_filters_architectures_by_name_family_and_size(dimmix):
    found = lines(dimmix("list", "*nano*", "--architectures", "--sort", "params").out)
    assert sorted(record["name"] for record in found) == package.list_models("*nano*")
    assert [record["params"] for record in found] == sorted(record["params"] for record in found)
    limit = 1 + min(record["params"] for record in found if "vit" in record["name"])
    options = ["--family", "vit_butterfly", "--max-params", limit / 1e6]
    small = lines(dimmix("list", "*nano*", "--architectures", *options).out)
    assert [record["name"] for record in small] == [
        record["name"] for record in found if "vit" in record["name"] and record["params"] <= limit
    ]
    assert 0 < len(small) < len(found)


def test_every_architecture_is_listed_under_the_family_whose_file_registers_it():
    for name in package.list_models():
        assert is_model_in_modules(name, package.family_of(name)), name
    assert (package.family_of("resnet18"), package.family_of("resnet200d")) == ("", "")


def test_info_shows_structure_and_macs(dimmix):
    record = json.loads(dimmix("info", "butterfly_resnet20_convmix_w32", "--format", "json").out)
    assert (record["params"], record["macs"]) == (129_578, 24_052_992)
    assert record["levels"][1]["stride"] == 4
    assert record["modules"][0]["of_dense"] == pytest.approx(0.148, abs=0.001)
    out = dimmix("info", "butterfly_resnet20_convmix_w32", "--format", "table").out
    assert all(word in out for word in ("129,578", "What each layer mixes", "Multiply-accumulates", "blocks.2.2.conv2"))


def test_info_shows_the_card_of_a_checkpoint(dimmix, tiny):
    record = json.loads(dimmix("info", tiny.architecture, "--checkpoint", tiny.checkpoint).out)
    assert record["card"]["tag"] == "random"


def test_benchmark_has_a_row_for_each_model_and_backend(dimmix):
    names = ["butterfly_resnet_nano_32", "butterfly_resnet_nano_32_dense"]
    found = lines(dimmix("benchmark", *names, "--backend", "eager", "--rounds", 3, "-b", 2).out)
    assert [(record["model"], record["backend"]) for record in found] == [(name, "eager") for name in names]
    for record in found:
        assert 0 < record["quarter_ms"] <= record["median_ms"] <= record["three_quarter_ms"]
        assert record["images_per_second"] == pytest.approx(2000 / record["median_ms"])
    assert found[0]["macs"] < found[1]["macs"]


def test_quartiles_of_few_rounds_lie_between_the_times(monkeypatch):
    times = iter([1.0, 3.0])
    monkeypatch.setattr(benchmark, "_time", lambda call, device: next(times))
    (timing,) = benchmark.benchmark(
        ["butterfly_resnet20_convmix_w32"], ["eager"], rounds=2, batch_size=2, device=torch.device("cpu")
    )
    assert (timing.quarter_ms, timing.median_ms, timing.three_quarter_ms) == (1500, 2000, 2500)


@pytest.mark.parametrize(
    ("backends", "options", "said"),
    [
        (["onnx"], {}, "no backend onnx: they are eager, compiled, onnxruntime"),
        (["eager"], {"rounds": 0}, "0 rounds of 2 images"),
        (["eager"], {"batch_size": 0}, "1 rounds of 0 images"),
    ],
)
def test_what_cannot_be_timed_is_refused(backends, options, said):
    options = {"rounds": 1, "batch_size": 2} | options
    with pytest.raises(DimmixError, match=said):
        list(benchmark.benchmark(["butterfly_resnet20_convmix_w32"], backends, device=torch.device("cpu"), **options))
    assert list(Backend) == list(benchmark.BACKENDS)


def test_benchmark_goes_on_past_a_backend_that_does_not_run(dimmix, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda model: lambda batch: 1 / 0)
    name = "butterfly_resnet_nano_32"
    done = dimmix("benchmark", name, "--backend", "compiled", "--backend", "eager", "--rounds", 1)
    assert [record["backend"] for record in lines(done.out)] == ["eager"]
    assert (done.code, done.err) == (1, f"dimmix: {name} does not run compiled: division by zero\n")


def test_explain_writes_a_picture_and_says_what_reaches(dimmix, tiny, class_folders, tmp_path):
    image = next((class_folders / "cat").iterdir())
    model = ["--model", tiny.architecture, "--checkpoint", tiny.checkpoint]
    done = dimmix("explain", image, *model, "--output", tmp_path / "heat.png")
    assert [record["layer"] for record in lines(done.out)] == ["blocks.0", "blocks.1", "blocks.2"]
    assert (tmp_path / "heat.png").exists()
    done = dimmix("explain", tmp_path / "none.png", *model)
    assert (done.code, done.err) == (1, f"dimmix: {tmp_path}/none.png: no such file or directory\n")


def test_doctor_checks_versions_weights_and_a_prediction(dimmix):
    done = dimmix("doctor")
    found = {record["check"]: record for record in lines(done.out)}
    assert found["dimmix"]["value"] == package.__version__
    assert {"torch", "cpu", "kernels", "cache", "self test", *cards()} <= set(found)
    assert found["kernels"]["value"].split(":")[0] in ("avx512", "avx2", "none")
    assert done.code == (0 if cards() else 1)
