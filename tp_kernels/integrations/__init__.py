"""Tensor parallelism for models that others wrote: Hugging Face models in one call, torch's ``parallelize_module``.

Imported lazily, name by name: transformers and PEFT are needed only by what uses them.
"""

from tp_kernels._lazy import lazy

_HOMES = {
    "hf": ["PatchReport", "apply_tp_kernels"],
    "hf_loading": ["from_pretrained"],
    "lora": ["load_lora", "register_lora", "save_lora"],
    "styles": ["ColumnParallel", "RowParallel", "VocabParallel", "parallel_plan"],
}

__all__ = [name for names in _HOMES.values() for name in names]

__getattr__, __dir__ = lazy(__name__, _HOMES)
