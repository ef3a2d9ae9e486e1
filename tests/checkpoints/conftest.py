import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_server import TOKEN, Hub
from huggingface_hub.utils import close_session, disable_progress_bars, enable_progress_bars
from toy_checkpoint import make_card

from dimmix.checkpoints import Card, card


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Card]]:
    """Puts checkpoints into an otherwise empty package folder: `bundle(content, card's fields)`; None: card only."""
    folder = tmp_path / "bundled"
    folder.mkdir()
    monkeypatch.setattr(card, "FOLDER", folder)

    def add(content: bytes, with_weights: bool = True, **changes: Any) -> Card:
        made = make_card(content, **changes)
        made.write(folder / f"{made.name}.json")
        if with_weights:
            (folder / made.file).write_bytes(content)
        card._read_folder.cache_clear()
        return made

    yield add
    card._read_folder.cache_clear()


@pytest.fixture
def waits() -> list[float]:
    """The seconds the client would have slept between attempts."""
    return []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Hub]:
    """A running Hub that huggingface_hub talks to, with an empty cache, no token and no real waiting."""
    clock = types.SimpleNamespace(**{**vars(time), "sleep": waits.append})
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
    with Hub() as server:
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DOWNLOAD_TIMEOUT": 0.25,
            "DOWNLOAD_CHUNK_SIZE": 1024,
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "DIMMIX_HUB_NAMESPACE"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        disable_progress_bars()
        yield server
        close_session()
        enable_progress_bars()


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    """Logs in."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN
