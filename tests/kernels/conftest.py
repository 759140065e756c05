"""GPU kernels on whatever is here: the GPU, or Triton's interpreter on CPU tensors that stand in for an H100's."""

import pytest
import torch

from tp_kernels.ops._gpu import A100, H100, pretend

HAS_GPU = torch.cuda.is_available()


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
