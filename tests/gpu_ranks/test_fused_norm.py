"""All-reduce + bias + residual + RMSNorm in one kernel, and the layers that use it. Tier: ranks on one GPU."""

import itertools
import uuid

import pytest
import torch

from tp_kernels import ops
from tp_kernels.comm.symmetric_sizes import MAX_LAMPORT_ROW_PACKS, lamport_rows, row_packs
from tp_kernels.inference.kv_cache import KVCache
from tp_kernels.models import ModelConfig, ParallelCausalLM
from tp_kernels.testing.numeric import assert_close_to_reference
from tp_kernels.testing.symmetric_ranks import make_symmetric, symmetric_group

pytestmark = pytest.mark.gpu

HALF = 1 << 20
# Decode, ragged rows, more rows than blocks, more than a half of 1 MiB holds.
SHAPES = ((1, 4096), (3, 4096), (5, 1001), (2, 24), (33, 8192), (300, 1024), (700, 2048))


def run(gpu_ranks, world_size, function, *args):
    return gpu_ranks(world_size, backend="gloo").run(within, function.__name__, uuid.uuid4().hex, args, timeout=90.0)


def within(group, name, tag, args):
    symm = make_symmetric(group, tag, max_bytes=HALF, timeout=20.0)
    try:
        result = globals()[name](symm, group, *args)
        torch.cuda.synchronize()
        symm.check()
        return result
    finally:
        symm.close()


def random(shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def operands(rows, width, dtype, world, biased):
    partials = [random((rows, width), dtype, 11 + rank) for rank in range(world)]
    residual, weight = random((rows, width), dtype, 7), random((width,), dtype, 8)
    return partials, residual, weight, random((width,), dtype, 9) if biased else None


def algorithms(rows, width, dtype, world, rounded):
    found = ["one_shot", "two_shot"]
    # Triton compiles a kernel for every width, number of ranks and option: a second each.
    if world < 4 and ((width == 4096 and rows > 1) or (width == 1001 and rounded)):
        found.append("triton")
    if row_packs(width, dtype.itemsize) <= MAX_LAMPORT_ROW_PACKS and rows <= 4 * lamport_rows(width, dtype.itemsize):
        found.append("lamport")  # in up to four parts
    return found


def kernels(symm, group, dtypes):
    rank, world = symm.rank, symm.world_size
    for dtype, (rows, width), biased in itertools.product(dtypes, SHAPES, (False, True)):
        partials, residual, weight, bias = operands(rows, width, dtype, world, biased)
        exact = sum(p.double() for p in partials) + residual.double() + (bias.double() if biased else 0)
        exact = (ops.rms_norm_reference(exact, weight.double(), 1e-5), exact)
        for rounded in (True, False):
            expected = ops.all_reduce_add_rms_norm_reference(partials, residual, weight, 1e-5, bias, rounded)
            first = None
            for algorithm in algorithms(rows, width, dtype, world, rounded):
                what = f"{algorithm}, {rows} x {width} {dtype}, bias={biased}, rounded={rounded}"
                options = dict(bias=bias, round_before_norm=rounded, algorithm=algorithm)
                results = symm.all_reduce_add_rms_norm(partials[rank].clone(), residual, weight, 1e-5, **options)
                if first is None:
                    first = results
                    assert torch.equal(results[1], expected[1]), f"{what}: the sum has other bits"
                    for i, name in enumerate(("normed", "sum")):
                        assert_close_to_reference(results[i], expected[i], exact[i], name=f"{what}: {name}")
                for a, b in zip(results, first, strict=True):
                    assert torch.equal(a, b), f"{what}: other bits than one-shot"
                shared = symm.get_buffer((rows, width), dtype)
                if shared is None:
                    continue
                shared.copy_(partials[rank])
                out = symm.get_buffer((rows, width), dtype, use="output")
                normed, summed = symm.all_reduce_add_rms_norm(shared, residual, weight, 1e-5, out=out, **options)
                assert normed is out and torch.equal(normed, first[0]) and torch.equal(summed, first[1]), what
    group.barrier()


@pytest.mark.parametrize("world_size, dtypes", [(2, (torch.bfloat16, torch.float32)), (3, (torch.float16,))])
def test_the_kernels(gpu_ranks, world_size, dtypes):
    run(gpu_ranks, world_size, kernels, dtypes)


def test_the_kernels_at_four_ranks(gpu_ranks):
    run(gpu_ranks, 4, kernels, (torch.bfloat16,))


def separate(symm, group):
    """Against ``all_reduce`` then ``ops.add_rms_norm`` of the same communicator: equal sums, close norms."""
    group = symmetric_group(symm, group)
    for rows, width in ((1, 4096), (16, 8192), (600, 1024)):
        partials, residual, weight, bias = operands(rows, width, torch.bfloat16, symm.world_size, True)
        mine = partials[symm.rank]
        normed, summed = ops.all_reduce_add_rms_norm(mine.clone(), residual, weight, 1e-6, group, bias)
        expected = ops.add_rms_norm(symm.all_reduce(mine) + bias, residual, weight, 1e-6)
        assert torch.equal(summed, expected[1]), f"{rows} x {width}: the sum has other bits"
        # Other orders of the sum of squares: the rounding before the weight and the one after it, 2^-8 each.
        torch.testing.assert_close(normed, expected[0], rtol=2**-7, atol=0)


def test_the_op_against_separate_ops(gpu_ranks):
    run(gpu_ranks, 2, separate)


def chain(symm, group):
    """Sums that are gathered by nobody: each rank keeps its rows, and the norms are right all the same."""
    for rows in (2, 100, 700):
        partials, residual, weight, _ = operands(rows, 2048, torch.bfloat16, symm.world_size, False)
        whole = scattered = residual
        for step in range(3):
            mine = partials[symm.rank] * (step + 1)
            expected, whole = symm.all_reduce_add_rms_norm(mine, whole, weight, 1e-6)
            normed, scattered = symm.all_reduce_add_rms_norm(mine, scattered, weight, 1e-6, gather_sum=False)
            assert torch.equal(normed, expected), f"{rows} rows, step {step}"


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_chain_without_gathered_sums(gpu_ranks, world_size):
    run(gpu_ranks, world_size, chain)


# Models --------------------------------------------------------------------------------------------------------------


def make_model(group):
    torch.manual_seed(3)
    config = dict(model_type="llama", hidden_size=256, intermediate_size=512, vocab_size=320, num_hidden_layers=3)
    config |= dict(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, mlp_bias=True)
    model = ParallelCausalLM(ModelConfig.from_hf(config), group=group, dtype=torch.bfloat16)
    return model.cuda().eval()


def model_passes(symm, group):
    model = make_model(symmetric_group(symm, group))
    ids = torch.randint(0, 320, (2, 90), generator=torch.Generator().manual_seed(1)).cuda()
    results = {}
    with torch.inference_mode():
        for fused in (False, True):
            symm.fused_norm = fused
            symm.counters.clear()
            cache = KVCache.for_model(model, 2, 96)
            pieces = []
            for piece in ids.split([87, 1, 1, 1], dim=1):
                pieces.append(model(piece, cache=cache))
                cache.advance(piece.shape[1])
            results[fused] = torch.cat(pieces, 1)
            norms = sum(count for path, count in symm.counters.items() if path.startswith("norm_"))
            assert norms == (4 * 6 if fused else 0)
        scale = results[False].float().abs().max()
        difference = (results[True].float() - results[False].float()).abs().max()
        # Six norms, each of which may round otherwise by 2^-8: as independent errors 0.0096; this is twice that.
        assert difference <= 0.02 * scale, f"logits differ by {difference} of {scale}"
        hidden = torch.randn(2, 1, 256, device="cuda", dtype=torch.bfloat16)
        hidden = symm.broadcast(hidden)
        layer = model.model.layers[0]
        eager = layer(hidden, hidden)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(hidden, hidden)
        for _ in range(5):
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
    return results[True].cpu()


@pytest.mark.parametrize("world_size", [2, 4])
def test_models_leave_their_sums_to_the_norms(gpu_ranks, world_size):
    logits = run(gpu_ranks, world_size, model_passes)
    assert all(torch.equal(logits[0], other) for other in logits)
