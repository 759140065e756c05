"""Single layers from tp_kernels inside a model of your own: the same file on one process or on N ranks.

    python examples/import_layers.py
    torchrun --nproc-per-node 2 examples/import_layers.py
    tp-kernels launch --nproc 3 examples/import_layers.py

The sizes below divide by neither 2 nor 3. One training step is made on each, and every run prints the same figures: the
ranks hold slices of what one process would hold, and the layers sum where it is needed, forward and backward.
"""

import torch
from torch import nn

import tp_kernels as tp


class Block(nn.Module):
    """A pre-norm transformer block. Full sizes go in; each rank keeps its share of heads and of the MLP's width."""

    def __init__(self, hidden: int = 60, heads: int = 5, width: int = 157):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.attention = tp.ParallelAttention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = tp.ParallelMLP(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def main() -> None:
    # Reads torchrun's environment; without it this is one rank and torch.distributed is never touched.
    with tp.ProcessGroupManager.initialize() as manager:
        torch.manual_seed(0)  # alike on every rank: the shards are then those of one and the same model
        model = nn.Sequential(Block(), Block(), nn.Linear(60, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = torch.randn(8, 16, 60), torch.randint(0, 10, (8, 16))

        losses = []
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        # Stock names and shapes, the same whatever the number of ranks: what you would save.
        state = tp.full_state_dict(model)
        local = sum(p.numel() for p in model.parameters())
        if manager.rank == 0:
            print(f"ranks {manager.world_size}, transport {manager.tp_group.backend}")
            print("losses " + " ".join(f"{loss:.5f}" for loss in losses))
            print(f"parameters: {sum(t.numel() for t in state.values())} in all, {local} on rank 0")
            print(f"0.mlp.gate_proj.weight {tuple(state['0.mlp.gate_proj.weight'].shape)} in the state dict")


if __name__ == "__main__":
    main()
