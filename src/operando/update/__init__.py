"""Turning rewarded rollouts into one optimizer step: advantages, losses and their reductions."""
