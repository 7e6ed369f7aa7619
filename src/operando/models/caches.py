"""CACHE: what the installed transformers calls a model's cache, as an argument and as a result.

`cache` since transformers 5.24, `past_key_values` before:
    out = model(input_ids=ids_BT, use_cache=True, **{CACHE: cache})
    cache = out[CACHE]
"""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

_FIELDS = {field.name for field in fields(CausalLMOutputWithPast)}
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"
