"""Reading a few features of an SAE at every token, exactly, without all the others in float32.

Shape legend: N tokens, n of a chunk, D d_in, M d_sae, F chosen features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from operando.sae.sae import CHUNK_ELEMENTS, SAE, check_activations, top_codes

LARGE = 4096  # from so many features on a bfloat16 pass decides all but the close cases
# In units of |x| |w|: rounding x and w to bfloat16 is off by at most 2^-8 + 2^-18, rounding their
# product by 2^-9, and by another 2^-9 where a device adds up parts of a sum in bfloat16.
PRODUCT_ERROR = 0.008


class SelectedFeatures:
    """Chosen features of each token under the SAE's true activation function.

    Where a feature does not depend on the others (relu, jumprelu, batchtopk at inference) only its
    own row is multiplied. Whether a feature is among the top k depends on all of them: these are
    computed a chunk of tokens at a time, their products in bfloat16 if they are many; biases are
    added in float32. A feature nearer to the k-th than the error of bfloat16 is decided in float32,
    so that the result is the exact one.

    Example: SelectedFeatures(sae, (3, 17))(x_ND).shape == (N, 2)
    """

    def __init__(self, sae: SAE, ids: tuple[int, ...]) -> None:
        self.sae = sae
        self.id_F = torch.tensor(ids, device=sae.W_enc_MD.device)
        self.is_topk = sae.activation in ("topk", "topk_relu")
        self.W_low_MD: Tensor | None = None
        if self.is_topk and sae.d_sae >= LARGE:
            self.W_low_MD = sae.W_enc_MD.bfloat16()
            self.longest = float(sae.W_enc_MD.norm(dim=1).max())

    def __call__(self, x_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        """Return the features; NaN or inf in x is an error."""
        sae = self.sae
        check_activations(x_ND, sae.d_in, sae.origin.site)
        z_NF = pre_columns(sae, x_ND, self.id_F)
        if not self.is_topk:
            if sae.activation == "relu":
                return z_NF.relu()
            assert sae.threshold_M is not None
            return z_NF.relu() * (z_NF > sae.threshold_M[self.id_F])
        size = max(1, CHUNK_ELEMENTS // sae.d_sae)
        rows = zip(x_ND.split(size), z_NF.split(size), strict=True)
        member_NF = torch.cat([self._among_top(x_nD, z_nF) for x_nD, z_nF in rows])
        value_NF = z_NF.relu() if sae.activation == "topk_relu" else z_NF
        return value_NF * member_NF

    def _among_top(self, x_nD: Tensor, z_nF: Tensor) -> Tensor:
        if self.W_low_MD is None:
            return self._exactly(x_nD)
        assert self.sae.k is not None
        x_nD = x_nD.float() - self.sae.b_pre_D
        low_nM = (x_nD.bfloat16() @ self.W_low_MD.T).float().add_(self.sae.b_enc_M)
        last_n1 = top_codes(low_nM, self.sae.k).value_Nk.amin(dim=1, keepdim=True)
        error_n1 = PRODUCT_ERROR * self.longest * x_nD.norm(dim=1, keepdim=True)
        member_nF = z_nF > last_n1
        close_n = ((z_nF - last_n1).abs() <= error_n1).any(dim=1)
        if bool(close_n.any()):
            member_nF[close_n] = self._exactly(x_nD[close_n] + self.sae.b_pre_D)
        return member_nF

    def _exactly(self, x_nD: Tensor) -> Tensor:
        """Return which chosen features are among the k largest, all in float32."""
        assert self.sae.k is not None
        idx_nk = top_codes(self.sae.pre_activations(x_nD), self.sae.k).idx_Nk
        column_M = torch.full((self.sae.d_sae,), len(self.id_F), device=self.id_F.device)
        column_M[self.id_F] = torch.arange(len(self.id_F), device=self.id_F.device)
        member_nF = torch.zeros(len(x_nD), len(self.id_F) + 1, dtype=torch.bool, device=x_nD.device)
        member_nF.scatter_(1, column_M[idx_nk.long()], True)
        return member_nF[:, :-1]


def pre_columns(sae: SAE, x_ND: Float[Tensor, "N D"], id_F: Tensor) -> Float[Tensor, "N F"]:
    """Return z of chosen features, before the activation function."""
    return torch.addmm(sae.b_enc_M[id_F], x_ND.float() - sae.b_pre_D, sae.W_enc_MD[id_F].T)


def relu_columns(
    sae: SAE, x_ND: Float[Tensor, "N D"], ids: tuple[int, ...]
) -> Float[Tensor, "N F"]:
    """Return relu(z) of chosen features, whatever the SAE's activation function.

    What mechreward's G3 trained with, though its features were found under top-k."""
    return pre_columns(sae, x_ND, torch.tensor(ids, device=sae.W_enc_MD.device)).relu()
