import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import timm

import dimmix.training.teacher  # noqa: F401, registers it
from benchmarks.trained import by_cpu_recipes, unbundled
from dimmix.checkpoints import Card, cards
from dimmix.errors import DimmixError
from dimmix.training.learner import load_teacher
from dimmix.training.recipe import parse_recipe, read_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
TEACHERS = map(Card.read, ROOT.glob("recipes/*.json"))
MEASURED = {card.recipe: card for card in (*cards().values(), *unbundled(), *by_cpu_recipes(), *TEACHERS)}


def test_reads_values_and_defaults(recipe_file: Callable[..., Path]) -> None:
    recipe = read_recipe(recipe_file())
    assert (recipe.model.args["width"], recipe.optimizer.lr, recipe.schedule.epochs) == (8, 0.05, 2)
    assert (recipe.augment.flip, recipe.teacher, recipe.optimizer.block_lr_mult) == (True, None, 1.0)
    assert (recipe.stem, recipe.tag) == ("toy_resnet.toy", "toy")


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("a_net.toy", "pretrained = true", "a_net.toy"),
        ("a_net.toy", "pretrained = false", ""),
        ("a_net", "", ""),
        ("a_net", 'checkpoint_path = "/home/me/mine.safetensors"', "mine.safetensors"),
        ("hf-hub:me/net", "pretrained = true", "hf-hub:me/net"),
        ("local-dir:/home/me/net", "pretrained = true", "net"),
    ],
)
def test_says_what_training_starts_from(recipe_file: Callable[..., Path], name: str, args: str, expected: str) -> None:
    recipe = read_recipe(recipe_file(), (f"model.name={name}", f"model.args={{{args}}}"))
    assert recipe.started_from == expected


def test_a_byte_order_mark_is_passed_over(recipe_file: Callable[..., Path]) -> None:
    path = recipe_file()
    expected = read_recipe(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_recipe(path) == expected


def test_survives_json(recipe_file: Callable[..., Path]) -> None:
    recipe = read_recipe(recipe_file(), ("teacher.name=test_vit", "teacher.weights=t.safetensors"))
    assert recipe.teacher
    assert parse_recipe(recipe.to_json(), recipe.path) == recipe


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lr = 0.05", "learning_rate = 0.05", ["unknown key optimizer.learning_rate", "lr, weight_decay"]),
        ("batch_size = 8", "batchsize = 8", ["train.batchsize", "did you mean train.batch_size?"]),
        ('name = "sgd"', 'name = "sdg"', ["optimizer.name = 'sdg'", '"sgd", "adamw", "muon"']),
        ("lr = 0.05", "", ["optimizer.lr is missing"]),
        ("lr = 0.05", 'lr = "big"', ["optimizer.lr = 'big'", "a number >= 0"]),
        ("lr = 0.05", "lr = -1.0", ["optimizer.lr = -1.0", "a number >= 0"]),
        ("crop = 2", "crop = true", ["augment.crop = True", "a whole number >= 0"]),
        ("cutout = 4", "cutout = 99999999999999999999", ["augment.cutout = 99999999999999999999", "at most 4096"]),
        ('name = "toy"', 'name = ".."', ["data.name = '..' must be the name of a folder"]),
        ('name = "toy"', 'name = ""', ["data.name = '' must be the name of a folder"]),
        ("crop = 2", "flip = 1", ["augment.flip = 1", "true or false"]),
        ("held_back = 8", "mean = [0.5]", ["data.mean", "3 numbers"]),
        ("epochs = 2", "epochs = 0", ["schedule.epochs", "at least 1"]),
        ("[model]", "[model", ["not a TOML file"]),
        ("[model]", f"x = {'[' * 5000}\n[model]", ["not a TOML file"]),
        ("[model]", 'path = "x"\n[model]', ["unknown key path"]),
        ("lr = 0.05", "lr = inf", ["optimizer.lr = inf", "a number >= 0"]),
        ("lr = 0.05", "lr = 0.05\nblock_lr_mult = 0", ["optimizer.block_lr_mult = 0.0", "more than 0"]),
        ("lr = 0.05", "lr = 0.05\nbetas = [0.9]", ["optimizer.betas", "2 numbers"]),
        ("lr = 0.05", "lr = 0.05\nbetas = [0.9, 1.0]", ["optimizer.betas = (0.9, 1.0)", "less than 1"]),
        ("lr = 0.05", "lr = 0.05\nmomentum = 1.5", ["optimizer.momentum = 1.5", "less than 1"]),
        ("[train]", "[loss]\nlabel_smoothing = 1.5\n[train]", ["loss.label_smoothing = 1.5", "at most 1"]),
        ("[train]", "[train]\nseed = 9999999999999999", ["train.seed", "less than 2^40"]),
        ("ema_decay = 0.9", "ema_decay = 1.5", ["train.ema_decay = 1.5", "less than 1"]),
        ("held_back = 8", "std = [0.2, 0.0, 0.2]", ["data.std", "more than 0"]),
        ("warmup_epochs = 0.5", "warmup_epochs = 50", ["schedule.warmup_epochs", "at most schedule.epochs, 2"]),
        ("cutout = 4", "plain_epochs = 3", ["augment.plain_epochs", "at most schedule.epochs, 2"]),
        ("cutout = 4", "mix_probability = 3", ["augment.mix_probability = 3.0", "at most 1"]),
        ("crop = 2", "crop = 16", ["augment.crop must be less than data.image_size"]),
        ("[train]", '[teacher]\nname="t"\nweights="w"\nalpha=3\n[train]', ["teacher.alpha = 3.0", "at most 1"]),
        ("[train]", '[teacher]\nname="t"\nweights="w"\ntemperature=0\n[train]', ["temperature = 0.0", "more than 0"]),
    ],
)
def test_a_mistake_names_file_key_and_what_is_allowed(
    recipe_file: Callable[..., Path], old: str, new: str, said: list[str]
) -> None:
    with pytest.raises(DimmixError) as raised:
        read_recipe(recipe_file((old, new)))
    assert raised.value.exit_code == 2
    for words in ["toy_resnet.toy.toml", *said]:
        assert words in str(raised.value)


def test_overrides_are_toml_values_or_text(recipe_file: Callable[..., Path]) -> None:
    changes = ("optimizer.lr=0.2", "augment.flip=false", "optimizer.name=adamw", "model.args.drop_rate=0")
    recipe = read_recipe(recipe_file(), changes)
    assert (recipe.optimizer.lr, recipe.augment.flip, recipe.optimizer.name) == (0.2, False, "adamw")
    assert recipe.model.args["drop_rate"] == 0


@pytest.mark.parametrize("change", ["lr", "lr=1", "optimizer.rate=1", "model.name.x=1"])
def test_a_wrong_override_is_refused(recipe_file: Callable[..., Path], change: str) -> None:
    with pytest.raises(DimmixError) as raised:
        read_recipe(recipe_file(), (change,))
    assert change.partition("=")[0] in str(raised.value)


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", RECIPES, ids=_shown)
def test_every_recipe_of_the_project_is_sound(path: Path) -> None:
    recipe = read_recipe(path)
    assert timm.is_model(recipe.model.name)
    header = path.read_text().partition("[model]")[0]
    assert f"dimmix train {_shown(path)}" in header
    assert "Result" in header


@pytest.mark.parametrize("path", RECIPES, ids=_shown)
def test_a_header_says_what_the_card_does(path: Path) -> None:
    recipe, lines = read_recipe(path), path.read_text().splitlines()
    (result,) = (line.removeprefix("# Result").strip() for line in lines if line.startswith("# Result"))
    card = MEASURED.get(_shown(path))
    if card is None:
        is_study = any(line.startswith("# Command  dimmix study") for line in lines)
        assert result in ("not measured yet", *["in docs/wide_sparse.md"] * is_study)
        return
    assert result.startswith(f"{card.top1:.2f} % test top-1 (last epoch, EMA, seed {card.seed}); ")
    assert f"; {card.train_minutes:.0f} minutes at {card.images_per_second:.0f} images/s on " in result
    assert (card.epochs, card.seed, card.split) == (recipe.schedule.epochs, recipe.train.seed, "test")
    assert card.command.startswith(f"dimmix train {_shown(path)} --split full")


@pytest.mark.parametrize("path", [path for path in RECIPES if read_recipe(path).teacher], ids=_shown)
def test_the_teacher_comes_with_the_recipe(path: Path) -> None:
    recipe = read_recipe(path)
    card = Card.read(Path(recipe.teacher_weights).with_suffix(".json"))
    assert card.dataset == recipe.data.name
    learnt = load_teacher(recipe, len(card.labels))
    assert hashlib.sha256(Path(recipe.teacher_weights).read_bytes()).hexdigest() == card.sha256
    assert sum(p.numel() for p in learnt.parameters()) == card.params


def test_a_card_names_the_recipe_as_seen_from_the_current_folder(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file()
    assert read_recipe(path).shown_path == path.name
    monkeypatch.chdir(path.parent.parent)
    assert read_recipe(path).shown_path == f"{path.parent.name}/{path.name}"
    assert read_recipe(path.relative_to(Path.cwd())).shown_path == f"{path.parent.name}/{path.name}"
