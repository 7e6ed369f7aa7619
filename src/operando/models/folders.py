"""Writing model folders that transformers 4.57 and 5 read alike, but for GPT-NeoX's rotary keys.

transformers 5 writes rotary settings as `rope_parameters` alone, which 4.x does not know: it would
fall back to a theta of 10000 without a word, and every position would be turned wrongly. It also
names a tokenizer class that 4.x does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from operando.files import read_object
from operando.models.recursive import RecursiveCausalLM
from operando.run import write_json

RECURSIVE_CARD = """# A recursive language model

transformers learns of its class from operando, in the process that loads it:

```python
import operando.models.recursive
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")
```
"""

Json = dict[str, object]


def save_folder(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model and tokenizer into a folder; `weights` stand for the model's own, if given."""
    model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    tokenizer.save_pretrained(folder)
    if isinstance(model, RecursiveCausalLM):
        (folder / "README.md").write_text(RECURSIVE_CARD, encoding="utf-8")
    _edit(folder / "config.json", with_rope_of_4)
    _edit(folder / "tokenizer_config.json", _with_class_of_4)


def with_rope_of_4(config: Json) -> Json:
    """Return a config.json with transformers 4's rotary keys beside those of 5, text part too."""
    text = config.get("text_config")
    if isinstance(text, dict):
        return config | {"text_config": with_rope_of_4(text)}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    if "rope_type" in rope:
        return config | _flat(rope)
    full, local = rope.get("full_attention"), rope.get("sliding_attention")
    if not isinstance(full, dict) or not isinstance(local, dict):
        return config
    return config | _flat(full) | {"rope_local_base_freq": local["rope_theta"]}


def _flat(rope: Json) -> Json:
    keys: Json = {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")}
    if rope["rope_type"] != "default":
        keys["rope_scaling"] = {k: v for k, v in rope.items() if k not in keys}
    return keys


def _with_class_of_4(config: Json) -> Json:
    if config.get("tokenizer_class") != "TokenizersBackend":
        return config
    return config | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _edit(file: Path, change: Callable[[Json], Json]) -> None:
    config = read_object(file)
    write_json(file, change(config))
