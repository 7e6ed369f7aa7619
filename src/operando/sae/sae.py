"""A sparse autoencoder as plain tensors: encode, decode, its origin and its hash.

Shape legend: N tokens, D width of the model (d_in), M features (d_sae), k active ones per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor, nn

from operando.errors import UserError
from operando.models.hooks import ActivationReader

Activation = Literal["topk", "topk_relu", "batchtopk", "relu", "jumprelu"]
CHUNK_ELEMENTS = 2**24  # the largest dense [n, M] held at once: 64 MB in float32


class Codes(NamedTuple):
    """The active features of each token; a slot that is not used has the value 0.

    Example: Codes(idx_Nk=tensor([[5, 2]], dtype=torch.int32), value_Nk=tensor([[0.7, 0.1]]))
    """

    idx_Nk: Int32[Tensor, "N k"]
    value_Nk: Float[Tensor, "N k"]


class Reconstructed(NamedTuple):
    """What an SAE makes of activations: x_hat as x, and every feature of every token.

    Example: x_hat, z = sae(x)
    """

    x_hat: Float[Tensor, "*rows D"]
    z: Float[Tensor, "*rows M"]


@dataclass(frozen=True)
class Origin:
    """Where an SAE comes from; kept in every format that has room for it.

    Example: Origin(model="starter", site="blocks.3.hook_resid_post", checkpoint="step_00100",
                    parent="9f...", arm="null", resampled=(17, 203), data="ab...", split_seed=0)
    """

    model: str = ""
    site: str = ""  # as in hooks.py: blocks.12.hook_resid_post
    checkpoint: str = ""
    parent: str = ""  # sha256 of the SAE it was warm-started from
    arm: Literal["", "real", "null"] = ""
    resampled: tuple[int, ...] = ()  # features whose index was given to a new direction
    data: str = ""  # hash of the activations
    split_seed: int | None = None


@dataclass(frozen=True)
class SAE:
    """A sparse autoencoder in float32.

    z = W_enc (x - b_pre) + b_enc;  f = activation(z);  x_hat = f W_dec + b_dec
      topk       the k largest z, raw and signed (sae_rl's)
      topk_relu  the same, then max(0, .)   (Gao et al. 2406.04093; SAELens, sparsify)
      batchtopk  relu(z) * (z > threshold), its inference form   (2412.06410)
      relu       relu(z)
      jumprelu   relu(z) * (z > threshold)   (2407.14435)

    `config` is what the file said that it was read from, as it stood there; nothing computes with
    it. Unpacking gives the SAE itself and its config, and calling it gives Reconstructed: both for
    the lines `sae, cfg = load_sae(path)` and `x_hat, z = sae(x)` of sae_rl's README.

    Example: sae = load_sae("saes/step_00100/blocks.3.hook_resid_post")
             codes = sae.encode(x_ND); x_hat_ND = sae.decode(codes)
    """

    W_enc_MD: Float[Tensor, "M D"]
    b_enc_M: Float[Tensor, "M"]
    W_dec_MD: Float[Tensor, "M D"]  # one row per feature
    b_pre_D: Float[Tensor, "D"]
    b_dec_D: Float[Tensor, "D"]
    activation: Activation
    k: int | None = None
    threshold_M: Float[Tensor, "M"] | None = None
    origin: Origin = field(default_factory=Origin)
    config: Mapping[str, object] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        topk = self.activation in ("topk", "topk_relu")
        if topk and not (self.k is not None and 1 <= self.k <= self.d_sae):
            raise UserError(
                f"an SAE with activation {self.activation!r} needs 1 <= k <= {self.d_sae}, "
                f"given k={self.k}"
            )
        if self.activation in ("batchtopk", "jumprelu") and self.threshold_M is None:
            raise UserError(f"an SAE with activation {self.activation!r} needs a threshold")

    @property
    def d_in(self) -> int:
        return self.W_enc_MD.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_enc_MD.shape[0]

    def __iter__(self) -> Iterator[SAE | Mapping[str, object]]:
        """Give the SAE itself, then its config."""
        yield self
        yield self.config

    def __call__(self, x: Float[Tensor, "*rows D"]) -> Reconstructed:
        """Return the reconstruction and every feature, for x of any leading dims.

        Dense: x.numel() / D * M floats are held. `encode` and `decode` hold k per token.
        """
        rows_ND = x.reshape(-1, x.shape[-1])
        f_NM = self.encode_dense(rows_ND)
        x_hat_ND = f_NM @ self.W_dec_MD + self.b_dec_D
        return Reconstructed(x_hat_ND.reshape(x.shape), f_NM.reshape(*x.shape[:-1], self.d_sae))

    def pre_activations(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N M"]:
        """Return z = W_enc (x - b_pre) + b_enc in float32."""
        return torch.addmm(self.b_enc_M, x_ND.float() - self.b_pre_D, self.W_enc_MD.T)

    def encode(self, x_ND: Float[Tensor, "N D"]) -> Codes:
        """Return the active features of each token, in chunks; NaN or inf in x is an error.

        For activations without a fixed k, the slots are as many as the fullest token needs.
        """
        check_activations(x_ND, self.d_in, self.origin.site)
        if x_ND.shape[0] == 0:
            empty_Nk = x_ND.new_zeros(0, self.k or 0)
            return Codes(empty_Nk.int(), empty_Nk.float())
        parts = [self._encode(x_nD) for x_nD in chunks(x_ND, self.d_sae)]
        width = max(part.idx_Nk.shape[1] for part in parts)
        return Codes(
            torch.cat([F.pad(p.idx_Nk, (0, width - p.idx_Nk.shape[1])) for p in parts]),
            torch.cat([F.pad(p.value_Nk, (0, width - p.value_Nk.shape[1])) for p in parts]),
        )

    def _encode(self, x_ND: Tensor) -> Codes:
        if self.activation in ("topk", "topk_relu"):
            assert self.k is not None
            codes = top_codes(self.pre_activations(x_ND), self.k)
            if self.activation == "topk_relu":
                return Codes(codes.idx_Nk, codes.value_Nk.relu())
            return codes
        f_NM = self._gated(x_ND)
        return top_codes(f_NM, max(1, int((f_NM > 0).sum(dim=1).max())))

    def encode_dense(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N M"]:
        """Return every feature of each token; for small use, N x M floats are held."""
        if self.activation in ("topk", "topk_relu"):
            idx_Nk, value_Nk = self.encode(x_ND)
            f_NM = value_Nk.new_zeros(x_ND.shape[0], self.d_sae)
            return f_NM.scatter_(1, idx_Nk.long(), value_Nk)
        check_activations(x_ND, self.d_in, self.origin.site)
        return self._gated(x_ND)

    def _gated(self, x_ND: Tensor) -> Tensor:
        z_NM = self.pre_activations(x_ND)
        if self.activation == "relu":
            return z_NM.relu()
        assert self.threshold_M is not None
        return z_NM.relu() * (z_NM > self.threshold_M)

    def decode(self, codes: Codes) -> Float[Tensor, "N D"]:
        """Return x_hat = sum_j value_j W_dec[idx_j] + b_dec."""
        return weighted_rows(codes.idx_Nk, self.W_dec_MD, codes.value_Nk) + self.b_dec_D

    def reconstruct(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Return decode(encode(x))."""
        return self.decode(self.encode(x_ND))

    def metadata(self) -> dict[str, object]:
        """Return what the SAE is and where it comes from, ready for JSON."""
        origin = asdict(self.origin)
        named = {"model_name": origin.pop("model"), "hook_name": origin.pop("site")}
        sizes = {"d_in": self.d_in, "d_sae": self.d_sae, "k": self.k, "sha256": self.sha256()}
        origin["resampled"] = list(self.origin.resampled)
        return {**named, "activation": self.activation, **sizes, "provenance": origin}

    def sha256(self) -> str:
        """Return a hash of the activation and of every weight; the origin does not count."""
        digest = hashlib.sha256(f"{self.activation} {self.k}".encode())
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Tensor):
                digest.update(f" {part.name} {tuple(value.shape)} ".encode())
                digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> SAE:
        """Return the SAE on a device."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def weighted_rows(
    idx_Nk: Int32[Tensor, "N k"], W_MD: Float[Tensor, "M D"], value_Nk: Float[Tensor, "N k"]
) -> Float[Tensor, "N D"]:
    """Return sum_j value[n, j] W[idx[n, j]] without the [N, k, D] in between."""
    return F.embedding_bag(idx_Nk, W_MD, per_sample_weights=value_Nk, mode="sum")


def row_products(
    idx_NK: Int32[Tensor, "N K"], W_MD: Float[Tensor, "M D"], x_ND: Float[Tensor, "N D"]
) -> Float[Tensor, "N K"]:
    """Return <x[n], W[idx[n, j]]>: the gradient of embedding_bag by its weights."""
    with torch.enable_grad():
        leaf_NK = torch.zeros(idx_NK.shape, device=x_ND.device).requires_grad_()
        sum_ND = F.embedding_bag(idx_NK, W_MD.detach(), per_sample_weights=leaf_NK, mode="sum")
    return torch.autograd.grad(sum_ND, leaf_NK, x_ND)[0]


def blocked_product(b_M: Float[Tensor, "M"], W_MD: Float[Tensor, "M D"]) -> Float[Tensor, "D"]:
    """Return b @ W summed in blocks, for a sum whose terms are many times larger than itself."""
    blocks = zip(b_M.split(128), W_MD.split(128), strict=True)
    return torch.stack([b_m @ W_mD for b_m, W_mD in blocks]).sum(dim=0)


def top_codes(z_NM: Float[Tensor, "N M"], k: int) -> Codes:
    """Return the k largest of each row, unsorted; exact.

    Two stages where they are faster: an element of the top k lies in one of the k groups of 8 with
    the largest maxima, so only those groups are searched.
    """
    N, M = z_NM.shape
    if M % 8 or 32 * k > M or z_NM.is_cuda:
        value_Nk, idx_Nk = z_NM.topk(k, dim=1, sorted=False)
        return Codes(idx_Nk.int(), value_Nk)
    groups_NG8 = z_NM.view(N, M // 8, 8)
    group_Nk = groups_NG8.amax(dim=2).topk(k, dim=1, sorted=False).indices
    candidates_NK = groups_NG8.gather(1, group_Nk[:, :, None].expand(N, k, 8)).view(N, 8 * k)
    value_Nk, at_Nk = candidates_NK.topk(k, dim=1, sorted=False)
    idx_Nk = group_Nk.gather(1, at_Nk // 8) * 8 + at_Nk % 8
    return Codes(idx_Nk.int(), value_Nk)


def chunks(x_ND: Float[Tensor, "N D"], d_sae: int) -> Iterator[Float[Tensor, "n D"]]:
    """Yield runs of rows whose dense codes fit in CHUNK_ELEMENTS."""
    yield from x_ND.split(max(1, CHUNK_ELEMENTS // d_sae))


def check_activations(x_ND: Float[Tensor, "N D"], d_in: int, what: str = "") -> None:
    """Raise a UserError if the width is not d_in or a value is NaN or inf."""
    named = f" at {what}" if what else ""
    if x_ND.dim() != 2:
        raise UserError(
            f"activations{named} have shape {tuple(x_ND.shape)}; expected [tokens, {d_in}]. "
            "Flatten batch and positions, and leave padding out"
        )
    if x_ND.shape[1] != d_in:
        raise UserError(f"activations{named} have width {x_ND.shape[1]}; the SAE reads {d_in}")
    for start in range(0, x_ND.shape[0], 65536):
        good_N = x_ND[start : start + 65536].isfinite().all(dim=1)
        if not bool(good_N.all()):
            row = start + int((~good_N).int().argmax())
            count = int((~x_ND.isfinite().all(dim=1)).sum())
            hint = " float16 overflows above 65504." if x_ND.dtype == torch.float16 else ""
            raise UserError(
                f"activations{named}: NaN or inf in {count} of {x_ND.shape[0]} tokens, "
                f"first in row {row}.{hint}"
            )


def check_fits(sae: SAE, model: nn.Module, width: int, site: str | None = None) -> str:
    """Return the site at which the SAE reads the model, a residual stream of `width`.

    A width that is not the SAE's, a site that the model lacks, or one that is not the SAE's own, is
    one UserError.
    """
    own = sae.origin.site
    if site is not None and own and site != own:
        raise UserError(f"the SAE was trained at {own!r}, not at {site!r}")
    chosen = site or own
    if not chosen:
        raise UserError("the SAE does not say its site; give one, as blocks.12.hook_resid_post")
    ActivationReader(model, [chosen])
    if width != sae.d_in:
        raise UserError(
            f"the SAE at {chosen} reads d_in={sae.d_in}; {type(model).__name__} has width {width}"
        )
    return chosen
