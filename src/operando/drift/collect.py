"""Residual activations of every stage of a run, on the same tokens for all stages.

One forward serves all sites. What is kept is [tokens, d_model] in float16 on disk, one file a stage
and site, never the dense features:

    drift/acts/both/step_00010/blocks.3.hook_resid_post.npy      drift/acts/both/texts.json
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from operando.errors import UserError
from operando.files import read_object
from operando.models.hooks import ActivationReader
from operando.models.load import head_weight, load_model, lora_in_model_dtype
from operando.models.logprobs import token_logps
from operando.models.policy import Policy
from operando.run import SeedTree, atomic_path, write_json
from operando.run_folder import read_manifest, read_recipe
from operando.sae.quality import splicing
from operando.tables import read_parquet
from operando.update.checkpoint import load_weights, weight_steps

Writer = Literal["base", "last", "both"]
BATCH_TOKENS = 8192  # of one forward, padding included


@dataclass(frozen=True)
class Texts:
    """Prompts with completions; the completions' tokens are those that are read.

    `writer` says whose completions they are: of the first step's policy (the base), of the last
    step's, or half of each. `digest` names the token ids.

    Example: read_texts(Path("runs/ppo"), "both", max_tokens=20_000).num_tokens
    """

    writer: Writer
    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    digest: str

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.completions))

    def text_of_token(self) -> Tensor:
        """Return for each token the number of its text [N]."""
        lengths = torch.tensor([len(c) for c in self.completions])
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    def prompt_of_token(self) -> Tensor:
        """Return for each token the number of its run of texts with the same prompt [N].

        Siblings say much the same: for intervals and tests they are one.
        """
        new = [a != b for a, b in zip(self.prompts[1:], self.prompts, strict=False)]
        run_of_text = torch.tensor([0, *new]).cumsum(0)
        return run_of_text[self.text_of_token()]


def read_texts(run: Path, writer: Writer, max_tokens: int) -> Texts:
    """Return the first rollouts of the first step, of the last step, or both in turn.

    The first step is sampled before any update: its completions are the base's. With few rollouts a
    step, those of the steps beside it are taken until `max_tokens` is reached.
    """
    files = sorted((run / "rollouts").glob("step_*.parquet"))
    if len(files) < 2:
        raise UserError(f"{run}/rollouts holds {len(files)} steps; texts need at least 2")
    half = max_tokens // 2
    match writer:
        case "base":
            rows = _rows(files[:1], max_tokens)
        case "last":
            rows = _rows(files[::-1], max_tokens)
        case "both":
            rows = _rows(files[: len(files) // 2], half) + _rows(files[::-1], half)
    ids = json.dumps([[list(p), list(c)] for p, c in rows]).encode()
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    return Texts(writer, prompts, completions, hashlib.sha256(ids).hexdigest())


def _rows(files: Sequence[Path], max_tokens: int) -> list[tuple[list[int], list[int]]]:
    found: list[tuple[list[int], list[int]]] = []
    num = 0
    for file in files:
        table = read_parquet(file, columns=["prompt_ids", "completion_ids"]).to_pylist()
        for row in table:
            if num >= max_tokens:
                return found
            found.append((row["prompt_ids"], row["completion_ids"]))
            num += len(row["completion_ids"])
    return found


def chosen_texts(run: Path) -> Texts:
    """Return the texts that this run's SAEs were trained on."""
    read_manifest(run)  # an error if it is no run folder
    file = run / "drift" / "texts.json"
    if not file.is_file():
        raise UserError(f"{run} has no SAE chains; run: operando sae train {run}")
    kept = read_object(file, writer=str, max_tokens=int, digest=str)
    texts = read_texts(run, kept["writer"], kept["max_tokens"])
    if texts.digest != kept["digest"]:
        raise UserError(f"{run}/rollouts changed since its SAEs were trained: other token ids")
    return texts


def choose_texts(run: Path, writer: Writer, max_tokens: int) -> Texts:
    """Return texts and remember the choice; SAEs of another choice may not be gone on from."""
    texts = read_texts(run, writer, max_tokens)
    file = run / "drift" / "texts.json"
    value = {"writer": writer, "max_tokens": max_tokens, "digest": texts.digest}
    if file.is_file() and read_object(file) != value:
        raise UserError(
            f"{run} has SAEs of other texts ({file}); give the same --texts and --tokens, or "
            f"remove {run}/saes and {run}/drift"
        )
    write_json(file, value)
    return texts


def stages_of(run: Path) -> list[int]:
    """Return 0 (the base) and every step with saved weights."""
    saved = weight_steps(run)
    if not saved:
        raise UserError(f"{run} has no checkpoint: there is no stage but the base")
    return [0, *saved]


def acts_file(run: Path, texts: Texts, step: int, site: str) -> Path:
    return run / "drift" / "acts" / texts.writer / f"step_{step:05d}" / f"{site}.npy"


def sites_of(layers: Sequence[int]) -> list[str]:
    """Return the residual after each layer, as site names."""
    return [f"blocks.{layer}.hook_resid_post" for layer in layers]


def collect(
    run: Path,
    sites: Sequence[str],
    texts: Texts,
    on_stage: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[int]:
    """Write the activations of every stage that are not there yet; return the stages.

    Files of other texts are replaced: texts.json says which token ids the files belong to.
    """
    stages = stages_of(run)
    where = run / "drift" / "acts" / texts.writer / "texts.json"
    known = read_object(where, digest=str)["digest"] if where.is_file() else None
    if known != texts.digest:
        for old in where.parent.glob("step_*/*.npy"):
            old.unlink()
        write_json(where, {"digest": texts.digest, "tokens": texts.num_tokens})
    recipe = read_recipe(run)
    policy: Policy | None = None
    for number, step in enumerate(stages):
        missing = [s for s in sites if not acts_file(run, texts, step, s).is_file()]
        if missing:
            if policy is None:
                policy = Policy(load_model(recipe.model), recipe.model, SeedTree(recipe.seed))
            if step:
                load_weights(run, step, policy)
            acts = read_acts(policy, missing, texts)
            for site, acts_ND in acts.items():
                file = acts_file(run, texts, step, site)
                with atomic_path(file) as part, part.open("wb") as stream:
                    np.save(stream, acts_ND.numpy())
        on_stage(number + 1, len(stages))
    return stages


@torch.no_grad()
def read_acts(
    policy: Policy, sites: Sequence[str], texts: Texts
) -> Mapping[str, Float[Tensor, "N D"]]:
    """Return the float16 activations at every completion token, in the order of the texts."""
    reader = ActivationReader(policy.base, sites)
    width = policy.base.config.get_text_config().hidden_size
    acts = {s: torch.empty(texts.num_tokens, width, dtype=torch.float16) for s in sites}
    start = 0
    for ids_BS, read_BS in padded_batches(texts):
        with reader.reading() as seen:
            run_decoder(policy, ids_BS)
        end = start + int(read_BS.sum())
        for site in sites:
            acts[site][start:end] = seen[site][read_BS.to(policy.device)].cpu()
        start = end
    for site, acts_ND in acts.items():
        if not acts_ND.isfinite().all():
            raise UserError(f"site {site}: activations are not finite in float16")
    return acts


class Splice(NamedTuple):
    """What is put in place of the kept tokens at a site. `kept_N` runs over all that are read.

    Example: Splice("blocks.3.hook_resid_post", ~sink_tokens(acts_ND), sae.reconstruct)
    """

    site: str
    kept_N: Bool[Tensor, "N"]
    change: Callable[[Tensor], Tensor]


@torch.no_grad()
def text_logps(policy: Policy, texts: Texts, splice: Splice | None = None) -> Float[Tensor, "N"]:
    """Return the log-prob of every completion token, at temperature 1."""
    parts: list[Tensor] = []
    start = 0
    for ids_BS, read_BS in padded_batches(texts):
        assert not bool(read_BS[:, 0].any()), "a text without a prompt"
        if splice is None:
            hidden_BSD = run_decoder(policy, ids_BS)
        else:
            change_BS = read_BS.clone()
            change_BS[read_BS] = splice.kept_N[start : start + int(read_BS.sum())]
            with splicing(policy.base, splice.site, change_BS.to(policy.device), splice.change):
                hidden_BSD = run_decoder(policy, ids_BS)
        hidden_ND = hidden_BSD[read_BS.roll(-1, dims=1).to(policy.device)]  # the token before
        target_N = ids_BS[read_BS].to(policy.device)
        weight_VD = head_weight(policy.base)
        parts.append(token_logps(hidden_ND, weight_VD, target_N, policy.head_config).logp_N.cpu())
        start += len(target_N)
    return torch.cat(parts)


class Padded(NamedTuple):
    """Some texts right-padded, and which tokens are read: those of the completions."""

    ids_BS: Int[Tensor, "B S"]
    read_BS: Bool[Tensor, "B S"]


def padded_batches(texts: Texts) -> Iterator[Padded]:
    """Give texts in their order, in batches of at most BATCH_TOKENS with padding."""
    for batch in _batches(texts):
        width = max(len(p) + len(c) for p, c in batch)
        ids_BS = torch.zeros(len(batch), width, dtype=torch.long)
        read_BS = torch.zeros(len(batch), width, dtype=torch.bool)
        for b, (prompt, completion) in enumerate(batch):
            row = torch.tensor([*prompt, *completion])
            ids_BS[b, : len(row)] = row
            read_BS[b, len(prompt) : len(row)] = True
        yield Padded(ids_BS, read_BS)


def run_decoder(policy: Policy, ids_BS: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
    """Return the last hidden states of right-padded rows.

    Under causal attention no real token sees the padding, so none is masked.
    """
    position_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    with lora_in_model_dtype(policy.base):
        return policy.base.get_decoder()(
            input_ids=ids_BS.to(policy.device),
            position_ids=position_BS.to(policy.device),
            use_cache=False,
        ).last_hidden_state


def _batches(texts: Texts) -> Iterator[list[tuple[Sequence[int], Sequence[int]]]]:
    batch: list[tuple[Sequence[int], Sequence[int]]] = []
    width = 0
    for pair in zip(texts.prompts, texts.completions, strict=True):
        longest = max(width, len(pair[0]) + len(pair[1]))
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, longest = [], len(pair[0]) + len(pair[1])
        batch.append(pair)
        width = longest
    if batch:
        yield batch


def load_acts(run: Path, texts: Texts, step: int, site: str) -> Float[Tensor, "N D"]:
    """Return one file's activations in float32."""
    file = acts_file(run, texts, step, site)
    if not file.is_file():
        raise UserError(f"no activations at {file}; run: operando sae train {run}")
    found = np.load(file)
    if len(found) != texts.num_tokens:
        raise UserError(f"{file} holds {len(found)} tokens, expected {texts.num_tokens}")
    return torch.from_numpy(found).float()
