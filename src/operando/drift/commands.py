"""What `operando sae` and `operando drift` do, from arguments to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoConfig

from operando.drift.chain import chain_config, check_settings, train_chains, training_table
from operando.drift.collect import choose_texts, chosen_texts, collect, sites_of, stages_of
from operando.drift.frozen_sae import feature_table, frozen_report, frozen_table
from operando.drift.model_diff import grid_lines, grid_report, grid_table
from operando.drift.report import draw_drift, drift_report, drift_table, stage_table, verdict_lines
from operando.errors import UserError, nearest
from operando.models.layers import parse_layer_set
from operando.models.load import auto_class, count_layers, resolve, width_of
from operando.recipe.renamed import refuse_renamed
from operando.recipe.run import Recipe
from operando.run_folder import read_recipe
from operando.sae.formats import load_sae
from operando.sae.sae import SAE, check_fits
from operando.tables import progress_bar

WRITERS = ("base", "last", "both")
CHOICES = {
    "mode": ("default", "sae_rl"),
    "select": ("float32", "bfloat16"),
    "sinks": ("drop", "keep"),
}


def train_run_saes(
    console: Console,
    run: Path,
    layers: str,
    writer: str,
    tokens: int,
    num_seeds: int,
    mode: str = "default",
    expansion: int = 8,
    **given: object,
) -> None:
    """Collect the activations of every stage and train all chains with their null arms.

    `given` are settings of drift/chain.py:ChainConfig; what is absent or None is the mode's.
    """
    recipe = read_recipe(run)
    writer = _one_of("--texts", writer, WRITERS)
    refuse_renamed("sae train", "--mode", mode)
    for key, known in CHOICES.items():
        value = {"mode": mode, **given}.get(key)
        if value is not None:
            _one_of(f"--{key}", str(value), known)
    num_layers = count_layers(recipe.model)
    chosen = parse_layer_set(layers, num_layers)
    d_sae = expansion * width_of(recipe.model)
    configs = {
        site: chain_config(mode, d_sae, layer == num_layers - 1, **given)  # pyright: ignore[reportArgumentType]
        for site, layer in zip(sites_of(chosen), chosen, strict=True)
    }
    sites, seeds = list(configs), range(num_seeds)
    check_settings(run, configs, stages_of(run), seeds)
    texts = choose_texts(run, writer, tokens)  # pyright: ignore[reportArgumentType]
    with progress_bar(console) as progress:
        reading = progress.add_task("activations", total=None)
        stages = collect(
            run, sites, texts, lambda n, of: progress.update(reading, completed=n, total=of)
        )
        training = progress.add_task("SAEs, real and null", total=None)
        train_chains(
            run,
            texts,
            configs,
            stages,
            seeds,
            lambda n, of: progress.update(training, completed=n, total=of),
        )
    console.print(training_table(run, configs, stages, seeds))


def show_drift(console: Console, run: Path) -> Path:
    """Print and write the drift of a run's chains; return the JSON file."""
    report = drift_report(run, chosen_texts(run))
    console.print(drift_table(report))
    console.print(stage_table(report))
    for line in verdict_lines(report):
        console.print(line, highlight=False)
    draw_drift(report, report.file.with_suffix(".svg"))
    return report.file


def show_frozen(console: Console, run: Path, path: Path, site: str | None) -> Path:
    """Print and write what every stage does with one SAE; return the JSON file."""
    sae, site = _fitting_sae(read_recipe(run), path, site)
    with progress_bar(console) as progress:
        reading = progress.add_task("activations", total=None)
        report = frozen_report(
            run, sae, path, site, lambda n, of: progress.update(reading, completed=n, total=of)
        )
    console.print(frozen_table(report))
    console.print(feature_table(report))
    return report.file


def show_grid(
    console: Console, run: Path, layers: str | None, path: Path | None, site: str | None
) -> Path:
    """Print and write what the text and what the model changed; return the JSON file.

    The sites are the residual after `layers` (default: all), or with an SAE, its own.
    """
    recipe = read_recipe(run)
    if path is None:
        given = sites_of(parse_layer_set(layers or "all", count_layers(recipe.model)))
        report = grid_report(run, given if site is None else [site], None)
    elif layers is not None:
        raise UserError("drift --grid: give --layers or --frozen, not both: an SAE has one site")
    else:
        sae, site = _fitting_sae(recipe, path, site)
        report = grid_report(run, [site], sae)
    console.print(grid_table(report))
    for line in grid_lines(report):
        console.print(line, highlight=False)
    return report.file


def _fitting_sae(recipe: Recipe, path: Path, site: str | None) -> tuple[SAE, str]:
    """Return the SAE and the site at which it reads the model; no weight of the model is loaded."""
    sae = load_sae(path)
    config = AutoConfig.from_pretrained(resolve(recipe.model.id), revision=recipe.model.revision)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return sae, check_fits(sae, model, width_of(recipe.model), site)


def _one_of(option: str, given: str, known: Sequence[str]) -> str:
    if given not in known:
        raise UserError(
            f"{option} {given!r}: expected one of {', '.join(known)}.{nearest(given, known)}"
        )
    return given
