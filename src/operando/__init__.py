"""operando: reinforcement learning of language models with the internals in the loop."""

__version__ = "0.1.0"
