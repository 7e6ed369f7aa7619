"""Plain language-model and supervised training."""
