"""Where a model runs: the device asked for, or one line that says there is none."""

import pytest
import torch

from dimmix.benchmark import compiled
from dimmix.errors import DimmixError
from dimmix.runtime import OnnxRuntime, load_runtime

ort = pytest.importorskip("onnxruntime")


@pytest.fixture
def providers(monkeypatch):
    """What the next session is told to run on, as if onnxruntime came with CUDA."""
    told = []
    session = ort.InferenceSession

    def note(path, options, providers, **kwargs):
        told.extend(providers)
        return session(path, options, providers=["CPUExecutionProvider"], **kwargs)

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", note)
    return told


@pytest.mark.parametrize(
    ("device", "number"), [("cpu", None), ("auto", "0"), ("cuda", "0"), ("cuda:0", "0"), ("cuda:1", "1")]
)
def test_onnxruntime_runs_on_the_gpu_that_is_named(brightest, providers, device, number):
    OnnxRuntime(brightest, device)
    gpu = [] if number is None else [("CUDAExecutionProvider", {"device_id": number})]
    assert providers == [*gpu, "CPUExecutionProvider"]


@pytest.mark.parametrize(("device", "said"), [("mps", "runs on cpu or cuda"), ("cuda:1", "has no CUDA provider")])
def test_a_device_that_onnxruntime_has_not_is_refused(brightest, monkeypatch, device, said):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DimmixError, match=f"--device {device}: .*{said}") as raised:
        load_runtime(str(brightest), device=device)
    assert raised.value.exit_code == 2


def test_ten_models_are_compiled_in_one_process():
    """Torch's own limit is 8 graphs of one piece of code, and what comes after runs uncompiled, unsaid."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Scaled(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(width))

        def forward(self, x):
            return x * self.weight

    torch._dynamo.reset()
    for width in range(2, 12):
        compiled(Scaled(width), backend=backend)(torch.ones(1, width))
    assert len(graphs) == 10
