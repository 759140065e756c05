"""The decode engine over ranks: graphs with collectives in them, tokens equal to one rank's. Tier: ranks on one GPU."""

import pytest
import torch

from tp_kernels.inference.engine import DecodeEngine
from tp_kernels.inference.generation import generate
from tp_kernels.inference.sampling import SamplingParams
from tp_kernels.models import ModelConfig, ParallelCausalLM

pytestmark = pytest.mark.gpu

LENGTHS = (5, 61, 1)
LIMITS = (20, 12, 20)
VOCAB = 515  # odd parts on 2 and 3 ranks
SAMPLING = SamplingParams(0.9, top_k=50, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def engine_ranks(gpu_ranks):
    """``gpu_ranks`` whose pools end with this file: they hold graphs and communicators of their own."""
    used = []

    def get(world_size, **options):
        used.append(gpu_ranks(world_size, **options))
        return used[-1]

    yield get
    for pool in used:
        pool.close()


def make_model(group, device, dtype):
    """The same weights on any number of ranks, large enough that the best logits are apart."""
    torch.manual_seed(5)
    sizes = dict(hidden_size=256, intermediate_size=336, vocab_size=VOCAB, num_hidden_layers=3, head_dim=64)
    config = dict(
        model_type="qwen2", num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256, **sizes
    )
    model = ParallelCausalLM(ModelConfig.from_hf({**config, "eos_token_id": None}), group=group, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(50.0 if "embed" in name else 2.5)
    return model.to(device, dtype).eval()


def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected():
    """One CPU rank's greedy tokens in fp32, no two best logits of which are close, and sampled ones."""
    model = make_model(None, "cpu", torch.float32)
    greedy = generate(model, prompts(), max_new_tokens=20, stop_ids=()).output_ids
    for prompt, output in zip(prompts(), greedy, strict=True):
        with torch.no_grad():
            best = model(torch.tensor([prompt + output]))[0, len(prompt) - 1 : -1].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, "two tokens are too close; change the seed"
    options = dict(temperature=0.9, top_k=50, top_p=0.95, seed=5)
    sampled = generate(model, prompts(), max_new_tokens=20, stop_ids=(), **options).output_ids
    return [[row[:limit] for row, limit in zip(rows, LIMITS, strict=True)] for rows in (greedy, sampled)]


def decoded(group, dtype, capture):
    """(path, greedy and sampled tokens, what the communicator counted) by graphs or eagerly."""
    model = make_model(group, group.device, dtype)
    with DecodeEngine(model, max_batch=3, max_len=96, page_size=16, capture=capture) as engine:
        found = [engine.generate(prompts(), LIMITS, sampling=each).output_ids for each in (SamplingParams(), SAMPLING)]
        engine.generate(prompts(), LIMITS, chunk=32)
        path = engine.path
    torch.cuda.synchronize()
    group.communicator.check()
    return path, found, dict(group.communicator.counters)


# Models and their graphs take most of the time of a test: each number of ranks and each backend once or twice.
@pytest.mark.parametrize(("world_size", "backend"), [(2, "auto"), (3, "auto"), (2, "nccl")])
def test_tokens_are_those_of_one_rank(engine_ranks, expected, world_size, backend):
    pool = engine_ranks(world_size, backend=backend)
    for path, found, counters in pool.run(decoded, torch.float32, True, timeout=120.0):
        assert path == "graph"
        assert found[0] == expected[0]
        assert found[1] == expected[1]
        fused = sum(count for name, count in counters.items() if name.startswith("symm:"))
        assert (fused > 0) == (backend == "auto"), counters


def test_graphs_and_eager_steps_agree_in_bf16(engine_ranks):
    pool = engine_ranks(2, backend="auto")
    by_capture = [pool.run(decoded, torch.bfloat16, capture, timeout=120.0) for capture in (True, False)]
    first = by_capture[0][0][1]
    for ranks in by_capture:
        assert all(found == first for _, found, _ in ranks)


def over_gloo(group):
    model = make_model(group, group.device, torch.float32)
    with pytest.raises(ValueError, match="capture=True: the gloo communicator"):
        DecodeEngine(model, max_batch=3, max_len=96, capture=True)
    with DecodeEngine(model, max_batch=3, max_len=96) as engine:
        return engine.path, engine.generate(prompts(), LIMITS).output_ids


def test_gloo_runs_eagerly_and_says_so(gpu_ranks, expected):
    for path, found in gpu_ranks(2, backend="gloo").run(over_gloo, timeout=120.0):
        assert path.startswith("eager: the gloo communicator goes through host memory")
        assert found == expected[0]


def broken(group):
    model = make_model(group, group.device, torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    messages = []
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN") as caught:
            generate(model, prompts(), max_new_tokens=4, stop_ids=(), temperature=temperature, seed=1)
        messages.append(str(caught.value))
    return messages


def test_nan_logits_end_all_ranks(engine_ranks):
    first, second = engine_ranks(2, backend="auto").run(broken, timeout=120.0)
    assert first == second
