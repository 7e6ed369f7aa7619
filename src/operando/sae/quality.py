"""How good an SAE is: error on activations, and what splicing it into the model costs.

Shape legend: N tokens, D d_in, M d_sae; B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from operando.errors import UserError
from operando.models.hooks import ActivationReader
from operando.sae.sae import SAE, check_activations, check_fits, chunks

SINK_MULTIPLE = 10.0  # a token whose norm is above this multiple of the median is a sink


class Quality(NamedTuple):
    """The reconstruction of one set of activations.

    nmse         sum (x - x_hat)^2 / numel / Var(all elements, one global mean, unbiased); the
                 sae_rl's. Attention sinks are most of its denominator in middle layers.
    fvu          sum |x - x_hat|^2 / sum |x - mean_n x|^2, per dimension centred
    fvu_no_sinks the same without sink tokens, the mean taken without them too; NaN if none is left
    fvu_median   median over tokens of |x - x_hat|^2 / |x - mean_n x|^2
    l0           mean number of active features per token
    dead         share of features that fire on no token

    Example: measure_quality(sae, val_ND, first_N=first).fvu_no_sinks
    """

    nmse: float
    mse: float
    fvu: float
    fvu_no_sinks: float
    fvu_median: float
    l0: float
    dead: float
    tokens: int
    sinks: int


class TextBatch(NamedTuple):
    """Padded ids, which of them are real, and which of those the SAE is asked about.

    A prompt is real and not read: it is seen by what follows, and stays as it is.

    Example: TextBatch(ids_BS, real_BS=mask_BS, read_BS=mask_BS)
    """

    ids_BS: Int[Tensor, "B S"]
    real_BS: Bool[Tensor, "B S"]
    read_BS: Bool[Tensor, "B S"]


class LossRecovered(NamedTuple):
    """Next-token cross-entropy in nats per token, with the site as it is, spliced, and ablated.

    delta           spliced - base: what the SAE's error costs, in nats
    recovered_mean  (mean_ablated - spliced) / (mean_ablated - base)   (sae_rl's denominator)
    recovered_zero  the same with zero ablation   (SAELens); NaN if ablation changes nothing

    Example: loss_recovered(model, sae, [TextBatch(ids_BS, real_BS, read_BS)]).recovered_mean
    """

    base: float
    spliced: float
    mean_ablated: float
    zero_ablated: float
    delta: float
    recovered_mean: float
    recovered_zero: float
    tokens: int


def mean_activation(x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "D"]:
    """Return the mean over tokens, summed in float64."""
    total_D = torch.zeros(x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
    for x_nD in x_ND.split(16384):
        total_D += x_nD.double().sum(dim=0)
    return (total_D / x_ND.shape[0]).float()


def typical_variance(x_ND: Float[Tensor, "N D"], mean_D: Float[Tensor, "D"]) -> float:
    """Return the median over tokens of mean_d (x - mean)^2, which attention sinks do not move."""
    parts = [(x_nD.float() - mean_D).square().mean(dim=1) for x_nD in x_ND.split(16384)]
    return max(float(torch.cat(parts).median()), 1e-30)


def sink_tokens(
    x_ND: Float[Tensor, "N D"], first_N: Bool[Tensor, "N"] | None = None
) -> Bool[Tensor, "N"]:
    """Return which tokens are attention sinks: norm > 10 x the median norm, or the first of a text.

    `first_N` marks the first tokens; without it only the norm is asked.
    """
    norm_N = torch.cat([x_nD.float().norm(dim=1) for x_nD in x_ND.split(16384)])
    sink_N = norm_N > SINK_MULTIPLE * norm_N.median()
    return sink_N if first_N is None else sink_N | first_N


def nmse(x_ND: Float[Tensor, "N D"], x_hat_ND: Float[Tensor, "N D"]) -> float:
    """Return mean((x - x_hat)^2) / Var(x), one scalar mean for all elements (sae_rl's NMSE)."""
    x_ND, x_hat_ND = x_ND.double(), x_hat_ND.double()
    return float((x_ND - x_hat_ND).square().mean() / x_ND.var())


def measure_quality(
    sae: SAE, x_ND: Float[Tensor, "N D"], first_N: Bool[Tensor, "N"] | None = None
) -> Quality:
    """Return the reconstruction quality of an SAE on activations, in one pass of chunks."""
    check_activations(x_ND, sae.d_in, sae.origin.site)
    N, D = x_ND.shape
    if N < 2:
        raise UserError(f"the quality of an SAE needs at least 2 tokens, given {N}")
    errors, fired_M, active = [], torch.zeros(sae.d_sae, dtype=torch.int64, device=x_ND.device), 0
    for x_nD in chunks(x_ND, sae.d_sae):
        codes = sae.encode(x_nD)
        errors.append((x_nD.float() - sae.decode(codes)).double().square().sum(dim=1))
        fired = codes.idx_Nk[codes.value_Nk != 0]
        fired_M += torch.bincount(fired, minlength=sae.d_sae)
        active += len(fired)
    error_N = torch.cat(errors)
    sink_N = sink_tokens(x_ND, first_N)
    kept_N = ~sink_N
    spread_N = _spread(x_ND, torch.ones_like(kept_N))
    spread_kept_N = _spread(x_ND, kept_N)
    total = x_ND.double().mean()
    squares = sum(float((x.double() - total).square().sum()) for x in x_ND.split(16384))
    mse = float(error_N.sum()) / (N * D)
    return Quality(
        nmse=_ratio(mse, squares / (N * D - 1)),
        mse=mse,
        fvu=_ratio(float(error_N.sum()), float(spread_N.sum())),
        fvu_no_sinks=_ratio(float(error_N[kept_N].sum()), float(spread_kept_N[kept_N].sum())),
        fvu_median=float((error_N / spread_N.clamp(min=1e-30)).median()),
        l0=active / N,
        dead=float((fired_M == 0).double().mean()),
        tokens=N,
        sinks=int(sink_N.sum()),
    )


def _spread(x_ND: Tensor, kept_N: Tensor) -> Tensor:
    """Return |x - mean|^2 of every token, the mean taken over `kept_N`."""
    total_D = torch.zeros(x_ND.shape[1], dtype=torch.float64, device=x_ND.device)
    parts = list(zip(x_ND.split(16384), kept_N.split(16384), strict=True))
    for x_nD, kept_n in parts:
        total_D += x_nD[kept_n].double().sum(dim=0)
    mean_D = total_D / kept_N.sum().clamp(min=1)
    return torch.cat([(x_nD.double() - mean_D).square().sum(dim=1) for x_nD, _ in parts])


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else float("nan")


def loss_recovered(
    model: PreTrainedModel,
    sae: SAE,
    batches: Sequence[TextBatch],
    site: str | None = None,
    mean_D: Float[Tensor, "D"] | None = None,
) -> LossRecovered:
    """Return the cross-entropy with the SAE's reconstruction in place of the site's activations.

    Only read tokens are replaced; a token counts if it and the one before it are read; tokens weigh
    alike (deviation: sae_rl averages over batches). `mean_D` is the ablation's vector; without it
    the mean over the read tokens (deviation: sae_rl takes the first 32 prompts).
    """
    width = model.config.get_text_config().hidden_size
    site = check_fits(sae, model, width, site)
    if not any(bool((batch.read_BS[:, 1:] & batch.read_BS[:, :-1]).any()) for batch in batches):
        raise UserError("no two read tokens in a row: there is no loss to recover")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if mean_D is None:
                mean_D = _mean_at(model, site, batches)
            mean_D = mean_D.float().to(model.device)
            base, tokens = _loss(model, site, batches, None)
            spliced, _ = _loss(model, site, batches, sae.to(model.device).reconstruct)
            mean, _ = _loss(model, site, batches, lambda x_ND: mean_D.expand_as(x_ND))
            zero, _ = _loss(model, site, batches, lambda x_ND: torch.zeros_like(x_ND))
    finally:
        model.train(was_training)
    return LossRecovered(
        base,
        spliced,
        mean,
        zero,
        spliced - base,
        _recovered(mean, spliced, base),
        _recovered(zero, spliced, base),
        tokens,
    )


def _recovered(ablated: float, spliced: float, base: float) -> float:
    return (ablated - spliced) / (ablated - base) if ablated != base else float("nan")


def _mean_at(model: PreTrainedModel, site: str, batches: Iterable[TextBatch]) -> Tensor:
    reader = ActivationReader(model, [site])
    total_D, count = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in batches:
        with reader.reading() as acts:
            _logits(model, batch)
        x_ND = acts[site][batch.read_BS.to(model.device)]
        total_D = total_D + x_ND.double().sum(dim=0)
        count += len(x_ND)
    return total_D / count


def _loss(
    model: PreTrainedModel,
    site: str,
    batches: Iterable[TextBatch],
    change: Callable[[Tensor], Tensor] | None,
) -> tuple[float, int]:
    """Return the mean cross-entropy over counted tokens, in float32, and their number."""
    total, tokens = 0.0, 0
    for batch in batches:
        ids_BS, read_BS = batch.ids_BS.to(model.device), batch.read_BS.to(model.device)
        if change is None:
            logits_BSV = _logits(model, batch)
        else:
            with splicing(model, site, read_BS, change):
                logits_BSV = _logits(model, batch)
        counts_BS = read_BS[:, 1:] & read_BS[:, :-1]
        logits_NV = logits_BSV[:, :-1][counts_BS].float()
        loss = F.cross_entropy(logits_NV, ids_BS[:, 1:][counts_BS].long(), reduction="sum")
        total += float(loss)
        tokens += int(counts_BS.sum())
    return total / tokens, tokens


def _logits(model: PreTrainedModel, batch: TextBatch) -> Tensor:
    ids_BS, real_BS = batch.ids_BS.to(model.device), batch.real_BS.to(model.device)
    position_BS = (real_BS.long().cumsum(dim=1) - 1).clamp(min=0)
    return model(
        input_ids=ids_BS, attention_mask=real_BS.long(), position_ids=position_BS, use_cache=False
    ).logits


@contextmanager
def splicing(
    model: PreTrainedModel,
    site: str,
    mask_BS: Bool[Tensor, "B S"],
    change: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    """Inside the block, real tokens at `site` are `change(x_ND)`; the others stay as they are.

    Example: with splicing(model, site, mask_BS, sae.reconstruct): logits = model(...).logits
    """

    def replaced(resid_BSD: Tensor) -> Tensor:
        new_BSD = resid_BSD.clone()
        new_BSD[mask_BS] = change(resid_BSD[mask_BS].float()).to(resid_BSD.dtype)
        return new_BSD

    def before(
        _module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        resid = args[0] if args else kwargs["hidden_states"]
        assert isinstance(resid, Tensor), type(resid)
        if args:
            return (replaced(resid), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": replaced(resid)}

    def after(_module: torch.nn.Module, _args: object, output: object) -> object:
        if isinstance(output, tuple):
            return (replaced(output[0]), *output[1:])
        assert isinstance(output, Tensor), type(output)
        return replaced(output)

    module = ActivationReader(model, [site]).modules[site]
    if site.endswith("hook_resid_pre"):
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
