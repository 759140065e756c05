"""Text from a checkpoint that no rank holds whole, through the Python API under torchrun.

torchrun --nproc-per-node 2 examples/torchrun_generate.py                     the demo model, if it is installed
torchrun --nproc-per-node 2 examples/torchrun_generate.py ./Llama-3.2-1B "Once upon a time"
python examples/torchrun_generate.py                                          one rank, no torch.distributed
"""

import os
import sys

import torch

import tp_kernels as tp
from tp_kernels.checkpoint.demo_model import smollm2_path


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else smollm2_path()
    question = sys.argv[2] if len(sys.argv) > 2 else "Name three primary colours."
    with tp.ProcessGroupManager.initialize() as manager:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
        first = manager.rank == 0

        tokenizer = tp.load_tokenizer(path)
        model = tp.load_model(path, dtype=torch.float32)  # reads only this rank's bytes of the file
        prompts = [tokenizer.chat(question), tokenizer.encode("The capital of France is")]
        result = tp.generate(model, prompts, max_new_tokens=24)  # a batch of two, of different lengths

        if first:
            for ids in result.output_ids:
                print("-", tokenizer.decode(ids).strip().replace("\n", " "))
            print(f"[{manager.world_size} ranks, {result.tokens_per_second:.1f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    main()
