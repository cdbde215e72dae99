"""The method in plain torch: path, coupling, field, solver, normalisation, regression."""
