"""Extracting directions from contrastive pairs, with their controls, and checking what they do.

A pair is one prompt with two answers, one that hacks and one that does not. The same command makes
the controls: a random vector, the vector of pairs whose sides are shuffled, and one that tells
something off topic (long questions from short ones) in the clean answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from operando.drift.collect import Texts, padded_batches, run_decoder
from operando.errors import UserError
from operando.models import directions as dr
from operando.models.directions import DirectionArm, DirectionSet
from operando.models.hooks import ActivationReader
from operando.models.layers import parse_layer_set
from operando.models.load import Loaded, dtype_name, load_model, stop_ids
from operando.models.policy import Policy
from operando.models.tokens import text_ids
from operando.recipe.run import Recipe
from operando.rollout.hf import HfSampler
from operando.rollout.sampler import Request, Sampling, as_rollouts
from operando.run import SeedTree, write_json
from operando.sae.feature_set import model_digest
from operando.setup import make_prompt_sets
from operando.stats.intervals import Interval, wilson
from operando.tasks.base import Task
from operando.tasks.load import recipe_task
from operando.types import Prompt

SIZES = (8, 16, 32)  # singular vectors kept
ARMS: tuple[DirectionArm, ...] = ("real", "random", "shuffled", "off_topic")


class Side(NamedTuple):
    """One side of the pairs: activations at the position, [N L D], and the token ids."""

    acts_NLD: Float[Tensor, "N L D"]
    texts: Texts


@dataclass(frozen=True)
class Retained:
    """What SVD denoising leaves of a vector, mean over a band's modules of one side.

    Example: Retained("left", m=16, kept=0.31, null=0.125, cosine=0.55)
    """

    side: str
    m: int
    kept: float
    null: float
    cosine: float


@dataclass(frozen=True)
class Extracted:
    """The accuracy of each arm on held-out pairs, what denoising keeps, and the files."""

    layers: tuple[int, ...]
    num_pairs: int
    num_held_out: int
    accuracy: Mapping[str, Interval]
    retained: tuple[Retained, ...]
    cosine_to_real: Mapping[str, float]
    files: Mapping[str, str]
    file: str


class Workbench:
    """A recipe's base model (or a policy as it stands) with the pairs of its task."""

    def __init__(
        self, recipe: Recipe, policy: Policy | None = None, day: datetime | None = None
    ) -> None:
        """`day` is the date that a chat template prints; None: today's."""
        if recipe.direction is None:
            raise UserError(f"recipe {recipe.name!r} has no [direction] table; add one")
        self.recipe, self.config = recipe, recipe.direction
        self.task: Task = recipe_task(recipe)
        if self.task.pair is None:
            raise UserError(
                f"task {self.task.name} has no contrastive pairs; words (with loophole = true) and "
                "code have them"
            )
        if policy is None:
            policy = Policy(load_model(recipe.model), recipe.model, SeedTree(recipe.seed))
        self.policy = policy
        self.loaded = Loaded(policy.base, policy.tokenizer, policy.identity)
        self.layers = parse_layer_set(self.config.layers, len(self.policy.blocks))
        wanted = self.config.num_pairs + self.config.num_held_out
        prompts, self.held_out = make_prompt_sets(
            recipe,
            self.task,
            self.loaded.tokenizer,
            self.loaded.model.config,
            day or datetime.now(UTC),
        )
        if len(prompts) < wanted:
            raise UserError(
                f"direction: {wanted} pairs are asked for, the training split has {len(prompts)}"
            )
        self.prompts = prompts[:wanted]

    def side(self, prompts: Sequence[Prompt], hack: bool) -> Side:
        """Return the activations of the hack or the clean side of the prompts' pairs."""
        assert self.task.pair is not None
        tokenizer = self.loaded.tokenizer
        end = stop_ids(self.policy.base, tokenizer)[:1]
        completions = []
        for prompt in prompts:
            pair = self.task.pair(prompt.example)
            text = pair.hack if hack else pair.clean
            (ids,) = text_ids(tokenizer, [text], f"a pair of {prompt.example.id}")
            completions.append([*ids, *end])
        texts = Texts("base", [p.ids for p in prompts], completions, "")
        return Side(self.read(texts), texts)

    @torch.no_grad()
    def read(self, texts: Texts) -> Float[Tensor, "N L D"]:
        """Return the residual after each layer of the band at the position, in float32."""
        sites = [f"blocks.{layer}.hook_resid_post" for layer in self.layers]
        reader = ActivationReader(self.policy.base, sites)
        found: list[Tensor] = []
        for ids_BS, read_BS in padded_batches(texts):
            with reader.reading() as seen:
                run_decoder(self.policy, ids_BS)
            acts_BLSD = torch.stack([seen[site].float().cpu() for site in sites], dim=1)
            for acts_LSD, read_S in zip(acts_BLSD, read_BS, strict=True):
                own_LtD = acts_LSD[:, read_S]
                last = self.config.position == "last"
                found.append(own_LtD[:, -1] if last else own_LtD.mean(dim=1))
        return torch.stack(found)

    def modules(self) -> dict[str, nn.Linear]:
        """Return the linear modules of the band, by the name they have in the base model."""
        blocks = {id(block): layer for layer, block in enumerate(self.policy.blocks)}
        found: dict[str, nn.Linear] = {}
        for name, block in self.policy.base.named_modules():
            if blocks.get(id(block)) in self.layers:
                for child, module in block.named_modules():
                    if isinstance(module, nn.Linear) and "lora" not in child:
                        found[f"{name}.{child}".replace(".base_layer", "")] = module
        return found

    @torch.no_grad()
    def mean_inputs(self, texts: Texts) -> dict[str, Float[Tensor, "d"]]:
        """Return each module's mean input over the completion tokens, normalised."""
        sums: dict[str, Tensor] = {}
        now: dict[str, Tensor] = {}
        modules = self.modules()
        with ExitStack() as stack:
            for name, module in modules.items():
                handle = module.register_forward_pre_hook(_keep_input(now, name))
                stack.callback(handle.remove)
            for ids_BS, read_BS in padded_batches(texts):
                run_decoder(self.policy, ids_BS)
                for name in modules:
                    x_ND = now[name][read_BS.to(now[name].device)].float().cpu()
                    sums[name] = sums.get(name, torch.zeros(x_ND.shape[1])) + x_ND.sum(dim=0)
        return {name: dr.unit(total) for name, total in sums.items()}


def gradient_directions(
    bench: Workbench, hack: Texts, clean: Texts, inputs: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "_ _"]]:
    """Return each module's own direction from gradients, one row [1 d].

    D = d/dW (mean NLL of the hack side - mean NLL of the clean side): a step along -D makes hacks
    likelier. A writer's row is the first left singular vector of -D, turned so that -D moves its
    output along it at the mean hack input; a reader's the first right one. (The public code takes
    the SVD over pairs in the basis of W's singular values; this is the mean pair's, in W's own.)"""
    modules = {name: module for name, module, _ in _sides(bench)}
    with ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.weight.requires_grad_, module.weight.requires_grad)
            module.weight.requires_grad_(True)
        loss = mean_nll(bench, hack) - mean_nll(bench, clean)
        weights = [module.weight for module in modules.values()]
        gradients = torch.autograd.grad(loss, weights)
    rows: dict[str, Tensor] = {}
    for (name, _, side), gradient_oi in zip(_sides(bench), gradients, strict=True):
        U_oR, _, V_Ri = torch.linalg.svd(-gradient_oi.float().cpu(), full_matrices=False)
        row_D = U_oR[:, 0] if side == "left" else V_Ri[0]
        if side == "left" and float(row_D @ -gradient_oi.float().cpu() @ inputs[name]) < 0:
            row_D = -row_D
        rows[name] = row_D[None]
    return rows


def mean_nll(bench: Workbench, texts: Texts) -> Float[Tensor, ""]:
    """Return the mean over texts of the mean NLL of their completion tokens."""
    total = torch.zeros((), device=bench.policy.device)
    for ids_BS, read_BS in padded_batches(texts):
        ids_BS = ids_BS.to(bench.policy.device)
        logits_BSV = bench.policy.base(ids_BS).logits[:, :-1].float()
        nll_BS = torch.nn.functional.cross_entropy(
            logits_BSV.transpose(1, 2), ids_BS[:, 1:], reduction="none"
        )
        real_BS = read_BS[:, 1:].to(nll_BS.device)
        total = total + ((nll_BS * real_BS).sum(1) / real_BS.sum(1)).sum()
    return total / len(texts.prompts)


def _keep_input(now: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        now[name] = args[0].detach()

    return hook


class _Read(NamedTuple):
    """Both sides of all pairs, the layers' norms, and what each module gets."""

    plus: Side
    minus: Side
    norm_L: Tensor
    inputs: Mapping[str, Tensor]
    own: Mapping[str, Tensor]


def _read(bench: Workbench) -> _Read:
    plus, minus = (bench.side(bench.prompts, hack=hack) for hack in (True, False))
    norm_L = torch.cat([plus.acts_NLD, minus.acts_NLD]).norm(dim=2).mean(dim=0)
    inputs = bench.mean_inputs(plus.texts)
    own: dict[str, Tensor] = {}
    if bench.config.source == "gradient":
        num = bench.config.num_pairs
        hack, clean = (
            Texts("base", t.prompts[:num], t.completions[:num], "")
            for t in (plus.texts, minus.texts)
        )
        own = gradient_directions(bench, hack, clean, inputs)
    return _Read(plus, minus, norm_L, inputs, own)


def _made(bench: Workbench, read: _Read, arm: DirectionArm, v_D: Tensor) -> DirectionSet:
    config, recipe, num = bench.config, bench.recipe, bench.config.num_pairs
    share = dr.pair_accuracy(v_D, read.plus.acts_NLD[num:], read.minus.acts_NLD[num:])
    clean_N = dr.pair_scores(v_D, read.minus.acts_NLD, read.norm_L)
    evidence = {"gate": config.min_accuracy, "clean_q95": float(clean_N.quantile(0.95))}
    norms = zip(bench.layers, read.norm_L, strict=True)
    evidence |= {f"norm_{layer}": float(norm) for layer, norm in norms}
    return DirectionSet(
        arm,
        config.source,
        v_D,
        bench.layers,
        config.position,
        recipe.model.id,
        model_digest(bench.loaded.identity),
        dtype_name(bench.loaded.model),
        share,
        modules=_own_rows(bench, arm, v_D, read.own),
        inputs=read.inputs,
        evidence=evidence,
    )


def extract(recipe: Recipe) -> Extracted:
    """Extract the direction and its controls, judge them on held-out pairs, write the files."""
    bench = Workbench(recipe)
    config, num = bench.config, bench.config.num_pairs
    read = _read(bench)
    vectors = _vectors(bench, read.plus.acts_NLD[:num], read.minus.acts_NLD[:num])
    folder = Path(recipe.runs_dir) / f"{recipe.name}_directions"
    files: dict[str, str] = {}
    accuracy: dict[str, Interval] = {}
    for arm, v_D in vectors.items():
        made = _made(bench, read, arm, v_D)
        accuracy[arm] = wilson(round(made.accuracy * config.num_held_out), config.num_held_out)
        dr.save_directions(made, folder / f"{arm}.safetensors")
        files[arm] = str(folder / f"{arm}.safetensors")
    result = Extracted(
        bench.layers,
        num,
        config.num_held_out,
        accuracy,
        _retained(bench, vectors["real"]),
        {arm: float(v_D @ vectors["real"]) for arm, v_D in vectors.items()},
        files,
        str(folder / "directions.json"),
    )
    write_json(folder / "directions.json", asdict(result))
    return result


def refresher(recipe: Recipe, day: datetime) -> Callable[[Policy], DirectionSet] | None:
    """Return what extracts a recipe's direction again from the policy; None if it never does.

    `day` is the date that a chat template prints: that of the run's start.
    """
    if recipe.projection is None or recipe.projection.refresh is None:
        return None
    arm = dr.load_directions(recipe.projection.directions).arm

    def again(policy: Policy) -> DirectionSet:
        bench = Workbench(recipe, policy, day)
        read, num = _read(bench), bench.config.num_pairs
        vectors = _vectors(bench, read.plus.acts_NLD[:num], read.minus.acts_NLD[:num])
        return _made(bench, read, arm, vectors[arm])

    return again


def _vectors(
    bench: Workbench, plus_NLD: Tensor, minus_NLD: Tensor
) -> dict[DirectionArm, Float[Tensor, "D"]]:
    seeds = SeedTree(bench.recipe.seed)
    num = len(plus_NLD)
    order_N = torch.randperm(num, generator=seeds.generator("direction", "shuffled"))
    sides = dr.shuffled_pairs(plus_NLD, minus_NLD, order_N < num // 2)
    noise_D = torch.randn(plus_NLD.shape[2], generator=seeds.generator("direction", "random"))
    length_N = torch.tensor([len(p.example.question) for p in bench.prompts[:num]])
    by_length = length_N.argsort(stable=True)
    short, long = by_length[: num // 2], by_length[-(num // 2) :]
    return {
        "real": dr.contrast_vector(plus_NLD, minus_NLD),
        "random": dr.unit(noise_D),
        "shuffled": dr.contrast_vector(*sides),
        "off_topic": dr.contrast_vector(minus_NLD[long], minus_NLD[short]),
    }


def _sides(bench: Workbench) -> Iterator[tuple[str, nn.Linear, dr.Side]]:
    """Give the band's writers ("left") and readers ("right") of the residual stream."""
    width = bench.policy.base.config.get_text_config().hidden_size
    for name, module in bench.modules().items():
        if "mlp.down" in name or name.endswith("o_proj"):
            yield name, module, "left"
        elif module.in_features == width:
            yield name, module, "right"


def _own_rows(
    bench: Workbench, arm: DirectionArm, v_D: Tensor, own: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, "_ _"]]:
    """Return what applies to each module in place of the band's one vector; nothing: that vector.

    The controls of gradient directions are random rows for every arm but the real one: what their
    pairs lack is a gradient that means anything."""
    m = bench.config.denoise
    if own and arm == "real":
        return dict(own)
    if own:
        seeds = SeedTree(bench.recipe.seed)
        return {
            name: dr.unit(
                torch.randn(row_1D.shape[1], generator=seeds.generator("direction", arm, name))
            )[None]
            for name, row_1D in own.items()
        }
    if not m:
        return {}
    return {
        name: dr.denoise(v_D, module.weight.detach().cpu(), m, side).vector_D[None]
        for name, module, side in _sides(bench)
    }


def _retained(bench: Workbench, v_D: Tensor) -> tuple[Retained, ...]:
    width = v_D.shape[0]
    rows = []
    for m in (size for size in SIZES if size < width):
        for side in ("left", "right"):
            some = [
                dr.denoise(v_D, module.weight.detach().cpu(), m, its)
                for _, module, its in _sides(bench)
                if its == side
            ]
            kept, cosine = (
                sum(values) / len(some)
                for values in ([d.retained for d in some], [d.cosine for d in some])
            )
            rows.append(Retained(side, m, kept, some[0].null, cosine))
    return tuple(rows)


def validate(recipe: Recipe) -> dict[str, Interval]:
    """Return how many pairs of the task's held-out split each written direction orders rightly."""
    bench = Workbench(recipe)
    prompts = bench.held_out
    plus, minus = (bench.side(prompts, hack=hack).acts_NLD for hack in (True, False))
    found: dict[str, Interval] = {}
    for arm in ARMS:
        file = Path(recipe.runs_dir) / f"{recipe.name}_directions" / f"{arm}.safetensors"
        made = dr.load_directions(file)
        dr.check_directions(
            made, file, model_digest(bench.loaded.identity), dtype_name(bench.loaded.model)
        )
        if made.layers != bench.layers:
            raise UserError(
                f"{file} is of layers {list(made.layers)}, the recipe's {list(bench.layers)}"
            )
        share = dr.pair_accuracy(made.vector_D, plus, minus)
        found[arm] = wilson(round(share * len(prompts)), len(prompts))
    return found


@dataclass(frozen=True)
class Steered:
    """Labels of greedy answers with a vector added. Example: Steered("real", 4.0, n=40, ...)"""

    arm: str
    scale: float
    n: int
    correct: int
    labels: Mapping[str, int]


def steer(recipe: Recipe, scales: Sequence[float], num: int) -> list[Steered]:
    """Return the labels of answers to held-out prompts with scale * v added in the band.

    `scale` is in norms of the layer's residual. Held-out prompts, greedy, sampled by HF generate,
    because hooks do not reach the engine."""
    bench = Workbench(recipe)
    prompts = bench.held_out[:num]
    results = [_steered(bench, "base", 0.0, None, prompts)]
    folder = Path(recipe.runs_dir) / f"{recipe.name}_directions"
    for arm in ARMS:
        found = dr.load_directions(folder / f"{arm}.safetensors")
        results += [_steered(bench, arm, scale, found, prompts) for scale in scales]
    write_json(folder / "steering.json", [asdict(one) for one in results])
    return results


def _steered(
    bench: Workbench,
    arm: str,
    scale: float,
    directions: DirectionSet | None,
    prompts: Sequence[Prompt],
) -> Steered:
    recipe, loaded = bench.recipe, bench.loaded
    sampler = HfSampler(
        bench.policy.base,
        loaded.tokenizer,
        stop_ids(bench.policy.base, loaded.tokenizer),
        recipe.rollout.max_batch,
    )
    sampling = Sampling(recipe.rollout.max_completion_length, stop=recipe.rollout.stop)
    with adding(bench.policy, directions, scale):
        sampled = sampler.sample(Request([p.ids for p in prompts], 1, sampling, None))
    rollouts = as_rollouts(prompts, list(range(len(prompts))), 1, sampled)
    counts: dict[str, int] = {}
    correct = 0
    for r in rollouts:
        seen = r.prompt.example, r.completion, r.is_truncated
        correct += bench.task.verify(*seen).correct
        for label, is_so in (bench.task.labels(*seen) if bench.task.labels else {}).items():
            counts[label] = counts.get(label, 0) + is_so
    return Steered(arm, scale, len(rollouts), correct, counts)


@contextmanager
def adding(policy: Policy, directions: DirectionSet | None, scale: float) -> Iterator[None]:
    """Add scale * norm * v to the residual after each layer of the band."""
    with ExitStack() as stack:
        for layer in directions.layers if directions is not None else ():
            assert directions is not None
            size = scale * float(directions.evidence[f"norm_{layer}"])
            push_D = (size * directions.vector_D).to(policy.device)
            handle = policy.blocks[layer].register_forward_hook(_add(push_D))
            stack.callback(handle.remove)
        yield


def _add(push_D: Tensor) -> Callable[..., object]:
    def hook(_module: nn.Module, _args: object, output: object) -> object:
        if isinstance(output, tuple):
            return (output[0] + push_D.to(output[0].dtype), *output[1:])
        assert isinstance(output, Tensor), type(output)
        return output + push_D.to(output.dtype)

    return hook
