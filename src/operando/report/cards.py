"""Model cards: what a checkpoint is, what it scored against its base, and what it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from operando.doctor.findings import series
from operando.errors import UserError
from operando.models.recursive import RecursiveConfig
from operando.recipe.run import Recipe
from operando.report.collect import RunTables, Score, collect, read_held_out, score_marks
from operando.run import atomic_path
from operando.stats.intervals import PairedDifference, paired_difference
from operando.tables import read_parquet


def write_cards(folder: Path) -> list[Path]:
    """Write README.md beside every checkpoint of a run; return the files."""
    files = []
    for checkpoint in sorted((folder / "checkpoints").glob("step_*")):
        step = int(checkpoint.name.removeprefix("step_"))
        target = checkpoint / "README.md"
        text = model_card(folder, step)
        with atomic_path(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
        files.append(target)
    return files


def model_card(folder: Path, step: int) -> str:
    """Return the card of the checkpoint of `step` as Markdown with PEFT's front matter."""
    checkpoint = folder / "checkpoints" / f"step_{step:05d}"
    if not checkpoint.is_dir():
        raise UserError(f"{folder} has no checkpoint of step {step}")
    run = collect(folder)
    sections = [
        _front_matter(run.recipe),
        f"# {run.label}, step {step} of {run.recipe.steps}",
        _summary(run, step),
        f"## Held-out result\n\n{_result(run, step)}",
        _health(run),
        f"## Use\n\n{_load_code(run.recipe, run.manifest)}",
        f"## What this is not\n\n{_limits(run.recipe)}",
        f"## Provenance\n\n{_provenance(run.manifest)}",
        f"## Recipe\n\n```toml\n{run.recipe_text.rstrip()}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(recipe: Recipe) -> str:
    library = "peft" if recipe.model.lora is not None else "transformers"
    tags = ["operando", "reinforcement-learning", *(["lora"] if library == "peft" else [])]
    lines = [f"base_model: {recipe.model.id}", f"library_name: {library}", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in tags), "---"])


def _summary(run: RunTables, step: int) -> str:
    recipe = run.recipe
    lora = recipe.model.lora
    what = (
        f"A LoRA adapter (rank {lora.rank}, alpha {lora.alpha:g})"
        if lora is not None
        else "All weights"
    )
    rates = [p.value for p in series(run.rows, "lr") if p.step <= step]
    low, high = (min(rates), max(rates)) if rates else (recipe.optim.lr, recipe.optim.lr)
    rate = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    parts = ", ".join(f"`{n}` (`{p.kind}`, weight {p.weight:g})" for n, p in recipe.rewards.items())
    kl = (
        f"KL {recipe.kl.estimator}, coefficient {recipe.kl.coef:g}, in the {recipe.kl.place}"
        if recipe.kl is not None
        else "no KL term"
    )
    rows = (
        ("trained", f"{what} of `{recipe.model.id}`, decoder blocks: {recipe.model.layers}"),
        ("task", f"`{recipe.task.kind}`"),
        ("reward", parts),
        (
            "steps",
            f"{len(rates)} with an update, of {recipe.rollout.num_prompts} prompts x "
            f"{recipe.rollout.num_generations} completions",
        ),
        (
            "learning rate",
            f"{rate} over these steps (recipe: {recipe.optim.lr:g}, "
            f"{recipe.optim.schedule}, {recipe.optim.warmup_steps} warm-up steps)",
        ),
        ("advantage, loss", f"`{recipe.advantage.kind}`, `{recipe.loss.kind}`; {kl}"),
        ("seed", f"{recipe.seed} (one run)"),
    )
    return "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows)


def _result(run: RunTables, step: int) -> str:
    """Return the evaluation that `operando eval RUN` wrote, else the smaller one of training."""
    recipe = run.recipe
    asked = f"answers_step_{step:05d}_{recipe.task.kind}_{recipe.prompt.format}_greedy"
    file = run.folder / "evals" / f"{asked}.parquet"
    if file.is_file():
        rows = read_parquet(file, columns=["model", "correct"]).to_pylist()
        old = [row["correct"] for row in rows if row["model"] == "base"]
        new = [row["correct"] for row in rows if row["model"] != "base"]
        scores = [("base", score_marks(0, old)), (f"step {step}", score_marks(step, new))]
        return _table(scores) + "\n\n" + paired_sentence(paired_difference(old, new))
    held_out = read_held_out(run.folder, run.rows, step)
    if held_out.before is None:
        return "Not evaluated."
    scores = [
        (
            "step 0, the base model"
            if held_out.before.step == 0
            else f"step {held_out.before.step}",
            held_out.before,
        )
    ]
    if held_out.after is not None:
        scores.append((f"step {held_out.after.step}", held_out.after))
    lines = [_table(scores)]
    if held_out.paired is not None:
        lines.append(paired_sentence(held_out.paired))
    if scores[-1][1].step != step:
        lines.append(f"The checkpoint is of step {step}, which was not evaluated itself.")
    return "\n\n".join(lines)


def _table(scores: Sequence[tuple[str, Score]]) -> str:
    lines = ["| model | right | n | accuracy | 95 % interval (Wilson) |", "|---|---|---|---|---|"]
    for name, s in scores:
        interval = f"{s.accuracy.low:.1%} to {s.accuracy.high:.1%}"
        lines.append(f"| {name} | {s.correct} | {s.n} | {s.accuracy.value:.1%} | {interval} |")
    return "Greedy answers, judged by the task's verifier.\n\n" + "\n".join(lines)


def paired_sentence(p: PairedDifference) -> str:
    """Return the paired difference in words."""
    d = p.difference
    chance = "p < 0.0001" if p.p_value < 1e-4 else f"p = {p.p_value:.4f}"
    return (
        f"Difference on the same {p.n} problems: {100 * d.value:+.1f} points (95 % interval "
        f"{100 * d.low:+.1f} to {100 * d.high:+.1f}, Newcombe); {p.gained} gained, {p.lost} lost, "
        f"McNemar exact {chance}."
    )


def _health(run: RunTables) -> str:
    """Return findings, cautions and warnings; they are of the whole run."""
    lines = [
        f"- {f.name.replace('_', ' ')}: {f.sentence} Remedy: {f.remedy}." for f in run.findings
    ]
    lines += [f"- {text}" for text in (*run.cautions, *run.warnings)]
    return "## Findings, cautions and warnings of the run\n\n" + "\n".join(lines)


def _load_code(recipe: Recipe, manifest: Mapping[str, object]) -> str:
    """Return code that loads the folder the card lies in; only a name of ours needs operando.

    It reads the folder's own tokenizer.json; AutoTokenizer gives some architectures another.
    """
    model = recipe.model
    ours = "/" not in model.id
    auto = manifest.get("model_class", "AutoModelForCausalLM")
    where = f'resolve("{model.id}")' if ours else f'"{model.id}"'
    revision = f', revision="{model.revision}"' if model.revision is not None else ""
    imports = ["from operando.models.load import resolve"] if ours else []
    recursive = manifest.get("model_type") == RecursiveConfig.model_type
    first = ["import operando.models.recursive"] if recursive else []
    if model.lora is None:
        lines = [
            *first,
            f"from transformers import {auto}, PreTrainedTokenizerFast",
            "",
            f'model = {auto}.from_pretrained("PATH/TO/THIS/FOLDER")',
            'tokenizer = PreTrainedTokenizerFast.from_pretrained("PATH/TO/THIS/FOLDER")',
        ]
    else:
        lines = [
            *first,
            *imports,
            "from peft import PeftModel",
            f"from transformers import {auto}, PreTrainedTokenizerFast",
            "",
            f"base = {auto}.from_pretrained({where}{revision})",
            'model = PeftModel.from_pretrained(base, "PATH/TO/THIS/FOLDER")',
            f"tokenizer = PreTrainedTokenizerFast.from_pretrained({where}{revision})",
        ]
    code = "\n".join(lines)
    prompt = f"Prompts in training were `{recipe.prompt.format}`; the template is in the recipe."
    return f"```python\n{code}\n```\n\n{prompt}"


def _limits(recipe: Recipe) -> str:
    truth = any(part.kind == "correct" for part in recipe.rewards.values())
    paid = (
        "- It was rewarded what the task's verifier accepts, which is the final answer alone: the "
        "steps it writes need not be the reason for its answer."
        if truth
        else "- It was not rewarded for right answers as the task's verifier judges them, but by "
        "the reward parts above; read the held-out result before the reward."
    )
    return "\n".join(
        (
            f"- Not a general assistant: it was trained on the task `{recipe.task.kind}` alone, "
            "and nothing else was measured.",
            paid,
            "- Not evidence across seeds: it is one run.",
        )
    )


def _provenance(manifest: Mapping[str, object]) -> str:
    git, versions = manifest["git"], manifest["versions"]
    assert isinstance(git, Mapping) and isinstance(versions, Mapping), f"{git!r}, {versions!r}"
    commit = f"commit {git['commit']}" if git["commit"] else "no git checkout"
    dirty = " with local changes (code.diff of the run)" if git["dirty"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Begun {manifest['started']}; {commit}{dirty}. {packages}."
