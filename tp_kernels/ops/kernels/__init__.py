"""Triton and Gluon kernels, one family a file, with the launchers and configurations that go with them.

No kernel is imported before the first GPU tensor arrives: ``import tp_kernels`` neither needs nor loads Triton.
Every module has the same parts, in this order:

    kernels                          ``@triton.jit`` or ``@gluon.jit``, private
    Config                           a NamedTuple of what may be tuned
    default_config(info, ...)        pure, right on every GPU, not necessarily the fastest
    candidates(info, ...)            what ``tp-kernels tune`` measures; all fit the GPU's shared memory
    launchers                        write into tensors they are given and allocate nothing but workspace
    aot_cases()                      representative launches, compiled to sm_80 and sm_90 by the tests without a GPU
"""
