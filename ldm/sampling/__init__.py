"""Samplers, one a file; time grids; guidance; and the noise of a sampling run."""
