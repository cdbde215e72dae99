"""What one does with a trained model: load it, find its data, move its threshold."""
