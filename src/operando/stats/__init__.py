"""Statistics, at the ground: one interval, one place for each test. Used by every room above."""
