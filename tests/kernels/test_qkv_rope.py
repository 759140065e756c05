"""From the fused projection to the KV cache in one launch. Tier: interpreter, GPU."""

from __future__ import annotations

import pytest
import torch

from tp_kernels import ops
from tp_kernels.ops import tuning
from tp_kernels.ops._gpu import H100
from tp_kernels.ops.kernels.qkv_rope import Config, candidates, default_config
from tp_kernels.ops.qkv import choose_qkv_rope_cache
from tp_kernels.ops.rope import choose_apply_rope
from tp_kernels.testing.numeric import assert_close_to_reference

NAN = float("nan")


def rotary(positions: int, dim: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 1.0 / 10000 ** (torch.arange(0, dim, 2, device=device) / dim)
    angles = (torch.arange(positions, device=device).unsqueeze(-1) * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


class Problem:
    """Random operands of one call; ``run`` returns q and both caches, which start filled with 3."""

    def __init__(
        self,
        generator,
        dtype,
        batch,
        tokens,
        heads,
        kv_heads,
        dim,
        *,
        max_len=20,
        norm=False,
        bias=False,
        positions=None,
        page_size=0,
        token_major=False,
        new_tokens=False,
        cache_dtype=None,
    ):
        self.dtype, self.heads, self.kv_heads, self.dim = dtype, heads, kv_heads, dim
        self.cache_dtype, self.page_size, self.token_major = cache_dtype or dtype, page_size, token_major
        device = generator.device

        def randn(*shape):
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        def randint(low, high, *shape):
            return torch.randint(low, high, shape, generator=generator, device=device)

        width = (heads + 2 * kv_heads) * dim
        self.qkv = randn(batch, tokens, width)
        self.cos, self.sin = rotary(max_len + 5, dim, device)
        self.lengths = randint(0, max_len - tokens + 1, batch)
        self.shape = (batch, kv_heads, max_len, dim)
        self.more = {}
        if norm:
            self.more |= {"q_norm": randn(dim).abs() + 0.5, "k_norm": randn(dim).abs() + 0.5, "eps": 1e-5}
        if bias:
            self.more["bias"] = randn(width)
        if positions is not None:
            self.more["positions"] = randint(0, max_len + 5, *positions)
        if new_tokens:
            self.more["new_tokens"] = randint(0, tokens + 1, batch).to(torch.int32)
        if page_size:
            assert max_len % page_size == 0
            slots = batch * (max_len // page_size)
            self.pages = slots + 3
            order = torch.randperm(self.pages, generator=generator, device=device)[:slots]
            self.more["page_table"] = order.view(batch, -1).to(torch.int32)

    def caches(self, dtype):
        shape = self.shape
        if self.page_size:
            shape = (self.pages, shape[1], self.page_size, shape[3])
        if self.token_major:
            shape = (shape[0], shape[2], shape[1], shape[3])
        pair = [torch.full(shape, 3.0, dtype=dtype, device=self.qkv.device) for _ in range(2)]
        return [cache.transpose(1, 2) for cache in pair] if self.token_major else pair

    def arguments(self, wide=False):
        def cast(x):
            return x.double() if wide and isinstance(x, torch.Tensor) and x.is_floating_point() else x

        caches = self.caches(torch.float64 if wide else self.cache_dtype)
        operands = (cast(self.qkv), cast(self.cos), cast(self.sin), self.lengths, *caches, self.heads, self.kv_heads)
        return operands, {name: cast(x) for name, x in self.more.items()}

    def run(self, function, wide=False):
        operands, more = self.arguments(wide)
        q = function(*operands, **more)
        return q, operands[4], operands[5]

    def check(self):
        operands, more = self.arguments()
        assert choose_qkv_rope_cache(*operands, **more).path == "triton"
        results = (
            self.run(ops.qkv_rope_cache),
            self.run(ops.qkv_rope_cache_reference),
            self.run(ops.qkv_rope_cache_reference, wide=True),
        )
        count = self.more.get("new_tokens")
        for name, actual, plain, exact in zip(("q", "k_cache", "v_cache"), *results, strict=True):
            if name == "q" and count is not None:
                assert actual.isfinite().all()
                live = torch.arange(actual.shape[2], device=count.device) < count.unsqueeze(-1)
                actual, plain, exact = (x.transpose(1, 2)[live] for x in (actual, plain, exact))
            assert_close_to_reference(actual, plain, exact, name=name)
        return results[0]


SMALL = {
    "plain": ((2, 3, 4, 2, 16), {}),
    "decode": ((5, 1, 9, 3, 64), {"norm": True}),
    "smallest": ((1, 1, 1, 1, 2), {"bias": True}),
    "odd_head": ((1, 5, 3, 1, 80), {"norm": True, "positions": (5,)}),
    "third_of_256": ((2, 7, 4, 4, 96), {"norm": True, "bias": True, "positions": (2, 7), "token_major": True}),
    "unaligned": ((2, 2, 5, 5, 18), {"positions": (1, 2)}),
    "padding": ((4, 9, 5, 2, 16), {"new_tokens": True}),
    "pages": ((3, 7, 4, 2, 16), {"page_size": 4, "norm": True, "bias": True}),
    "pages_token_major": ((2, 6, 4, 1, 24), {"page_size": 5, "token_major": True, "new_tokens": True}),
    "fp32_cache": ((2, 3, 2, 2, 16), {"cache_dtype": torch.float32}),
}


@pytest.mark.parametrize("case", SMALL)
def test_qkv_rope_cache(generator, dtype, case):
    sizes, options = SMALL[case]
    Problem(generator, dtype, *sizes, **options).check()


def test_every_tile_gives_the_same_result(generator):
    from tp_kernels.ops.kernels.qkv_rope import qkv_rope

    problem = Problem(generator, torch.float32, 2, 3, 5, 2, 24, norm=True, page_size=4)
    expected = problem.run(ops.qkv_rope_cache)
    for config in (Config(1, 1, 1), Config(2, 8, 1), Config(8, 4, 4)):
        (qkv, cos, sin, lengths, k_cache, v_cache, heads, _), more = problem.arguments()
        q = qkv.new_empty(2, 3, heads, 24)
        qkv_rope(q, qkv, cos, sin, lengths, k_cache, v_cache, **more, config=config)
        # Not the same bits: a head's squares are summed in an order that depends on the tile.
        for a, b in zip((q.transpose(1, 2), k_cache, v_cache), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_strided_operands(generator):
    """A slice of a wider projection, a cache that is a slice of a longer one, a table that is a column of another."""
    problem = Problem(generator, torch.float32, 2, 3, 4, 2, 16)
    dense = problem.run(ops.qkv_rope_cache)
    wide = torch.full((2, 4, 150), NAN, device=generator.device)
    wide[:, :3, 5:133] = problem.qkv
    tables = torch.stack((problem.cos, problem.sin), 1)
    outer = torch.full((2, 3, 30, 19), 3.0, device=generator.device)
    k_cache, v_cache = outer[:, 1:, 3:23, 1:17], problem.caches(torch.float32)[1]
    lengths = problem.lengths.repeat_interleave(2)[::2]
    q = ops.qkv_rope_cache(wide[:, :3, 5:133], tables[:, 0], tables[:, 1], lengths, k_cache, v_cache, 4, 2)
    for a, b in zip((q, k_cache, v_cache), dense, strict=True):
        assert torch.equal(a, b)
    outer[:, 1:, 3:23, 1:17] = 3.0
    assert (outer == 3.0).all()
    columns = problem.caches(torch.float32)[0].transpose(2, 3).contiguous().transpose(2, 3)
    operands = (problem.qkv, problem.cos, problem.sin, problem.lengths, columns, v_cache, 4, 2)
    assert choose_qkv_rope_cache(*operands).path == "torch"
    torch.testing.assert_close(ops.qkv_rope_cache(*operands), q)


def test_nothing_outside_is_touched(generator):
    """Slots and pages that do not exist are skipped; positions that do not exist are loud."""
    problem = Problem(generator, torch.float32, 4, 2, 2, 1, 8, max_len=8)
    good = problem.run(ops.qkv_rope_cache)
    problem.lengths = torch.tensor([-1, 7, 2**40, 3], device=generator.device)
    problem.more["positions"] = torch.tensor([0, 1], device=generator.device)
    q, k_cache, v_cache = problem.run(ops.qkv_rope_cache)
    assert q.isfinite().all()
    for cache in (k_cache, v_cache):
        written = (cache != 3.0).all(-1).squeeze(1)
        expected = torch.zeros(4, 8, dtype=torch.bool)
        expected[0, 0] = expected[1, 7] = expected[3, 3] = expected[3, 4] = True
        assert torch.equal(written.cpu(), expected)

    problem.lengths = torch.tensor([0, 1, 2, 3], device=generator.device)
    problem.more["positions"] = torch.tensor([[0, 1], [-1, 1], [1, 13], [12, 2]], device=generator.device)
    q, k_cache, v_cache = problem.run(ops.qkv_rope_cache)
    assert torch.equal(q.isnan().any(-1).any(1).cpu(), torch.tensor([[0, 0], [1, 0], [0, 1], [0, 0]]).bool())
    assert k_cache.isnan().any(-1).sum() == 2 and v_cache.isfinite().all()

    paged = Problem(generator, torch.float32, 3, 2, 2, 1, 8, max_len=8, page_size=2)
    paged.lengths = torch.tensor([0, 2, 7], device=generator.device)
    table = paged.more["page_table"]
    table[0, 0], table[1, 1] = paged.pages, -1
    _, k_cache, v_cache = paged.run(ops.qkv_rope_cache)
    for cache in (k_cache, v_cache):
        written = (cache != 3.0).all(-1).squeeze(1)
        assert written.sum() == 1 and written[table[2, 3].item(), 1]
    assert good[0].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"page_size": 4, "bias": True, "new_tokens": True}], ids=["whole", "paged"])
def test_op_compile_and_empty(generator, options):
    problem = Problem(generator, torch.float32, 2, 2, 4, 2, 8, norm=True, **options)
    operands, more = problem.arguments()
    order = ("q_norm", "k_norm", "eps", "positions", "bias", "page_table", "new_tokens")
    arguments = (*operands, *(more.get(name) for name in order))
    torch.library.opcheck(torch.ops.tp_kernels.qkv_rope_cache.default, arguments)

    def call(qkv, k_cache, v_cache):
        rest = (problem.cos, problem.sin, problem.lengths)
        return ops.qkv_rope_cache(qkv, *rest, k_cache, v_cache, 4, 2, **problem.more) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, theirs = problem.caches(torch.float32), problem.caches(torch.float32)
        expected = call(problem.qkv, *theirs)
        actual = compiled(problem.qkv, *ours)
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
        problem.more.pop("page_table", None), problem.more.pop("new_tokens", None)
        for empty in (problem.qkv[:, :0], problem.qkv[:0]):
            problem.lengths = problem.lengths[: len(empty)]
            caches = [
                cache[: len(empty)] for cache in Problem(generator, torch.float32, 2, 2, 4, 2, 8).caches(torch.float32)
            ]
            assert call(empty, *caches).shape == (len(empty), 4, empty.shape[1], 8)


def test_a_norm_in_a_wider_dtype_leaves_that_of_the_queries(generator):
    """As under autocast; with such a norm the call is PyTorch's."""
    half = torch.float16
    device = generator.device
    qkv = torch.randn(1, 2, 4 * 16, generator=generator, device=device).to(half)
    caches = (torch.zeros(1, 1, 8, 16, dtype=half, device=device) for _ in range(2))
    norm, lengths = torch.rand(16, generator=generator, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    arguments = (qkv, *rotary(8, 16, device), lengths, *caches, 2, 1, norm, norm)
    assert ops.qkv_rope_cache(*arguments).dtype == half
    torch.library.opcheck(torch.ops.tp_kernels.qkv_rope_cache.default, arguments)


def test_choices(generator, device):
    problem = Problem(generator, torch.float16, 1, 1, 4, 2, 16)
    operands, _ = problem.arguments()
    choice = choose_qkv_rope_cache(*operands)
    assert choice.path == "triton" and "not measured on NVIDIA" in choice.reason
    half = (operands[0], operands[1].half(), operands[2].half(), *operands[3:])
    assert choose_qkv_rope_cache(*half).path == "torch"
    assert choose_qkv_rope_cache(*operands, q_norm=torch.ones(16, device=device)).path == "torch"
    for sizes in ((1, 32, 8, 128), (64, 8, 2, 128), (4096, 9, 3, 64), (16384, 4, 1, 256)):
        m, heads, kv_heads, dim = sizes
        found = candidates(H100, torch.bfloat16, m=m, heads=heads, kv_heads=kv_heads, head_dim=dim)
        assert 1 <= len(found) <= 12 and len(set(found)) == len(found)
        assert found[0] == default_config(H100, torch.bfloat16, m=m, heads=heads, kv_heads=kv_heads, head_dim=dim)
        assert all(Config(**config._asdict()) == config for config in found)


def test_measured_tables_decide(generator, monkeypatch):
    """An entry that names PyTorch, or a configuration, is followed; the words carry its figures."""
    problem = Problem(generator, torch.float32, 2, 3, 4, 2, 16)
    expected = problem.run(ops.qkv_rope_cache)
    operands, _ = problem.arguments()
    q, k = expected[0].contiguous(), expected[0][:, :2].contiguous()
    rope = (q, k, problem.cos[:3], problem.sin[:3])
    for path, config in (("torch", {}), ("triton", Config(2, 2, 1)._asdict())):
        entry = tuning.Entry({}, path, config, {"torch": 2.0, "triton": 1.0}, "here")
        for module in ("qkv", "rope"):
            monkeypatch.setattr(f"tp_kernels.ops.{module}.lookup", lambda *_, found=entry, **__: found)
        for choice in (choose_qkv_rope_cache(*operands), choose_apply_rope(*rope)):
            assert (choice.path, choice.reason) == (path, "triton 1.0 us, torch 2.0 us (here)")
        for a, b in zip(problem.run(ops.qkv_rope_cache), expected, strict=True):
            torch.testing.assert_close(a, b)
        for a, b in zip(ops.apply_rope(*rope), ops.apply_rope_reference(*rope), strict=True):
            torch.testing.assert_close(a, b)


# On a GPU ------------------------------------------------------------------------------------------------------------

MODELS = {
    "llama3-8b": ((32, 8, 128), {}),
    "llama3-8b-tp4": ((8, 2, 128), {}),
    "qwen3-8b": ((32, 8, 128), {"norm": True}),
    "qwen2-0.5b": ((14, 2, 64), {"bias": True}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_models_on_a_gpu(generator, dtype, model):
    sizes, options = MODELS[model]
    for batch, tokens, more in (
        (1, 1, {}),
        (7, 1, {"page_size": 16, "token_major": True}),
        (64, 1, {"max_len": 128}),
        (1, 1000, {}),
        (3, 333, {"page_size": 128, "new_tokens": True}),
        (2, 65, {"positions": (2, 65), "cache_dtype": torch.float32}),
    ):
        Problem(generator, dtype, batch, tokens, *sizes, **{"max_len": 1024, **options, **more}).check()


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("options", [{}, {"page_size": 4, "bias": True, "new_tokens": True}], ids=["whole", "paged"])
def test_small_on_a_gpu(generator, options):
    Problem(generator, torch.bfloat16, 3, 5, 5, 2, 80, norm=True, **options).check()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_graph_capture(generator):
    """Lengths move on between replays; the same launch writes the next slot."""
    problem = Problem(generator, torch.bfloat16, 2, 1, 8, 2, 128, norm=True, page_size=4)
    problem.lengths.zero_()
    operands, more = problem.arguments()
    problem.run(ops.qkv_rope_cache)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = ops.qkv_rope_cache(*operands, **more)
        problem.lengths += 1
    for cache in operands[4:6]:
        cache.fill_(3.0)
    problem.lengths.zero_()
    expected = problem.caches(torch.bfloat16)
    for _ in range(6):
        step = problem.lengths.clone()
        problem.qkv.normal_(generator=generator)
        graph.replay()
        other = ops.qkv_rope_cache(operands[0], operands[1], operands[2], step, *expected, 8, 2, **more)
        assert torch.equal(q, other)
    for a, b in zip(operands[4:6], expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [False, True], ids=["slots", "positions"])
def test_layer_never_waits_for_the_gpu(given):
    """Prompt, chunk and decode steps of a layer against the layer without a cache, with every wait an error."""
    from tp_kernels.inference.kv_cache import KVCache
    from tp_kernels.layers import ParallelAttention, RotaryEmbedding

    torch.manual_seed(0)
    layer = ParallelAttention(
        256, 8, 2, 64, qk_norm=True, rope=RotaryEmbedding(64), device="cuda", dtype=torch.bfloat16
    ).eval()
    x = torch.randn(2, 40, 256, device="cuda", dtype=torch.bfloat16)
    start = 1000 if given else 0
    positions = torch.arange(start, start + 40, device="cuda").expand(2, 40) if given else None

    def cached():
        cache, parts, done = KVCache(1, 2, 2, 64, 64, device="cuda", dtype=torch.bfloat16), [], 0
        for count in (24, 12, 1, 1, 1, 1):
            piece = slice(done, done + count)
            at = positions[:, piece] if given else None
            parts.append(layer(x[:, piece], at, cache.layers[0]))
            cache.advance(count)
            done += count
        return torch.cat(parts, 1)

    with torch.inference_mode():
        expected = layer(x, positions)
        cached()  # kernels compiled, tables made
        try:
            torch.cuda.set_sync_debug_mode("error")
            actual = cached()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert (actual - expected).float().norm() < 0.02 * expected.float().norm()
