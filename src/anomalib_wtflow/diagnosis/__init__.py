"""Diagnosis of a trained model: numbers, figures, words, and an HTML page."""
