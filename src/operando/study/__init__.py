"""Arms, seeds and the statistics that compare them."""
