"""Loading by hub id, from a cache laid out as the hub lays it out; nothing is downloaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.families import model, peft_model, tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import torch
from modeldiff.errors import SetupError
from modeldiff.models import ModelPair

pair = ModelPair.load("me/base", adapter="me/adapters", subfolder="rank2", revision="v1")
by_id = pair.run(["the cat sat"]).logits
two = ModelPair.load("me/base", "me/whole")
here = ModelPair.load("{base}", adapter="{adapter}")
print(torch.equal(by_id, here.run(["the cat sat"]).logits), pair.kind, two.kind, two.sides.names)
try:
    ModelPair.load("me/base", "me/missing")
except SetupError as error:
    print("me/missing" in str(error))
"""


def publish(home, name, folder, revision="main"):
    """Put a folder into the cache as the snapshot of a repository."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)


def test_base_adapter_and_whole_model_load_by_hub_id(tmp_path):
    base, whole, adapters = (tmp_path / name for name in ("base", "whole", "adapters"))
    model("llama").save_pretrained(base)
    tokenizer().save_pretrained(base)
    model("llama", 1).save_pretrained(whole)
    peft_model().save_pretrained(adapters)
    (adapters / "tuned").rename(adapters / "rank2")
    home = tmp_path / "home"
    publish(home, "me/base", base)
    publish(home, "me/whole", whole)
    publish(home, "me/adapters", adapters, revision="v1")
    script = SCRIPT.format(base=base, adapter=adapters / "rank2")
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.splitlines() == ["True adapter two ('me/base', 'me/whole')", "True"]
