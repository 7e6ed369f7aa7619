"""Sources, budgets, packing, and training on them: exact shares, masked prompts, resuming."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from operando.cli import app
from operando.errors import UserError
from operando.models.load import load_model
from operando.pretrain import mixture as pm
from operando.pretrain import sft
from operando.pretrain.fit import IGNORED, STATE, PretrainProgress
from operando.recipe.data import ModelConfig
from operando.recipe.mixture import MixtureRecipe, SftRecipe
from operando.recipe_io import check, load_pretrain_recipe
from operando.tasks import clrs, files, graph_search, words
from operando.tasks.mixture import Document, open_source, shares, take_pairs

DATA = Path(__file__).parents[3] / "shared" / "data"
WIKI = DATA / "wikitext2_valid.txt.gz"
ALPACA = DATA / "alpaca_seed_tasks.jsonl"
GENERATED = {
    "graphs": {"kind": "clrs", "weight": 0.5, "sizes": [4]},
    "math": {"kind": "words", "weight": 0.3},
    "search": {"kind": "graph_search", "weight": 0.2, "sizes": [4]},
}
SMALL = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 16,
    "max_length": 512,
}


def mixture(out: Path, sources: object = None, tokens: int = 3001, **keys: object) -> MixtureRecipe:
    tables: dict[str, object] = {
        "name": "m",
        "out": str(out),
        "batch_size": 4,
        "model": SMALL,
        "checkpoint_every": 4,
        "mixture": {"tokens": tokens, "length": 64, "sources": sources or GENERATED},
    }
    return check(MixtureRecipe, tables | keys, "here")


def tuning(out: Path, model: Path | str, sources: object = None, **keys: object) -> SftRecipe:
    tables: dict[str, object] = {
        "name": "s",
        "out": str(out),
        "model": str(model),
        "num_pairs": 20,
        "batch_size": 4,
        "max_length": 512,
        "checkpoint_every": 2,
        "sources": sources or GENERATED,
    }
    return check(SftRecipe, tables | keys, "here")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pm.pretrain_mixture(mixture(tmp_path_factory.mktemp("pretrained") / "model"))


# --- budgets and packing -------------------------------------------------------------------------


def test_shares_add_up_and_an_empty_one_is_an_error() -> None:
    assert shares(10, {"a": 0.5, "b": 0.33, "c": 0.17}) == {"a": 5, "b": 3, "c": 2}
    assert shares(60_000_001, {"a": 0.5, "b": 0.33, "c": 0.17}) == {
        "a": 30_000_001,
        "b": 19_800_000,
        "c": 10_200_000,
    }
    with pytest.raises(UserError, match="sources b: their share of 3 is 0"):
        shares(3, {"a": 0.99, "b": 0.01})


def test_every_source_has_its_tokens_exactly_and_the_same_ones_again(tmp_path: Path) -> None:
    recipe = mixture(tmp_path)
    tokenizer = pm.train_tokenizer(recipe)
    taken = pm.take_all(recipe, tokenizer)
    counts = {name: sum(map(len, source.ids)) for name, source in taken.items()}
    assert counts == {"graphs": 1501, "math": 900, "search": 600}
    assert all(source.facts["tokens"] == counts[name] for name, source in taken.items())
    eos = tokenizer.eos_token_id
    for source in taken.values():
        assert all(ids[-1] == eos and eos not in ids[:-1] for ids in source.ids[:-1])
        assert eos not in source.ids[-1][:-1]
        assert source.facts["rows"] == len(source.ids)
    assert pm.manifest_of(pm.take_all(recipe, tokenizer)) == pm.manifest_of(taken)
    other = pm.take_all(mixture(tmp_path, seed=1), tokenizer)
    assert other["math"].facts["sha256"] != taken["math"].facts["sha256"]


def test_packing_keeps_every_token_once_and_pads_only_the_end() -> None:
    documents = [[i] * (i % 5 + 1) for i in range(1, 12)]
    rows_RS, num = pm.pack(documents, 4, pad=0, seed=3)
    flat = rows_RS.flatten().tolist()
    assert num == sum(map(len, documents)) == len(flat) - flat.count(0)
    assert flat[num:] == [0] * (len(flat) - num)
    assert Counter(flat[:num]) == Counter(i for one in documents for i in one)
    whole = [row for row in rows_RS.tolist() if len(set(row)) > 1]
    runs = [[a for a, b in zip(r, [None, *r[:-1]], strict=True) if a != b and a] for r in whole]
    assert sum(map(len, runs)) <= len(documents) + len(rows_RS), "cut at the ends of rows only"
    assert sum(runs, []) != sorted(sum(runs, [])), "shuffled"
    long_one, _ = pm.pack([[1] * 40, [2] * 40], 4, pad=0, seed=3)
    assert long_one[:10, 0].tolist() not in ([1] * 10, [2] * 10), "rows are shuffled too"
    batch_at = pm.row_batches(rows_RS, num, batch_size=3)
    labels = [
        i for step in range(-(-len(rows_RS) // 3)) for i in batch_at(step).labels_BS.flatten()
    ]
    assert [int(i) for i in labels] == flat[:num] + [IGNORED] * (len(flat) - num)


def test_the_tokenizer_gives_every_text_back_with_tags_and_digits_single(tmp_path: Path) -> None:
    tokenizer = pm.train_tokenizer(mixture(tmp_path))
    text = "Q: Graph: A-[B] Find 1234.\nA: <search> A <backtrack> B\nAnswer: é [0 1 23]\n\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces.count("<search>") == pieces.count("<backtrack>") == 1
    assert not any(len([c for c in p if c.isdigit()]) > 1 for p in pieces)
    assert len(tokenizer) <= SMALL["vocab_size"]


def test_no_held_out_problem_is_in_a_generated_source() -> None:
    recipe = mixture(Path("unused"))
    held_out = {
        "graphs": lambda d: clrs_held_out(d.prompt),
        "math": lambda d: words.is_held_out(d.answer.partition(" ####")[0].strip()),
        "search": lambda d: graph_held_out(d.prompt.removeprefix("Q: ").removesuffix("\nA:")),
    }
    for name, is_held_out in held_out.items():
        reader = open_source(name, recipe.mixture.sources[name], f"sources.{name}", 0)
        found, _ = take_pairs(reader, 200)
        assert not any(map(is_held_out, found)), name


def clrs_held_out(prompt: str) -> bool:
    import hashlib

    A = clrs.read_states(prompt.split("A: [", 1)[1].split("], initial")[0] + "]")
    return hashlib.sha256(clrs.question_text(A, False).encode()).digest()[0] % 5 == 0


def graph_held_out(question: str) -> bool:
    import hashlib

    assert graph_search.read_graph(question)
    return hashlib.sha256(question.encode()).digest()[0] % 5 == 0


def test_a_graph_may_be_answered_with_or_without_its_walk(tmp_path: Path) -> None:
    found = []
    for trace in (True, False):
        table = {"kind": "graph_search", "weight": 1.0, "sizes": [4], "trace": trace}
        source = mixture(tmp_path, {"s": table}).mixture.sources["s"]
        found.append(take_pairs(open_source("s", source, "sources.s", 0), 20)[0])
    for walked, direct in zip(*found, strict=True):
        assert walked.prompt == direct.prompt and walked.answer.startswith(" <search> ")
        assert walked.answer.endswith(f"\n{direct.answer.strip()}")
        assert direct.answer.startswith(" Answer: Path is [")


# --- files ---------------------------------------------------------------------------------------


def test_a_text_file_is_read_in_blocks_and_never_repeated_unasked(tmp_path: Path) -> None:
    file = tmp_path / "t.txt.gz"
    file.write_bytes(gzip.compress(b"one\ntwo\n\n\nthree\n \nfour"))
    tables = {"t": {"kind": "text", "weight": 1.0, "path": str(file)}}
    source = mixture(tmp_path, tables).mixture.sources["t"]
    found, facts = take_pairs(open_source("t", source, "sources.t", 0), 3)
    assert sorted(d.answer for d in found) == ["four", "one\ntwo", "three"]
    assert facts["file_rows"] == 3 and len(str(facts["file_sha256"])) == 64
    recipe = mixture(tmp_path, tables, tokens=100)
    with pytest.raises(
        UserError, match=r"source t: \d+ of its share of 100 tokens.*max_passes = 1"
    ):
        pm.pretrain_mixture(recipe)
    tables["t"]["max_passes"] = 50
    taken = pm.take_all(mixture(tmp_path, tables, tokens=100), pm.train_tokenizer(recipe))
    assert int(taken["t"].facts["rows"]) > 3


def test_instructions_come_with_input_and_instances_and_empty_answers_are_counted(
    tmp_path: Path,
) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "response": "hi"},
        {"instruction": "Name.", "instances": [{"input": "", "output": "Ann"}]},
        {"instruction": "Nothing.", "input": "", "output": ""},
    ]
    file = tmp_path / "i.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = {"i": {"kind": "instructions", "weight": 1.0, "path": str(file)}}
    reader = open_source("i", mixture(tmp_path, tables).mixture.sources["i"], "sources.i", 0)
    found, facts = take_pairs(reader, 3)
    assert set(found) == {
        Document("Q: Add.\n1 2\nA:", " 3"),
        Document("Q: Say hi.\nA:", " hi"),
        Document("Q: Name.\nA:", " Ann"),
    }
    assert facts["rows_empty"] == 1 and facts["file_rows"] == 3
    tables["i"]["max_chars"] = 15
    reader = open_source("i", mixture(tmp_path, tables).mixture.sources["i"], "sources.i", 0)
    found, facts = take_pairs(reader, 1)
    assert found == [Document("Q: Name.\nA:", " Ann")] and facts["rows_too_long"] == 2


def test_empty_rows_of_a_text_column_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": ""}\n{"text": "one"}\n')
    source = {"kind": "text", "weight": 1.0, "path": str(file)}
    reader = open_source("t", mixture(tmp_path, {"t": source}).mixture.sources["t"], "t", 0)
    found, facts = take_pairs(reader, 1)
    assert found == [Document("", "one")] and facts["rows_empty"] == 1
    source["column"] = "txt"
    with pytest.raises(UserError, match="no `txt`. Did you mean 'text'"):
        open_source("t", mixture(tmp_path, {"t": source}).mixture.sources["t"], "t", 0)


@pytest.mark.skipif(not (WIKI.is_file() and ALPACA.is_file()), reason=f"needs {DATA}")
def test_wikitext_and_the_seed_instructions_are_read(tmp_path: Path) -> None:
    sources = {
        "wiki": {"kind": "text", "weight": 0.5, "path": str(WIKI)},
        "chat": {"kind": "instructions", "weight": 0.5, "path": str(ALPACA)},
    }
    recipe = mixture(tmp_path, sources, tokens=2000)
    taken = pm.manifest_of(pm.take_all(recipe, pm.train_tokenizer(recipe)))
    assert taken["wiki"]["file_sha256"] == (
        "3ac34ae2b6509075d52302c50a04a8a1970739ffe1a904f2cd374fefbea3cbf2"
    )
    assert taken["chat"]["tokens"] == taken["wiki"]["tokens"] == 1000


# --- one clear error each ------------------------------------------------------------------------


def refuse(**_: object) -> str:
    raise OSError("no route to host")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"kind": "text", "path": "nowhere.txt"},
            "mixture.sources.x.path = 'nowhere.txt': no such",
        ),
        (
            {"kind": "gsm8k"},
            r"sources.x.path = 'openai/gsm8k' can't be downloaded from the Hugging Face",
        ),
        ({"kind": "text", "path": "a/b"}, "name the file in it as mixture.sources.x.hub_file"),
        (
            {"kind": "text", "path": "Salesforce/wikitext", "hub_file": "x.parquet"},
            r"can't be downloaded from the Hugging Face hub \(no route to host\)",
        ),
    ],
)
def test_a_source_that_cannot_be_had_stops_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(files, "hf_hub_download", refuse)
    sources = {"math": {"kind": "words", "weight": 0.5}, "x": source | {"weight": 0.5}}
    with pytest.raises(UserError, match=message):
        pm.pretrain_mixture(mixture(tmp_path / "out", sources))
    assert not (tmp_path / "out").exists()
    if source["kind"] != "text":
        with pytest.raises(UserError, match="can't be downloaded"):
            sft.take_all(tuning(tmp_path, "starter", sources), load_starter())


def load_starter():
    return load_model(ModelConfig()).tokenizer


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": {"kind": "words", "weight": 0.5}}, r"must sum to 1; 0.5 \(a\) = 0.5"),
        ({"a": {"kind": "nope", "weight": 1.0}}, "kind"),
        ({"a": {"kind": "words", "weight": 1.0, "size": 3}}, "mixture.sources.a.size: unknown key"),
    ],
)
def test_a_mixture_that_is_none(tmp_path: Path, sources: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixture(tmp_path, sources)


def test_a_text_that_spells_the_end_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a <eos> b")
    sources = {"t": {"kind": "text", "weight": 1.0, "path": str(tmp_path / "t.txt")}}
    with pytest.raises(UserError, match="source t: a document holds the model's special token"):
        pm.pretrain_mixture(mixture(tmp_path, sources, tokens=5))


def test_text_is_no_source_of_pairs_and_long_pairs_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sources.t: plain text has no question"):
        tuning(tmp_path, "starter", {"t": {"kind": "text", "weight": 1.0, "path": "x.txt"}})
    with pytest.raises(UserError, match=r"source graphs: 10 of 10 pairs are over max_length = 8 "):
        sft.take_all(tuning(tmp_path, "starter", max_length=8), load_starter())


# --- training ------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killer(step: int) -> Callable[[PretrainProgress], None]:
    def on_step(at: PretrainProgress) -> None:
        if at.step == step:
            raise Killed

    return on_step


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(ModelConfig(id=str(folder))).model.state_dict()


def assert_same(a: Path, b: Path) -> None:
    before, after = weights(a), weights(b)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pretraining_goes_on_bit_equal_after_a_kill(tmp_path: Path, pretrained: Path) -> None:
    recipe = mixture(tmp_path / "killed")
    with pytest.raises(Killed):
        pm.pretrain_mixture(recipe, on_step=killer(6))
    with pytest.raises(UserError, match="did not finish: continue with --resume"):
        pm.pretrain_mixture(recipe)
    with pytest.raises(UserError, match=r"--resume: the recipe is not .* lr: 0.002 -> 0.5"):
        pm.pretrain_mixture(mixture(tmp_path / "killed", lr=0.5), resume=True)
    seen: list[int] = []
    pm.pretrain_mixture(recipe, resume=True, on_step=lambda at: seen.append(at.step))
    assert seen == [*range(5, pm.num_steps(recipe) + 1)], "from the state of step 4"
    assert_same(pretrained, tmp_path / "killed")
    assert not (tmp_path / "killed" / STATE).exists()
    one, other = (
        json.loads((f / "pretrain.json").read_text()) for f in (pretrained, recipe_out(recipe))
    )
    assert one == other and one["tokens"] == 3001
    assert set(one["sources"]["math"]) >= {"kind", "rows", "tokens", "sha256"}


def recipe_out(recipe: MixtureRecipe | SftRecipe) -> Path:
    return Path(recipe.out)


def test_resuming_on_other_data_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("\n\n".join(f"line {i} of a text" for i in range(300)))
    sources = {"t": {"kind": "text", "weight": 1.0, "path": str(file)}}
    recipe = mixture(tmp_path / "out", sources, tokens=1500)
    with pytest.raises(Killed):
        pm.pretrain_mixture(recipe, on_step=killer(5))
    file.write_text(file.read_text().replace("text", "test"))
    with pytest.raises(UserError, match="the data are not those of"):
        pm.pretrain_mixture(recipe, resume=True)
    with pytest.raises(UserError, match="there is no .*; train without --resume"):
        pm.pretrain_mixture(mixture(tmp_path / "nothing"), resume=True)


def test_prompt_tokens_get_no_gradient_and_answers_do(pretrained: Path) -> None:
    model, tokenizer, _ = load_model(ModelConfig(id=str(pretrained)))
    pairs, _ = sft.take_all(tuning(Path("unused"), pretrained), tokenizer)
    batch = sft.pair_batches(pairs, 3, pad=0)(0)
    logits_BSV = model(input_ids=batch.ids_BS).logits
    logits_BSV.retain_grad()
    model.loss_function(
        logits=logits_BSV, labels=batch.labels_BS, vocab_size=logits_BSV.shape[-1]
    ).backward()
    size_BS = logits_BSV.grad.abs().sum(-1)
    for b, pair in enumerate(pairs[:3]):
        first, end = len(pair.prompt) - 1, len(pair.prompt) + len(pair.answer) - 1
        assert (size_BS[b, :first] == 0).all() and (size_BS[b, end:] == 0).all()
        assert (size_BS[b, first:end] > 0).all(), "from the first answer token to the end token"
        assert pair.answer[-1] == tokenizer.eos_token_id


def test_sft_writes_a_model_that_loads_and_goes_on_bit_equal(
    tmp_path: Path, pretrained: Path
) -> None:
    whole = sft.finetune(tuning(tmp_path / "whole", pretrained))
    killed = tuning(tmp_path / "killed", pretrained)
    with pytest.raises(Killed):
        sft.finetune(killed, on_step=killer(3))
    sft.finetune(killed, resume=True)
    assert_same(whole, tmp_path / "killed")
    moved = [
        not torch.equal(a, b)
        for a, b in zip(weights(whole).values(), weights(pretrained).values(), strict=True)
    ]
    assert any(moved)
    facts = json.loads((whole / "sft.json").read_text())
    assert facts["pairs"] == 20 and facts["sources"]["graphs"]["rows"] == 10
    with pytest.raises(UserError, match="is the model's own folder"):
        sft.finetune(tuning(pretrained, pretrained))


# --- the commands --------------------------------------------------------------------------------

TOML = """
name = "m"
out = "{out}"
batch_size = 4
[model]
vocab_size = 300
hidden_size = 16
num_layers = 1
num_heads = 2
num_kv_heads = 1
intermediate_size = 16
max_length = 128
[mixture]
tokens = 1000
length = 32
[mixture.sources.math]
kind = "words"
weight = {weight}
"""


def test_the_commands_print_the_folder_and_mistakes_are_exit_code_2(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text(TOML.format(out=tmp_path / "model", weight=0.5))
    result = CliRunner().invoke(app, ["pretrain", str(file)])
    assert isinstance(result.exception, UserError) and "sum to 1" in str(result.exception)
    file.write_text(TOML.format(out=tmp_path / "model", weight=1.0))
    assert isinstance(load_pretrain_recipe(str(file)), MixtureRecipe)
    result = CliRunner().invoke(app, ["pretrain", str(file)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path / "model")
    assert "tokens/s" in result.output and "s left" in result.output


# --- loops ---------------------------------------------------------------------------------------


def test_a_recursive_model_draws_its_loops_by_step_and_goes_on_with_the_same(
    tmp_path: Path,
) -> None:
    looped = {"model": {"recursive": "tiny", "min_loops": 2, "vocab_size": 320}}
    whole = pm.pretrain_mixture(mixture(tmp_path / "whole", tokens=1500, **looped))
    recipe = mixture(tmp_path / "killed", tokens=1500, **looped)
    with pytest.raises(Killed):
        pm.pretrain_mixture(recipe, on_step=killer(5))
    assert_same(whole, pm.pretrain_mixture(recipe, resume=True))
    all_loops = {"model": {"recursive": "tiny", "vocab_size": 320}}
    other = pm.pretrain_mixture(mixture(tmp_path / "all", tokens=1500, **all_loops))
    a, b = weights(whole), weights(other)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_loops_of_a_model_without_them_are_an_error(tmp_path: Path, pretrained: Path) -> None:
    with pytest.raises(UserError, match="min_loops = 2 is for a recursive model.*Qwen2ForCausalLM"):
        sft.finetune(tuning(tmp_path / "s", pretrained, min_loops=2))
    deep = {"recursive": "tiny", "min_loops": 9, "vocab_size": 320}
    with pytest.raises(UserError, match="min_loops = 9: the model has 8 loops"):
        pm.pretrain_mixture(mixture(tmp_path / "deep", model=deep))
    assert not (tmp_path / "s").exists() and not (tmp_path / "deep").exists()
