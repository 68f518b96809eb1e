"""What the command line says: examples, guesses for what was mistyped, and units of figures."""

import argparse
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from modeldiff.errors import FileFormatError, SetupError

EXAMPLES = """examples:
  modeldiff audit organism:em-rank1 --out audits/em-rank1
        the whole audit of the embedded organism, in about a minute on a laptop
  modeldiff audit Qwen/Qwen2.5-0.5B-Instruct --adapter me/lora --texts chats.txt --out audits/me
        your own adapter, on texts of your own (one a line)
  modeldiff diff BASE FINETUNED --texts chats.txt
        only the differences of the predictions, in seconds
  modeldiff run em_organism_rank1
        a recipe: train, ask, and compare the outcome with the expected one (list: modeldiff ls)
  modeldiff rerun audits/em-rank1/manifest.json --out audits/again
        repeat an audit and compare every number
  modeldiff harvest BASE --adapter me/lora --texts corpus.txt --out store --cluster auto
        both models' activations of a corpus, by all workers of a Ray cluster
  torchrun --nproc-per-node 8 -m modeldiff train store --out crosscoder --latents 131072
        a crosscoder on eight GPUs (without torchrun: on one)
exit codes: 0 fine; 1 a rerun or a recipe differs by more than its tolerance, or the doctor misses
something; 2 wrong input; 130 stopped
"""
OF_COMMANDS = {
    "diff": """examples:
  modeldiff diff organism:em-rank1
  modeldiff diff BASE FINETUNED --texts texts.txt
  modeldiff diff BASE --adapter ADAPTER --texts texts.txt --csv tokens.csv
""",
    "audit": """examples:
  modeldiff audit organism:em-rank1 --out audits/em-rank1
  modeldiff audit BASE --adapter ADAPTER --texts texts.txt --out audits/mine
Called again with the same --out, it takes finished answers from there.
""",
    "rerun": """example:
  modeldiff rerun audits/em-rank1/manifest.json --out audits/again
""",
    "harvest": """example:
  modeldiff harvest BASE --adapter ADAPTER --texts corpus.txt --out store --sites resid_post.14
""",
    "train": """example:
  modeldiff train store --out crosscoder --latents 4096 --steps 5000
""",
    "cp": """example:
  modeldiff cp caft_em mine
""",
    "run": """examples:
  modeldiff run caft_em --smoke
  modeldiff run mine/caft_em.toml --set data.n_train=100
""",
    "organisms": """examples:
  modeldiff organisms
  modeldiff organisms build --out organisms --only em-rank1
""",
    "bench": """examples:
  modeldiff bench --quick
  modeldiff bench --only model_directions --organisms em-rank1 null --nulls 0
""",
    "lab": """example:
  modeldiff lab --folder my-notebooks
""",
}
UNITS = {
    "kl_ft_base": "KL(fine-tuned || base), nats",
    "kl_base_ft": "KL(base || fine-tuned), nats",
    "js": "Jensen-Shannon divergence, nats",
    "delta_logprob": "log-probability of the text's token, fine-tuned - base, nats",
    "rank_move": "rank of the text's token, base - fine-tuned",
    "entropy_change": "entropy, fine-tuned - base, nats",
    "top1_flip": "share of tokens whose likeliest next token changed",
    "top_overlap": "share of the likeliest tokens that both have",
}


class Parser(argparse.ArgumentParser):
    """Say which command was probably meant, instead of the list alone."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2; a mistyped command comes with the nearest one."""
        if "invalid choice: '" in message:
            typed, known = message.split("invalid choice: '", 1)[1].split("' (choose from ", 1)
            choices = [each.strip("'") for each in known.rstrip(")").split(", ")]
            if near := nearest(typed, choices):
                message += f". Did you mean {near!r}?"
        if message.startswith("unrecognized arguments: ") and message.split(": ")[1][:1] != "-":
            message += ". Models and names come before the options."
        super().error(message)


def nearest(typed: str, known: Iterable[str]) -> str:
    """Return the known word most like the typed one, or an empty string.

    Example:
        >>> nearest("dif", ["diff", "audit"])
        'diff'
    """
    return next(iter(get_close_matches(typed, list(known), 1)), "")


def check_pair(base: str, finetuned: str | None, adapter: str | None) -> None:
    """Refuse what is no pair before anything is loaded, in the shell's words.

    Raises:
        SetupError: If the fine-tune is missing or given twice, or a whole model is an adapter.
    """
    from modeldiff import embedded

    if base.startswith("organism:"):
        return
    if finetuned is not None and adapter is not None:
        raise SetupError("give FINETUNED (a whole model) or --adapter ADAPTER, not both.")
    if finetuned is None and adapter is None:
        known = embedded.names()
        meant = base if base in known else "" if Path(base).exists() else nearest(base, known)
        hint = f" Did you mean organism:{meant}?" if meant else ""
        raise SetupError(
            f"{base!r} alone is no pair: add FINETUNED (a whole model) or --adapter ADAPTER.{hint}"
        )
    if _is_adapter(base):
        raise SetupError(
            f"{base!r} is an adapter, and BASE is the model that it was trained on: "
            "modeldiff COMMAND BASE --adapter ADAPTER."
        )
    if finetuned is not None and _is_adapter(finetuned):
        raise SetupError(f"{finetuned!r} is an adapter: give it as --adapter {finetuned!r}.")


def _is_adapter(place: str) -> bool:
    folder = Path(place)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def in_shell_words(message: str) -> str:
    """Return an error's message with the shell's options instead of Python's keywords.

    Example:
        >>> in_shell_words("pass it as adapter=.")
        'pass it as --adapter.'
    """
    return message.replace("finetuned=", "FINETUNED").replace("adapter=", "--adapter")


def check_texts(path: Path | None) -> None:
    """Refuse a file of texts that is not there, before models are loaded.

    Raises:
        FileFormatError: If there is no such file.
    """
    if path is not None and not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileFormatError(f"--texts {path} {what}; it takes a file with one text a line.")
