"""Attention over lists of tiles, and its gradients, for every GPU."""
