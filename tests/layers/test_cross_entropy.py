"""Cross entropy over a vocabulary spread over ranks, against F.cross_entropy. Tier: CPU ranks (1 to 3 processes)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tp_kernels import ops
from tp_kernels.checkpoint.sharding import shard_vocab_sizes
from tp_kernels.layers import ParallelLMHead, full_gradients, vocab_parallel_cross_entropy
from tp_kernels.testing.numeric import assert_close_to_reference

WORLDS = [1, 2, 3]
VOCAB, IGNORE = 101, -100
REDUCTIONS = ("mean", "sum", "none")


def own_words(group):
    sizes = shard_vocab_sizes(VOCAB, group.world_size)
    start = sum(sizes[: group.rank])
    return slice(start, start + sizes[group.rank])


def upstream(loss):
    return torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)


def run_parallel(group, logits, targets):
    """This rank's (loss, gradient of its words) for every reduction, with and without the vocabulary's size."""
    words, results = own_words(group), {}
    for reduction in REDUCTIONS:
        for size, inplace in ((None, False), (VOCAB, True)):
            leaf = logits[..., words].clone().requires_grad_()
            loss = vocab_parallel_cross_entropy(
                leaf * 1, targets, group, IGNORE, reduction, vocab_size=size, inplace_backward=inplace
            )
            (grad,) = torch.autograd.grad((loss * upstream(loss)).sum(), leaf)
            results[reduction, inplace] = loss.detach(), grad
    return results


def by_torch(logits, targets, reduction, dtype):
    leaf = logits.to(dtype).requires_grad_()
    loss = F.cross_entropy(leaf.view(-1, VOCAB), targets.view(-1), reduction=reduction, ignore_index=IGNORE)
    loss = loss.view(targets.shape) if reduction == "none" else loss
    (grad,) = torch.autograd.grad((loss * upstream(loss)).sum(), leaf)
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("world_size", WORLDS)
def test_loss_and_gradient(rank_pool, world_size, dtype):
    torch.manual_seed(world_size)
    logits = (torch.randn(2, 7, VOCAB) * 4).to(dtype)
    targets = torch.randint(0, VOCAB, (2, 7))
    targets[0, :3] = torch.tensor([0, VOCAB - 1, IGNORE])
    logits[1, 2, 30:] = float("-inf")  # the other ranks have nothing in this row
    targets[1, 2] = 3
    ranks = rank_pool(world_size).run(run_parallel, logits, targets)
    wide = torch.promote_types(dtype, torch.float32)
    for reduction in REDUCTIONS:
        exact_loss, exact_grad = by_torch(logits, targets, reduction, torch.float64)
        plain_grad = by_torch(logits, targets, reduction, wide)[1].to(dtype)
        for inplace in (False, True):
            losses, grads = zip(*(rank[reduction, inplace] for rank in ranks), strict=True)
            assert all(torch.equal(losses[0], loss) for loss in losses), "the same bits on all ranks"
            assert losses[0].dtype is wide and grads[0].dtype is dtype
            torch.testing.assert_close(losses[0], exact_loss.to(wide), rtol=16 * torch.finfo(wide).eps, atol=0)
            grad = torch.cat(grads, dim=-1)
            if dtype is torch.float64:
                torch.testing.assert_close(grad, exact_grad, rtol=1e-12, atol=1e-12)
            else:
                assert_close_to_reference(grad, plain_grad, exact_grad, 3.0, name=f"{reduction}: gradient")


def check_special_batches(group):
    words = own_words(group)
    torch.manual_seed(0)
    logits, targets = torch.randn(4, VOCAB), torch.full((4,), IGNORE)
    leaf = logits[:, words].clone().requires_grad_()
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0), ("none", torch.zeros(4))):
        loss = vocab_parallel_cross_entropy(leaf, targets, group, IGNORE, reduction, vocab_size=VOCAB)
        torch.testing.assert_close(loss.detach(), torch.as_tensor(expected), equal_nan=True)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert not grad.any(), "ignored rows have no gradient, also where the mean is NaN"
    empty = vocab_parallel_cross_entropy(leaf[:0], targets[:0], group, reduction="sum")
    assert empty == 0
    large = (logits * 0 + 1e4)[:, words]
    loss = vocab_parallel_cross_entropy(large, targets * 0 + 5, group, vocab_size=VOCAB)
    torch.testing.assert_close(loss, torch.tensor(float(VOCAB)).log())
    other = vocab_parallel_cross_entropy(logits[:, words], targets * 0 + 7, group, ignore_index=7, reduction="sum")
    assert other == 0
    assert not torch.is_grad_enabled() or loss.grad_fn is None


def check_errors(group):
    words = own_words(group)
    logits, targets = torch.randn(4, VOCAB)[:, words], torch.randint(0, VOCAB, (4,))
    bad = [
        (dict(targets=targets + VOCAB), rf"expected targets in \[0, {VOCAB}\) or -100, got"),
        (dict(targets=targets - 2 * VOCAB - 100), "expected targets in"),
        (dict(targets=targets[:3]), r"int64 or int32 targets \[4\], got \[3\]"),
        (dict(reduction="batchmean"), "reduction must be one of"),
        (dict(vocab_size=VOCAB + 3 * group.world_size), f"words in the logits of rank {group.rank} of"),
    ]
    for change, message in bad:
        arguments = {"targets": targets, "vocab_size": VOCAB, **change}
        with pytest.raises(ValueError, match=message):
            vocab_parallel_cross_entropy(logits, arguments.pop("targets"), group, **arguments)


def check_behind_a_head(group):
    """From the head's shard of the logits to the gradient of its weight."""
    torch.manual_seed(5)
    linear = torch.nn.Linear(24, VOCAB)
    hidden, targets = torch.randn(3, 5, 24), torch.randint(0, VOCAB, (3, 5))
    head = ParallelLMHead.from_linear(linear, group=group, gather_output=False)
    loss = vocab_parallel_cross_entropy(head(hidden), targets, group, vocab_size=head.num_embeddings)
    loss.backward()
    expected = F.cross_entropy(linear(hidden).view(-1, VOCAB), targets.view(-1))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, grad in full_gradients(head).items():
        torch.testing.assert_close(grad, getattr(linear, name).grad)


@pytest.mark.parametrize("check", [check_special_batches, check_errors, check_behind_a_head])
@pytest.mark.parametrize("world_size", WORLDS)
def test_on_ranks(rank_pool, world_size, check):
    rank_pool(world_size).run(check)


def test_one_process_needs_no_group():
    logits, targets = torch.randn(3, VOCAB), torch.randint(0, VOCAB, (3,))
    loss = vocab_parallel_cross_entropy(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    torch.testing.assert_close(loss, ops.cross_entropy(logits, targets))
    double = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, targets, reduction="none"), double)


def test_the_op_on_the_cpu():
    logits, targets = torch.randn(2, 3, VOCAB, requires_grad=True), torch.randint(0, VOCAB, (2, 3), dtype=torch.int32)
    loss = ops.cross_entropy(logits, targets, reduction="none")
    assert loss.shape == (2, 3)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1).long(), reduction="none").view(2, 3)
    )
    half = ops.cross_entropy(logits.bfloat16(), targets)
    assert half.dtype is torch.float32
    half.backward()
    assert logits.grad.shape == logits.shape
    with pytest.raises(ValueError, match=rf"expected targets in \[0, {VOCAB}\) or -100, got {VOCAB}"):
        ops.cross_entropy(logits, targets * 0 + VOCAB)
    compiled = torch.compile(ops.cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, targets), ops.cross_entropy(logits, targets))
