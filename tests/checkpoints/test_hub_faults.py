"""Downloads that go wrong: what the user sees, and that the cache is sound afterwards."""

import errno
import hashlib
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
from toy_checkpoint import weights

from dimmix.checkpoints import CheckpointError, find
from dimmix.checkpoints.hub import fetch_config
from tests.hub_server import cut, flip_bit, replace, shorten, stall, with_status

NAME = "someone/toy"
GOOD = weights()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def toy(hub):
    hub.publish(NAME, {"model.safetensors": GOOD})
    return hub


def fails_with(pattern: str, name: str = f"hf-hub:{NAME}") -> None:
    """The user sees one line that matches, and the cache holds nothing but whole and true files."""
    with pytest.raises(CheckpointError) as caught:
        find(name)
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert "\n" not in message
    assert_sound_cache()


def assert_sound_cache() -> None:
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    assert not [path for path in cache.rglob("*") if ".incomplete" in path.name or path.name.startswith("tmp")]
    for path in (*cache.glob("*/snapshots/*/*"), *cache.glob("*/blobs/*")):
        assert sha256(path.read_bytes()) == path.resolve().name


def recovers(hub) -> None:
    """With the Hub well again, the right file is found."""
    hub.faults.clear()
    assert find(f"hf-hub:{NAME}").read_bytes() == GOOD
    assert_sound_cache()


def test_404_no_such_repository(hub):
    fails_with(r"^hf-hub:someone/nothing: there is no such repository, or your HF_TOKEN", "hf-hub:someone/nothing")


def test_401_a_private_repository_without_a_token(hub):
    hub.publish(NAME, {"model.safetensors": GOOD}, private=True)
    fails_with("there is no such repository, or your HF_TOKEN does not allow it")


def test_403_a_gated_repository(toy):
    toy.fail("HEAD", "/resolve/", with_status(403, X_Error_Code="GatedRepo"))
    fails_with("access is granted by its owners only")
    recovers(toy)


def test_429_waits_as_long_as_it_is_told_and_goes_on(toy, waits):
    toy.fail("HEAD", "/resolve/", with_status(429, Retry_After="7"), times=2)
    assert find(f"hf-hub:{NAME}").read_bytes() == GOOD
    assert 8.0 in waits  # huggingface_hub adds a second to what the server asked for
    assert_sound_cache()


def test_429_for_ever(toy):
    toy.fail("HEAD", "/resolve/", with_status(429, Retry_After="1"), times=99)
    fails_with(r"the Hub is asked too often \(429\).*not in the cache either")
    recovers(toy)


def test_500_then_success(toy):
    toy.fail("HEAD", "/resolve/", with_status(500), times=2)
    assert find(f"hf-hub:{NAME}").read_bytes() == GOOD
    assert_sound_cache()


def test_500_for_ever(toy):
    toy.fail("HEAD", "/resolve/", with_status(500), times=99)
    fails_with(r"the Hub answered 500; try again later; it is not in the cache either")
    recovers(toy)


def test_500_from_the_store(toy):
    toy.fail("GET", "/cdn/", with_status(500))
    fails_with(r"the Hub answered 500; try again later")
    recovers(toy)


@pytest.mark.parametrize("fault", [cut, stall])
def test_an_interrupted_body_is_resumed_where_it_stopped(toy, fault):
    toy.fail("GET", "/cdn/", fault)
    assert find(f"hf-hub:{NAME}").read_bytes() == GOOD
    again = toy.seen("GET", "/cdn/")[1]
    whole_chunks = len(GOOD) // 2 // 1024 * 1024
    assert again["range"] == f"bytes={whole_chunks}-"
    assert_sound_cache()


@pytest.mark.parametrize("fault", [cut, stall])
def test_a_connection_that_never_gets_further(toy, fault):
    toy.fail("GET", "/cdn/", fault)
    toy.fail("GET", "/cdn/", lambda handler, *_: handler.connection.close(), times=99)
    fails_with(r"no connection to http://127\.0\.0\.1")
    recovers(toy)


def test_a_wrong_length_once(toy):
    toy.fail("GET", "/cdn/", shorten)
    assert find(f"hf-hub:{NAME}").read_bytes() == GOOD
    assert_sound_cache()


def test_a_wrong_length_every_time(toy):
    toy.fail("GET", "/cdn/", shorten, times=99)
    fails_with(rf"should be of size {len(GOOD)} but has size {len(GOOD) - 7}")
    recovers(toy)


def test_a_flipped_bit_once_is_downloaded_again(toy):
    toy.fail("GET", "/cdn/", flip_bit)
    assert find(f"hf-hub:{NAME}").read_bytes() == GOOD
    assert len(toy.seen("GET", "/cdn/")) == 2
    assert_sound_cache()


def test_a_flipped_bit_every_time_shows_both_digests(toy):
    toy.fail("GET", "/cdn/", flip_bit, times=99)
    bad = sha256(GOOD[:-1] + bytes([GOOD[-1] ^ 1]))
    fails_with(rf"downloaded twice: .* its sha256 is {bad}, expected {sha256(GOOD)}")
    recovers(toy)


def test_a_flipped_bit_of_a_small_file_is_downloaded_again_and_never_kept(toy):
    config = b'{"num_classes": 10}'
    toy.publish(NAME, {"config.json": config})
    toy.fail("GET", "config.json", flip_bit)
    assert fetch_config(NAME).read_bytes() == config
    toy.publish(NAME, {"config.json": config + b"\n"})
    toy.fail("GET", "config.json", flip_bit, times=2)
    with pytest.raises(CheckpointError, match=r"downloaded twice: .*git sha1 is .*, expected") as caught:
        fetch_config(NAME)
    assert "\n" not in str(caught.value)
    assert len(toy.seen("GET", "config.json")) == 4
    assert fetch_config(NAME).read_bytes() == config + b"\n"


def test_an_etag_that_changed_between_head_and_get(toy):
    other = weights(9)

    def change(*request):
        toy.publish(NAME, {"model.safetensors": other})
        replace(other)(*request)

    toy.fail("GET", "/cdn/", change)
    assert find(f"hf-hub:{NAME}").read_bytes() == other
    assert_sound_cache()


def test_the_hub_gone_with_the_file_cached(toy):
    path = find(f"hf-hub:{NAME}")
    toy.stop()
    assert find(f"hf-hub:{NAME}") == path
    assert_sound_cache()


def test_the_hub_gone_with_nothing_cached(toy, waits):
    toy.stop()
    fails_with(rf"^hf-hub:{NAME}: no connection to http://127.0.0.1:\d+ .*; it is not in the cache either$")
    assert sum(waits) < 60


def test_a_damaged_file_in_the_cache_is_downloaded_again(toy):
    path = find(f"hf-hub:{NAME}")
    path.resolve().write_bytes(weights(3))
    assert find(f"hf-hub:{NAME}").read_bytes() == GOOD
    assert_sound_cache()


def test_a_damaged_file_in_the_cache_with_the_hub_gone_is_left_where_it_is(toy):
    path = find(f"hf-hub:{NAME}")
    path.resolve().write_bytes(weights(3))
    toy.stop()
    pattern = (
        rf"sha256 is {sha256(weights(3))}, expected {sha256(GOOD)}; it could not be downloaded again: .*no connection"
    )
    with pytest.raises(CheckpointError, match=pattern):
        find(f"hf-hub:{NAME}")
    assert path.read_bytes() == weights(3)


def test_other_weights_on_the_hub_than_the_card_says(hub, bundle):
    bundle(GOOD, with_weights=False)
    hub.publish("dimmix/toy_net.cifar10", {"model.safetensors": weights(8)})
    fails_with(rf"its sha256 is {sha256(weights(8))}, expected {sha256(GOOD)}", "toy_net.cifar10")


@pytest.mark.parametrize(
    ("code", "pattern"),
    [
        (errno.ENOSPC, "no space left for the cache .*; free some, or set HF_HOME to another disk"),
        (errno.EROFS, "the cache .* cannot be written to; set HF_HOME to a folder that can"),
        (errno.EACCES, "the cache .* cannot be written to; set HF_HOME to a folder that can"),
    ],
)
def test_a_disk_that_refuses(toy, monkeypatch, code, pattern):
    def refuse(*_, **__):
        raise OSError(code, "refused")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", refuse)
    fails_with(pattern)


def test_a_cache_that_is_a_file(toy):
    Path(huggingface_hub.constants.HF_HUB_CACHE).write_text("in the way")
    with pytest.raises(CheckpointError, match=r"^hf-hub:someone/toy: .*(exists|directory)"):
        find(f"hf-hub:{NAME}")
