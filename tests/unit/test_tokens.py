"""Text to ids and back: the folder's own tokenizer, nothing lost, one beginning, no end."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from operando.errors import UserError
from operando.models.load import load_model
from operando.models.tokens import (
    check_stop,
    completion_text,
    load_tokenizer,
    lost_in_ids,
    prompt_ids,
    start_ids,
    text_ids,
)
from operando.pretrain.sft import encode_pairs
from operando.recipe.data import ModelConfig, PromptConfig, RolloutConfig
from operando.rewards.formats import is_one_block, whole_answer
from operando.rollout.engine import Engine
from operando.rollout.sampler import Request, Sampling, finish
from operando.tasks.mixture import Document, Reader, encode_texts
from operando.tasks.prompts import answer_so_far, make_prompts, missing_start
from operando.types import Example, Prompt, Rollout
from tests.unit.tiny import tiny_model

SPECIAL = ("<pad>", "</s>", "<s>", "<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_PROMPT = CHAT.partition("{% if")[0]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
DROPS = CHAT.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
DAY = datetime(2024, 2, 29, 23, 58, tzinfo=UTC)
SHOP = Example("shop/0", "Tom has 3 pens.\nHow many  has he?", "3", "3")


def byte_bpe(
    *extra: str, post: str = "$A", template: str | None = None, drop: str = ""
) -> PreTrainedTokenizerFast:
    """Return 256 bytes and special tokens; `post` as in a TemplateProcessing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(tokenizer_models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    if drop:
        tokenizer.normalizer = normalizers.Replace(drop, "")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(t, special=True, normalized=False) for t in (*SPECIAL, *extra)]
    tokenizer.add_special_tokens(tokens)
    pairs = [(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=pairs)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = template
    return fast


def piece_bpe() -> PreTrainedTokenizerFast:
    """Return a tokenizer in the manner of SentencePiece: spaces are "▁", other bytes <0x0A>."""
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    model = tokenizer_models.BPE({c: i for i, c in enumerate(pieces)}, [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


def shop_prompt(tokenizer: PreTrainedTokenizerBase, **settings: object) -> Prompt:
    config = PromptConfig.model_validate(settings, strict=False)
    return make_prompts([SHOP], [], config, tokenizer, 999, DAY)[0]


def phi3_like(**taken: bool) -> PreTrainedTokenizerFast:
    tokenizer = byte_bpe()
    tokens = [
        AddedToken(t, special=True, normalized=False, **taken)
        for t in ("<|user|>", "<|end|>", "<|assistant|>")
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return tokenizer


@pytest.mark.parametrize("taken", [{"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_whitespace_that_an_added_token_takes_is_not_lost(taken: dict[str, bool]) -> None:
    tokenizer = phi3_like(**taken)
    user, end, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>"])
    hi = tokenizer("Hi")["input_ids"]
    text = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert text_ids(tokenizer, [text], "a prompt") == [[user, *hi, end, assistant]]
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer.chat_template = template
    prompt = shop_prompt(tokenizer, format="chat")
    assert prompt.ids[0] == user and prompt.ids[-2:] == (end, assistant)


def test_whitespace_elsewhere_and_other_text_is_lost_beside_such_tokens_too() -> None:
    tokenizer = phi3_like(rstrip=True)
    ids = tokenizer("<|user|>\nHi you<|end|>\n")["input_ids"]
    for other in ("<|user|>\nHi\nyou<|end|>", "<|user|>\nHi you\n<|end|>", "<|user|>\nHi<|end|>"):
        assert lost_in_ids(tokenizer, other, ids) is not None, other
    plain = phi3_like()
    lost = plain("<|user|>Hi")["input_ids"]
    assert lost_in_ids(plain, "<|user|>\nHi", lost) is not None  # not declared to take it


# --- the folder's own tokenizer ------------------------------------------------------------------


@pytest.fixture
def qwen2_folder(tmp_path: Path) -> Path:
    tokenizer = piece_bpe()
    tiny_model("qwen2", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_a_qwen2_folder_keeps_the_tokenizer_that_lies_in_it(qwen2_folder: Path) -> None:
    text = "Q: Tom's 12 pens\nand\n\n7  more.\nA:"
    asked = piece_bpe()(text)["input_ids"]
    theirs = AutoTokenizer.from_pretrained(qwen2_folder)
    assert theirs(text)["input_ids"] != asked, "transformers reads the folder right: simplify"
    ours = load_tokenizer(str(qwen2_folder))
    assert ours(text)["input_ids"] == asked
    assert ours.eos_token == "</s>" and len(ours) == len(piece_bpe())
    loaded = load_model(ModelConfig(id=str(qwen2_folder)))
    (prompt,) = make_prompts([SHOP], [], PromptConfig(), loaded.tokenizer, 999, DAY)
    assert loaded.tokenizer.decode(list(prompt.ids)).lstrip() == prompt.text


def test_the_ids_that_transformers_would_give_are_an_error(qwen2_folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(qwen2_folder)
    with pytest.raises(
        UserError, match=r"a prompt: the tokenizer \(Qwen2Tokenizer\).*' ' x 8, '\\n' x 2"
    ):
        shop_prompt(theirs)


def test_the_starter_has_no_token_beyond_its_embedding() -> None:
    loaded = load_model(ModelConfig())
    embedding = loaded.model.get_input_embeddings()
    assert embedding is not None
    assert len(loaded.tokenizer) == embedding.get_parameter("weight").shape[0]


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0")  # of transformers before 5.20
def test_without_tokenizer_json_it_is_the_model_type_s_class(tmp_path: Path) -> None:
    tiny_model("qwen2").config.save_pretrained(tmp_path)
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (tmp_path / "vocab.json").write_text(json.dumps(alphabet))
    (tmp_path / "merges.txt").write_text("")
    found = load_tokenizer(str(tmp_path))
    assert type(found).__name__ == "Qwen2Tokenizer"
    assert found.decode(text_ids(found, ["a\n b"], "a text")[0]) == "a\n b"


# --- nothing is lost -----------------------------------------------------------------------------


def test_what_a_tokenizer_drops_is_named() -> None:
    lossy = byte_bpe(drop="\n")
    said = r"Lost: '\\n' x 2\. 'Q: Tom has 3 pens\.\\nHow .* comes back as 'Q: Tom has 3 pens\.How"
    with pytest.raises(UserError, match=said):
        shop_prompt(lossy)
    lossy.chat_template = CHAT
    with pytest.raises(UserError, match=r"Lost: '\\n' x "):
        shop_prompt(lossy, format="chat")
    with pytest.raises(UserError, match=r"rollout.stop = '\\nQ:': .*Lost: '\\n' x 1"):
        check_stop(lossy, (lossy.eos_token_id,), ("\nQ:",))
    with pytest.raises(UserError, match=r"source s: a prompt: .*Lost: '\\n' x 1"):
        encode_pairs([Document("Q: a\nA:", " b")], lossy, 99, "s")
    with pytest.raises(UserError, match=r"source s: an answer: .*Lost: '\\n' x 1"):
        encode_pairs([Document("Q: a", " b\nc")], lossy, 99, "s")
    with pytest.raises(UserError, match=r"source s: a document: .*Lost: '\\n' x 1"):
        encode_texts(Reader("s", iter(()), {}, ""), lossy, [Document("Q\n", " b")])


def test_another_character_in_its_place_is_an_error_too() -> None:
    swaps = byte_bpe()
    swaps._tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match=r"Lost: 'T' x 1\. In their place: 't' x 1"):
        text_ids(swaps, ["Tom"], "a text")
    shuffles = byte_bpe()
    shuffles._tokenizer.normalizer = normalizers.Replace("ab", "ba")
    with pytest.raises(UserError, match="'ab' comes back as 'ba'"):
        text_ids(shuffles, ["ab"], "a text")


def test_a_character_that_is_added_is_an_error() -> None:
    adds = byte_bpe()
    adds._tokenizer.normalizer = normalizers.Replace("a", "ax")
    with pytest.raises(UserError, match=r"In their place: 'x' x 1"):
        text_ids(adds, ["la"], "a text")


def test_added_spaces_and_composed_accents_are_no_loss() -> None:
    assert text_ids(piece_bpe(), ["a  b\n c"], "a text")
    composes = byte_bpe()
    composes._tokenizer.normalizer = normalizers.NFC()
    assert text_ids(composes, ["cafe\u0301 au lait"], "a text")


# --- beginning and end ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("post", "text", "tokens"),
    [
        ("$A", "ab", ["a", "b"]),
        ("<s> $A", "ab", ["<s>", "a", "b"]),
        ("$A </s>", "ab", ["a", "b"]),
        ("<s> $A </s>", "ab", ["<s>", "a", "b"]),
        ("<s> $A", "<s>ab", ["<s>", "a", "b"]),  # one, not two
        ("$A", "<s>ab", ["<s>", "a", "b"]),
        ("<s> $A </s>", "", ["<s>"]),
    ],
)
def test_a_prompt_has_one_beginning_and_no_end(post: str, text: str, tokens: list[str]) -> None:
    tokenizer = byte_bpe(post=post)
    (ids,) = prompt_ids(tokenizer, [text], "a prompt")
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert start_ids(tokenizer) == ((tokenizer.bos_token_id,) if "<s> $A" in post else ())


def test_sft_prompts_are_what_a_model_is_asked() -> None:
    tokenizer = byte_bpe(post="<s> $A </s>")
    prompt = shop_prompt(tokenizer)
    (pair,) = encode_pairs([Document(prompt.text, " 3")], tokenizer, 99, "s")
    assert pair.prompt == prompt.ids and prompt.ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in prompt.ids
    assert pair.answer[-1] == tokenizer.eos_token_id and pair.answer.count(pair.answer[-1]) == 1


def test_a_chat_prompt_has_what_its_template_writes_and_a_warning_says_what_is_missing() -> None:
    chat = PromptConfig(format="chat")
    for post in ("$A", "<s> $A", "<s> $A </s>"):
        with_bos = byte_bpe(post=post, template="{{ bos_token }}" + CHAT)
        ids = shop_prompt(with_bos, format="chat").ids
        assert ids.count(with_bos.bos_token_id) == 1 and with_bos.eos_token_id not in ids
        assert missing_start(chat, with_bos, DAY) is None
    without = byte_bpe(post="<s> $A", template=CHAT)
    assert without.bos_token_id not in shop_prompt(without, format="chat").ids
    assert "begin with '<s>'" in (missing_start(chat, without, DAY) or "")
    assert missing_start(PromptConfig(), without, DAY) is None
    assert missing_start(chat, byte_bpe(template=CHAT), DAY) is None


# --- chat templates ------------------------------------------------------------------------------


def test_a_template_that_refuses_drops_or_ignores_is_one_clear_error() -> None:
    refuses = byte_bpe(template=REFUSES + CHAT)
    assert shop_prompt(refuses, format="chat")
    with pytest.raises(UserError, match=r"refuses .* system, user: no system role\. Leave out"):
        shop_prompt(refuses, format="chat", system="Be brief.")
    drops = byte_bpe(template=DROPS)
    assert shop_prompt(drops, format="chat")
    with pytest.raises(UserError, match=r"drops prompt.system: 'Be brief.'"):
        shop_prompt(drops, format="chat", system="Be brief.")
    with pytest.raises(UserError, match=r"ignores add_generation_prompt: .*begins with .*assist"):
        shop_prompt(byte_bpe(template=NO_PROMPT), format="chat")


def test_a_template_whose_answers_need_no_beginning_is_fine() -> None:
    prompt = shop_prompt(byte_bpe(template=MISTRAL), format="chat")
    assert prompt.text == f"<s>[INST] {SHOP.question} [/INST]"


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<think>\n\n"])
def test_a_think_tag_that_the_template_opens_is_part_of_the_answer(opening: str) -> None:
    tokenizer = byte_bpe(
        template=CHAT.replace("assistant\n{% endif", f"assistant\n{opening}{{% endif")
    )
    prompt = shop_prompt(tokenizer, format="chat")
    assert prompt.text.endswith(f"<|im_start|>assistant\n{opening}") and prompt.prefill == opening
    rollout = Rollout(prompt, 0, 0, "3 pens</think>3", (1,), (0.0,), False)
    assert is_one_block(whole_answer(rollout))
    more = shop_prompt(tokenizer, format="chat", prefill="Well,")
    assert more.prefill == f"{opening}Well,"
    with pytest.raises(UserError, match="already ends with <think>"):
        shop_prompt(tokenizer, format="chat", prefill="<think>")


def test_a_raw_template_opens_it_too_and_a_mention_does_not() -> None:
    tokenizer = byte_bpe()
    assert shop_prompt(tokenizer, template="{question}\n<think>\n").prefill == "<think>\n"
    assert shop_prompt(tokenizer, template="Use <think> tags.\n{question}\nA:").prefill == ""
    assert shop_prompt(tokenizer, prefill=" <think>").prefill == " <think>"
    assert answer_so_far("A: <think>\nWell", "Well") == "<think>\nWell"


# --- what a completion's text is -----------------------------------------------------------------


def test_special_tokens_are_text_and_end_and_padding_are_not() -> None:
    tokenizer = byte_bpe("<think>", "</think>")
    asked = "<s><think>1+1=2</think>2<|im_end|><pad>"
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert completion_text(tokenizer, ids) == "<think>1+1=2</think>2<|im_end|>"
    ids.append(tokenizer.eos_token_id)
    found = finish(tokenizer, [*ids, 5, 6], [0.0] * (len(ids) + 2), (ids[-1],), Sampling(99))
    assert found.text == "<think>1+1=2</think>2<|im_end|>" and found.ids == tuple(ids)
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = finish(tokenizer, ids, [0.0] * len(ids), (turn_end, ids[-1]), Sampling(99))
    assert found.text == "<think>1+1=2</think>2" and found.ids[-1] == turn_end


def test_a_stop_text_that_is_a_special_token_stops() -> None:
    tokenizer = byte_bpe()
    ids = tokenizer("4<|im_end|>\nuser", add_special_tokens=False)["input_ids"]
    sampling, eos = Sampling(99, stop=("<|im_end|>",)), tokenizer.eos_token_id
    found = finish(tokenizer, ids, [0.0] * len(ids), (eos,), sampling)
    assert (found.text, found.is_truncated, len(found.ids)) == ("4", False, 2)
    check_stop(tokenizer, (eos,), ("<|im_end|>", "</s>", "\nQ:"))


@pytest.mark.parametrize("stop", ["<pad>", "<s>", "a</s>", "</s>\n"])
def test_a_stop_text_that_no_completion_holds_is_refused(stop: str) -> None:
    tokenizer = byte_bpe()
    with pytest.raises(UserError, match=r"rollout\.stop = .* can't be found.*</s>"):
        check_stop(tokenizer, (tokenizer.eos_token_id,), (stop,))
    with pytest.raises(ValidationError, match="at least 1 character"):
        RolloutConfig(stop=("",))


def test_a_sampler_refuses_it_before_it_samples() -> None:
    tokenizer = byte_bpe()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    engine = Engine(model, tokenizer, (tokenizer.eos_token_id,))
    with pytest.raises(UserError, match="can't be found"):
        engine.sample(Request([(5, 6)], 1, Sampling(4, math.inf, ("<pad>",)), None))


DATED = "Today: {{ strftime_now('%d %B %Y') }}{{strftime_now( \"|%Y-%m-%d\" )}}\n" + CHAT
LLAMA_3 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% else %}'
    '{% set date_string = "26 Jul 2024" %}{% endif %}{% endif %}Today: {{ date_string }}\n' + CHAT
)
SWITCH = CHAT.replace(
    "assistant\n",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}!{% endif %}",
)


def test_a_template_prints_the_day_of_the_run() -> None:
    text = shop_prompt(byte_bpe(template=DATED), format="chat").text
    assert text.startswith("Today: 29 February 2024|2024-02-29\n<|im_start|>user")
    text = shop_prompt(byte_bpe(template=LLAMA_3), format="chat").text
    assert text.startswith("Today: 29 Feb 2024\n")
    given = {"date_string": "1 Jan 1970"}
    dated = shop_prompt(byte_bpe(template=LLAMA_3), format="chat", chat_template_kwargs=given)
    assert dated.text.startswith("Today: 1 Jan 1970\n")
    assert byte_bpe(template=DATED).chat_template == DATED, "the model's own template stays"
    computed = "{% set f = '%Y' %}{{ strftime_now(f) }}" + CHAT
    with pytest.raises(UserError, match=r"can't be fixed to the run's day: 'strftime_now\(f\)"):
        shop_prompt(byte_bpe(template=computed), format="chat")


def test_a_template_is_given_what_the_recipe_says() -> None:
    tokenizer = byte_bpe(template=SWITCH + "{% generation %}{% endgeneration %}")
    plain = shop_prompt(tokenizer, format="chat")
    off = shop_prompt(tokenizer, format="chat", chat_template_kwargs={"enable_thinking": False})
    on = shop_prompt(tokenizer, format="chat", chat_template_kwargs={"enable_thinking": True})
    assert off.text == plain.text + "!" and on.text == plain.text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("enable_thinkin", "never reads 'enable_thinkin'. Did you mean 'enable_thinking'?"),
        ("date_string", "It reads: enable_thinking"),
        ("messages", "'messages' is set by operando itself"),
    ],
)
def test_a_name_that_the_template_never_reads_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        shop_prompt(byte_bpe(template=SWITCH), format="chat", chat_template_kwargs={name: False})
    assert said in str(caught.value)


def test_raw_text_has_no_template_to_be_given_anything() -> None:
    with pytest.raises(ValidationError, match='chat_template_kwargs is for format = "chat"'):
        PromptConfig(chat_template_kwargs={"enable_thinking": False})
