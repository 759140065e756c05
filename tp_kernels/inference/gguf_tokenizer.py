"""A ``tokenizers.Tokenizer`` from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

GGUF stores vocabulary, merges and special ids, but only the *name* of the pre-tokenizer that cut the text while the
merges were learned; the patterns behind the names are here. Ids equal those of transformers' own conversion of the
same file.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from tp_kernels.checkpoint.errors import CheckpointError

__all__ = ["build_gguf_tokenizer"]

_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx", "pixtral"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
# The pattern of GPT-2, which the tokenizers library has built in. "smollm" and its kin also cut numbers into digits;
# their vocabularies have no merge across digits, so that shows only where blanks stand before a number (see
# ``split_digits``).
_GPT2_LIKE = ("default", "gpt-2", "smollm", "starcoder", "refact", "command-r", "codeshell", "olmo", "exaone", "mpt")
_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")

# Vocabularies with words that no chain of merges reaches: a word that is a token is taken whole.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")

# Files that do not say whether text begins with BOS: what llama.cpp assumes.
_BOS_BY_DEFAULT = _WHOLE_WORDS


def build_gguf_tokenizer(
    metadata: dict[str, Any], *, file: str, split_digits: bool = False
) -> tuple[Tokenizer, dict[str, Any]]:
    """Build the tokenizer that a GGUF file describes.

    Args:
        metadata: the file's metadata.
        file: path, for errors.
        split_digits: cut numbers into digits before everything else where the pre-tokenizer's name asks for it, as
            llama.cpp and the model's original tokenizer do. transformers does not, for GGUF files: runs of blanks
            before a number come out as other tokens.
    Returns:
        The tokenizer, and what ``tokenizer_config.json`` would say: bos_token_id, eos_token_ids, add_bos_token,
        chat_template, and the special tokens' texts.
    Raises:
        CheckpointError: a tokenizer model that is not supported, or inconsistent metadata.
    """

    def get(key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{key}")
        if value is None:
            return default
        if not isinstance(value, kind):
            raise CheckpointError(f"tokenizer.ggml.{key} has the wrong type {type(value).__name__}", file=file)
        return value

    tokens = get("tokens", list)
    if not tokens or not isinstance(tokens[0], str):
        raise CheckpointError("the metadata holds no tokenizer (tokenizer.ggml.tokens)", file=file)
    model = get("model", str, "")
    pre = get("pre", str, "default")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    types = get("token_type", np.ndarray)
    types = [1] * len(tokens) if types is None else [int(kind) for kind in types]
    if len(types) != len(tokens):
        raise CheckpointError(f"{len(tokens)} tokens but {len(types)} token types", file=file)

    try:
        if model == "gpt2":
            tokenizer = _byte_level(tokens, get("merges", list), pre, split_digits, file)
            add_bos = pre in _BOS_BY_DEFAULT
        elif model == "llama":
            tokenizer = _sentencepiece(metadata, tokens, vocabulary, get("add_space_prefix", bool, True), file)
            add_bos = True
        else:
            raise CheckpointError(f"tokenizer model {model!r} is not supported; supported: gpt2, llama", file=file)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"the tokenizer's metadata is inconsistent: {error}", file=file) from error

    _add_special(tokenizer, tokens, types, byte_level=model == "gpt2")
    return tokenizer, _settings(metadata, tokens, get("add_bos_token", bool, add_bos), get, file)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable letter for every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _byte_level(tokens: list[str], merges: list[str] | None, pre: str, split_digits: bool, file: str) -> Tokenizer:
    if merges is None:
        raise CheckpointError("a gpt2 tokenizer needs tokenizer.ggml.merges", file=file)
    alphabet = _byte_alphabet()
    letters = set(alphabet.values())
    # Added tokens may be spelled in plain text; the model sees everything in the byte alphabet.
    vocabulary = {
        token if letters.issuperset(token) else "".join(alphabet[byte] for byte in token.encode()): index
        for index, token in enumerate(tokens)
    }
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_pairs(merges, file), fuse_unk=False, ignore_merges=pre in _WHOLE_WORDS)
    )
    if pre in _SPLITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        if pre not in _GPT2_LIKE:
            warnings.warn(
                f"{file}: unknown pre-tokenizer {pre!r}; text is cut as GPT-2 does, so some tokens may differ from the "
                "model's own",
                stacklevel=4,
            )
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if split_digits and pre in _SPLIT_DIGITS:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pairs(merges: list[str], file: str) -> list[tuple[str, str]]:
    pairs = [tuple(merge.split(" ")) for merge in merges]
    bad = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
    if bad is not None:
        raise CheckpointError(f"a merge must be two tokens with a blank between, got {bad!r}", file=file)
    return pairs


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], vocabulary: dict[str, int], space_prefix: bool, file: str
) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    merges = metadata.get("tokenizer.ggml.merges")
    if isinstance(merges, list):
        pairs = _pairs(merges, file)
    elif isinstance(scores, np.ndarray) and len(scores) == len(tokens):
        pairs = _merges_from_scores(tokens, vocabulary, [float(score) for score in scores])
    else:
        raise CheckpointError("a llama tokenizer needs merges, or a score for every token", file=file)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    unknown = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if space_prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(tokens: list[str], vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose union scores best; as a BPE that is every split of every token, by score.

    Ties go to the longer left part, then to the longer right one, as in transformers' conversion.
    """
    found = []
    for token, score in dict(zip(tokens, scores, strict=True)).items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        local = [(left, right, score) for left, right in splits if left in vocabulary and right in vocabulary]
        found += sorted(local, key=lambda item: (vocabulary[item[0]], vocabulary[item[1]]))
    found.sort(key=lambda item: (item[2], len(item[0]), len(item[1])), reverse=True)
    return [(left, right) for left, right, _ in found]


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int], *, byte_level: bool) -> None:
    """Control tokens (``<|im_end|>``) are special; user-defined ones (``<think>``) are kept whole but are text."""
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL and token]
    if byte_level:
        # Real tokens are spelled in the byte alphabet; a control token that is not is a mislabelled piece of text.
        letters = set(_byte_alphabet().values())
        special = [token for token in special if letters.issuperset(token)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    known = tokenizer.get_vocab()
    plain = [
        token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED and token and token in known
    ]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _settings(metadata, tokens, add_bos, get, file) -> dict[str, Any]:
    ids: dict[str, int] = {}
    for key in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        value = get(f"{key}_token_id", int)
        if value is not None:
            if not 0 <= value < len(tokens):
                raise CheckpointError(
                    f"tokenizer.ggml.{key}_token_id is {value}, there are {len(tokens)} tokens", file=file
                )
            ids[key] = value
    template = metadata.get("tokenizer.chat_template")
    return {
        "bos_token_id": ids.get("bos"),
        "eos_token_ids": [ids[key] for key in ("eos", "eot", "eom") if key in ids],
        "add_bos_token": add_bos and "bos" in ids,
        "add_eos_token": bool(get("add_eos_token", bool, False)) and "eos" in ids,
        "chat_template": template if isinstance(template, str) else None,
        "special_tokens": {
            f"{name}_token": tokens[ids[key]]
            for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if key in ids
        },
    }
