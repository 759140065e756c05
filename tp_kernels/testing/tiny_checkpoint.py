"""A complete tiny checkpoint folder (random Llama, byte-level tokenizer, chat template) for tests of whole commands.

Needs transformers and tokenizers, which are imported only when one is made.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["save_tiny_checkpoint"]

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_checkpoint(folder: str | Path, *, layers: int = 2, max_position_embeddings: int = 1 << 20) -> Path:
    """Save a Llama with 9 query and 3 KV heads that never ends a text by itself; returns ``folder``.

    The weights are spread widely, so that greedy tokens do not hang on the last bits of the logits.

    Args:
        folder: made if it is missing.
        layers: number of decoder layers.
        max_position_embeddings: large by default, so that a generation can be kept running for as long as a test wants.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[1],
        "eos_token": special[0],
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    config = transformers.LlamaConfig(
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=101,
        vocab_size=len(vocabulary),
        num_hidden_layers=layers,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=1,
        eos_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[1] ** 0.5)
        # Special tokens get a zero row: their logit is 0, and some other token's is always above it.
        model.lm_head.weight[: len(special)] = 0.0
    model.save_pretrained(folder)
    return folder
