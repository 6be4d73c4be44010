"""Triton helpers that kernels are made of; nothing here is launched."""
