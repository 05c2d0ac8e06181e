"""Sparse training with real kernels: SWAT's sparse weights and sparse activations for PyTorch, faster and smaller as measured."""
