"""Ranks that import transformers once, in the server they are forked from."""

from tp_kernels.testing.rank_pool import PRELOAD

PRELOAD.extend(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2", "qwen3"))
PRELOAD.extend(["transformers.generation.utils", "peft"])
