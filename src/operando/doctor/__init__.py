"""What is wrong with a run: findings from its metrics, each with a remedy."""
