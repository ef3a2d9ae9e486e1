"""The studies on a small random data set: what they measure, keep and refuse."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dimmix.errors import DimmixError
from dimmix.training import study as module
from dimmix.training.data import Images
from dimmix.training.recipe import Data, Teacher
from dimmix.training.study import Study, cka, densify, run_study, short_recipe
from dimmix.training.study_plot import plot_study
from dimmix.wide_mixer import WideMixer


@pytest.fixture
def make_study(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (600, 8, 8, 3), dtype=np.uint8)
    data = Images(pixels, pixels[:, :4].mean((1, 2, 3)).round().astype(np.int64) % 2, ("even", "odd"))
    monkeypatch.setattr(module, "load_images", lambda *args: data)
    recipe = short_recipe("cifar10")
    recipe = replace(
        recipe,
        model=replace(recipe.model, args={"img_size": 8}),
        data=Data("cifar10", image_size=8, held_back=520),
        schedule=replace(recipe.schedule, epochs=1, warmup_epochs=0.0),
        train=replace(recipe.train, batch_size=16, precision="fp32"),
    )
    return lambda kind, connections, **kwargs: Study(kind, recipe, Path("data"), tmp_path, connections, **kwargs)


@pytest.mark.parametrize(
    ("kind", "count", "columns"),
    [
        ("width", 2, {"channels", "tokens", "error"}),
        ("depth", 6, {"depth", "error"}),
        ("similarity", 32, {"against", "layer", "cka"}),
        ("spectrum", 6, {"width", "norm_at_start", "norm_after"}),
    ],
)
def test_every_study_measures_draws_and_keeps_what_it_found(make_study, tmp_path, monkeypatch, kind, count, columns):
    study = make_study(kind, 512)
    records = list(run_study(study))
    assert len(records) == count
    assert columns <= records[0].keys()
    plot_study(kind, records, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    monkeypatch.setattr(module._Bench, "fit", None)  # a second run trains nothing
    assert list(run_study(study)) == records


def test_an_interrupted_study_goes_on_and_other_settings_are_measured_anew(make_study, tmp_path):
    study = make_study("depth", 64)
    first = next(run_study(study))
    assert len((tmp_path / "depth.jsonl").read_text().splitlines()) == 1
    assert next(run_study(study)) == first
    assert next(run_study(replace(study, images=32)))["images"] == 32
    assert len((tmp_path / "depth.jsonl").read_text().splitlines()) == 2
    model = replace(study.recipe.model, args={"img_size": 8, "patch_size": 2})
    next(run_study(replace(study, recipe=replace(study.recipe, model=model))))
    assert len((tmp_path / "depth.jsonl").read_text().splitlines()) == 3


def test_studies_side_by_side_keep_what_both_found_and_a_torn_line_is_left(tmp_path):
    path = tmp_path / "width.jsonl"
    first, second = module._Store(path), module._Store(path)
    first.put({"n": 1}, [{"error": 1.0}])
    second.put({"n": 2}, [{"error": 2.0}])
    path.write_text(f'{path.read_text()}{{"asked": {{"n"')  # torn by a stop
    first.put({"n": 3}, [{"error": 3.0}])
    third = module._Store(path)
    assert [third.get({"n": n}) for n in (1, 2, 3)] == [[{"error": float(n)}] for n in (1, 2, 3)]


def test_mixer_and_sparse_mlp_of_a_study_have_equal_connections(make_study):
    mixer, sparse, *_ = run_study(make_study("depth", 1000))
    assert mixer["connections"] == sparse["connections"] == 1000
    assert {mixer["model"], sparse["model"]} == {"MLP-Mixer", "SW-MLP"}


def test_a_study_without_data_is_one_line(tmp_path):
    study = Study("width", short_recipe("cifar10"), tmp_path / "nothing", tmp_path)
    with pytest.raises(DimmixError, match="nothing: no such file or folder"):
        list(run_study(study))


def test_a_recipe_with_a_teacher_is_refused(make_study):
    study = make_study("depth", 64)
    with pytest.raises(DimmixError, match=r"a study trains without a teacher; take \[teacher\] out"):
        list(run_study(replace(study, recipe=replace(study.recipe, teacher=Teacher("teacher_cnn", "none")))))


@pytest.mark.parametrize("args", [{"order": "s_mixer"}, {"connections": 100}])
def test_a_recipe_of_other_models_than_the_study_compares_is_refused(make_study, args):
    study = make_study("similarity", 64)
    model = replace(study.recipe.model, args=study.recipe.model.args | args)
    with pytest.raises(DimmixError, match=r"take model.args.order and model.args.connections out") as raised:
        list(run_study(replace(study, recipe=replace(study.recipe, model=model))))
    assert raised.value.exit_code == 2


def test_too_many_images_too_few_connections_and_foreign_results_are_one_line(make_study, tmp_path):
    with pytest.raises(DimmixError, match="--images 100: 600 training rows"):
        list(run_study(make_study("depth", 64, images=100)))
    with pytest.raises(DimmixError, match="need at least 1 connection"):
        list(run_study(make_study("depth", -1)))
    (tmp_path / "depth.jsonl").write_text(json.dumps([1]))
    with pytest.raises(DimmixError, match="cannot keep a study's results"):
        list(run_study(make_study("depth", 64)))
    assert (tmp_path / "depth.jsonl").read_text() == "[1]"


def test_cka_is_one_up_to_rotation_and_scale_and_small_for_noise():
    torch.manual_seed(0)
    x, rotation = torch.randn(200, 10), torch.linalg.qr(torch.randn(10, 10))[0]
    assert cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-6)
    assert cka(x, torch.randn(200, 10)) < 0.2


def test_a_dense_mask_changes_what_is_stored_and_not_what_is_computed():
    model = WideMixer(img_size=8, channels=5, num_classes=3, mixing="sparse", connections=20).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    densify(model)
    torch.testing.assert_close(model(x), expected)
    masks = [buffer for name, buffer in model.named_buffers() if name.endswith("weight_mask")]
    assert [(tuple(mask.shape), int(mask.sum())) for mask in masks] == [((20, 20), 20)] * 8
