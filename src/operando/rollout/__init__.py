"""How text is sampled."""
