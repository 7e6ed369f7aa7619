"""The recursive model's own: halting and drafting heads, its pipeline, what its loops do."""
