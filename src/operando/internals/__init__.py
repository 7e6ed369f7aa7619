"""What is read inside a model: sparse autoencoders and the formats they come in."""
