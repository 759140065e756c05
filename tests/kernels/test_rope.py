"""Rotation of queries and keys with its gradient. Tier: interpreter, GPU."""

from __future__ import annotations

import pytest
import torch

from tp_kernels import ops
from tp_kernels.ops.rope import choose_apply_rope
from tp_kernels.testing.numeric import assert_close_to_reference


def rotary(positions: int, dim: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2, device=device) / dim)
    angles = (torch.arange(positions, device=device).unsqueeze(-1) * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def heads_of(generator, dtype, batch, tokens, heads, kv_heads, dim, contiguous):
    """q and k as the layer has them: views of a projection; or each for itself."""
    shape = (batch, tokens, heads + 2 * kv_heads, dim)
    qkv = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
    q, k, _ = qkv.split((heads, kv_heads, kv_heads), dim=2)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return (q.contiguous(), k.contiguous()) if contiguous else (q, k)


def rope_gradients(function, q, k, cos, sin, grads):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    outs = function(q, k, cos, sin)
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, (q, k), grads)


def check_rope(generator, q, k, cos, sin):
    assert choose_apply_rope(q, k, cos, sin).path == "triton"
    grads = [torch.randn(x.shape, generator=generator, device=generator.device).to(q.dtype) for x in (q, k)]
    results = (
        rope_gradients(ops.apply_rope, q, k, cos, sin, grads),
        rope_gradients(ops.apply_rope_reference, q, k, cos, sin, grads),
        rope_gradients(ops.apply_rope_reference, *(x.double() for x in (q, k, cos, sin)), [g.double() for g in grads]),
    )
    for name, actual, plain, exact in zip(("q", "k", "dq", "dk"), *results, strict=True):
        assert_close_to_reference(actual, plain, exact, name=name)
    return results[0]


@pytest.mark.parametrize(
    ("sizes", "contiguous", "batched"),
    [
        ((2, 5, 4, 2, 16), False, False),
        ((2, 3, 3, 3, 80), True, True),
        ((1, 9, 5, 1, 96), False, True),
        ((3, 1, 1, 1, 2), True, False),
        ((2, 4, 3, 2, 18), False, False),
    ],
)
def test_apply_rope_and_gradients(generator, dtype, sizes, contiguous, batched):
    batch, tokens, *_, dim = sizes
    q, k = heads_of(generator, dtype, *sizes, contiguous)
    cos, sin = rotary(40, dim, generator.device)
    if batched:
        where = torch.randint(0, 40, (batch, tokens), generator=generator, device=generator.device)
        cos, sin = cos[where], sin[where]
    else:
        cos, sin = cos[7 : 7 + tokens], sin[7 : 7 + tokens]
    trained = check_rope(generator, q, k, cos, sin)
    with torch.no_grad():
        inference = ops.apply_rope(q, k, cos, sin)
    for a, b in zip(inference, trained, strict=False):
        assert torch.equal(a, b) and a.stride() == b.stride()
        assert a.is_contiguous() if contiguous else a.transpose(1, 2).is_contiguous()


def test_apply_rope_is_hugging_faces(generator, dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = heads_of(generator, dtype, 2, 5, 4, 2, 16, False)
    cos, sin = (x[None, 3:8].to(dtype) for x in rotary(8, 16, generator.device))
    theirs = llama.apply_rotary_pos_emb(q, k, cos, sin)
    exact = llama.apply_rotary_pos_emb(*(x.double() for x in (q, k, cos, sin)))
    for actual, plain, reference in zip(ops.apply_rope(q, k, cos, sin), theirs, exact, strict=True):
        assert_close_to_reference(actual, plain, reference)


def test_apply_rope_gradients_of_every_kind(generator):
    """Gradients that are expanded, transposed or absent; tables that need one; float64; a transform; autocast."""
    q, k = heads_of(generator, torch.float32, 2, 3, 4, 2, 8, False)
    cos, sin = rotary(3, 8, generator.device)
    for loss in (
        lambda q, k: q.sum() + k.sum(),
        lambda q, k: (q.transpose(1, 2).reshape(2, 3, -1).pow(2)).sum() + k[..., ::2].sum(),
        lambda q, k: q.pow(3).sum(),
    ):
        pairs = []
        for function in (ops.apply_rope, ops.apply_rope_reference):
            leaves = [x.detach().requires_grad_() for x in (q, k)]
            loss(*function(*leaves, cos, sin)).backward()
            pairs.append([torch.zeros_like(x) if x.grad is None else x.grad for x in leaves])
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b)
    table = cos.clone().requires_grad_()
    ops.apply_rope(q, k, table, sin)[0].sum().backward()
    assert table.grad is not None
    wide = [x.double().requires_grad_() for x in (q, k)]
    assert choose_apply_rope(*wide, cos, sin).path == "torch"
    assert torch.autograd.gradcheck(lambda a, b: ops.apply_rope(a, b, cos.double(), sin.double()), wide)
    one = torch.func.vmap(lambda a, b: ops.apply_rope(a, b, cos, sin))(q[:, None], k[:, None])
    torch.testing.assert_close(one[0][:, 0], ops.apply_rope(q, k, cos, sin)[0])
    with torch.autocast(generator.device.type, dtype=torch.bfloat16):
        assert ops.apply_rope(q, k, cos, sin)[0].dtype == torch.float32  # as PyTorch: no matmul, no cast
    empty = ops.apply_rope(q[:, :, :0], k[:, :, :0], cos[:0], sin[:0])
    assert empty[0].shape == (2, 4, 0, 8)


def training_step(qkv, cos, sin):
    q, k, v = qkv.view(2, 3, 8, 8).split((4, 2, 2), dim=2)
    q, k = ops.apply_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return (q.pow(2) * torch.cat((k, v.transpose(1, 2)), 1)).sum()


def check_compiled(generator, backend):
    cos, sin = rotary(3, 8, generator.device)
    qkv = torch.randn(2, 3, 64, generator=generator, device=generator.device).requires_grad_()
    (expected,) = torch.autograd.grad(training_step(qkv, cos, sin), qkv)
    compiled = torch.compile(training_step, fullgraph=True, backend=backend)
    (actual,) = torch.autograd.grad(compiled(qkv, cos, sin), qkv)
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        # A sum of terms of either sign, in whatever order a compiler likes.
        torch.testing.assert_close(compiled(qkv, cos, sin), training_step(qkv, cos, sin), rtol=1e-5, atol=1e-4)


def test_apply_rope_op_and_compile(generator):
    q, k = heads_of(generator, torch.float32, 2, 3, 4, 2, 8, False)
    cos, sin = rotary(3, 8, generator.device)
    for name in ("apply_rope_forward", "apply_rope_backward"):
        op = getattr(torch.ops.tp_kernels, name).default
        for token_major in (True, False):
            torch.library.opcheck(op, (q, k, cos, sin, token_major))
        torch.library.opcheck(op, (q.double(), k.double(), cos, sin, True))
    check_compiled(generator, "aot_eager")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 4096, 32, 8, 128), (2, 777, 8, 2, 128), (2, 333, 14, 2, 64)])
def test_models_on_a_gpu(generator, dtype, sizes):
    q, k = heads_of(generator, dtype, *sizes, False)
    check_rope(generator, q, k, *rotary(sizes[1], sizes[-1], "cuda"))


@pytest.mark.gpu
@pytest.mark.sanitize
def test_small_on_a_gpu(generator):
    q, k = heads_of(generator, torch.bfloat16, 2, 5, 5, 2, 80, False)
    check_rope(generator, q, k, *rotary(5, 80, "cuda"))
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_graph_capture(generator):
    q, k = heads_of(generator, torch.bfloat16, 2, 64, 8, 2, 128, False)
    cos, sin = rotary(64, 128, "cuda")
    with torch.no_grad():
        ops.apply_rope(q, k, cos, sin)  # compiled before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = ops.apply_rope(q, k, cos, sin)
        for x in (q, k):
            x.mul_(2)
        graph.replay()
        for a, b in zip(outs, ops.apply_rope(q, k, cos, sin), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_compiled_by_inductor(generator):
    check_compiled(generator, "inductor")


def test_one_tensor_in_two_places_is_compiled(device, generator):
    q = torch.randn(1, 2, 4, 16, generator=generator, device=device, requires_grad=True)
    table = torch.randn(4, 16, generator=generator, device=device)
    weight = torch.ones(16, device=device)
    for function in (lambda: ops.apply_rope(q, q, table, table), lambda: ops.add_rms_norm(q, q, weight)):
        expected = torch.autograd.grad(sum(out.square().sum() for out in function()), q)
        torch._dynamo.reset()
        results = torch.compile(function, fullgraph=True, backend="aot_eager")()
        torch.testing.assert_close(torch.autograd.grad(sum(out.square().sum() for out in results), q), expected)
