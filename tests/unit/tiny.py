"""Random tiny models of the served families, a byte-level tokenizer, and word-problem rollouts."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from operando.types import Batch, Example, Prompt, Rollout, make_batch


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 bytes plus <pad> and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_model(family: str, seed: int = 0, vocab_size: int = 258) -> PreTrainedModel:
    """A random model of 3 layers, wide enough in its weights that its choices differ."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.3,
    }
    match family:
        case "llama":
            model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**shape))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16))
        case "gemma":
            model = GemmaForCausalLM(GemmaConfig(**shape, head_dim=16))
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
        case "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=vocab_size,
                    n_embd=32,
                    n_layer=3,
                    n_head=4,
                    n_positions=256,
                    pad_token_id=0,
                    eos_token_id=1,
                    bos_token_id=None,
                    initializer_range=0.3,
                    attn_pdrop=0.0,
                    embd_pdrop=0.0,
                    resid_pdrop=0.0,
                )
            )
        case _:
            raise AssertionError(family)
    return model.eval()


def random_batch(groups: int, group_size: int, seed: int = 0) -> Batch:
    """Rollouts with random ids and lengths: prompts of 3-9 tokens, completions of 1-12."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    rollouts = []
    for group in range(groups):
        ids = tuple(draw(2, 258, draw(3, 10)[0]))
        example = Example(id=f"e{group}", question="q", answer="7", columns={"answer": "7"})
        prompt = Prompt(example, "q", ids)
        for sample in range(group_size):
            completion = tuple(draw(2, 258, draw(1, 13)[0]))
            logp = tuple(-0.5 for _ in completion)
            rollouts.append(Rollout(prompt, group, sample, "7", completion, logp, False))
    return make_batch(rollouts, group_size, pad_id=0)
