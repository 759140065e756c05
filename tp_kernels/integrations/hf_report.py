"""``PatchReport``: what became of a model's modules."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["PatchReport"]


@dataclass
class PatchReport:
    """What ``apply_tp_kernels`` replaced in a model, and what it left alone.

    Attributes:
        family: "Llama", "Mistral", "Qwen2" or "Qwen3".
        world_size: ranks that share the model.
        replaced: kind of module or operation to how many there are.
        kept: (what, why it was left alone).
    """

    family: str
    world_size: int
    replaced: dict[str, int] = field(default_factory=dict)
    kept: list[tuple[str, str]] = field(default_factory=list)

    def count(self, kind: str, number: int = 1) -> None:
        """Add to ``replaced``."""
        self.replaced[kind] = self.replaced.get(kind, 0) + number

    def keep(self, what: str, reason: str) -> None:
        """Add to ``kept``, once."""
        if (what, reason) not in self.kept:
            self.kept.append((what, reason))

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank" + ("s" if self.world_size > 1 else "")
        lines = [f"{self.family} on {ranks}", "replaced:"]
        lines += [f"  {count:4d}  {kind}" for kind, count in self.replaced.items()] or ["  nothing"]
        if self.kept:
            lines += ["left alone:"] + [f"  {what}: {reason}" for what, reason in self.kept]
        return "\n".join(lines)
