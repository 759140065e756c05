"""Text generation: the decode engine, KV caches, sampling, ``generate``, and the tokenizers of checkpoints."""

from tp_kernels.inference.engine import DecodeEngine
from tp_kernels.inference.generation import GenerationResult, generate
from tp_kernels.inference.kv_cache import KVCache
from tp_kernels.inference.paged_cache import OutOfPages, PagedKVCache
from tp_kernels.inference.sampling import SamplingParams
from tp_kernels.inference.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

__all__ = [
    "DecodeEngine",
    "GenerationResult",
    "KVCache",
    "OutOfPages",
    "PagedKVCache",
    "SamplingParams",
    "StreamDecoder",
    "Tokenizer",
    "generate",
    "load_tokenizer",
]
