"""A smoke run at tiny sizes: what is written and what the check says, never how long anything took."""

import json
import time
from importlib import metadata
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import timm
import torch
from torch import nn

from benchmarks import gpu, layers, models, plots
from benchmarks.__main__ import Plan, _line, full_plan, main, run_on_gpu, write
from benchmarks.check import shortfalls
from benchmarks.machine import describe
from benchmarks.models import _beats, _equal, _like_size, equals, fold_timm, front
from benchmarks.timing import compare, speedup, summary
from benchmarks.trained import by_cpu_recipes, last_trained, trained_alike, unbundled
from dimmix.checkpoints import cards
from dimmix.fuse import fuse
from dimmix.layers import native

TINY = Plan(
    seconds=0,
    linear=(16,),
    mlp=(16,),
    rows=(4,),
    attention=(16,),
    memory=(16,),
    modes=("float32", "bfloat16", "training"),
    backends=("fused", "training"),
    models=("butterfly_mixer_nano_32",),
    sample=("butterfly_mixer_nano_32",),
    operators=True,
    others=("test_resnet",),
    batches=(1,),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    assert main(["--out", str(folder)], TINY) == 0
    return folder


def _records(folder, subject):
    return json.loads((folder / f"{subject}.json").read_text())["records"]


def test_writes_a_file_a_subject_with_the_machine_and_the_plots(folder):
    written = {path.name for path in folder.iterdir()}
    subjects = {"linear", "mlp", "attention", "memory", "twins", "front", "operators"}
    subjects |= {"kernels"} if native.INSTRUCTIONS else set()
    assert written == {f"{s}.json" for s in subjects} | {"linear.png", "attention.png", "models.png"}
    machine = json.loads((folder / "linear.json").read_text())["machine"]
    assert machine["cores"] >= 1
    assert machine["kernels"] == native.INSTRUCTIONS
    assert "torch" in machine["versions"]


def test_the_whole_plan_times_what_was_trained_once():
    plan = full_plan()
    timed = [*plan.models, *plan.others]
    assert len(timed) == len(set(timed))
    assert {card.architecture for card in cards().values()} <= set(timed)
    assert {card.architecture for card in unbundled()} <= set(timed)
    assert "butterfly_mixer_nano_32_dense" in timed
    assert set(plan.compiled) < set(full_plan(every=True).compiled)
    assert set(plan.sample) < set(full_plan(every=True).sample) == set(plan.models)


def test_linear_records_the_mac_ratio_and_half_of_it_as_the_mark(folder):
    record = _records(folder, "linear")[0]
    assert (record["n"], record["rows"], record["mac_ratio"], record["reach"]) == (16, 4, 2.0, 1.0)
    assert record["our_dense_ms"].keys() == record["dense_ms"].keys()
    assert record["sparse_ms"]["low"] <= record["sparse_ms"]["median"] <= record["sparse_ms"]["high"]


def test_attention_times_every_level_and_its_memory_is_counted_in_copies(folder):
    assert len(_records(folder, "attention")[0]["level_ms"]) == 2
    record = _records(folder, "memory")[0]
    copy = 3 * 16 * 128 * 4  # q, k and v themselves
    assert record["peak_bytes"] >= copy
    assert record["copies_of_qkv"] == pytest.approx(record["peak_bytes"] / copy, abs=1e-3)


def test_twins_ask_for_half_of_the_mac_saving_at_batch_64_alone(folder):
    record = _records(folder, "twins")[0]
    assert record["against"] == "butterfly_mixer_nano_32_dense"
    assert record["mac_ratio"] > 1
    assert record["reach"] == 1.0


@pytest.fixture
def takes(monkeypatch):
    """Has calls in the modules that are named take so many milliseconds each, whatever they do."""

    def pretend(*modules, **milliseconds):
        times = {name.replace("_", " "): [ms, ms] for name, ms in milliseconds.items()}
        for module in modules:
            monkeypatch.setattr(module, "compare", lambda calls, *_, **__: {name: times[name] for name in calls})

    return pretend


def test_a_layer_is_faster_by_what_the_dense_one_takes_for_what_it_takes(takes):
    takes(layers, dense=8.0, ours=4.0, features_last=2.0, features_first=1.0)
    last, first = layers.linear((16,), (4,), seconds=0)
    assert (last["faster"], last["faster_than_ours"]) == (4, 2)
    assert (first["faster"], first["faster_than_ours"]) == (8, 4)


def test_attention_is_as_fast_as_its_dearest_level_and_has_more_to_reach_on_more_tokens(takes):
    takes(layers, full=12.0, level_0=2.0, level_1=3.0)
    few, many = layers.attention((16, 4096), seconds=0)
    assert (few["faster"], few["dearest_to_cheapest"]) == (4, 1.5)
    assert (few["reach"], many["reach"]) == pytest.approx((0.4 * 4, 0.6 * 64))


def test_models_are_faster_by_what_their_twin_takes_for_what_they_take(takes):
    takes(models, gpu, sparse=2.0, dense=6.0)
    one, many = models.twins(["butterfly_mixer_nano_32"], "fused", (1, 64), seconds=0)
    assert (one["faster"], many["faster"]) == (3, 3)
    assert (one["reach"], many["reach"]) == (
        1,
        pytest.approx(2 / (1 + many["sparse_macs"] / many["dense_macs"]), abs=0.01),
    )
    (on_gpu,) = gpu.models(["butterfly_mixer_nano_32"], "eager", (1,), 0, torch.device("cpu"))
    assert on_gpu["faster"] == 3


def test_kernels_are_faster_by_what_torch_takes_for_what_they_take(takes):
    takes(models, kernels=1.0, torch=3.0)
    (record,) = models.kernels(["butterfly_mixer_nano_32"], (1,), seconds=0)
    assert record["faster"] == 3


def test_a_backend_is_what_it_says(monkeypatch):
    folded, answers = [], []

    def once(calls, seconds):
        answers.extend(call().dtype for call in calls.values())
        return {name: [1.0, 1.0] for name in calls}

    monkeypatch.setattr(models, "compare", once)
    monkeypatch.setattr(models, "fuse", lambda model: folded.append(model) or fuse(model))
    for backend, dtype, folds in (
        ("eager", torch.float32, 0),
        ("bfloat16", torch.bfloat16, 0),
        ("fused", torch.float32, 2),
    ):
        models.twins(["butterfly_resnet20_convmix_w32"], backend, (1,), seconds=0)
        assert answers == [dtype] * 2
        assert len(folded) == folds
        answers.clear()


def test_the_exit_code_says_whether_any_subject_falls_short_if_that_is_asked(monkeypatch, capsys):
    reached, missed = {"work": "a", "faster": 2.0, "reach": 1.0}, {"work": "b", "faster": 1.0, "reach": 2.0}
    monkeypatch.setattr("benchmarks.__main__.run", lambda plan: {"linear": [reached], "twins": [missed]})
    assert main(["--quick"]) == 0
    assert "falls short" not in capsys.readouterr().out
    assert main(["--quick", "--check"]) == 1
    assert "falls short: b: 1 times as fast, to reach 2\n" in capsys.readouterr().out
    monkeypatch.setattr("benchmarks.__main__.run", lambda plan: {"linear": [reached]})
    assert main(["--quick", "--check"]) == 0


@pytest.mark.skipif(not native.INSTRUCTIONS, reason="no kernels on this machine")
def test_kernels_are_timed_beside_torch_alone(folder):
    (record,) = _records(folder, "kernels")
    assert (record["work"], record["batch"]) == ("butterfly_mixer_nano_32", 1)
    assert set(record) == {"work", "batch", "kernels_ms", "torch_ms", "faster"}
    assert record["kernels_ms"]["rounds"] == record["torch_ms"]["rounds"] >= 5
    assert native.INSTRUCTIONS  # switched on again


def test_operators_share_out_the_whole_pass(folder):
    sparse, dense = _records(folder, "operators")
    assert [sparse["work"], dense["work"]] == ["butterfly_mixer_nano_32", "butterfly_mixer_nano_32_dense"]
    assert sum(sparse["shares"].values()) == pytest.approx(100, abs=2)
    kernel = "kernel of all blocks"
    assert (kernel in sparse["shares"]) == (kernel in dense["shares"]) == bool(native.INSTRUCTIONS)
    assert ("batched product" in sparse["shares"]) == (not native.INSTRUCTIONS)
    assert "batched product" not in dense["shares"]


def test_a_record_on_a_line():
    timing = {"median": 1.5, "low": 1.0}
    record = {"work": "attention", "n": 4, "level_ms": [timing, timing], "beaten_by": ["resnet10t", "resnet18"]}
    assert _line(record) == "attention  n=4  level_ms=1.5/1.5  beaten_by=resnet10t/resnet18"
    assert _line({"work": "mine", "shares": {"sum": 1.5, "copy": 2.0}}) == "mine  shares=sum 1.5/copy 2.0"


def test_check_names_what_falls_short():
    lines = shortfalls(
        [
            {"work": "layer", "n": 8, "faster": 3.0, "reach": 4.0},
            {"work": "layer", "n": 16, "faster": 5.0, "reach": 4.0},
            {"work": "attention", "n": 4, "faster": 2.0, "reach": 1.0, "dearest_to_cheapest": 1.5},
            {"work": "memory", "n": 4, "copies_of_qkv": 1.6, "below": 1.5},
            {"work": "mine", "batch": 64, "beaten_by": ["theirs"]},
            {"work": "better", "batch": 64, "beaten_by": []},
        ]
    )
    assert [line.split(":")[0] for line in lines] == ["layer 8", "attention 4", "memory 4", "mine 64"]
    assert lines[0] == "layer 8: 3 times as fast, to reach 4"


def test_the_equal_is_the_narrowest_within_a_quarter_point_or_else_the_best():
    dense = {"resnet20_w16": 90.0, "resnet20_w20": 91.5, "resnet20_w24": 91.2}
    assert _equal(89.0, dense) == "resnet20_w16"
    assert _equal(90.25, dense) == "resnet20_w16"
    assert _equal(90.3, dense) == "resnet20_w20"
    assert _equal(92.0, dense) == "resnet20_w20"


def test_equals_put_a_sparse_resnet_beside_the_dense_one_of_its_accuracy(monkeypatch):
    top1 = {"butterfly_resnet_nano_32": 90.0, "resnet20_w20": 91.0, "resnet20_w16": 89.9, "vit_butterfly_nano_32": 90.0}
    macs = {"butterfly_resnet_nano_32": 36, "resnet20_w20": 64, "resnet20_w16": 41, "vit_butterfly_nano_32": 20}
    trained = [SimpleNamespace(architecture=name, dataset="cifar10", top1=top1[name], macs=macs[name]) for name in top1]
    monkeypatch.setattr("benchmarks.models.last_trained", lambda: trained)
    (record,) = equals("onnxruntime", batches=(1,), seconds=0)
    assert (record["work"], record["against"]) == ("butterfly_resnet_nano_32", "resnet20_w16")
    assert (record["backend"], record["sparse_top1"], record["dense_top1"]) == ("onnxruntime", 90.0, 89.9)
    assert record["reach"] == 1.0


def test_a_sparse_resnet_beyond_every_resnet20_stands_beside_a_dense_twin_as_good(monkeypatch, takes):
    takes(models, sparse=2.0, dense=6.0)
    top1 = {"butterfly_resnet_nano_32_dense": 94.0, "butterfly_resnet_nano_32": 93.0, "resnet20_w16": 92.0}
    macs = {"butterfly_resnet_nano_32_dense": 95, "butterfly_resnet_nano_32": 36, "resnet20_w16": 41}
    trained = [SimpleNamespace(architecture=name, dataset="cifar10", top1=top1[name], macs=macs[name]) for name in top1]
    monkeypatch.setattr("benchmarks.models.last_trained", lambda: trained)
    (record,) = equals("fused", batches=(64,), seconds=0)
    assert (record["work"], record["against"]) == ("butterfly_resnet_nano_32", "butterfly_resnet_nano_32_dense")
    assert record["reach"] == 1.0  # not half of the saving, as of twins


def test_a_model_of_timm_beats_ours_only_if_no_slower_and_no_less_accurate():
    ours = {"top1": 90.0, "ms": {"median": 10.0}}
    assert _beats({"top1": 90.0, "ms": {"median": 10.0}}, ours)
    assert not _beats({"top1": 95.0, "ms": {"median": 10.1}}, ours)
    assert not _beats({"top1": 89.9, "ms": {"median": 1.0}}, ours)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_byobnet", "test_efficientnet", "mobilenetv2_050"])
def test_a_model_of_timm_is_folded_to_the_same_function(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).double().eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        for tensor, low, high in ((norm.running_mean, -0.3, 0.3), (norm.running_var, 0.5, 1.5), (norm.bias, -1, 1)):
            nn.init.uniform_(tensor, low, high)
    folded = fold_timm(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    assert norms
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_the_front_says_who_is_ahead_of_each_of_ours(monkeypatch):
    top1 = {"butterfly_resnet_nano_32": 80.0, "resnet20_w16": 90.0, "test_byobnet": 85.0, "resnet10t": 95.0}
    took = {"butterfly_resnet_nano_32": 9.0, "resnet20_w16": 2.0, "test_byobnet": 3.0, "resnet10t": 4.0}
    trained = [SimpleNamespace(architecture=name, dataset="cifar10", top1=value) for name, value in top1.items()]
    monkeypatch.setattr("benchmarks.models.trained_alike", lambda: trained)
    monkeypatch.setattr("benchmarks.models.compare", lambda runs, seconds: {name: [took[name]] * 2 for name in runs})
    ours, *others = front(top1, batch=1, seconds=0)
    assert (ours["beaten_by"], ours["beaten_by_larger"]) == (["test_byobnet"], ["resnet10t"])
    assert ours["beaten_by_dense"] == ["resnet20_w16"]
    assert not any("beaten_by" in other for other in others)


def test_on_the_front_our_models_are_as_the_recipe_of_timm_s_left_them():
    first, last, alike = (
        {card.architecture: card.top1 for card in trained if card.dataset == "cifar10"}
        for trained in (by_cpu_recipes(), last_trained(), trained_alike())
    )
    assert alike["butterfly_resnet_fast_32"] == first["butterfly_resnet_fast_32"] < last["butterfly_resnet_fast_32"]
    assert alike["patch_only_mixer_tiny_32"] == last["patch_only_mixer_tiny_32"]
    assert alike["resnet10t"] == last["resnet10t"]
    assert "butterfly_resnet_fast_r128_32" in last
    assert "butterfly_resnet_fast_r128_32" not in alike


def test_what_was_trained_on_from_a_checkpoint_is_compared_with_nothing():
    long, first = (f"patch_only_mixer_strided_tiny_32.{tag}" for tag in ("cifar10_long", "cifar10"))
    assert cards()[long].started_from == first
    assert cards()[long].top1 > cards()[first].top1
    names = {card.name for card in last_trained()}
    assert first in names
    assert long not in names


def test_a_model_of_timm_is_of_like_size_up_to_twice_the_parameters():
    assert _like_size({"params": 200}, {"params": 100})
    assert _like_size({"params": 1}, {"params": 100})
    assert not _like_size({"params": 201}, {"params": 100})


def test_what_runs_on_a_gpu_stands_beside_its_dense_twin_and_has_no_mark(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda model: model)  # half a minute of a core
    records = run_on_gpu(TINY, torch.device("cpu"))["gpu"]
    kinds = [(record["work"], record.get("backend")) for record in records]
    levels = [(f"ButterflyAttention, level {level}", None) for level in (0, 1)]
    model = [("butterfly_mixer_nano_32", mode) for mode in ("eager", "compiled", "training")]
    assert kinds == [("ButterflyLinear", None), ("ButterflyMlp", None), *levels, *model]
    assert all(record["sparse_ms"]["median"] > 0 and record["reach"] is None for record in records)
    assert records[-1]["mac_ratio"] == 2.67
    write({"gpu": records}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_without_a_gpu_the_benchmark_of_one_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["--gpu"])
    assert stopped.value.code == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_gpu_and_all_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--gpu", "--all"])
    assert stopped.value.code == 2
    assert "--all: not allowed with argument --gpu" in capsys.readouterr().err


def test_a_device_that_works_on_is_waited_for_and_that_counts():
    calls = []

    def settle():
        calls.append("done")
        time.sleep(0.01)

    times = compare({"a": lambda: calls.append("a")}, seconds=0, least=2, settle=settle)
    assert min(times["a"]) >= 10
    assert calls == ["a", "a", "done", "a", "done", "a", "done"]


def test_speedup_is_the_median_of_the_ratios_of_each_round():
    assert speedup([10.0, 90.0, 20.0], [5.0, 30.0, 20.0]) == 2.0
    assert summary([3.0, 1.0, 2.0]).median == 2.0


def test_compare_runs_every_contender_in_every_round_in_orders_that_change():
    calls = []
    times = compare({name: lambda name=name: calls.append(name) for name in "ab"}, seconds=0, least=20)
    assert calls[:4] == ["a", "a", "b", "b"]
    rounds = {tuple(calls[i : i + 2]) for i in range(4, len(calls), 2)}
    assert rounds == {("a", "b"), ("b", "a")}
    assert [len(times[name]) for name in "ab"] == [20, 20]


def test_costs_are_drawn_with_a_line_to_each_dense_twin_and_names_that_cover_nothing():
    points = {
        "butterfly_resnet_fast_32": (43.0, 92.1),
        "butterfly_resnet_fast_r64_32": (44.0, 92.1),
        "butterfly_resnet_fast_32_dense": (129.0, 92.6),
        "patch_only_mixer_tiny_32": (11.0, 88.2),
        "resnet20_w16": (43.5, 92.0),
    }
    figure, axes = plt.subplots(figsize=plots.COSTS_SIZE)
    plots.draw_costs(axes, points)
    lines = [tuple(line.get_ydata()) for line in axes.lines if line.get_linestyle() == ":"]
    assert lines == [(92.1, 92.6), (92.1, 92.6)]
    assert {text.get_text() for text in axes.texts} == {"fast", "fast_r64", "tiny", "resnet20_w16"}
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])
    plt.close(figure)


def test_what_cannot_be_written_is_known_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.__main__.run", lambda plan: pytest.fail("it was measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", "--out", str(tmp_path / "file")])
    assert f"--out {tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_a_library_that_is_not_installed_has_no_version(monkeypatch):
    def version(name):
        if name == "onnxruntime":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    assert describe()["versions"] | {"python": ""} == {"python": "", "torch": "1.0", "timm": "1.0", "numpy": "1.0"} | {
        "onnxruntime": None
    }
