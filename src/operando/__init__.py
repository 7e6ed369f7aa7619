"""operando: reinforcement learning of language models with the internals in the loop."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Load what needs torch only when it is asked for, so that `import operando` stays light."""
    match name:
        case "load_sae":
            from operando.sae.formats import load_sae

            return load_sae
        case "load_chain":
            from operando.drift.published import load_chain

            return load_chain
        case _:
            raise AttributeError(f"module 'operando' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "load_chain", "load_sae"]
