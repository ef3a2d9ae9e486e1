"""Where a model runs: the device asked for, or one line that says there is none."""

from dataclasses import replace

import pytest
import torch

from dimmix.benchmark import compiled
from dimmix.errors import DimmixError
from dimmix.onnx_runtime import OnnxRuntime
from dimmix.runtime import METADATA_KEY, load_runtime, resolve_device

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


def test_a_device_of_no_number_is_one_line():
    with pytest.raises(DimmixError, match=r"--device cpu:x: .*[Ii]nvalid device string"):
        resolve_device("cpu:x")


def test_a_graph_of_other_numbers_than_it_says_is_refused(brightest, tmp_path):
    onnx = pytest.importorskip("onnx")
    wider, fewer = onnx.load(brightest), onnx.load(brightest)
    wider.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 9
    spec = OnnxRuntime(brightest).spec
    onnx.helper.set_model_props(fewer, {METADATA_KEY: replace(spec, labels=(*spec.labels, "white")).to_json()})
    for model in (wider, fewer):
        onnx.save(model, tmp_path / "other.onnx")
        with pytest.raises(DimmixError, match="takes and gives other numbers than it says"):
            OnnxRuntime(tmp_path / "other.onnx")


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
