"""The recursive model where others call it: Trainer, generate, configurations, folders."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from operando.errors import UserError
from operando.models.folders import save_folder
from operando.models.recursive import RecursiveConfig
from tests.unit.recursive_models import random_recursive
from tests.unit.tiny import byte_tokenizer


class Rows(Dataset[dict[str, Tensor]]):
    """Eight rows with labels of different lengths, so that a mean of means is not the mean."""

    def __init__(self) -> None:
        noise = torch.Generator().manual_seed(0)
        self.ids_NS = torch.randint(2, 258, (8, 12), generator=noise)

    def __len__(self) -> int:
        return len(self.ids_NS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.ids_NS[i].clone()
        labels[: 1 + i] = -100
        return {"input_ids": self.ids_NS[i], "labels": labels}


def trained_once(folder: Path, batch: int, parts: int) -> dict[str, float]:
    """One step of a Trainer at a rate of 0; returns what it logs."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        learning_rate=0.0,
        gradient_accumulation_steps=parts,
        max_steps=1,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=1e9,
    )
    trainer = Trainer(random_recursive(), arguments, train_dataset=Rows())
    trainer.train()
    return trainer.state.log_history[0]


def test_a_trainer_gets_the_same_loss_and_gradient_in_parts(tmp_path: Path) -> None:
    whole, parts = trained_once(tmp_path, 8, 1), trained_once(tmp_path, 1, 8)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_the_depth_can_be_set_in_generate() -> None:
    model = random_recursive(num_loops=2, max_loops=12, halt_threshold=0.6)
    ids = torch.randint(2, 258, (2, 6), generator=torch.Generator().manual_seed(1))
    run = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    def slow(loops: int, threshold: float | None) -> Tensor:
        """Greedy decoding without a cache, one whole forward a token."""
        seen = ids
        for _ in range(8):
            logits = model(input_ids=seen, num_loops=loops, halt_threshold=threshold).logits
            seen = torch.cat([seen, logits[:, -1:].argmax(-1)], dim=1)
        return seen

    with torch.no_grad():
        deep = model.generate(ids, num_loops=12, halt_threshold=math.inf, **run)
        assert torch.equal(deep, slow(12, math.inf))
        assert torch.equal(model.generate(ids, **run), slow(2, None))
    assert not torch.equal(deep, slow(2, None))


def test_a_static_cache_is_refused() -> None:
    ids = torch.arange(10, 16)[None]
    with pytest.raises(UserError, match="leave cache_implementation out"):
        random_recursive().generate(ids, max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads = 5 must divide hidden_size = 64"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 must divide num_attention_heads = 4"),
        ({"mod_rank": 1000}, "mod_rank = 1000 must be 1 to 64"),
        ({"draft_tokens": 9}, "draft_tokens = 9 must be 0 to num_speculative_heads = 4"),
        ({"halt_threshold": 2.0}, "halt_threshold = 2.0 is compared with a probability"),
        ({"halt_threshold": 0.0}, "halt_threshold = 0.0 is compared with a probability"),
        ({"min_loops": 99}, "min_loops = 99 must be 1 to num_loops = 8"),
        ({"num_loops": 0, "min_loops": 1}, "num_loops = 0 must be 1 to max_loops = 32"),
        ({"num_loops": 33}, "num_loops = 33 must be 1 to max_loops = 32"),
        ({"num_core_blocks": 0}, "num_core_blocks = 0 must be at least 1"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        RecursiveConfig(**changes)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UserError, match="num_loops = 0 .*draft_tokens = 9"):
        RecursiveConfig(num_loops=0, draft_tokens=9)


def test_a_folder_tells_a_process_without_operando_what_to_import(tmp_path: Path) -> None:
    save_folder(tmp_path, random_recursive(), byte_tokenizer())
    card = (tmp_path / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("PATH/TO/THIS/FOLDER", str(tmp_path))
    assert code.startswith("import operando.models.recursive\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
