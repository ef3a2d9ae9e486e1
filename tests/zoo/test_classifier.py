"""Classifier: every kind of image gives the same answer; streams are lazy and go on past what is broken."""

import dataclasses
import itertools

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dimmix import Classifier
from dimmix.errors import DimmixError
from dimmix.images import ImageError
from dimmix.runtime import TorchRuntime, describe_model, model_spec


@pytest.fixture(scope="module")
def classifier(tiny):
    return Classifier(tiny.architecture, "cpu", tiny.checkpoint)


@pytest.fixture(scope="module")
def photo(class_folders):
    return sorted(class_folders.glob("cat/*.png"))[0]


def test_labels_and_transform_come_from_the_card(classifier):
    assert classifier.labels[3] == "cat"
    assert len(classifier.labels) == 10
    assert classifier.runtime.spec.preprocess.mean == (0.49, 0.48, 0.45)


@pytest.mark.parametrize(
    ("label_names", "labels"),
    [
        (["cat", "dog", "owl"], ("cat", "dog", "owl")),
        ({"0": "cat", "2": "owl", "7": "of no class"}, ("cat", "1", "owl")),
        ({0: "cat", 2: "owl"}, ("cat", "1", "owl")),
        (["of", "another", "head", "altogether"], ("0", "1", "2")),
        (None, ("0", "1", "2")),
        (3, ("0", "1", "2")),
    ],
)
def test_class_names_of_a_config_are_a_list_or_a_dict_with_gaps(label_names, labels):
    model = timm.create_model("butterfly_mixer_nano_32", num_classes=3)
    model.pretrained_cfg["label_names"] = label_names
    assert model_spec(model, "butterfly_mixer_nano_32", {}).labels == labels


def test_predictions_are_the_softmax_of_the_model_best_first(classifier, cifar_rows, tiny):
    image = cifar_rows[0][0]
    with torch.inference_mode():
        expected = classifier.runtime.model(classifier.transform(image)[None])[0].softmax(0)
    predictions = classifier.predict(image, topk=10)
    assert [p.index for p in predictions] == expected.argsort(descending=True).tolist()
    assert sum(p.score for p in predictions) == pytest.approx(1)
    assert predictions[0].score == pytest.approx(expected.max().item(), abs=1e-6)


def test_a_classifier_runs_the_model_with_its_batch_norms_folded(classifier, cifar_rows, tiny):
    model = timm.create_model(tiny.architecture, num_classes=10, checkpoint_path=str(tiny.checkpoint)).eval()
    x = classifier.transform(cifar_rows[0][0])[None]
    with torch.inference_mode():
        assert (classifier.runtime.model(x) - model(x)).abs().max() < 1e-5
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in classifier.runtime.model.modules())


def test_paths_images_arrays_bytes_and_tensors_agree(classifier, photo):
    image = Image.open(photo)
    pixels = np.asarray(image)
    chw = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    kinds = [photo, str(photo), photo.read_bytes(), image, pixels, chw, classifier.transform(image)]
    answers = [classifier.predict(kind, topk=1)[0].score for kind in kinds]
    assert answers == pytest.approx([answers[0]] * len(kinds), abs=1e-6)


def test_images_as_they_are_and_transformed_ones_may_come_together(classifier, cifar_rows):
    image = cifar_rows[0][0]
    kinds = [image, classifier.transform(image), classifier.transform(image).bfloat16()]
    plain, ready, rough = classifier.predict(kinds)
    assert [p.index for p in plain] == [p.index for p in ready] == [p.index for p in rough]
    assert [p.score for p in plain] == pytest.approx([p.score for p in ready], abs=1e-5)


def test_amp_computes_in_bfloat16_what_is_no_export(classifier, brightest, cifar_rows, tiny):
    image = cifar_rows[0][0]
    exact = classifier.predict(image, topk=10)
    rough = Classifier(tiny.architecture, "cpu", tiny.checkpoint, amp=True).predict(image, topk=10)
    assert rough != exact
    assert {p.index: p.score for p in rough} == pytest.approx({p.index: p.score for p in exact}, abs=0.05)
    with pytest.raises(DimmixError, match=r"--amp: .* keeps the types it was exported with"):
        Classifier(str(brightest), "cpu", amp=True)


def test_several_images_give_a_list_of_answers(classifier, photo, cifar_rows):
    images = [image for image, _ in cifar_rows[:3]]
    answers = classifier.predict(images, topk=2)
    assert [len(answer) for answer in answers] == [2, 2, 2]
    stack = torch.stack([classifier.transform(image) for image in images])
    assert classifier.predict(stack, topk=2)[1][0].index == answers[1][0].index


def test_embeddings_are_the_pooled_features(classifier, cifar_rows):
    rows = classifier.embed([image for image, _ in cifar_rows[:2]])
    assert rows.shape == (2, classifier.runtime.model.head_hidden_size)
    assert np.array_equal(classifier.embed(cifar_rows[0][0]).shape, rows[0].shape)


def test_a_stream_goes_on_past_a_broken_image(classifier, photo, tmp_path):
    results = list(classifier.stream([photo, tmp_path / "none.png", photo], batch_size=2))
    assert [result.error for result in results] == [None, "no such file or directory", None]
    with pytest.raises(ImageError, match=r"none\.png: no such file"):
        classifier.predict([tmp_path / "none.png"])


def test_a_stream_goes_on_past_what_holds_no_pixels_or_no_numbers(classifier, photo):
    nan = np.full((3, *classifier.runtime.spec.preprocess.input_size[1:]), np.nan, np.float32)
    results = list(classifier.stream([photo, Image.new("RGB", (0, 5)), nan, photo]))
    said = [None, "0x5 pixels are no image", "values that are not finite", None]
    assert [result.error for result in results] == said
    assert results[0].predictions == results[3].predictions


def test_a_model_of_four_channels_takes_its_own_input_alone(classifier, photo):
    spec = classifier.runtime.spec
    four = dataclasses.replace(spec.preprocess, input_size=(4, 8, 8), mean=(0.5,) * 4, std=(0.5,) * 4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10)).eval()
    ours = Classifier.of(TorchRuntime(model, dataclasses.replace(spec, preprocess=four), torch.device("cpu")))
    with pytest.raises(ImageError, match="the model takes 4 channels"):
        ours.predict(photo)
    assert len(ours.predict(np.zeros((4, 8, 8), np.float32), topk=10)) == 10


def test_a_model_that_does_not_pool_is_no_classifier(classifier, photo):
    model = torch.nn.Conv2d(3, 10, 1).eval()
    ours = Classifier.of(TorchRuntime(model, classifier.runtime.spec, torch.device("cpu")))
    with pytest.raises(DimmixError, match=r"gives \(10, \d+, \d+\) numbers for an image, not one for each class"):
        ours.predict(photo)


def test_a_stream_of_empty_batches_is_refused(classifier, photo):
    with pytest.raises(ValueError, match="batch_size=0 holds no image"):
        list(classifier.stream([photo], batch_size=0))


def test_a_stream_is_lazy(classifier, cifar_rows):
    endless = itertools.cycle([cifar_rows[0][0]])
    results = list(itertools.islice(classifier.stream(endless, batch_size=4, workers=2), 6))
    assert [result.predictions[0] for result in results] == [results[0].predictions[0]] * 6


def test_a_float_array_of_another_shape_is_refused(classifier):
    with pytest.raises(ImageError, match="after `transform` they are"):
        classifier.predict(np.zeros((32, 32, 3), np.float32))


@pytest.mark.parametrize("name", ["no_such_model", "no_such_model.tag"])
def test_an_unknown_model_is_a_usage_error(name):
    with pytest.raises(DimmixError, match="unknown model") as caught:
        Classifier(name)
    assert caught.value.exit_code == 2


def test_an_unknown_model_names_close_matches():
    with pytest.raises(DimmixError, match=r"did you mean .*resnet18"):
        Classifier("resnet18x")


def test_weights_of_another_architecture_say_what_does_not_fit(tiny, tmp_path):
    with pytest.raises(DimmixError, match=r"tiny\.safetensors: weights of butterfly_.*_convmix_w32, not of resnet18"):
        Classifier("resnet18", "cpu", tiny.checkpoint)
    (tmp_path / "w.safetensors").write_bytes(tiny.checkpoint.read_bytes())  # without its card
    with pytest.raises(DimmixError, match=r"w\.safetensors: the weights do not fit resnet18: .* expected"):
        Classifier("resnet18", "cpu", tmp_path / "w.safetensors")


def test_a_checkpoint_alone_is_of_the_architecture_that_its_card_names(tiny, tmp_path):
    classifier = Classifier(device="cpu", checkpoint=tiny.checkpoint)
    assert classifier.name == tiny.architecture
    named = Classifier(tiny.architecture, "cpu", tiny.checkpoint)
    image = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    assert classifier.predict(image) == named.predict(image)
    (tmp_path / "w.safetensors").write_bytes(tiny.checkpoint.read_bytes())  # without its card
    with pytest.raises(DimmixError, match=r"w\.safetensors: no card beside it names the architecture") as caught:
        Classifier(checkpoint=tmp_path / "w.safetensors")
    assert caught.value.exit_code == 2


def test_a_file_of_weights_is_not_a_model_and_the_error_says_what_it_is(tiny):
    with pytest.raises(DimmixError, match="a file of weights is given as --checkpoint"):
        Classifier(str(tiny.checkpoint))


@pytest.mark.parametrize("text", ["{}", "not json", "[]", '{"preprocess": {"interpolation": "random"}}'])
def test_foreign_metadata_are_one_line(tiny, tmp_path, text):
    save_file(load_file(tiny.checkpoint), tmp_path / "w.safetensors", {"dimmix": text})
    with pytest.raises(DimmixError, match=r"w\.safetensors: its metadata are not those of an export") as caught:
        Classifier(tiny.architecture, "cpu", tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18.bogus", "wide_mixer_c192_32.bogus"])
def test_an_unknown_tag_is_a_usage_error(name, tiny):
    for checkpoint in (None, tiny.checkpoint.with_name("none.safetensors")):
        with pytest.raises(DimmixError):
            Classifier(name, "cpu", checkpoint)
    with pytest.raises(DimmixError, match=f"unknown model '{name}'") as caught:
        describe_model(name)
    assert caught.value.exit_code == 2


class Broken:
    """Runs as a model whose numbers are not finite."""

    def __init__(self, spec, value):
        self.spec, self.value = spec, value

    def logits(self, batch):
        return np.full((len(batch), len(self.spec.labels)), self.value, np.float32)

    embed = logits

    def lanes(self, batch_size):
        return 1

    def lane(self, lanes):
        return lambda: None


def test_answers_that_are_no_numbers_are_an_error(classifier, photo):
    broken = Classifier.of(Broken(classifier.runtime.spec, np.nan))
    with pytest.raises(DimmixError, match="gives numbers that are not finite"):
        broken.predict(photo)


def test_a_model_without_classes_gives_embeddings_alone(classifier, photo):
    nothing = Classifier.of(Broken(dataclasses.replace(classifier.runtime.spec, labels=()), 0.0))
    with pytest.raises(DimmixError, match="has no classifier, and gives embeddings alone"):
        nothing.predict(photo)


def test_of_no_images_there_is_nothing(classifier):
    assert classifier.predict([]) == []
    assert len(classifier.embed([])) == 0


def test_a_changed_checkpoint_does_not_match_its_card(tiny, tmp_path):
    content = bytearray(tiny.checkpoint.read_bytes())
    content[-1] ^= 1
    (tmp_path / "tiny.safetensors").write_bytes(content)
    (tmp_path / "tiny.json").write_bytes(tiny.checkpoint.with_suffix(".json").read_bytes())
    with pytest.raises(DimmixError, match="sha256"):
        Classifier(tiny.architecture, "cpu", tmp_path / "tiny.safetensors")


def test_an_absent_device_names_those_there_are(tiny):
    if torch.backends.mps.is_available():
        pytest.skip("there is one here")
    with pytest.raises(DimmixError, match="not on this machine, which has cpu"):
        Classifier(tiny.architecture, "mps", tiny.checkpoint)


def test_a_local_dir_of_timm_is_a_model(tiny, tmp_path, cifar_rows):
    from timm.models import save_for_hf

    model = timm.create_model(tiny.architecture, num_classes=10).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert len(Classifier(f"local-dir:{tmp_path}", "cpu").predict(cifar_rows[0][0])) == 5
