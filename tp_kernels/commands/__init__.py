"""The sub-commands of ``tp-kernels``, one a module.

Each has NAME, SUMMARY, DESCRIPTION, EXAMPLES, ``add_arguments(parser)`` and ``run(args)``. None of them imports torch
at module level.
"""

from tp_kernels.commands import bench, demo, doctor_command, generate, launch_command, plan, tune

__all__ = ["COMMANDS"]

COMMANDS = (demo, generate, doctor_command, bench, tune, plan, launch_command)
