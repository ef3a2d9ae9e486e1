from pathlib import Path

import pytest
import torch
from torch import nn

from dimmix.errors import DimmixError
from dimmix.training.optim import build_optimizers
from dimmix.training.recipe import Optimizer
from dimmix.training.state import load_optimizer_tensors, optimizer_tensors, read_state, write_state


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    write_state(tmp_path / "s", {"a": shared, "b": shared}, {"step": 3, "loss": 0.1 + 0.2})
    tensors, facts = read_state(tmp_path / "s")
    assert torch.equal(tensors["a"], shared)
    assert torch.equal(tensors["b"], shared)
    assert facts == {"step": 3, "loss": 0.1 + 0.2}


def test_a_state_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path / "s", {"a": torch.ones(3)}, {"step": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_state(tmp_path / "s", {"a": torch.zeros(3)}, {"step": 2})
    tensors, facts = read_state(tmp_path / "s")
    assert (tensors["a"].tolist(), facts) == ([1, 1, 1], {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_state_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(DimmixError, match=r"not a run's state .*--restart"):
        read_state(tmp_path / "s")


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_restored_optimizer_takes_the_same_step(name: str) -> None:
    def build() -> tuple[nn.Sequential, list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8)).to(memory_format=torch.channels_last)
        return model, build_optimizers(model, Optimizer(name, 0.1, weight_decay=0.1))  # type: ignore[arg-type]

    def step(model: nn.Sequential, optimizers: list[torch.optim.Optimizer]) -> None:
        model(torch.ones(2, 8, 3, 3)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    model, optimizers = build()
    step(model, optimizers)
    other, others = build()
    other.load_state_dict(model.state_dict())
    load_optimizer_tensors(others, {k: t.clone().contiguous() for k, t in optimizer_tensors(optimizers).items()})
    step(model, optimizers)
    step(other, others)
    for expected, actual in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_the_count_of_steps_goes_to_its_parameters_device() -> None:
    weight = nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    load_optimizer_tensors([optimizer], {"optimizer.0.0.step": torch.tensor(3.0)})
    assert optimizer.state[weight]["step"].device == weight.device
