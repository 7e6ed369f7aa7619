"""What changed inside between checkpoints: SAE training and quality, chains, null arms."""
