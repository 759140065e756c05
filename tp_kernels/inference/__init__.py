"""Text generation: KV cache, sampling, ``generate``, and the tokenizers of checkpoints."""

from tp_kernels.inference.generation import GenerationResult, generate
from tp_kernels.inference.kv_cache import KVCache
from tp_kernels.inference.sampling import SamplingParams
from tp_kernels.inference.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

__all__ = [
    "GenerationResult",
    "KVCache",
    "SamplingParams",
    "StreamDecoder",
    "Tokenizer",
    "generate",
    "load_tokenizer",
]
