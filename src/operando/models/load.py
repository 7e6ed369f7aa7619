"""From a name to a model and its tokenizer, with everything that could differ said explicitly."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from operando import parallel
from operando.errors import UserError, nearest
from operando.models.home import cache_folder, imported_models
from operando.models.layers import is_multimodal
from operando.models.recursive import RecursiveConfig, check_layout
from operando.models.tokens import load_tokenizer
from operando.recipe.data import ModelConfig
from operando.run import hash_file

logger = logging.getLogger(__name__)

MERGE = (
    "Merge it first: PeftModel.from_pretrained(base, FOLDER).merge_and_unload()"
    ".save_pretrained(NEW_FOLDER)"
)

SMALL = 100_000_000  # parameters up to which "auto" is float32: nothing is gained by 16 bits
WORTH = 1.5  # times faster than float32, from which "auto" is bfloat16 on a CPU

STARTER, DEEP = (Path(__file__).parent / name for name in ("starter", "deep"))
EMBEDDED = {"starter": STARTER, "deep": DEEP}


Dtype = Literal["float32", "bfloat16"]


class Loaded(NamedTuple):
    """A model in eval mode with its tokenizer, and what identifies its weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, str]


class Opened(NamedTuple):
    """What can be read of a model before its weights."""

    where: str  # folder or hub id
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig


def resolve(model_id: str) -> str:
    """Return the folder or hub id that a model id means."""
    if model_id in EMBEDDED:
        return str(EMBEDDED[model_id])
    if model_id in imported_models():
        return str(cache_folder() / "models" / model_id)
    if model_id.endswith(".gguf"):
        from operando.models.gguf import import_gguf

        return str(import_gguf(Path(model_id)))
    if Path(model_id).is_dir():
        adapter = (Path(model_id) / "adapter_config.json").is_file()
        if not (Path(model_id) / "config.json").is_file():
            raise UserError(
                f"model.id: the folder {model_id} has no config.json"
                + (f": it is an adapter alone. {MERGE}" if adapter else "")
            )
        if adapter:
            raise UserError(
                f"model.id: the folder {model_id} holds an adapter beside the model, which would "
                "be loaded into the base without a word. Move it elsewhere to train the plain "
                f"model. {MERGE}"
            )
        return model_id
    if "/" not in model_id or model_id.startswith((".", "/")):
        known = [*EMBEDDED, *imported_models(), "smollm2"]
        todo = " Run `operando import smollm2` first." if model_id == "smollm2" else ""
        raise UserError(
            f"model.id = {model_id!r} is neither a folder, an imported model nor a hub id."
            f"{todo or nearest(model_id, known)} Here: {', '.join(EMBEDDED)}, "
            f"{', '.join(imported_models()) or 'nothing imported'}"
        )
    return model_id


def pick_device(device: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:1` means here, made the current one.

    Streams and graphs are made on the current device, wherever the tensors are.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"model.device = {device!r}: {error}") from error
    if picked.type not in ("cpu", "cuda"):
        raise UserError(f'model.device = {device!r}: expected "auto", "cpu", "cuda" or "cuda:1"')
    if picked.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"model.device = {device!r}, but torch sees no CUDA device here")
        if picked.index is not None:
            _make_current(picked.index)
    return picked


def _make_current(index: int) -> None:
    found = torch.cuda.device_count()
    if index >= found:
        raise UserError(f'model.device = "cuda:{index}", but there are {found} CUDA devices here')
    if parallel.world_size() > 1 and index != torch.cuda.current_device():
        raise UserError(
            f'model.device = "cuda:{index}" puts every process on one device: set "cuda", and each '
            "takes the device of its rank"
        )
    torch.cuda.set_device(index)


def open_model(config: ModelConfig) -> Opened:
    """Return what can be read of a model before its weights: where it is, tokenizer, config."""
    where = resolve(config.id)
    device = pick_device(config.device)
    check_layout(Path(where))
    try:
        tokenizer = load_tokenizer(where, config.revision)
        published = AutoConfig.from_pretrained(where, revision=config.revision)
    except (OSError, ValueError) as error:
        raise _unreadable(config, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {config.id!r} has no end-of-sequence token: set eos_token in its "
            "tokenizer_config.json"
        )
    return Opened(where, device, tokenizer, published)


def opened_of(loaded: Loaded) -> Opened:
    """Return the same of a model that is loaded already."""
    return Opened("", loaded.model.device, loaded.tokenizer, loaded.model.config)


def load_model(config: ModelConfig, opened: Opened | None = None) -> Loaded:
    """Return model and tokenizer as the recipe asks, in eval mode, on the device.

    Example: model, tokenizer, identity = load_model(load_recipe("demo").model)
    """
    opened = opened or open_model(config)
    where, device, tokenizer, published = opened
    dtype = getattr(torch, choose_dtype(config, opened).dtype)
    try:
        model = auto_class(published).from_pretrained(
            where,
            revision=config.revision,
            dtype=dtype,
            attn_implementation="sdpa",
            quantization_config=_quantization(config, dtype),
            device_map={"": device} if config.quantization != "none" else None,
        )
    except (OSError, ValueError) as error:
        raise _unreadable(config, error) from error
    assert isinstance(model, PreTrainedModel), type(model)
    if config.quantization == "none":
        nn.Module.to(model, device)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # On a CPU bitsandbytes would pack the weights for inference, and then has no gradient.
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]
    return Loaded(model.eval(), tokenizer, _identity(config, where))


def _unreadable(config: ModelConfig, error: Exception) -> UserError:
    first = str(error).strip().splitlines()[0]
    return UserError(f"model.id = {config.id!r} can't be loaded: {first}")


def auto_class(
    config: PreTrainedConfig,
) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """Return the class that loads a model whole: with its towers, if its config has them.

    A multimodal checkpoint loaded as a causal language model would lose its towers, and an adapter
    trained on what is left names other modules than those of the published model.
    """
    if not is_multimodal(config):
        return AutoModelForCausalLM
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or config.is_encoder_decoder:
        raise UserError(
            f"{config.model_type!r} is a multimodal model without a language decoder: there are no "
            "blocks that write text, so nothing to train here"
        )
    return AutoModelForImageTextToText


class DtypeChoice(NamedTuple):
    """What model.dtype is here, and why. Example: DtypeChoice("float32", "the recipe says so")"""

    dtype: Dtype
    why: str


def choose_dtype(config: ModelConfig, opened: Opened, *, frozen: bool = False) -> DtypeChoice:
    """Return the recipe's dtype, or what "auto" is for this model on this machine.

    `frozen`: nothing of it will be trained. Only the last line depends on a measurement, and what
    it can say lies far from the bound: a product in bfloat16 takes a quarter of the time with its
    instructions, and nine times as long without.
    """
    if config.dtype != "auto":
        return DtypeChoice(config.dtype, "the recipe says so")
    if config.lora is None and not frozen:
        return DtypeChoice("float32", "the weights themselves are trained")
    if isinstance(opened.config, RecursiveConfig):
        return DtypeChoice("float32", "a recursive model")
    count = count_parameters(opened.config)
    if count <= SMALL:
        return DtypeChoice("float32", f"{count:,} parameters are at most {SMALL:,}")
    if opened.device.type == "cuda":
        return DtypeChoice("bfloat16", f"{count:,} parameters on a CUDA device")
    times = 1 / bfloat16_slowdown()
    return DtypeChoice(
        "bfloat16" if times >= WORTH else "float32",
        f"{count:,} parameters, and this processor multiplies bfloat16 {times:.2g} times as fast "
        f"as float32; from {WORTH} on it is bfloat16",
    )


def dtype_name(model: PreTrainedModel) -> Dtype:
    """Return the dtype of a loaded model's frozen weights, in a recipe's words."""
    return "float32" if model.dtype == torch.float32 else "bfloat16"


def count_parameters(config: PreTrainedConfig) -> int:
    """Return a model's number of parameters from its config; a tied weight counts once."""
    with torch.device("meta"):
        return auto_class(config).from_config(config).num_parameters()


@cache
def bfloat16_slowdown(size: int = 512, rounds: int = 5) -> float:
    """Return how many times longer a bfloat16 product takes than a float32 one on this processor;
    the fastest of `rounds`, which other processes can't lengthen; a few hundredths of a second,
    once a process. Without its instructions it is near 9."""
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(rounds + 1):
        for dtype, taken in seconds.items():
            a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
            started = time.perf_counter()
            torch.mm(a, b)
            taken.append(time.perf_counter() - started)
    whole, half = (min(taken[1:]) for taken in seconds.values())
    return half / whole


@contextmanager
def float32_products(config: ModelConfig, device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices as the recipe says, for the length of a block."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision_of(config, device))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)


def precision_of(config: ModelConfig, device: torch.device) -> str:
    """Return torch's word for how float32 matrices are multiplied: "high" is TF32."""
    return "high" if config.tf32 and device.type == "cuda" else "highest"


def count_layers(config: ModelConfig) -> int:
    """Return the number of decoder blocks, from the model's config alone."""
    loaded = AutoConfig.from_pretrained(resolve(config.id), revision=config.revision)
    return loaded.get_text_config().num_hidden_layers


def width_of(config: ModelConfig) -> int:
    """Return the width of the residual stream, from the model's config alone."""
    loaded = AutoConfig.from_pretrained(resolve(config.id), revision=config.revision)
    return loaded.get_text_config().hidden_size


def _quantization(config: ModelConfig, dtype: torch.dtype) -> object | None:
    if config.quantization == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            'model.quantization = "nf4" needs: pip install "operando[quant]"'
        ) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def _identity(config: ModelConfig, where: str) -> dict[str, str]:
    folder = Path(where)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        hashes = {f"sha256 {file.name}": hash_file(file) for file in files}
        return {"id": config.id, "folder": folder.name} | hashes
    resolved = AutoConfig.from_pretrained(where, revision=config.revision)
    return {"id": config.id, "commit": str(resolved._commit_hash)}


LLAMA_LIKE = ("llama", "qwen2", "qwen3", "gemma")


def is_llama_like(model: PreTrainedModel) -> bool:
    """Return whether every block is plain causal attention and an MLP, as in Llama."""
    config = model.config
    window = "use_sliding_window" in config and config.use_sliding_window
    return config.model_type in LLAMA_LIKE and not window


@contextmanager
def lora_in_model_dtype(model: PreTrainedModel) -> Iterator[None]:
    """Cast LoRA's float32 factors to a 16-bit model's dtype for the product, not the activations.

    The factors are small and the activations are not; the factors' gradients arrive in float32.
    """
    if model.dtype == torch.float32:
        yield
        return
    with disable_input_dtype_casting(model), torch.autocast(model.device.type, model.dtype):
        yield


def head_weight(model: PreTrainedModel) -> nn.Parameter:
    """Return the output head's weight [V D]; a model without a bias-free head is refused."""
    head = model.get_output_embeddings()
    if head is None or "bias" in dict(head.named_parameters()):
        raise UserError(f"{type(model).__name__}: needs an output head without bias")
    return head.get_parameter("weight")


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills rows; it is always masked, so end-of-sequence serves as well."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert isinstance(eos, int), f"eos_token_id is {eos!r}"
    return pad if isinstance(pad, int) else eos


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a completion: the tokenizer's and the generation config's."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    found = [
        tokenizer.eos_token_id,
        *(configured if isinstance(configured, list) else [configured]),
    ]
    return tuple(sorted({i for i in found if isinstance(i, int)}))
