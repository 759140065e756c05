"""The parts of ``tp-kernels bench model`` that know nothing of our own models: rivals, checks, budgets, reports."""
