"""What tests of the layers share."""

from collections.abc import Iterator

import pytest
import torch

from dimmix.layers import native


@pytest.fixture
def float64() -> Iterator[None]:
    """Seeded draws, and float64 where no type is said: fast paths and references then agree to rounding."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels for one instruction set."""
    if native._native is None or native._native.use(request.param) != request.param:
        pytest.skip(f"no kernels for {request.param} here")
    torch.manual_seed(0)
    yield request.param
    native._native.use(native.INSTRUCTIONS)
