"""Diffusion on Diffusion (DoD, arXiv 2410.08531) in PyTorch: data, model, flow, training, sampling, evaluation.

Nothing here knows about DVC or Dagster: every stage reads paths, and writes one output folder.
"""
