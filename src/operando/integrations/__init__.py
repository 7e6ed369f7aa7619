"""What connects operando to other tools; each needs that tool only when it is used."""
