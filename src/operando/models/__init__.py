"""What is trained: models, the policy, layer sets, hooks, log-probs."""
