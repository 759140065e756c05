"""The warp-specialised Gluon flash attention: its own source in numpy, schedule, configurations; values on a GPU.

Tiers: no device (Gluon has no interpreter: ``tp_kernels.testing.gluon_machine`` runs the source), GPU.
"""

import itertools
import random

import numpy as np
import pytest
import torch

from tp_kernels.ops._gpu import A100, H100, gpu_of
from tp_kernels.ops.attention import attention_reference
from tp_kernels.testing.gluon_machine import Descriptor, Machine, Pointer
from tp_kernels.testing.numeric import assert_close_to_reference, max_error
from tp_kernels.testing.op_bench.case import randn

pytest.importorskip("triton")

from tp_kernels.ops.kernels import gluon_flash_attention as flash
from tp_kernels.ops.kernels import gluon_flash_schedule as schedule
from tp_kernels.ops.kernels.gluon_flash_attention import Config, flash_forward, unsupported_reason
from tp_kernels.ops.kernels.gluon_flash_forward import gluon_flash_forward

LOG2_E = 1.4426950408889634

# The kernel's own source on the CPU -----------------------------------------------------------------------------------


def oracle(q, k, v, scale, causal, window):
    """Attention and log-sum-exp in float64; 0 and -inf for rows that see nothing."""
    group, shift = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k, v = np.repeat(k, group, 1).astype(np.float64), np.repeat(v, group, 1).astype(np.float64)
    position, key = np.arange(q.shape[2])[:, None] + shift, np.arange(k.shape[2])[None]
    seen = key <= position if causal else np.ones((q.shape[2], k.shape[2]), bool)
    if window is not None:
        seen = seen & (key > position - window)
    scores = np.where(seen, q.astype(np.float64) @ k.swapaxes(2, 3) * scale, -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), -1e30)
        p = np.exp(scores - top)
        total = p.sum(-1, keepdims=True)
        return p @ np.where(np.isfinite(v), v, 0) / np.where(total == 0, 1, total), (top + np.log(total))[..., 0]


def simulate(case, *, packed=None, **names):
    """Run the kernel with tiles of 2 x 2 rows; ``packed``: lengths of sequences (queries, keys) laid end to end."""
    c = {"batch": 1, "heads": 2, "kv_heads": 1, "block_n": 4, "stages": 2, "programs": 2, "section": 99, "seed": 0}
    c |= {"causal": True, "window": None, "pingpong": False, "own_out": False, "persistent": False, "depth": 4} | case
    rng = np.random.default_rng(c["seed"])
    heads, kv_heads, depth = c["heads"], c["kv_heads"], c["depth"]
    sequences = packed or [(c["q_len"], c["kv_len"])]
    batch = len(sequences) if packed else c["batch"]
    cu_q, cu_k = ([0, *itertools.accumulate(lengths)] for lengths in zip(*sequences, strict=True))
    shape = (1 if packed else batch, heads, cu_q[-1], depth)
    q, k, v = (
        rng.standard_normal((shape[0], n, length, depth)).astype(np.float32)
        for n, length in (
            (heads, cu_q[-1]),
            (kv_heads, cu_k[-1] + 3 * bool(packed)),
            (kv_heads, cu_k[-1] + 3 * bool(packed)),
        )
    )
    if packed:
        k[:, :, cu_k[-1] :], v[:, :, cu_k[-1] :] = np.nan, np.inf
    rows = 2 * schedule.CONSUMERS.value
    max_q, max_k = (max(lengths) for lengths in zip(*sequences, strict=True))
    tiles = -(-max_q // rows)
    windowed = c["window"] is not None and c["window"] < max_k
    right_edge = c["causal"] and (bool(packed) or rows > c["block_n"] or (max_k - max_q) % c["block_n"] != 0)
    # The packed results have rows of other sequences around them; what nobody may touch stays NaN.
    out, lse = np.full(shape, np.nan, np.float32), np.full(shape[:3], np.nan, np.float32)
    total = tiles * batch * heads
    machine = Machine(
        c["seed"], ROWS=2, TILE_ROWS=rows, CONSUMERS=2, LN_2=1 / LOG2_E, accumulator=lambda n: None, **names
    )
    machine.launch(
        gluon_flash_forward,
        min(c["programs"], total) if c["persistent"] else total,
        Descriptor(q, (1, 1, 2, depth)),
        *(Descriptor(x, (1, 1, c["block_n"], depth)) for x in (k, v)),
        Descriptor(out, (1, 1, 2, depth)),
        Pointer(out.reshape(-1)),
        Pointer(lse.reshape(-1)),
        *((Pointer(np.array(cu)) for cu in (cu_q, cu_k)) if packed else (None, None)),
        0.7 * LOG2_E,
        max_q,
        max_k,
        c["window"] if windowed else 0,
        tiles,
        heads,
        batch * heads,
        min(c["section"], batch * heads),
        depth,
        shape[2] * depth,
        *((0, shape[2], 1) if packed else (heads * shape[2], shape[2], 1)),
        STAGES=c["stages"],
        CAUSAL=c["causal"],
        WINDOWED=windowed,
        VARLEN=bool(packed),
        RIGHT_EDGE=right_edge,
        PINGPONG=c["pingpong"],
        OWN_OUT=c["own_out"],
        PERSISTENT=c["persistent"],
        GROUP=heads // kv_heads,
        HEAD_DIM=depth,
    )
    for i in range(len(sequences)):
        of_q, of_k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        expected, logs = oracle(q[:, :, of_q], k[:, :, of_k], v[:, :, of_k], 0.7, c["causal"], c["window"])
        np.testing.assert_allclose(out[:, :, of_q], expected, atol=2e-5, err_msg=str(case))
        np.testing.assert_allclose(lse[:, :, of_q], logs, atol=2e-5, err_msg=str(case))


def some_cases(count, seed):
    pick = random.Random(seed)
    for i in range(count):
        heads = pick.choice([1, 2, 4])
        yield {
            "q_len": pick.randint(1, 18),
            "kv_len": pick.randint(1, 18),
            "batch": pick.choice([1, 2]),
            "heads": heads,
            "kv_heads": pick.choice([1, heads]),
            "causal": pick.random() < 0.6,
            "window": pick.choice([None, None, 1, 2, 3, 5, 9]),
            "block_n": pick.choice([2, 4, 8]),
            "stages": pick.choice([1, 2, 3]),
            "pingpong": pick.random() < 0.5,
            "own_out": pick.random() < 0.5,
            "persistent": pick.random() < 0.6,
            "programs": pick.choice([1, 2, 3, 5]),
            "section": pick.choice([1, 2, 3, 99]),
            "seed": i,
        }


@pytest.mark.parametrize("seed", range(4))
def test_source_on_the_cpu(seed):
    for case in some_cases(40, seed):
        simulate(case)


@pytest.mark.parametrize("seed", range(2))
def test_source_on_the_cpu_with_packed_sequences(seed):
    pick = random.Random(seed)
    for case in some_cases(30, seed + 100):
        lengths = [(pick.randint(0, 9), pick.randint(0, 9)) for _ in range(pick.randint(1, 3))]
        lengths[pick.randrange(len(lengths))] = (pick.randint(1, 9), pick.randint(1, 9))
        simulate(case, packed=lengths)


BROKEN = {
    "a phase that never flips": {"advance": lambda slot, phase, slots: ((slot + 1) % slots, phase)},
    "no wait for an empty slot": {"fill": "no wait"},
    "no fence": {"fence_async_shared": lambda: None},
    "a block too few": {"kv_blocks": lambda *a: (0, 0, 0, 1)},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_machine_finds(fault):
    names = dict(BROKEN[fault])

    def fill(desc, at, empty, ready, phase, slot):
        ready.bytes += desc.block_type.nbytes
        ready.pending -= 1
        slot.array[...] = desc.read(at)
        ready.bytes -= desc.block_type.nbytes
        ready.settle()

    if names.get("fill"):
        names["fill"] = fill
    with pytest.raises(AssertionError):
        for seed in range(5):
            simulate({"q_len": 17, "kv_len": 17, "seed": seed, "persistent": True}, **names)


# The schedule ---------------------------------------------------------------------------------------------------------

ROWS = 4
arithmetic = Machine(TILE_ROWS=ROWS)
kv_blocks = arithmetic.translate(schedule.kv_blocks)


@pytest.mark.parametrize("block_n", [2, 4, 8])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 6, 11])
def test_every_visible_key_is_visited_and_masks_are_where_they_must_be(block_n, causal, window):
    for q_len, kv_len in itertools.product(range(1, 14), range(1, 20)):
        shift = kv_len - q_len
        aligned = block_n >= ROWS and shift % block_n == 0
        for row in range(0, q_len, ROWS):
            lo, clear_lo, clear_hi, hi = kv_blocks(row, q_len, kv_len, window or 0, block_n, causal, window is not None)
            assert 0 <= lo <= clear_lo <= clear_hi <= hi
            assert hi == lo or clear_hi < hi
            assert (hi - 1) * block_n < kv_len
            if causal and aligned:
                assert hi - 1 - clear_hi <= 0 or window is not None  # RIGHT_EDGE is off: see below
            for position in range(row + shift, min(row + ROWS, q_len) + shift):
                first = 0 if window is None else max(position - window + 1, 0)
                end = max(min(kv_len, position + 1), 0) if causal else kv_len
                assert first >= end or (lo * block_n <= first and end <= hi * block_n)
                assert clear_lo == clear_hi or (first <= clear_lo * block_n and clear_hi * block_n <= end)


@pytest.mark.parametrize("block_n", [64, 128])
def test_without_a_right_edge_only_the_first_block_is_beyond_the_clear_ones(block_n):
    real = Machine(TILE_ROWS=128).translate(schedule.kv_blocks)
    for causal, q_len, kv_len, windowed in itertools.product(
        (True, False), (1, 64, 127, 128, 129, 300, 512), (1, 128, 200, 300, 512), (True, False)
    ):
        if not flash._right_edge(causal, False, q_len, kv_len, block_n):
            for row, window in itertools.product(range(0, q_len, 128), (1, 100, 128, 250)):
                lo, _, clear_hi, hi = real(row, q_len, kv_len, window, block_n, causal, windowed)
                assert hi - clear_hi <= 1 or hi == lo


@pytest.mark.parametrize(("tiles", "heads", "batch"), [(1, 1, 1), (3, 4, 1), (5, 2, 3), (7, 3, 2)])
@pytest.mark.parametrize("programs", [1, 2, 5, 40])
def test_every_tile_is_walked_once_and_the_heavy_ones_first(tiles, heads, batch, programs):
    nth_tile, locate = arithmetic.translate(schedule.nth_tile), arithmetic.translate(schedule.locate)
    total = tiles * heads * batch
    rounds = -(-total // programs)
    indices = [[nth_tile(turn, p, programs) for p in range(programs)] for turn in range(rounds)]
    assert sorted(itertools.chain(*indices)) == list(range(rounds * programs))
    for section in (1, 2, heads * batch):
        work = schedule.Work(None, None, 0, 0, 0, tiles, heads, heads * batch, section)
        found = [locate(work, i, True) for i in range(total)]
        assert sorted(found) == sorted(itertools.product(range(tiles), range(batch), range(heads)))
        assert all(a >= b for a, b in itertools.pairwise(tile for tile, _, _ in found[: section * tiles]))
        assert sorted(locate(work, i, False) for i in range(total)) == sorted(found)


# Configurations and checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_candidates_fit_and_come_back_from_a_table(head_dim):
    found = flash.candidates(H100, torch.bfloat16, head_dim, 4096, 4096, True)
    assert found[0] == flash.default_config(H100, torch.bfloat16, head_dim, 4096, 4096, True)
    assert len(set(found)) == len(found) <= 12
    for config in found:
        assert Config(**config._asdict()) == config
        own_out = flash._own_out(H100, config, head_dim)
        assert flash._shared(config, head_dim, own_out) <= H100.max_shared


def test_as_many_heads_side_by_side_as_the_cache_holds_but_not_too_few():
    assert flash.heads_side_by_side(8, 4 * 16384 * 128) == 8
    assert flash.heads_side_by_side(256, 4 * 1024 * 128) == 64
    assert flash.heads_side_by_side(256, 4 * (1 << 20) * 128) == 16
    assert flash.heads_side_by_side(256, 4 * 1024 * 128, 2) == 2


def reason(info=H100, dtype=torch.bfloat16, head_dim=128, q=None, k=None):
    q = torch.empty(1, 8, 256, head_dim, dtype=dtype, device="meta") if q is None else q
    k = torch.empty(1, 2, 256, head_dim, dtype=dtype, device="meta") if k is None else k
    return unsupported_reason(info, dtype, head_dim, q, k, k, True, None, False)


def test_unsupported_reason_in_words():
    assert reason() is None
    assert reason(head_dim=64) is None
    assert "9.x" in reason(A100)
    assert "float32" in reason(dtype=torch.float32)
    assert "head_dim" in reason(head_dim=100)
    assert "head_dim" in reason(head_dim=512)
    packed = torch.empty(1, 256, 10, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    assert reason(q=packed[:, :8], k=packed[:, 8:]) is None
    assert "not dense" in reason(q=torch.empty(1, 8, 128, 256, dtype=torch.bfloat16, device="meta").mT)
    odd = torch.empty(1, 8, 256, 132, dtype=torch.bfloat16, device="meta")[..., :128]
    assert "16 bytes" in reason(q=odd)
    shared = torch.empty(1, 1, 256, 128, dtype=torch.bfloat16, device="meta").expand(1, 2, 256, 128)
    assert "positive multiples" in reason(k=shared)
    unaligned = torch.empty(8 * 256 * 128 + 1, dtype=torch.bfloat16)[1:].view(1, 8, 256, 128)
    assert "does not start" in reason(q=unaligned)


def test_bad_calls_are_refused(device):
    q = torch.zeros(1, 2, 4, 64, dtype=torch.float16, device=device)
    options = {"causal": True, "window": None, "max_q": 4, "max_k": 4}
    with pytest.raises(ValueError, match="scale"):
        flash_forward(q, None, q, q, q, scale=0.0, **options)
    with pytest.raises(ValueError, match="float32"):
        flash_forward(q.float(), None, q.float(), q.float(), q.float(), scale=1.0, **options)


def test_nothing_to_attend_to(device):
    q = torch.ones(1, 2, 4, 64, dtype=torch.float16, device=device)
    k, out, lse = q[:, :, :0], torch.ones_like(q), torch.ones(1, 2, 4, device=device)
    flash_forward(out, lse, q, k, k, scale=1.0, causal=False, window=None, max_q=4, max_k=0)
    assert not out.any()
    assert lse.eq(-torch.inf).all()
    flash_forward(q[:, :, :0], None, q[:, :, :0], q, q, scale=1.0, causal=True, window=None, max_q=0, max_k=4)


# Values on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(device):
    """The device, if it is one that the kernel is for."""
    if device != "cuda" or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.x")
    return device


def inputs(generator, batch, heads, kv_heads, q_len, kv_len, head_dim, dtype):
    """q, k and v as a projection leaves them: [B, S, H, D] in memory."""
    return [
        randn(generator, batch, length, n, head_dim, dtype=dtype).transpose(1, 2)
        for n, length in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    ]


def double_lse(q, k, scale, causal, window):
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    position = torch.arange(q.shape[2], device=q.device)[:, None] + k.shape[2] - q.shape[2]
    key = torch.arange(k.shape[2], device=q.device)
    if causal:
        scores = scores.masked_fill(key > position, -torch.inf)
    if window is not None:
        scores = scores.masked_fill(key <= position - window, -torch.inf)
    return scores.logsumexp(-1)


def compare(out, lse, q, k, v, *, scale, causal, window):
    if (
        k.shape[1] > 1 and q.shape[1] * q.shape[2] * k.shape[2] >= 1 << 27
    ):  # scores in float64 of more heads would be gigabytes
        heads = (x.chunk(k.shape[1], 1) for x in (out, lse, q, k, v))
        for one in zip(*heads, strict=True):
            compare(*one, scale=scale, causal=causal, window=window)
        return
    blind = max(0, q.shape[2] - k.shape[2]) if causal else 0
    assert not out[:, :, :blind].any()
    assert lse[:, :, :blind].eq(-torch.inf).all()
    options = {"causal": causal, "sliding_window": window, "scale": scale}
    expected = attention_reference(*(x.double() for x in (q, k, v)), **options)[:, :, blind:]
    same_dtype = attention_reference(q, k, v, **options)[:, :, blind:]
    assert_close_to_reference(out[:, :, blind:], same_dtype, expected, name=f"{causal} {window}")
    assert max_error(lse[:, :, blind:], double_lse(q, k, scale, causal, window)[:, :, blind:]) < 1e-3


def check(q, k, v, *, causal, window=None, config=None, out=None):
    scale = q.shape[-1] ** -0.5
    out = torch.full_like(q, torch.nan) if out is None else out
    lse = torch.full(q.shape[:3], torch.nan, device=q.device)
    sizes = {"max_q": q.shape[2], "max_k": k.shape[2]}
    flash_forward(out, lse, q, k, v, scale=scale, causal=causal, window=window, config=config, **sizes)
    compare(out, lse, q, k, v, scale=scale, causal=causal, window=window)
    return out


MASKS = [(True, None), (False, None), (True, 200), (False, 77), (True, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [*((d, torch.bfloat16) for d in (64, 96, 128, 256)), (128, torch.float16)], ids=str
)
@pytest.mark.parametrize(("causal", "window"), MASKS)
def test_values(hopper, generator, dtype, head_dim, causal, window):
    for q_len, kv_len in ((512, 512), (1, 129), (333, 333), (100, 517), (517, 100)):
        check(*inputs(generator, 2, 4, 2, q_len, kv_len, head_dim, dtype), causal=causal, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_values_of_every_candidate(hopper, generator, head_dim):
    """More tiles than multiprocessors, so that persistent programs walk several."""
    q, k, v = inputs(generator, 2, 32, 8, 777, 777, head_dim, torch.bfloat16)
    assert q.shape[0] * q.shape[1] * -(-q.shape[2] // 128) > 2 * gpu_of(q).num_sms
    for config in flash.candidates(gpu_of(q), q.dtype, head_dim, 777, 777, True):
        assert torch.equal(*(check(q, k, v, causal=True, config=config) for _ in range(2))), config


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(32, 8, 4096), (8, 2, 4096), (64, 8, 1024)])
def test_model_shapes(hopper, generator, heads, kv_heads, length):
    check(*inputs(generator, 1, heads, kv_heads, length, length, 128, torch.bfloat16), causal=True)


@pytest.mark.gpu
def test_rows_beyond_the_end_are_left_alone(hopper, generator):
    """``out`` is the first rows of a longer buffer, which the heads after must not be written over by."""
    q, k, v = inputs(generator, 2, 4, 2, 200, 200, 128, torch.bfloat16)
    buffer = torch.full((2, 4, 300, 128), 7.0, dtype=q.dtype, device=hopper)
    check(q, k, v, causal=True, out=buffer[:, :, :200])
    assert buffer[:, :, 200:].eq(7.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(("causal", "window"), MASKS)
def test_packed_sequences(hopper, generator, causal, window, persistent):
    lengths = [(130, 130), (1, 300), (0, 5), (257, 64), (64, 257), (3, 0)]
    starts = [[0, *itertools.accumulate(side)] for side in zip(*lengths, strict=True)]
    cu_q, cu_k = (torch.tensor(s, dtype=torch.int32, device=hopper) for s in starts)
    q = randn(generator, starts[0][-1], 4, 128, dtype=torch.bfloat16)
    k, v = (randn(generator, starts[1][-1] + 200, 2, 128, dtype=torch.bfloat16) for _ in range(2))
    k[starts[1][-1] :], v[starts[1][-1] :] = torch.nan, torch.inf
    out, lse = torch.full_like(q, torch.nan), torch.full((4, q.shape[0]), torch.nan, device=hopper)
    config = Config(128, 2, pingpong=persistent, persistent=persistent)
    options = {"scale": 128**-0.5, "causal": causal, "window": window, "config": config, "max_q": 257, "max_k": 300}
    flash_forward(out, lse, q, k, v, cu_q=cu_q, cu_k=cu_k, **options)
    for i, (_, kv_len) in enumerate(lengths):
        of_q, of_k = slice(*starts[0][i : i + 2]), slice(*starts[1][i : i + 2])
        one = [x[rows].transpose(0, 1)[None] for x, rows in ((q, of_q), (k, of_k), (v, of_k))]
        mine, logs = out[of_q].transpose(0, 1)[None], lse[:, of_q][None]
        if kv_len == 0:
            assert not mine.any()
            assert logs.eq(-torch.inf).all()
        else:
            compare(mine, logs, *one, scale=options["scale"], causal=causal, window=window)


@pytest.mark.gpu
def test_in_a_cuda_graph(hopper, generator):
    q, k, v = inputs(generator, 1, 8, 2, 384, 384, 128, torch.bfloat16)
    options = {"scale": 0.1, "causal": True, "window": None, "max_q": 384, "max_k": 384}
    expected, out = torch.empty_like(q), torch.empty_like(q)
    flash_forward(expected, None, q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flash_forward(out, None, q, k, v, **options)
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("config", [Config(128, 2), Config(128, 2, True, True)])
def test_small_for_the_sanitizer(hopper, generator, config):
    check(*inputs(generator, 1, 2, 1, 150, 270, 128, torch.bfloat16), causal=True, config=config)
