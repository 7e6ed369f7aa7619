"""What inside a model goes with right and wrong answers, and what chance would have shown."""
