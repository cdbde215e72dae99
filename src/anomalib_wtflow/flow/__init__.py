"""The method: path, coupling, field, solver, normalisation, regression. Knows nothing of Lightning or anomalib."""
