"""Exact fields and densities, and the paper's claims as small experiments on drawn data."""
