"""A 4-bit base (bitsandbytes NF4) trains LoRA, is certified, and its adapter fits a 16-bit base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from operando.evals.certify import certify_run
from operando.models.load import STARTER
from tests.integration.runs import adapter, metric_rows, tiny, trained

pytest.importorskip("bitsandbytes")


@pytest.mark.filterwarnings("ignore")
def test_a_four_bit_base_trains_and_its_adapter_fits_a_sixteen_bit_one(tmp_path: Path) -> None:
    settings = ("model.quantization=nf4", "model.device=cpu", "steps=2")
    folder = trained(tiny(tmp_path, *settings))
    assert any(row.get("update_norm", 0) > 0 for row in metric_rows(folder))
    changed = [t for name, t in adapter(folder, 2).items() if "lora_B" in name and t.any()]
    assert len(changed) == 21, "three layers of seven modules"
    certificate, _ = certify_run(folder)
    assert certificate.passed
    base = AutoModelForCausalLM.from_pretrained(STARTER, dtype=torch.bfloat16).eval()
    ids = torch.arange(5, 25)[None]
    before = base(ids).logits
    peft = PeftModel.from_pretrained(base, str(folder / "checkpoints/step_00002"))
    assert (peft(ids).logits - before).abs().max() > 0
