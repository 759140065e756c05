"""A Hugging Face Llama, patched, generating: python examples/hf_generate.py FOLDER TEXT, or the same under torchrun."""

import sys

import torch
from transformers import AutoTokenizer

import tp_kernels as tp

if len(sys.argv) != 3:
    sys.exit(__doc__)
with tp.ProcessGroupManager.initialize(device="cuda" if torch.cuda.is_available() else "cpu") as manager:
    model = tp.from_pretrained(sys.argv[1])  # a LlamaForCausalLM, patched; each rank reads only its shard
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    tokens = model.generate(**tokenizer(sys.argv[2], return_tensors="pt").to(model.device), max_new_tokens=24)
    if manager.rank == 0:
        print(model.tp_report, tokenizer.decode(tokens[0], skip_special_tokens=True), sep="\n")
