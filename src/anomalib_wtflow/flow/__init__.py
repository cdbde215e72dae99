"""The method: path, coupling, field, solver, normalisation, regression. Knows torch, scipy and torchdiffeq only."""
