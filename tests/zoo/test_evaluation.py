"""The metrics equal torchmetrics'; a data set gives the same numbers in every layout; the report shows them."""

import re

import numpy as np
import pytest
import torch

from dimmix import Classifier
from dimmix.datasets import LabelledImages, Sample, open_dataset
from dimmix.errors import DimmixError
from dimmix.evaluation import Evaluation, evaluate
from dimmix.report import write_report

from ..conftest import CIFAR10, LABELS


@pytest.fixture(scope="module")
def classifier(tiny):
    return Classifier(tiny.architecture, "cpu", tiny.checkpoint)


@pytest.fixture(scope="module")
def result(classifier):
    return evaluate(classifier, open_dataset(str(CIFAR10)), batch_size=16)


def test_metrics_equal_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(500, 10, generator=generator)
    labels = torch.randint(10, (500,), generator=generator)
    logits[torch.arange(500), labels] += 3
    evaluation = Evaluation("m", "d", "test", list(LABELS))
    samples = [Sample(None, 0, "")] * 125
    for part in range(4):
        rows = slice(125 * part, 125 * (part + 1))
        evaluation.update(logits[rows].numpy(), labels[rows].numpy(), samples)
    micro = {"num_classes": 10, "average": "micro"}
    expected = {
        "top1": 100 * functional.multiclass_accuracy(logits, labels, **micro),
        "top5": 100 * functional.multiclass_accuracy(logits, labels, top_k=5, **micro),
        "nll": torch.nn.functional.cross_entropy(logits, labels),
        "ece": functional.multiclass_calibration_error(logits.softmax(-1), labels, num_classes=10),
    }
    for name, value in expected.items():
        assert getattr(evaluation, name) == pytest.approx(value.item(), abs=1e-5), name
    classes = functional.multiclass_accuracy(logits, labels, num_classes=10, average="none")
    assert evaluation.per_class_accuracy == pytest.approx((100 * classes).tolist(), abs=1e-4)
    confusion = functional.multiclass_confusion_matrix(logits, labels, num_classes=10)
    assert np.array_equal(evaluation.confusion, confusion)


def test_classes_of_one_name_stay_apart():
    evaluation = Evaluation("m", "d", "test", ["crane", "other", "crane"])
    evaluation.update(4 * np.eye(3)[[0, 2, 0]], np.array([0, 2, 2]), [Sample(None, 0, "")] * 3)
    assert evaluation.per_class_accuracy == (100.0, None, 50.0)
    assert evaluation.class_accuracies == [("crane", 100.0), ("crane", 50.0)]


def test_a_confidence_of_one_counts_once():
    evaluation = Evaluation("m", "d", "test", ["a", "b"])
    evaluation.update(np.array([[1000.0, 0.0], [1000.0, 0.0]]), np.array([0, 1]), [Sample(None, 0, "")] * 2)
    assert (evaluation.top1, evaluation.ece) == (50.0, 0.5)
    assert np.isfinite(evaluation.nll)


def test_an_evaluation_is_the_models_own_numbers(result, classifier, cifar_rows):
    stack = torch.stack([classifier.transform(image) for image, _ in cifar_rows])
    labels = torch.tensor([label for _, label in cifar_rows])
    with torch.inference_mode():
        logits = classifier.runtime.model(stack)
    assert result.images == 60
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert result.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)


def test_folders_and_parquet_agree(result, classifier, class_folders):
    other = evaluate(classifier, open_dataset(str(class_folders)), batch_size=7)
    assert other.nll == pytest.approx(result.nll, abs=1e-6)
    assert np.array_equal(other.confusion, result.confusion)


def test_labels_in_another_order_change_nothing(result, classifier, cifar_rows):
    turned = LABELS[::-1]
    samples = [Sample(image, turned.index(LABELS[label]), "") for image, label in cifar_rows]
    dataset = LabelledImages("d", "test", turned, 60, lambda: iter(samples))
    assert np.array_equal(evaluate(classifier, dataset).confusion, result.confusion)


def test_unreadable_images_are_left_out_and_named(classifier, cifar_rows):
    samples = [Sample(b"broken", 0, "row 0"), Sample(cifar_rows[0][0], cifar_rows[0][1], "row 1")]
    found = evaluate(classifier, LabelledImages("d", "test", LABELS, 2, lambda: iter(samples)))
    assert found.images == 1
    assert str(found.errors[0]).startswith("row 0: not an image")
    with pytest.raises(DimmixError, match="no image to evaluate on: row 0"):
        evaluate(classifier, LabelledImages("d", "test", LABELS, 1, lambda: iter(samples[:1])))


def test_a_label_beyond_the_classes_is_refused(classifier, cifar_rows):
    samples = [Sample(cifar_rows[0][0], 10, "row 0")]
    with pytest.raises(DimmixError, match="row 0 is of class 10, the model has 10 classes"):
        evaluate(classifier, LabelledImages("d", "test", None, 1, lambda: iter(samples)))


def test_mistakes_are_the_most_confident_ones(classifier):
    answers = []
    found = evaluate(classifier, open_dataset(str(CIFAR10)), on_answer=answers.append)
    wrong = sorted((a.score for a in answers if a.label != a.prediction), reverse=True)
    assert len(answers) == 60
    assert [mistake.score for mistake in found.mistakes] == wrong[:24]


def test_the_report_is_one_page_with_its_pictures_inside(result, tmp_path):
    pytest.importorskip("matplotlib")
    page = write_report(result, tmp_path / "report").read_text()
    sources = re.findall(r'src="([^"]{30})', page)
    assert len(sources) == 3 + len(result.mistakes)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert f"<td>{result.record()['top1']}</td>" in page
    assert "http" not in page


def test_ties_are_ranked_as_answers_are_and_what_is_no_number_is_refused():
    evaluation = Evaluation("m", "d", "test", list(LABELS))
    evaluation.update(np.zeros((10, 10)), np.arange(10), [Sample(None, 0, "")] * 10)
    assert (evaluation.top1, evaluation.top5) == (10, 50)
    with pytest.raises(DimmixError, match="m gives numbers that are not finite"):
        evaluation.update(np.full((1, 10), np.nan), np.arange(1), [Sample(None, 0, "")])


def test_of_mistakes_as_confident_as_each_other_the_first_are_kept():
    evaluation = Evaluation("model", "data", "test", ["a", "b"])
    samples = [Sample(object(), 0, f"row {row}") for row in range(60)]  # images that cannot be compared
    for start in range(0, 60, 20):
        evaluation.update(np.tile([-50.0, 50.0], (20, 1)), np.zeros(20, np.int64), samples[start : start + 20])
    assert {answer.sample.source for answer in evaluation.mistakes} == {f"row {row}" for row in range(24)}
