"""Checkpoints asked and compared: held-out problems, benchmarks, canaries, the reward fuzzer."""
