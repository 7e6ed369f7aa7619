"""What ails a run: findings from its metrics, each with a remedy."""
