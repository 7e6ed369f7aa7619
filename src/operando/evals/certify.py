"""The insulation certificate of a finished run, issued again from its files alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from operando.errors import UserError
from operando.files import read_object
from operando.models.freeze import Certificate, Insulation, check_merged
from operando.models.load import load_model
from operando.models.policy import Policy
from operando.run import SeedTree, write_json
from operando.run_folder import read_recipe
from operando.update.checkpoint import checkpoint_folder, load_weights, pick_step


def certify_run(folder: Path, step: int | None = None) -> tuple[Certificate, Path]:
    """Return the certificate of a saved step (None: the last) and the file it was written to.

    Nothing of the training process is left to trust: the base is loaded anew, the published weights
    are put into it, and the adapter is merged at the end. Raises UserError where the certificate
    beside the weights was made for other weights or another base.
    """
    recipe = read_recipe(folder)
    step = pick_step(folder, step)
    policy = Policy(load_model(recipe.model), recipe.model, SeedTree(recipe.seed))
    insulation = Insulation(policy)
    load_weights(folder, step, policy)
    certificate = insulation.issue(step, None, policy.save_weights())
    check_former(checkpoint_folder(folder, step) / "certificate.json", certificate)
    if recipe.model.lora is not None and recipe.model.quantization == "none":
        merged = check_merged(policy, insulation.frozen())
        certificate = replace(certificate, checks=(*certificate.checks, merged))
    file = folder / "audits" / f"certificate_step_{step:05d}.json"
    write_json(file, certificate.as_json())
    return certificate, file


def check_former(file: Path, certificate: Certificate) -> None:
    """Refuse a certificate that was made for other weights or another base."""
    if not file.is_file():
        raise UserError(f"{file} is missing: this checkpoint was saved without a certificate")
    former = read_object(file, weights_sha256=str, frozen_sha256=str)
    weights, frozen = str(former["weights_sha256"]), str(former["frozen_sha256"])
    if weights != certificate.weights_sha256:
        raise UserError(
            f"{file} was made for other weights: it names sha256 {weights[:12]}, the files beside "
            f"it have {certificate.weights_sha256[:12]}"
        )
    if frozen != certificate.frozen_sha256:
        raise UserError(
            f"{file} was made over another base model: its frozen tensors have sha256 "
            f"{frozen[:12]}, the base loaded now has {certificate.frozen_sha256[:12]}"
        )
