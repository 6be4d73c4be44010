"""`plan`: what Video Sparse Attention will do for a model and a size, before anything is downloaded."""

from .plan import Plan, plan

__all__ = ["Plan", "plan"]
