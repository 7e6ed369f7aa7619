"""Sparse autoencoders: their formats, training, quality, and the features chosen from them."""
