"""Tile means, scores, and which tiles are kept, as lists."""
