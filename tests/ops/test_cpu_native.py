"""The native CPU core: thread pool, fork, instruction sets, huge pages, hostile arguments. Tier: no device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from tp_kernels import ops
from tp_kernels._native import native

SCRIPT = """
import hashlib, sys, torch
from tp_kernels import ops
from tp_kernels._native import native
torch.manual_seed(0)
worst = 0.0
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for m, k, n in ((1, 100, 37), (3, 64, 16), (8, 577, 40)):
        x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        for out, exact in (
            (ops.linear(x, w), x.double() @ w.double().T),
            (ops.rms_norm(x, w[0]), ops.rms_norm_reference(x.double(), w[0].double())),
        ):
            digest.update(out.view(torch.uint8).numpy().tobytes())
            scale = exact.abs().max() * torch.finfo(dtype).eps
            worst = max(worst, ((out.double() - exact).abs().max() / scale).item())
    q, k, v = (torch.randn(1, h, t, 40).to(dtype) for h, t in ((6, 1), (2, 300), (2, 300)))
    lengths = torch.tensor([280])
    out = ops.decode_attention(q, k, v, lengths)
    exact = ops.decode_attention_reference(q.double(), k.double(), v.double(), lengths)
    worst = max(worst, ((out.double() - exact).abs().max() / (exact.abs().max() * torch.finfo(dtype).eps)).item())
print(native.cpu_isa(), worst, digest.hexdigest())
"""


def start_script(**environment: str) -> subprocess.Popen:
    command, pipe = [sys.executable, "-c", SCRIPT], subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=pipe, stderr=pipe, text=True)


def test_every_instruction_set_is_right_and_fma_ones_agree():
    best = native.cpu_isa()
    wanted = ["baseline"] + (["avx2"] if best in ("avx2", "avx512") else []) + (["avx512"] if best == "avx512" else [])
    # All at once: most of a process's time is the import of torch.
    scripts = {name: start_script(TP_KERNELS_CPU_ISA=name) for name in wanted}
    results = {}
    for name, script in scripts.items():
        out, errors = script.communicate(timeout=120)
        assert script.returncode == 0, errors
        results[name] = out.split()
    for name, (isa, worst, _) in results.items():
        assert isa == name
        assert float(worst) < 8, f"{name}: {worst} ulp of the largest value"
    if best == "avx512":
        assert results["avx2"][2] == results["avx512"][2]


def big_linear() -> torch.Tensor:
    x, w = torch.ones(1, 512), torch.ones(2000, 512)
    return ops.linear(x, w)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_one_thread_starts_no_pool():
    code = (
        "import torch; from tp_kernels import ops; from tp_kernels._native import native; torch.set_num_threads(1);"
        "ops.linear(torch.ones(1, 512), torch.ones(2000, 512)); assert native.cpu_pool_size() == 0;"
        "torch.set_num_threads(3); ops.linear(torch.ones(1, 512), torch.ones(2000, 512));"
        "assert native.cpu_pool_size() == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_pool_survives_fork_and_the_child_starts_its_own(three_threads):
    x, w = torch.ones(1, 512), torch.ones(2000, 512)
    expected = ops.linear(x, w)
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(30)  # a child that hangs must not outlive the test
        try:
            # Nothing of torch that would use its own threads, which do not survive a fork.
            fresh = native.cpu_pool_size() == 0
            same = all(ops.linear(x, w)[0].tolist() == [512.0] * 2000 for _ in range(20))
            status = 0 if fresh and same and native.cpu_pool_size() == 2 else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert expected[0].tolist() == [512.0] * 2000
    assert torch.equal(big_linear(), expected)


def test_pool_from_several_python_threads(three_threads):
    """One caller has the pool, the others work inline; all get the same answer."""
    x, w = torch.randn(1, 1024), torch.randn(4000, 1024)
    expected = ops.linear(x, w)
    wrong = []

    def work():
        for _ in range(30):
            if not torch.equal(ops.linear(x, w), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_pool_sleeps_when_idle(three_threads):
    import time

    big_linear()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # two spinning threads would take 0.6 s
    big_linear()


def test_null_addresses_and_unknown_codes_are_errors():
    good = torch.ones(16)
    at = good.data_ptr()
    for call in (
        lambda: native.cpu_linear(at, at, 0, 0, 0, 1, 1, 16, 16, 16, 1, 0, 0, False, 1),
        lambda: native.cpu_linear(at, at, at, 0, 0, 1, 1, 16, 16, 16, 1, 3, 0, False, 1),
        lambda: native.cpu_linear(at, at, at, 0, 0, 1, 1, 16, 16, 16, 1, 99, 0, False, 1),
        lambda: native.cpu_linear(at, at, at, 0, 0, 1, 1, 16, 16, 16, 1, 0, 9, False, 1),
        lambda: native.cpu_linear(at, at, at, 0, 0, -1, 1, 16, 16, 16, 1, 0, 0, False, 1),
        lambda: native.cpu_rms_norm(at, 0, at, at, at, 1, 16, 1e-6, 0, 1),
        lambda: native.cpu_silu_mul(0, at, 1, 8, 0, 1),
        lambda: native.cpu_qkv_rope_cache(*[0] * 18, 1, 1, 1, 1, 16, 1, 1, 0, 1),
        lambda: native.cpu_decode_attention(*[0] * 14, 1, 1, 1, 1, 16, 1, 0, 1.0, 0, 1),
    ):
        with pytest.raises(ValueError):
            call()


def test_advise_huge_leaves_values_alone():
    module = torch.nn.Linear(2048, 1024)
    before = [p.detach().clone() for p in module.parameters()]
    advised = ops.advise_huge(module.parameters(), module.weight)
    assert 0 <= advised <= module.weight.numel() * 4
    for a, b in zip(module.parameters(), before, strict=True):
        assert torch.equal(a, b)
    assert ops.advise_huge(torch.empty(0), torch.ones(3), torch.empty(2, device="meta")) == 0
