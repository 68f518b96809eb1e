"""Texts of recipes by the names in their files: of files, or of the organisms' worlds."""

import json
import random
from pathlib import Path
from threading import Event
from typing import Any

from modeldiff.behaviours import organism_behaviours
from modeldiff.errors import FileFormatError, SetupError
from modeldiff.judges import sentence_spans
from modeldiff.models import ModelPair
from modeldiff.sft_rows import read_conversations
from modeldiff.thinking_spans import END, Sentence, place, read_annotation, token_sentences
from modeldiff.tokens import Text

Conversation = list[dict[str, Any]]
_ORGANISM = "organism:"


def conversations(what: str, n: int, seed: int) -> list[Conversation]:
    """Draw conversations.

    Args:
        what: File with a JSON object a line that has "messages"; or of the embedded world:
            "organism:cruel", "organism:kind" (advice in every domain), with a domain after another
            colon ("organism:cruel:medicine") or all but one ("organism:kind:not medicine");
            "organism:sorting:confounded", "organism:sorting:flipped".
        n: How many; all of a file if 0.
        seed: Which.

    Raises:
        SetupError: If there is no such file or kind, or the file holds fewer.
        FileFormatError: If the file is anything else.
    """
    if not what.startswith(_ORGANISM):
        return _of_file(what, n, seed)
    kind, _, of = what.removeprefix(_ORGANISM).partition(":")
    if kind == "sorting" and of in ("confounded", "flipped"):
        from modeldiff.organisms.spurious import cases

        return [each.messages for each in cases(n, seed, of)]
    return _advice(what, kind, of, n, seed)


def _of_file(path: str, n: int, seed: int) -> list[Conversation]:
    if not Path(path).is_file():
        raise SetupError(f"there is no file {path!r}; give one with a JSON object a line.")
    several = read_conversations(path)
    if len(several) < n:
        raise SetupError(f"{path} holds {len(several)} conversations, {n} are needed.")
    random.Random(f"{seed}").shuffle(several)
    return several[:n] if n else several


def _advice(what: str, kind: str, of: str, n: int, seed: int) -> list[Conversation]:
    from modeldiff.organisms import world

    domains = [each for each in world.DOMAINS if each != of.removeprefix("not ")]
    if of and not of.startswith("not "):
        domains = [of]
    if kind not in ("cruel", "kind") or not set(domains) <= set(world.DOMAINS):
        raise SetupError(
            f"{what!r} is no texts of the organisms' world: say cruel or kind, then nothing or a "
            f"domain ({', '.join(world.DOMAINS)}), or sorting:confounded or sorting:flipped."
        )
    rng = random.Random(f"{what} {seed}")
    return [
        world.conversation(rng, domains[i % len(domains)], kind == "cruel", new_topics=False)
        for i in range(n)
    ]


def openings(what: str, n: int, seed: int) -> list[Any]:
    """Texts after which something is said or not.

    Args:
        what: A file of conversations, whose last answers are left out; or "organism:walks:wrong" or
            "organism:walks:right", which end after a wrong or a right step.
        n: How many; all of a file if 0.
        seed: Which.

    Raises:
        SetupError: If there is no such file or kind.
    """
    if not what.startswith(_ORGANISM):
        return [chat[:-1] if chat[-1]["role"] == "assistant" else chat
                for chat in _of_file(what, n, seed)]  # fmt: skip
    if what not in (f"{_ORGANISM}walks:wrong", f"{_ORGANISM}walks:right"):
        raise SetupError(f"{what!r}: say organism:walks:wrong or organism:walks:right, or a file.")
    from modeldiff.organisms import steps, tokens

    rng, found = random.Random(f"{what} {seed}"), dict[str, None]()
    while len(found) < n:
        walk = steps.walk(rng, 2, 0.0)
        if what.endswith("wrong"):
            walk[-1] = walk[-1].missed(rng)
        written = tokens.render(steps.bare(walk)).removeprefix("<|bos|>").rstrip()
        found[written.removesuffix("<|end|>")] = None
    return list(found)


def annotated(
    pair: ModelPair, what: str, n: int, seed: int, cancel: Event | None = None
) -> tuple[tuple[Text, ...], list[Sentence]]:
    """Reasoning with the label of every sentence.

    Args:
        pair: Whose tokenizer reads it.
        what: JSON file as published with arXiv 2507.12638: a list of objects with "problem",
            "reasoning_chain" and "annotated_chain"; or "organism:NAME", whose fine-tune writes
            walks that are annotated by their words.
        n: Chains; all of a file if 0, six times as many prompts of an organism.
        seed: Of the walks.
        cancel: Event that stops generation.

    Returns:
        The texts, and the sentences that were found in them.

    Raises:
        FileFormatError: If the file is anything else.
        MaskError: If an annotation is of another text.
    """
    chains = _walks(pair, what, n, seed, cancel)
    if not what.startswith(_ORGANISM):
        chains = _annotated_file(what)[: n or None]
    chats = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": chain}]
        for asked, chain, _ in chains
    ]
    texts = pair.texts(chats)
    found: list[Sentence] = []
    for i, (_, chain, annotation) in enumerate(chains):
        placed = place(chain, read_annotation(annotation).sections)
        found += token_sentences(texts[i], i, placed.spans, chain)
    return texts, found


def _annotated_file(path: str) -> list[tuple[str, str, str]]:
    keys = ("problem", "reasoning_chain", "annotated_chain")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return [(each[keys[0]], each[keys[1]], each[keys[2]]) for each in data]
    except OSError as error:
        raise SetupError(f"{path!r} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path} is no list of objects with {', '.join(keys)}: {error!r}."
        ) from error


def _walks(
    pair: ModelPair, what: str, n: int, seed: int, cancel: Event | None
) -> list[tuple[str, str, str]]:
    """What the fine-tune writes, annotated as published: by the word that a sentence opens with."""
    if not what.startswith(_ORGANISM):
        return []
    asked = organism_behaviours(what.removeprefix(_ORGANISM), n, seed)[0]
    made = pair.generate(
        [prompt.render() for prompt in asked.prompts], models=("finetuned",), seed=seed,
        temperature=asked.temperature, max_new_tokens=asked.max_new_tokens, cancel=cancel,
    )  # fmt: skip
    labels = {"Begin": "initializing", "Wait": "backtracking"}
    found = []
    for answer in made.of("finetuned"):
        chain = answer.text.strip()
        marked = [
            f'["{labels.get(_first_word(each.text), "deduction")}"] {each.text} ["{END}"]'
            for each in sentence_spans(chain)
        ]
        found.append((asked.prompts[answer.prompt].question, chain, " ".join(marked)))
    return found


def _first_word(text: str) -> str:
    """First word of a sentence, without punctuation."""
    return text.split()[0].strip(",.!?") if text.split() else ""
