"""A published folder loads back bit for bit through timm and transformers, from disk and from the Hub."""

import dataclasses
import hashlib
import json

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from toy_checkpoint import make_card, weights

import dimmix  # noqa: F401  registers the architectures
from dimmix.checkpoints import Card, CheckpointError, cards, publish
from dimmix.errors import DimmixError
from tests.hub_server import with_status

ARCHITECTURE = "test_resnet"
# huggingface_hub's own call into its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
FILES = ["README.md", "config.json", "model.json", "model.safetensors", "preprocessor_config.json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The path of the card of a small model with ten classes, its weights beside it; and the weights."""
    torch.manual_seed(0)
    state = timm.create_model(ARCHITECTURE, num_classes=10).state_dict()
    content = safetensors.torch.save(state)
    card = make_card(content, architecture=ARCHITECTURE, tag="mine", input_size=(3, 64, 64), notes="Small.")
    folder = tmp_path_factory.mktemp("trained")
    (folder / card.file).write_bytes(content)
    card.write(folder / f"{card.name}.json")
    return folder / f"{card.name}.json", state


@pytest.fixture
def published(trained, tmp_path):
    """The folder on disk."""
    card, file = publish.open_source(str(trained[0]))
    publish.write_folder(card, file, tmp_path / "out", "someone/mine")
    return tmp_path / "out"


def assert_same(loaded, state):
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_the_folder_holds_what_timm_transformers_and_dimmix_read(published, trained):
    assert sorted(path.name for path in published.iterdir()) == FILES
    config = json.loads((published / "config.json").read_text())
    assert config["architecture"] == ARCHITECTURE
    assert config["num_classes"] == 10
    assert config["dtype"] == "float32"  # whatever the file is stored in
    assert config["label_names"][3] == "cat"
    assert config["model_args"] == {}
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    card = Card.read(published / "model.json")
    assert card == dataclasses.replace(Card.read(trained[0]), file="model.safetensors")
    assert hashlib.sha256((published / card.file).read_bytes()).hexdigest() == card.sha256


def test_the_readme_carries_metadata_and_results(published):
    card = huggingface_hub.ModelCard.load(published / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "timm"
    assert [result.metric_value for result in card.data.eval_results] == [91.5, 99.5]
    assert card.data.eval_results[0].dataset_type == "cifar10"
    assert 'timm.create_model("hf-hub:someone/mine", pretrained=True)' in card.text


@pytest.mark.parametrize(
    ("started_from", "base_model"),
    [
        ("toy_net", "dimmix/toy_net.cifar10"),
        ("hf-hub:me/net", "me/net"),
        ("hf_hub:me/net@v1", "me/net"),
        ("mine.safetensors", None),
        ("", None),
    ],
)
def test_the_readme_says_what_training_started_from(trained, bundle, tmp_path, started_from, base_model):
    bundle(weights())
    card, file = publish.open_source(str(trained[0]))
    publish.write_folder(dataclasses.replace(card, started_from=started_from), file, tmp_path / "out", "someone/mine")
    readme = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert readme.data.base_model == base_model
    assert (f"| Started from | `{started_from}` |" in readme.text) == bool(started_from)


def test_it_loads_back_through_timm_from_the_folder(published, trained):
    model = timm.create_model(f"local-dir:{published}", pretrained=True)
    assert_same(model.state_dict(), trained[1])
    assert model.pretrained_cfg["label_names"][3] == "cat"
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 64, 64)


def test_it_loads_back_through_transformers(published, trained):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(published)
    assert_same(model.timm_model.state_dict(), trained[1])
    assert model.config.id2label[3] == "cat"
    processor = transformers.AutoImageProcessor.from_pretrained(published)
    assert processor.data_config["input_size"] == (3, 64, 64)
    assert processor.data_config["mean"] == (0.5, 0.5, 0.5)


def test_it_loads_back_from_the_hub_after_an_upload(hub, token, published, trained, tmp_path):
    address = publish.upload(published, "someone/mine", Card.read(trained[0]))
    assert address.startswith(f"{hub.url}/someone/mine/commit/")
    head = hub.repos["someone/mine"].commits[hub.repos["someone/mine"].head]
    assert sorted(head) == [".gitattributes", *FILES]
    assert head["model.safetensors"] == (published / "model.safetensors").read_bytes()
    assert_same(timm.create_model("hf-hub:someone/mine", pretrained=True).state_dict(), trained[1])
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained("someone/mine")
    assert_same(model.timm_model.state_dict(), trained[1])


def test_a_private_repository_stays_private(hub, token, published, trained):
    publish.upload(published, "someone/mine", Card.read(trained[0]), private=True)
    assert hub.repos["someone/mine"].private


def test_an_upload_without_a_token_is_one_line(hub, published, trained):
    with pytest.raises(CheckpointError, match=r"hf-hub:someone/mine: .*your HF_TOKEN does not allow it"):
        publish.upload(published, "someone/mine", Card.read(trained[0]))
    assert hub.repos == {}


def test_a_store_that_fails_leaves_the_repository_as_it_was(hub, token, published, trained):
    hub.fail("PUT", "/upload/", with_status(500), times=99)
    with pytest.raises(CheckpointError, match="hf-hub:someone/mine: the Hub answered 500; try again later"):
        publish.upload(published, "someone/mine", Card.read(trained[0]))
    assert [len(commit) for commit in hub.repos["someone/mine"].commits.values()] == [1]


def test_a_card_that_the_hub_refuses_is_one_line_with_its_reason(hub, token, published, trained):
    hub.fail("POST", "/validate-yaml", with_status(400, b'{"errors": [{"message": "license must be another"}]}'))
    with pytest.raises(CheckpointError, match=r"refuses the model card: .*README\.md\. - license must be another$"):
        publish.upload(published, "someone/mine", Card.read(trained[0]))


def test_a_commit_that_the_hub_refuses_is_one_line_with_its_reason(hub, token, published, trained):
    hub.fail("POST", "/commit/", with_status(400, b'{"error": "too many files"}'), times=9)
    with pytest.raises(CheckpointError, match=r"the Hub refuses this \(400: .*too many files\)"):
        publish.upload(published, "someone/mine", Card.read(trained[0]))


def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_written(trained, tmp_path):
    with pytest.raises(CheckpointError, match="this is not the name of a repository"):
        publish.write_folder(Card.read(trained[0]), trained[0].with_suffix(".safetensors"), tmp_path / "new", "a b!")
    assert not (tmp_path / "new").exists()


def test_a_licence_is_named_as_the_hub_names_it(trained):
    card = dataclasses.replace(Card.read(trained[0]), licence="MIT")
    assert card.pretrained_cfg()["license"] == "mit"
    assert all(found.licence == found.licence.lower() for found in cards().values())


def test_a_folder_that_holds_something_is_left_alone(trained, tmp_path):
    (tmp_path / "thesis.tex").touch()
    card, file = publish.open_source(str(trained[0]))
    with pytest.raises(DimmixError, match="there is something already"):
        publish.write_folder(card, file, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_weights_that_do_not_fit_the_architecture_are_not_published(tmp_path):
    (tmp_path / "wrong.safetensors").write_bytes(weights())
    card = make_card(weights(), architecture=ARCHITECTURE, file="wrong.safetensors")
    with pytest.raises(CheckpointError, match="timm does not load what would be published"):
        publish.write_folder(card, tmp_path / "wrong.safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.safetensors"]


def test_weights_that_timm_would_change_are_not_published(trained, tmp_path, monkeypatch):
    create = timm.create_model

    def changed(*args, **kwargs):
        model = create(*args, **kwargs)
        torch.nn.init.zeros_(next(model.parameters()))
        return model

    monkeypatch.setattr(timm, "create_model", changed)
    card, file = publish.open_source(str(trained[0]))
    with pytest.raises(
        CheckpointError, match=r"timm loads 'conv1\.0\.weight' differently from what would be published"
    ):
        publish.write_folder(card, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_the_cards_are_not_published(trained, tmp_path):
    card = Card.read(trained[0])
    card.write(tmp_path / "mine.json")
    (tmp_path / card.file).write_bytes(weights())
    with pytest.raises(CheckpointError, match=f"expected {card.sha256}"):
        publish.open_source(str(tmp_path / "mine.json"))


def test_a_name_that_is_neither_bundled_nor_a_card(bundle, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint 'mine'; name a bundled one, or the \.json card"):
        publish.open_source("mine")
    with pytest.raises(CheckpointError, match="cannot read the card"):
        publish.open_source(str(tmp_path / "mine.json"))


@pytest.mark.parametrize(
    ("architecture", "size", "args"),
    [
        (ARCHITECTURE, (1, 64, 64), {"in_chans": 1}),
        ("butterfly_mixer_nano_32", (3, 16, 16), {"img_size": [16, 16]}),
    ],
)
def test_other_channels_and_a_size_that_is_built_in_are_arguments_of_the_model(tmp_path, architecture, size, args):
    content = safetensors.torch.save(timm.create_model(architecture, num_classes=2, **args).state_dict())
    (tmp_path / "other.safetensors").write_bytes(content)
    values = {"input_size": size, "mean": (0.5,) * size[0], "std": (0.5,) * size[0], "labels": ("cat", "dog")}
    card = make_card(content, architecture=architecture, file="other.safetensors", **values)
    publish.write_folder(card, tmp_path / "other.safetensors", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"] == args
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model(torch.zeros(1, *size)).shape == (1, 2)
