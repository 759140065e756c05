"""A Hugging Face Llama on as many ranks as there are: python examples/hf_generate.py ./Llama-3.2-1B ["prompt"], or under torchrun."""

import sys

from transformers import AutoTokenizer

import tp_kernels as tp

path, prompt = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "The capital of France is"
with tp.ProcessGroupManager.initialize() as manager:
    model = tp.from_pretrained(path)  # a LlamaForCausalLM; each rank reads only its shard
    tokens = AutoTokenizer.from_pretrained(path)(prompt, return_tensors="pt")
    output = model.generate(**tokens, max_new_tokens=24, do_sample=False)
    if manager.rank == 0:
        print(AutoTokenizer.from_pretrained(path).decode(output[0], skip_special_tokens=True))
