from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
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
