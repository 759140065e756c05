"""A model whose tensors the group cannot carry is refused when it is patched. Tier: no device."""

import pytest
import torch
from torch import nn

from tp_kernels.comm import LocalCommunicator
from tp_kernels.comm.tp_group import TPGroup
from tp_kernels.integrations._group_checks import check_carries, check_model_device


def group_of(backend, world_size=2, device_type="cpu"):
    communicator = LocalCommunicator("tp")
    communicator.world_size, communicator.backend = world_size, backend
    return TPGroup(communicator, device_type=device_type)


@pytest.mark.parametrize(
    ("group", "device"),
    [
        (group_of("shm"), "cpu"),
        (group_of("shm"), "meta"),
        (group_of("gloo"), "cuda:1"),  # through host memory
        (group_of("symm", device_type="cuda"), "cuda"),
        (group_of("symm", device_type="cuda"), "cpu"),
        (group_of("local", world_size=1), "cuda"),
        (group_of("local", world_size=1), "mps"),
    ],
)
def test_what_a_group_carries(group, device):
    check_carries(group, device)


def test_gpu_tensors_over_shared_memory_are_refused():
    told = r"the weight is on cuda:1, and group 'tp' of 2 ranks \(shm\) .*CPU tensors only.* .*device=.cuda."
    with pytest.raises(ValueError, match=told):
        check_carries(group_of("shm"), "cuda:1", "the weight")
    with pytest.raises(ValueError, match="is on mps: expected the CPU or a CUDA device"):
        check_carries(group_of("symm", device_type="cuda"), torch.device("mps"))


class Placed(nn.Module):
    """A model with one tensor elsewhere than the others."""

    def __init__(self, where, device):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("table", torch.zeros(2))
        self.where, self.device = where, device

    def _elsewhere(self, where, tensors):
        yield from tensors
        if where == self.where:
            yield type("Tensor", (), {"device": torch.device(self.device)})

    def parameters(self, recurse=True):
        return self._elsewhere("parameter", super().parameters(recurse))

    def buffers(self, recurse=True):
        return self._elsewhere("buffer", super().buffers(recurse))


@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_one_tensor_elsewhere_is_enough(where):
    check_model_device(Placed(where, "cpu"), group_of("shm"))
    check_model_device(Placed(where, "cuda"), group_of("gloo"))
    with pytest.raises(ValueError, match=r"the model is on cuda:0.*carries CPU tensors only"):
        check_model_device(Placed(where, "cuda:0"), group_of("shm"))
