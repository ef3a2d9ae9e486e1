"""Which positions of each layer move the score, and where the heat is."""

import numpy as np
import pytest
import timm
import torch

from dimmix.classifier import Classifier
from dimmix.errors import DimmixError
from dimmix.explain import draw, explain
from dimmix.images import sample_images
from dimmix.runtime import TorchRuntime, model_spec


def classifier(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    return Classifier.of(TorchRuntime(model, model_spec(model, name, {}), torch.device("cpu")))


NAMES = (
    "butterfly_resnet_nano_32",
    "vit_butterfly_nano_patch4_32",
    "butterfly_mixer_nano_32",
    "patch_only_mixer_tiny_32",
)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_explained(name):
    ours = classifier(name)
    found = explain(ours, sample_images()[3])
    predicted = ours.predict(sample_images()[3], topk=1)[0]
    assert found.prediction.label == predicted.label
    assert found.prediction.score == pytest.approx(predicted.score, rel=1e-5)
    assert found.heat.shape == (32, 32)
    assert 0 <= found.heat.min() <= found.heat.max() <= 1
    assert len(found.layers) == len(ours.runtime.model.blocks)
    assert all(layer.reaching == (layer.sensitivity > 0).mean() for layer in found.layers)


def test_gradients_switched_off_by_the_caller_do_not_matter():
    ours = classifier("vit_butterfly_nano_patch4_32")
    expected = explain(ours, sample_images()[0], 1)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            found = explain(ours, sample_images()[0], 1)
        np.testing.assert_allclose(found.heat, expected.heat, atol=1e-5)


@pytest.mark.parametrize("index", [-1, 10])
def test_a_class_that_is_not_there_is_refused(index):
    with pytest.raises(DimmixError, match=f"has 10 classes, and no class {index}"):
        explain(classifier("vit_butterfly_nano_patch4_32"), sample_images()[0], index)


def test_a_layer_that_reads_one_patch_is_reached_by_that_alone():
    ours = classifier("vit_butterfly_nano_patch4_32")
    model = ours.runtime.model
    model.pool = lambda x: x[:, 0]
    reaching = [layer.reaching for layer in explain(ours, sample_images()[0]).layers]
    assert reaching[-3:] == [1.0, 8 / 64, 1 / 64]


def test_the_sensitivity_is_the_gradient_of_the_asked_class():
    ours = classifier("butterfly_resnet_nano_32")
    first, second = (explain(ours, sample_images()[0], index).layers[-1].sensitivity for index in (0, 1))
    weights = ours.runtime.model.head.weight.detach()
    np.testing.assert_allclose(first[0, 0], weights[0].norm() / first.size, rtol=1e-4)
    np.testing.assert_allclose(second[0, 0], weights[1].norm() / second.size, rtol=1e-4)


def test_the_heat_of_a_pooled_head_is_the_map_of_class_activations():
    """Below a mean over positions every gradient is the class's weight, so Grad-CAM is CAM (arXiv 1610.02391, 3.1)."""
    ours = classifier("butterfly_resnet_nano_32")
    model = ours.runtime.model
    pixels = torch.from_numpy(ours.to_batch([ours.prepare(sample_images()[0])]))
    with torch.no_grad():
        activations = torch.einsum("c,chw->hw", model.head.weight[4], model.forward_features(pixels)[0]).relu()
    wanted = torch.nn.functional.interpolate(activations[None, None], (32, 32), mode="bilinear")[0, 0]
    np.testing.assert_allclose(explain(ours, sample_images()[0], 4).heat, wanted / wanted.max(), atol=1e-5)


def test_the_picture_is_written_whole_or_not_at_all(tmp_path):
    pytest.importorskip("matplotlib")
    found = explain(classifier("butterfly_resnet_nano_32"), sample_images()[0])
    draw(found, tmp_path / "heat.png")
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DimmixError, match="the picture is a"):
        draw(found, tmp_path / "heat.txt")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_without_the_model_cannot_be_explained(brightest):
    with pytest.raises(DimmixError, match="only a model of dimmix"):
        explain(Classifier(str(brightest)), sample_images()[0])


def test_broken_weights_are_said():
    ours = classifier("butterfly_resnet_nano_32")
    torch.nn.init.constant_(ours.runtime.model.head.bias, float("nan"))
    with pytest.raises(DimmixError, match="not finite"):
        explain(ours, sample_images()[0])


def test_a_model_without_classes_has_nothing_to_explain():
    torch.manual_seed(0)
    model = timm.create_model("butterfly_resnet_nano_32", num_classes=0).eval()
    features = Classifier.of(TorchRuntime(model, model_spec(model, "features", {}), torch.device("cpu")))
    with pytest.raises(DimmixError, match="features has no classifier"):
        explain(features, sample_images()[0])


def test_an_image_that_came_transformed_is_drawn(tmp_path):
    ours = classifier("butterfly_resnet_nano_32")
    plain = explain(ours, sample_images()[0])
    found = explain(ours, ours.transform(sample_images()[0]))
    assert found.prediction.index == plain.prediction.index
    assert found.image.shape == (32, 32, 3)
    assert np.corrcoef(found.image[..., 0].ravel(), plain.image[..., 0].ravel())[0, 1] > 0.999
    draw(found, tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 10_000
