"""Read the residual stream of the starter model, and where two prompts part in it."""

import torch

from operando import ModelConfig, load_model
from operando.models.hooks import ActivationReader

loaded = load_model(ModelConfig(id="starter"))
num_layers = loaded.model.config.num_hidden_layers
sites = [f"blocks.{layer}.hook_resid_post" for layer in range(num_layers)]
reader = ActivationReader(loaded.model, sites)


def last_token(text: str) -> dict[str, torch.Tensor]:
    """Return what the model holds at each site after the last token, [D] each."""
    ids_BS = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    with torch.no_grad(), reader.reading() as acts_BSD:
        loaded.model(input_ids=ids_BS)
    return {site: acts_BSD[site][0, -1] for site in sites}


few = last_token("Q: Tom has 3 pens and buys 2 more. How many pens has he now?\nA:")
many = last_token("Q: Tom has 13 pens and buys 12 more. How many pens has he now?\nA:")
for site in sites:
    cosine = torch.cosine_similarity(few[site], many[site], dim=0)
    print(f"{site}  norm {few[site].norm():6.2f}  cosine {cosine:+.3f}")
