"""Predictions for a model on N GPUs: memory a rank, roofline times, communication, speedup. Pure functions."""
