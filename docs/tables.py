"""Writes what comes from the checkpoint cards (the table in README.md, MODEL_CARD.md, docs/accuracy_macs.png), from the
benchmark (the tables of docs/performance.md) and from the studies (those of docs/wide_sparse.md).

python docs/tables.py            # write
python docs/tables.py --check    # exit 1 and say which text is out of date
"""

import math
import statistics
import sys
from pathlib import Path

import benchmark_tables
import study_tables
from huggingface_hub import EvalResult, ModelCardData

from dimmix import family_of, list_models
from dimmix.checkpoints import Card, cards
from dimmix.registry import dense_twin

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the benchmark is not installed
from benchmarks import plots  # noqa: E402
from benchmarks.trained import by_cpu_recipes, last_trained, unbundled  # noqa: E402

SEEDS = ROOT / "docs" / "seeds"
BEGIN, END = "<!-- models: written by docs/tables.py -->", "<!-- /models -->"

MODEL_CARD = """---
{metadata}
---

# Model card: the dimmix checkpoints

Small image classifiers with structured sparsity, trained from scratch on CIFAR-10 or CIFAR-100, and dense twins trained
alike. Architectures: Dimension Mixer ([arXiv:2311.18735](https://arxiv.org/abs/2311.18735)) and, for the wide mixers,
Understanding MLP-Mixer as a Wide and Sparse MLP ([arXiv:2306.01470](https://arxiv.org/abs/2306.01470)).

## Results

{table}

Top-1, top-5 and per-class accuracy are percentages of the held-out test images, looked at once, after the last epoch,
with the averaged (EMA) weights, in the precision that is stored, and no test-time augmentation. NLL is in nats; ECE, in
percent, has 15 bins. MACs are multiply-accumulates for one image.
`dimmix eval DATA --model NAME --check` repeats a row's accuracy; the weights of the rows with a † are not bundled
(docs/models.md says why), and their recipes train them again. Milliseconds are of
[docs/performance.md](docs/performance.md), measured by `python -m benchmarks` on two CPU cores in float32.

### Beside the dense twin

{twins}

Points of top-1 above the dense twin, which was trained alike; what part of the twin's multiply-accumulates and
parameters the model has; and how many times as fast it takes 64 images. One training of each is compared, that of the
row: ten thousand test images alone give a top-1 of 90 % a standard error of 0.3 points, and one of 70 % of 0.5. In the
butterfly mixers and in `patch_only_mixer_fast_32` the blocks take larger steps (`block_lr_mult` in their recipes) than
the twins' matrices.

### Recipes for CPU cores

{cpu}

Top-1 of models that were trained on CPU cores, by `recipes/cpu/NAME.toml` (the teacher there has a third of the
parameters), and what the same model has by the longer `recipes/NAME.toml`, mostly a GPU's, as in the tables above. The
weights of the first are not kept; their cards are in docs/cards/cpu.

### Other seeds

{seeds}

Mean and standard deviation of top-1 over trainings by one recipe that differ in the seed; the third of the ViT and of
the Butterfly Mixer followed a second training of the teacher ([docs/models.md](docs/models.md)). The cards of the seeds
after the first are in docs/seeds.

## Intended use

Research on structured sparsity; a small, fast classifier for 32x32 images of the ten or hundred CIFAR classes; a
starting point for fine-tuning. A photograph is resized to 32x32 first, so small objects are lost.

## Limits

An answer is always one of the training classes, however foreign the image. The models were neither built nor tested for
people, medicine, safety or surveillance. Calibration holds for images like the test set's and no others.

## Data

CIFAR-10 and CIFAR-100, official splits, no other data. The copy of CIFAR-10 that was used holds 971 of its 60,000
images (798 train, 173 test, nearly all ships) as JPEG of quality 75; every other pixel is the original. CIFAR-100 is
the original. Hyper-parameters and epochs were chosen on the last 5,000 training images. Where whole recipes were
compared on the test set afterwards, [docs/models.md](docs/models.md) gives every figure.

## Training

`dimmix train recipes/NAME.toml --split full` repeats a row. Teachers learnt from the same training images and no
others. Their weights and cards lie beside the recipes in the repository (`recipes/teacher_cnn*`), not in the package.

{training}

## Per-class accuracy

Of the bundled checkpoints, in percent; that of the others is in their cards in docs/cards.

{classes}
"""


def main() -> int:
    ours = set(list_models())
    found = [*cards().values(), *(card for card in unbundled() if card.architecture in ours)]
    readme, performance, studies = (ROOT / name for name in ("README.md", "docs/performance.md", "docs/wide_sparse.md"))
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    texts = {
        readme: f"{before}{BEGIN}\n{_table(found, short=True)}\n{END}{after}",
        ROOT / "MODEL_CARD.md": _model_card(found),
        performance: benchmark_tables.fill(performance.read_text(encoding="utf-8"), benchmark_tables.TABLES),
        studies: benchmark_tables.fill(studies.read_text(encoding="utf-8"), study_tables.TABLES),
    }
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is out of date: run python docs/tables.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")
        print(f"wrote {path.name}")
    _draw_accuracy(found)
    return 0


def _name(card: Card) -> str:
    """As code, with a mark where there are no weights."""
    return f"`{card.name}`" + " †" * (card.name not in cards())


def _epochs(card: Card) -> str:
    return f"{card.epochs} epochs" + f" more than `{card.started_from}`" * bool(card.started_from)


def _draw_accuracy(found: list[Card]) -> None:
    """Top-1 against MACs, a panel a data set; without what was trained on, which no twin was."""
    drawn = [card for card in last_trained() if card in found]
    datasets = sorted({card.dataset for card in drawn})
    width, height = plots.COSTS_SIZE
    figure, panels = plots.plt.subplots(
        len(datasets), 1, figsize=(width, height * len(datasets)), layout="constrained", squeeze=False
    )
    for dataset, axes in zip(datasets, panels.flat, strict=True):
        plots.draw_costs(
            axes, {card.architecture: (card.macs / 1e6, card.top1) for card in drawn if card.dataset == dataset}
        )
        axes.set(xlabel="million multiply-accumulates an image", ylabel=f"top-1 on {dataset}, %")
    figure.savefig(ROOT / "docs" / "accuracy_macs.png", dpi=120)


def _table(found: list[Card], short: bool = False) -> str:
    latency = benchmark_tables.latency()
    columns = {
        "model": _name,
        "top-1 %": lambda card: f"{card.top1:.2f}",
        "top-5 %": lambda card: f"{card.top5:.2f}",
        "NLL": lambda card: f"{card.nll:.3f}",
        "ECE %": lambda card: f"{100 * card.ece:.2f}",
        "params": lambda card: f"{card.params:,}",
        "MMACs": lambda card: f"{card.macs / 1e6:.1f}",
        "ms, 64 images": lambda card: f"{latency[card.architecture]:.1f}" if card.architecture in latency else "",
        "trained": lambda card: f"{_epochs(card)}, {card.train_minutes:.0f} min",
    }
    if short:
        columns = {name: columns[name] for name in ("model", "top-1 %", "params", "MMACs", "ms, 64 images")}
        found = _to_choose_from(found, latency)
    return benchmark_tables.markdown_table(_best_first(found), columns)


def _to_choose_from(found: list[Card], latency: dict[str, float]) -> list[Card]:
    """Of the bundled models those that none is as fast and more accurate than, and the best of each family; and twins.

    A data set each. A dense twin is here for its sparse model alone.
    """
    dense = {dense_twin(card.architecture) for card in found}
    ours = [card for card in found if card.name in cards() and card.architecture not in dense]
    best = {(card.dataset, family_of(card.architecture)): card for card in sorted(ours, key=lambda card: card.top1)}
    chosen = [
        card
        for card in ours
        if card is best[card.dataset, family_of(card.architecture)]
        or not any(_as_fast_and_better(other, card, latency) for other in ours)
    ]
    twins = {(card.tag, dense_twin(card.architecture)) for card in chosen}
    return chosen + [card for card in found if (card.tag, card.architecture) in twins]


def _as_fast_and_better(other: Card, card: Card, latency: dict[str, float]) -> bool:
    times = [latency.get(one.architecture, math.inf) for one in (other, card)]
    return other.dataset == card.dataset and other.top1 > card.top1 and times[0] <= times[1]


def _beside_twins(found: list[Card]) -> str:
    """What each sparse model gains and loses on its dense twin, where both are trained."""
    latency = benchmark_tables.latency()
    known = {(card.tag, card.architecture): card for card in found}
    twins = [(card, known.get((card.tag, dense_twin(card.name)))) for card in _best_first(found)]
    pairs = [(card, twin) for card, twin in twins if twin]
    assert all(card.epochs == twin.epochs and card.teacher == twin.teacher for card, twin in pairs), "not trained alike"

    def faster(pair: tuple[Card, Card]) -> str:
        times = [latency.get(card.architecture) for card in pair]
        return f"{times[1] / times[0]:.2f}" if times[0] and times[1] else ""

    columns = {
        "model": lambda pair: f"`{pair[0].name}`",
        "top-1 above the twin": lambda pair: f"{pair[0].top1 - pair[1].top1:+.2f}",
        "MACs": lambda pair: f"{pair[0].macs / pair[1].macs:.2f}",
        "params": lambda pair: f"{pair[0].params / pair[1].params:.2f}",
        "faster": faster,
    }
    return benchmark_tables.markdown_table(pairs, columns)


def _best_first(found: list[Card]) -> list[Card]:
    """By data set and accuracy, each dense twin below the best of its sparse models."""
    sparse: dict[tuple[str, str | None], float] = {}
    for card in sorted(found, key=lambda card: card.top1):
        sparse[card.dataset, dense_twin(card.architecture)] = card.top1

    def key(card: Card) -> tuple[str, float, bool, str]:
        name = card.dataset, card.architecture
        return card.dataset, -sparse.get(name, card.top1), name in sparse, card.architecture

    return sorted(found, key=key)


def _by_recipes(found: list[Card]) -> str:
    """What each model had by the recipe for CPU cores, and has by the longer one."""
    last = {card.name: card for card in found}
    columns = {
        "model": lambda card: f"`{card.name}`",
        "top-1 %": lambda card: f"{card.top1:.2f}",
        "epochs": lambda card: str(card.epochs),
        "minutes": lambda card: f"{card.train_minutes:.0f}",
        "top-1 % by the longer recipe": lambda card: f"{last[card.name].top1:.2f}" if card.name in last else "",
    }
    return benchmark_tables.markdown_table(_best_first(by_cpu_recipes()), columns)


def _training(found: list[Card]) -> str:
    """How each model came to be."""
    columns = {
        "model": lambda card: f"`{card.name}`",
        "seed": lambda card: str(card.seed),
        "epochs": lambda card: str(card.epochs) + " more" * bool(card.started_from),
        "teacher": lambda card: card.teacher or "",
        "minutes": lambda card: f"{card.train_minutes:.1f}",
        "images/s": lambda card: f"{card.images_per_second:.0f}",
        "hardware": lambda card: card.hardware,
    }
    return benchmark_tables.markdown_table(_best_first(found), columns)


def _seeds(found: list[Card]) -> str:
    """Mean and standard deviation of top-1 over the seeds of each recipe that was repeated."""
    by_recipe = {card.recipe: [card] for card in [*found, *by_cpu_recipes()]}
    for path in sorted(SEEDS.glob("*.json")):
        card = Card.read(path)
        assert card.epochs == by_recipe[card.recipe][0].epochs
        by_recipe[card.recipe].append(card)
    repeated = [cards for cards in by_recipe.values() if len(cards) > 1]
    columns = {
        "recipe": lambda cards: f"`{cards[0].recipe}`",
        "top-1 %": lambda cards: " ± ".join(
            f"{of(c.top1 for c in cards):.2f}" for of in (statistics.mean, statistics.stdev)
        ),
        "seeds": lambda cards: str(len(cards)),
    }
    return benchmark_tables.markdown_table(repeated, columns)


def _model_card(found: list[Card]) -> str:
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "dimmix", *sorted({f"arxiv:{p}" for card in found for p in card.papers})],
        datasets=sorted({card.dataset for card in found}),
        metrics=["accuracy"],
        model_name="dimmix",
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=card.dataset,
                dataset_name=card.dataset,
                dataset_split=card.split,
                metric_type="accuracy",
                metric_name=f"top-1 accuracy of {card.name}, %",
                metric_value=round(card.top1, 2),
            )
            for card in found
            if card.name in cards()
        ],
    )
    classes = "\n".join(
        f"- `{card.name}`: "
        + ", ".join(
            f"{label} {'-' if value is None else f'{value:.1f}'}"
            for label, value in zip(card.labels, card.per_class_accuracy, strict=True)
        )
        for card in found
        if card.name in cards()
    )
    return MODEL_CARD.format(
        metadata=metadata.to_yaml(),
        table=_table(found),
        twins=_beside_twins(found),
        cpu=_by_recipes(found),
        seeds=_seeds(found),
        training=_training(found),
        classes=classes,
    )


if __name__ == "__main__":
    sys.exit(main())
