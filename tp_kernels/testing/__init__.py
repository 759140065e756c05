"""What this project's tests and benchmarks use, shipped for users' own: import the module you need.

``rank_pool`` runs functions on real ranks, ``numeric`` holds the tolerance rule (twice PyTorch's own error), ``bench``
the interleaved timing, CSV and plots, ``machine`` the record of where a figure came from.
"""
