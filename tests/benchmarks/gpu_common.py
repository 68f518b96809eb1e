"""What the GPU benchmarks share: a pair of random weights, clocks of the device, and their goals.

Goals and limits are for one H200; on another device they are printed all the same, and say nothing.
With ``small`` everything shrinks until it runs on a CPU in seconds, to test the benchmarks.
"""

import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from modeldiff.models import ModelPair
from modeldiff.store_texts import StoredText
from tests.families import tokenizer

BF16_FLOPS, TF32_FLOPS, BANDWIDTH = 790e12, 395e12, 4.3e12  # of an H200, as calculated with
QWEN_7B: dict[str, Any] = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip
SMALL: dict[str, Any] = QWEN_7B | {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One figure.

    Args:
        name: What was measured.
        value: The figure.
        unit: Its unit.
        goal: What it should be; None if it has none.
        limit: What the device allows by calculation.
        least: Whether larger is better.
        about: Everything else that belongs to it.
    """

    name: str
    value: float
    unit: str
    goal: float | None = None
    limit: float | None = None
    least: bool = False
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        if self.goal is None or device().type != "cuda":
            return None
        return self.value >= self.goal if self.least else self.value <= self.goal

    def record(self):
        return asdict(self) | {"reached": self.reached}

    def line(self):
        sign = ">=" if self.least else "<="
        goal = "no goal" if self.goal is None else f"goal {sign} {self.goal:g}"
        limit = "" if self.limit is None else f", limit {self.limit:.4g}"
        said = {None: "", True: ", reached", False: ", NOT reached"}[self.reached]
        return f"{self.name}: {self.value:.4g} {self.unit} ({goal}{limit}{said})"


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def about_device():
    """The device's name and the versions, as the results' file has them."""
    here = device()
    packages = ("torch", "transformers", "peft")
    found: dict[str, Any] = {name: metadata.version(name) for name in packages}
    if here.type == "cuda":
        facts = torch.cuda.get_device_properties(here)
        gib = round(facts.total_memory / (1 << 30), 1)
        return found | {"device": facts.name, "memory_gib": gib, "cuda": torch.version.cuda}
    return found | {"device": "cpu", "memory_gib": None, "cuda": None}


def milliseconds(runs, rounds, warm=2):
    """Time several functions in turn; median milliseconds of each, and of every round.

    On a GPU between two events on the stream, so that Python's part counts where it is waited for.
    """
    here = device()
    for _ in range(warm):
        for run in runs.values():
            run()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_clock(run, here))
    return {name: statistics.median(each) for name, each in times.items()}, times


def _clock(run, here):
    if here.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_bytes(run):
    """Bytes that a function takes on the GPU above what is there; None on a CPU."""
    if device().type != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def random_pair(small):
    """Random weights of the shape of Qwen2.5-7B in bfloat16, with a rank-1 adapter half-way up."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = SMALL if small else QWEN_7B
    middle = shape["num_hidden_layers"] // 2
    config = Qwen2Config(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.random.default_generator.manual_seed(0)
    here, dtype = device(), torch.float32 if device().type == "cpu" else torch.bfloat16
    with here:
        base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    settings = LoraConfig(
        r=1, lora_alpha=64, target_modules=["down_proj"], layers_to_transform=[middle]
    )
    peft = get_peft_model(base, settings, adapter_name="tuned").eval().requires_grad_(False)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.02)
    return ModelPair.of(peft.to(here, dtype), None, tokenizer()), middle


def random_texts(lengths, vocab, seed=0):
    """Texts of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for n in lengths:
        ids = tuple(torch.randint(300, vocab, (n,), generator=draw).tolist())
        made.append(StoredText(ids, ("text",) * n, n, tuple(range(1, n)), 0))
    return made


def show(results):
    for each in results:
        sys.stdout.write(each.line() + "\n")
    return results
