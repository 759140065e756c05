"""GPU kernels on whatever is here: the GPU, or Triton's interpreter on CPU tensors that stand in for an H100's."""

import json

import pytest
import torch

from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import A100, H100, gpu_of, pretend

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def no_measured_tables(tmp_path_factory):
    """Tests bring their own tables: what was measured on this GPU, or is shipped for it, decides nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        nowhere = tmp_path_factory.getbasetemp() / "no_tables"
        patch.setenv("TP_KERNELS_TUNING_DIR", str(nowhere))
        patch.setattr(tuning, "shipped_table", lambda slug: nowhere / "none.json")
        tuning.forget_tables()
        yield
    tuning.forget_tables()


@pytest.fixture(autouse=True)
def gpu_afterwards(request):
    """After a test: its memory is given back (files run side by side), and a lost CUDA context ends the session."""
    yield
    if HAS_GPU:
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            pytest.exit(f"ERROR the CUDA context was lost in {request.node.nodeid}: {error}", returncode=3)


@pytest.fixture
def device():
    """Where kernels run: "cuda", or "cpu" through the interpreter, pretending to be an H100."""
    if HAS_GPU:
        yield "cuda"
        return
    with pretend(H100):
        yield "cpu"


@pytest.fixture
def old_device():
    """Like ``device``, pretending to be a GPU without TMA."""
    if HAS_GPU:
        yield "cuda"
        return
    with pretend(A100):
        yield "cpu"


# The interpreter computes bf16 wrongly without saying so (Triton 3.6 and 3.8), so bf16 is for GPUs.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_GPU else [])


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    """Every dtype whose arithmetic can be trusted here."""
    return request.param


@pytest.fixture
def generator(device):
    """Random numbers on the device, the same in every run."""
    return torch.Generator(device=device).manual_seed(1234)


@pytest.fixture
def measured(monkeypatch, tmp_path, device):
    """``measured(op, path, sizes, config)``: make that the measured choice for this GPU and 16-bit operands."""
    rows = {}

    def write(op, path, sizes, config):
        row = {"dtype": "16bit", "sizes": sizes, "path": path, "config": config, "us": {path: 3.0, "other": 4.0}}
        rows.setdefault(op, []).append(row)
        info = gpu_of(torch.empty(0, device=device))
        content = {"gpu": info.name, "measured": "2026-01-01", "versions": {}, "ops": rows}
        (tmp_path / f"{info.slug}.json").write_text(json.dumps(content))
        tuning.forget_tables()

    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    tuning.forget_tables()
    yield write
    monkeypatch.undo()
    tuning.forget_tables()
