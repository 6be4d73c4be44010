"""Whole videos by any supported pipeline: loading, calling, and several processes for one video."""
