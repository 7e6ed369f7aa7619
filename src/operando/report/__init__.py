"""What is shown of a run: one HTML page, and the model card."""
