"""Many products in one model: which one an image shows, their data, and their report."""
