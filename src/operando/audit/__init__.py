"""What is checked about a run after the fact; only run folders are read."""
