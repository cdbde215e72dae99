"""What a user reads after a test or a prediction: verdicts, reports by product, pictures."""
