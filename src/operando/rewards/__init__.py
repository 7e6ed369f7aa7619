"""What is rewarded."""
