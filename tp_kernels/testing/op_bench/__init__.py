"""Microbenchmarks of the ops: one module an op with its cases, peers and tunable paths; see ``case.py``."""
