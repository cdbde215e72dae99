"""What a user reads after a test or a prediction; importing this registers the reports."""
