"""Cross entropy on the GPU path: kernels, ops, gradients, tracing. Tier: no device (Triton's interpreter); GPU."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch.nn import functional as F

from tp_kernels import ops
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import A100, H100, GpuInfo, gpu_of, pretend
from tp_kernels.ops.kernels import cross_entropy as kernels
from tp_kernels.ops.kernels.launch import recording
from tp_kernels.testing.numeric import assert_close_to_reference

# The package has a function of that name.
module = importlib.import_module("tp_kernels.ops.cross_entropy")

HAS_GPU = torch.cuda.is_available()
# One row shared by several programs, ragged blocks, a tiny vocabulary, leading dimensions.
SHAPES = [(1, 9000), (5, 700), (3, 3), (2, 3, 300)]
FEW = GpuInfo("two multiprocessors", (9, 0), 2)  # whatever the number of rows, one program a row


def problem(generator, shape, dtype, ignore_index=-100, scale=4.0):
    logits = (torch.randn(shape, generator=generator, device=generator.device) * scale).to(dtype)
    targets = torch.randint(0, shape[-1], shape[:-1], generator=generator, device=generator.device)
    if targets.numel() > 2:
        targets.view(-1)[1] = ignore_index
    return logits, targets


def oracle(logits, targets, reduction="none", dtype=torch.float64, ignore_index=-100):
    """(loss, gradient) by F.cross_entropy in ``dtype``; the upstream gradient is 1, 2, 3, ... for "none"."""
    leaf = logits.detach().to(dtype).requires_grad_()
    loss = F.cross_entropy(
        leaf.reshape(-1, leaf.shape[-1]), targets.reshape(-1).long(), reduction=reduction, ignore_index=ignore_index
    )
    loss = loss.view(targets.shape) if reduction == "none" else loss
    (loss * upstream(loss)).sum().backward()
    return loss.detach(), leaf.grad


def upstream(loss):
    return torch.arange(1, loss.numel() + 1, device=loss.device, dtype=loss.dtype).view(loss.shape)


def ours(logits, targets, reduction="none", **options):
    leaf = logits.detach().clone().requires_grad_()
    loss = ops.cross_entropy(leaf, targets, reduction=reduction, **options)
    (grad,) = torch.autograd.grad((loss * upstream(loss)).sum(), leaf)
    return loss.detach(), grad


def check_against_torch(logits, targets, reduction="none", **options):
    loss, grad = ours(logits, targets, reduction, **options)
    options.pop("inplace_backward", None)
    exact_loss, exact_grad = oracle(logits, targets, reduction, **options)
    plain_loss, plain_grad = oracle(logits, targets, reduction, torch.float32, **options)
    assert loss.dtype is torch.float32 and grad.dtype is logits.dtype and grad.shape == logits.shape
    # PyTorch in fp32 is the yardstick also for 16-bit logits: nothing is computed in less.
    assert_close_to_reference(loss, plain_loss, exact_loss, 3.0, name="loss")
    assert_close_to_reference(grad, plain_grad.to(grad.dtype), exact_grad, 3.0, name="gradient")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient(generator, dtype, shape):
    logits, targets = problem(generator, shape, dtype)
    assert module.choose_cross_entropy(logits, targets).path == "triton"
    check_against_torch(logits, targets)
    with torch.no_grad():
        loss = ops.cross_entropy(logits, targets, reduction="none")
    assert torch.equal(loss, ours(logits, targets)[0]), "the same bits with and without a gradient"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_and_int32(generator, reduction):
    logits, targets = problem(generator, (4, 50), torch.float32, ignore_index=7)
    check_against_torch(logits, targets.int(), reduction, ignore_index=7)
    check_against_torch(logits, targets, reduction, ignore_index=7, inplace_backward=True)


def test_views_of_logits(generator):
    logits, _ = problem(generator, (3, 4, 40), torch.float32)
    views = {
        "without the last token": logits[:, :-1],
        "a wider row": logits[..., 3:29],
        "transposed": logits.transpose(0, 1),
        "columns": logits.transpose(1, 2),
        "one row for all": logits[:1, :1].expand(2, 3, 40),
    }
    for name, view in views.items():
        targets = torch.randint(0, view.shape[-1], view.shape[:-1], generator=generator, device=view.device)
        loss = ops.cross_entropy(view, targets, reduction="none")
        exact, grad = oracle(view.clone(), targets)
        torch.testing.assert_close(loss, exact.float(), msg=name)
        for inplace in (False, True):
            before = logits.clone()
            base = logits.clone()
            top = view.amax(-1)
            total = (view - top[..., None]).exp().sum(-1)
            same = torch.as_strided(base, view.shape, view.stride(), view.storage_offset())
            out = ops.cross_entropy_backward(same, targets, top, total, upstream(loss), inplace=inplace)
            torch.testing.assert_close(out, grad.float(), rtol=1e-5, atol=1e-4, msg=name)  # gradients of up to 120
            overwritten = inplace and name not in ("columns", "one row for all")
            assert (out.data_ptr() == same.data_ptr()) == overwritten, name
            outside = torch.ones_like(base, dtype=torch.bool)
            torch.as_strided(outside, view.shape, view.stride(), view.storage_offset()).fill_(not overwritten)
            assert torch.equal(base[outside], before[outside]), name


@pytest.mark.parametrize("shards", [(50,), (17, 33), (1, 48, 1)], ids=str)
@pytest.mark.parametrize("info", [None, FEW], ids=["split rows", "whole rows"])
def test_shards_give_the_whole(generator, shards, info):
    logits, targets = problem(generator, (3, 50), torch.float32)
    exact, grad = oracle(logits, targets)
    with pretend(info or gpu_of(logits)):
        stats, start = [], 0
        for width in shards:
            part = logits[:, start : start + width]
            found = ops.cross_entropy_stats(part, targets, start, vocab_size=50)
            expected = ops.cross_entropy_stats_reference(part, targets, start, vocab_size=50)
            torch.testing.assert_close(found, expected)
            stats.append(found)
            start += width
        maximum, total, target = (torch.stack(column) for column in zip(*stats, strict=True))
        top = maximum.amax(0)
        total = (total * (maximum - top).exp()).sum(0)
        loss = (total.log() + (top - target.sum(0))).masked_fill(targets == -100, 0)
        torch.testing.assert_close(loss, exact.float())
        parts, start = [], 0
        for width in shards:
            part = logits[:, start : start + width]
            parts.append(ops.cross_entropy_backward(part, targets, top, total, upstream(loss), start))
            start += width
    torch.testing.assert_close(torch.cat(parts, -1), grad.float())


def test_splits_of_a_row_agree(generator):
    """The same row by one program and by several, also when whole parts of it are -inf."""
    logits, targets = problem(generator, (2, 3000), torch.float32)
    logits[0, :2500] = float("-inf")
    targets[0] = 2999
    assert kernels._splits(H100, 2, 3000, 256) > 1 and kernels._splits(FEW, 2, 3000, 256) == 1
    results = []
    for info in (FEW, H100):
        for config in (kernels.Config(256, 1, 3), kernels.Config(1024, 4, 1)):
            rows = [torch.empty(2, device=logits.device) for _ in range(3)]
            with pretend(info):
                kernels.cross_entropy_forward(*rows, logits, targets, -100, config)
            results.append(rows[0])
    for loss in results:
        torch.testing.assert_close(loss, oracle(logits, targets)[0].float())


@pytest.mark.parametrize("info", [None, FEW], ids=["split rows", "whole rows"])
def test_special_values(generator, info):
    logits, targets = problem(generator, (6, 600), torch.float32)
    targets[:] = torch.tensor([5, 6, 7, 8, 9, -100])
    logits[0, 100:500] = float("-inf")  # masked words
    logits[1] = float("-inf")  # no word is possible
    logits[2, 3] = float("nan")
    logits[3, 4] = float("inf")
    logits[4] = 1e4  # no overflow
    logits[5] = float("nan")  # ignored, so never looked at
    with pretend(info or gpu_of(logits)):
        loss, grad = ours(logits, targets)
    exact, exact_grad = oracle(logits, targets)
    torch.testing.assert_close(loss, exact.float(), equal_nan=True)
    keep = [0, 2, 3, 4]  # PyTorch multiplies 0 by NaN in rows 1 and 5
    torch.testing.assert_close(grad[keep].isnan(), exact_grad[keep].isnan())
    torch.testing.assert_close(grad[[0, 4]], exact_grad[[0, 4]].float())
    assert not grad[5].any() and loss[5] == 0


def test_targets_that_are_no_words(generator):
    logits, targets = problem(generator, (4, 30), torch.float32)
    targets[:] = torch.tensor([30, 2, -1, -100])
    loss, grad = ours(logits, targets)
    assert loss.isnan().tolist() == [True, False, True, False]
    assert grad.isnan().all(-1).tolist() == [True, False, True, False]
    stats = ops.cross_entropy_stats(logits[:, :10], targets, 0, vocab_size=30)
    assert stats[1].isnan().tolist() == stats[2].isnan().tolist() == [True, False, True, False]
    # Without the size of the vocabulary a target may be another shard's.
    assert ops.cross_entropy_stats(logits[:, :10], targets)[2][0] == 0


def test_all_ignored_and_empty(generator):
    logits, targets = problem(generator, (3, 20), torch.float32)
    targets[:] = -100
    for reduction in ("mean", "sum", "none"):
        loss, grad = ours(logits, targets, reduction)
        torch.testing.assert_close(loss, oracle(logits, targets, reduction)[0].float(), equal_nan=True)
        assert not grad.any(), "ignored rows have no gradient, also where the mean is NaN"
    empty = logits[:0]
    assert ops.cross_entropy(empty, targets[:0], reduction="sum") == 0
    assert ours(empty, targets[:0])[1].shape == (0, 20)
    assert ops.cross_entropy(logits[0], targets[0], reduction="none").shape == ()


BAD = {
    "expected int64 or int32 targets": lambda x, t: (x, t[:2]),
    r"int64 or int32 targets .* torch\.float32": lambda x, t: (x, t.float()),
    "floating-point logits": lambda x, t: (x.long(), t),
    r"logits \[\.\.\., V\], got \[3, 0\]": lambda x, t: (x[:, :0], t),
    "expected targets on": lambda x, t: (x, t.to("meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_operands(generator, message):
    logits, targets = problem(generator, (3, 20), torch.float32)
    for function in (ops.cross_entropy, ops.cross_entropy_stats):
        with pytest.raises(ValueError, match=message):
            function(*BAD[message](logits, targets))


def test_bad_options(generator):
    logits, targets = problem(generator, (3, 20), torch.float32)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'batchmean'"):
        ops.cross_entropy(logits, targets, reduction="batchmean")
    with pytest.raises(ValueError, match=r"expected total \[3\], got \[2\]"):
        ops.cross_entropy_backward(logits, targets, logits[:, 0], logits[:2, 0], logits[:, 0])
    with pytest.raises(ValueError, match="two strides"):
        out = torch.empty(20, 3, device=logits.device).t()
        kernels.cross_entropy_backward(out, logits, targets, *[logits[:, 0].contiguous()] * 3, 0, -100)


def test_overwritten_logits_cannot_be_used_again(generator):
    logits, targets = problem(generator, (3, 20), torch.float32)
    leaf = logits.clone().requires_grad_()
    hidden = leaf * 1
    loss = ops.cross_entropy(hidden, targets, inplace_backward=True)
    other = hidden.square().sum()
    (grad,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert grad.data_ptr() == hidden.data_ptr()
    torch.testing.assert_close(grad.detach(), oracle(logits, targets, "mean")[1].float())
    for again in (loss, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(again, hidden, retain_graph=True)


OP_CALLS = {
    "cross_entropy_forward": lambda x, t, r: (x, t, -100),
    "cross_entropy_stats": lambda x, t, r: (x, t, 4, -100, 60),
    "cross_entropy_backward": lambda x, t, r: (x, t, r, r, r, 4, -100),
}


@pytest.mark.parametrize("name", OP_CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(generator, name, dtype):
    logits, targets = problem(generator, (2, 3, 40), dtype)
    rows = logits.logsumexp(-1)
    torch.library.opcheck(getattr(torch.ops.tp_kernels, name).default, OP_CALLS[name](logits, targets, rows))


def check_compiled(generator, shape, dtype, backend, **bounds):
    logits, targets = problem(generator, shape, dtype)
    torch._dynamo.reset()

    def step(x, targets):
        return ops.cross_entropy(torch.tanh(x) * 3, targets, inplace_backward=True)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = []
    for function in (step, compiled):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, targets)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], **bounds)
    with torch.no_grad():
        torch.testing.assert_close(compiled(logits, targets), results[0][0], **bounds)


def test_compile(generator):
    check_compiled(generator, (3, 40), torch.float32, "aot_eager")


def test_autocast_transforms_and_other_dtypes(generator):
    logits, targets = problem(generator, (3, 40), torch.float32)
    expected = ops.cross_entropy(logits, targets)
    with torch.autocast(logits.device.type, torch.bfloat16):
        assert torch.equal(ops.cross_entropy(logits, targets), expected)
        assert ops.cross_entropy(logits.half(), targets).dtype is torch.float32
    grad = torch.func.grad(lambda x: ops.cross_entropy(x, targets))(logits)
    torch.testing.assert_close(grad, oracle(logits, targets, "mean")[1].float())
    double = ops.cross_entropy(logits.double(), targets)
    assert double.dtype is torch.float64 and "float64" in module.choose_cross_entropy(logits.double(), targets).reason
    torch.testing.assert_close(double, oracle(logits, targets, "mean")[0])


def test_tables_decide(generator, tmp_path, monkeypatch):
    logits, targets = problem(generator, (6, 256), torch.float32)
    config = {"block": 512, "num_warps": 2, "stages": 1}
    sizes = {"m": 6, "v": 256}
    entries = {
        "cross_entropy": {"path": "triton", "config": config, "us": {"triton": 3.0, "torch": 9.0}},
        "cross_entropy_backward": {"path": "torch", "config": {}, "us": {"torch": 1.0}},
    }
    table = {op: [{"dtype": "float32", "sizes": sizes, **entry}] for op, entry in entries.items()}
    name = f"{gpu_of(logits).slug}.json"
    (tmp_path / name).write_text(json.dumps({"gpu": "here", "measured": "2026-01-01", "ops": table}))
    monkeypatch.setenv("TP_KERNELS_TUNING_DIR", str(tmp_path))
    tuning.forget_tables()
    try:
        choice = module.choose_cross_entropy(logits, targets)
        assert (choice.path, choice.config) == ("triton", config) and "triton 3.0 us, torch 9.0 us" in choice.reason
        with recording() as launches:
            ops.cross_entropy(logits, targets)
            ops.cross_entropy_backward(logits, targets, *[logits[:, 0]] * 3)
        assert [launch.options.get("BLOCK") for launch in launches] == [512]
    finally:
        monkeypatch.undo()
        tuning.forget_tables()
    assert "not measured" in module.choose_cross_entropy(logits, targets).reason


@pytest.mark.parametrize("v", [3, 1000, 16032, 128256])
def test_configurations_fit(v):
    for info in (H100, A100):
        for m in (1, 4096):
            found = kernels.candidates(info, torch.bfloat16, m, v)
            assert len(found) <= 12 and len(set(found)) == len(found)
            assert kernels.Config(**found[-1]._asdict()) == found[-1]
            found = kernels.backward_candidates(info, torch.bfloat16, m, v)
            assert len(found) <= 12 and len(set(found)) == len(found)


# GPU ------------------------------------------------------------------------------------------------------------------

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(512, 128256), (7, 151936), (300, 16032), (200, 50257)], ids=str)
def test_real_sizes(generator, dtype, shape):
    logits, targets = problem(generator, shape, dtype)
    check_against_torch(logits, targets)
    check_against_torch(logits, targets, "mean", inplace_backward=True)


@pytest.mark.gpu
def test_offsets_beyond_31_bits(generator):
    """70000 rows of 32768 words are 2.3e9 elements; the last rows are what they should be."""
    logits = torch.empty(70000, 32768, dtype=torch.bfloat16, device="cuda")
    logits.normal_(generator=generator)
    targets = torch.randint(0, 32768, (70000,), generator=generator, device="cuda")
    loss = ops.cross_entropy(logits, targets, reduction="none")
    tail = slice(-16, None)
    torch.testing.assert_close(loss[tail], oracle(logits[tail], targets[tail])[0].float())
    maximum, total, _ = ops.cross_entropy_stats(logits, targets)
    rows = targets, maximum, total, loss
    expected = ops.cross_entropy_backward_reference(logits[tail], *(row[tail] for row in rows))
    ops.cross_entropy_backward(logits, *rows, inplace=True)
    torch.testing.assert_close(logits[tail], expected)


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(3, 9000), (140, 700), (5, 77)], ids=str)
def test_small_sizes(generator, shape):
    logits, targets = problem(generator, shape, torch.bfloat16)
    check_against_torch(logits, targets)
    check_against_torch(logits, targets, inplace_backward=True)


@pytest.mark.gpu
def test_compile_with_inductor(generator):
    # Inductor rounds 3 * tanh(x) once, PyTorch twice; one target has 3 / 64 of the gradient.
    check_compiled(generator, (64, 32000), torch.bfloat16, "inductor", rtol=0.02, atol=2e-3)


@pytest.mark.gpu
def test_cuda_graph(generator):
    logits, targets = problem(generator, (16, 32000), torch.bfloat16)
    with torch.no_grad():
        ops.cross_entropy(logits, targets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = ops.cross_entropy(logits, targets)
        for _ in range(3):
            logits.normal_(generator=generator)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(loss, ops.cross_entropy(logits, targets))
