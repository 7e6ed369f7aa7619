"""RecursiveCausalLM: a transformers model whose core blocks run R times (prelude, core, coda).

Importing this package tells AutoConfig and AutoModelForCausalLM of it.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from operando.models.recursive.configuration import RecursiveConfig, count_parameters, preset
from operando.models.recursive.layout import check_layout
from operando.models.recursive.modeling import RecursiveCausalLM, RecursiveModel

AutoConfig.register("recursive_causal_lm", RecursiveConfig)
AutoModel.register(RecursiveConfig, RecursiveModel)
AutoModelForCausalLM.register(RecursiveConfig, RecursiveCausalLM)

__all__ = [
    "RecursiveCausalLM",
    "RecursiveConfig",
    "RecursiveModel",
    "check_layout",
    "count_parameters",
    "preset",
]
