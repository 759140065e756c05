"""Tensor parallelism for models that others wrote: Hugging Face models in one call, torch's ``parallelize_module``.

Imported lazily, name by name: transformers and PEFT are needed only by what uses them.
"""

import importlib

_HOMES = {
    "tp_kernels.integrations.hf": ["PatchReport", "apply_tp_kernels"],
    "tp_kernels.integrations.hf_loading": ["from_pretrained"],
    "tp_kernels.integrations.lora": ["load_lora", "register_lora", "save_lora"],
    "tp_kernels.integrations.styles": ["ColumnParallel", "RowParallel", "VocabParallel", "parallel_plan"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = list(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tp_kernels.integrations' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
