"""The model card that is written beside every checkpoint while training goes on.

It holds what is known at that moment; `operando report` rewrites it with the evaluations.
"""

from __future__ import annotations

from operando.models.load import EMBEDDED, auto_class
from operando.models.policy import Policy
from operando.models.recursive import RecursiveCausalLM
from operando.recipe.run import Recipe
from operando.recipe_io import to_toml


def draft_card(recipe: Recipe, step: int, policy: Policy) -> str:
    """Return the card of a checkpoint as Markdown with PEFT's front matter."""
    lora = recipe.model.lora
    count = sum(p.numel() for p in policy.trainable().values())
    layers = f"{policy.layers[0]}-{policy.layers[-1]}" if policy.layers else "none"
    library = "peft" if lora is not None else "transformers"
    own = recipe.model.id in EMBEDDED
    name = f"operando.models.load.{recipe.model.id.upper()}" if own else f'"{recipe.model.id}"'
    auto = auto_class(policy.base.config).__name__
    base = f"{auto}.from_pretrained({name})"
    load = (
        f"PeftModel.from_pretrained({base}, HERE)"
        if lora is not None
        else f"{auto}.from_pretrained(HERE)"
    )
    first = "import operando.models.load\n" if own else ""
    if isinstance(policy.base, RecursiveCausalLM):
        first += "import operando.models.recursive\n"  # transformers learns of the class from it
    first += "from peft import PeftModel\n" if lora is not None else ""
    kind = f"LoRA rank {lora.rank}, alpha {lora.alpha:g}" if lora is not None else "full parameters"
    return f"""---
base_model: {recipe.model.id}
library_name: {library}
tags: [operando, reinforcement-learning]
---
# {recipe.name}, step {step} of {recipe.steps}

{kind}; {count:,} trained parameters in {len(policy.layers)} of {len(policy.blocks)} decoder blocks
({layers}). Task `{recipe.task.kind}`, seed {recipe.seed}, learning rate {recipe.optim.lr:g}.
Not evaluated in this card: see `results.json` and `evals/` of the run.

```python
{first}from transformers import {auto}

model = {load}
```

## Recipe

```toml
{to_toml(recipe)}```
"""
