"""Samplers, one a file; the times they visit; guidance; and the noise they draw."""
