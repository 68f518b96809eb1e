"""What ``modeldiff harvest`` and ``modeldiff train`` understand and do."""

import argparse
import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from modeldiff.errors import FileFormatError, SetupError

SIDES = ("pair", "difference", "base", "finetuned")


def cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of what can run on a cluster."""
    parser.add_argument("--cluster", metavar="auto|ADDRESS",
                        help="run on a Ray cluster: 'auto' for the one of this machine (started if "
                        "there is none), or its address; without it, in this process")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N",
                        help="workers of the cluster (default one a GPU, or 2)")  # fmt: skip


def harvest_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``harvest``, but for those of the pair."""
    parser.add_argument("--out", required=True, metavar="DIR|URL",
                        help="where the store goes: a folder, or an address of fsspec "
                        "(s3://bucket/run); called again, it goes on")  # fmt: skip
    parser.add_argument("--sites", nargs="+", default=[], metavar="SITE",
                        help="e.g. resid_post.14 (default: after the middle layer)")  # fmt: skip
    parser.add_argument("--on", default="all", metavar="MASK",
                        help="tokens to keep: all (the default), assistant, user ...")  # fmt: skip
    parser.add_argument("--skip-first", type=int, default=1, metavar="N",
                        help="positions dropped at the start of each text (default 1)")  # fmt: skip
    parser.add_argument("--float32", action="store_true", help="store float32, not bfloat16")
    parser.add_argument("--rows-per-shard", type=int, default=1 << 15, metavar="N",
                        help="tokens of a shard, made at one go (default 32768)")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=4096, metavar="N",
                        help="tokens of a batch (default 4096)")  # fmt: skip
    parser.add_argument("--gpus-per-worker", type=int, default=1, metavar="N",
                        help="where one cannot hold the pair; then --device auto")  # fmt: skip
    cluster_arguments(parser)


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``train``."""
    parser.add_argument("store", metavar="STORE", help="folder that 'modeldiff harvest' wrote, or "
                        "its address (then give --copy)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="folder of the dictionary and its checkpoint; called again, it goes "
                        "on")  # fmt: skip
    parser.add_argument("--copy", type=Path, metavar="DIR", help="copy a store at an address here")
    parser.add_argument("--follow", type=float, nargs="?", const=30.0, default=0.0,
                        metavar="MINUTES", help="train while 'modeldiff harvest' still writes the "
                        "store; give up after so many minutes without a shard (30)")  # fmt: skip
    parser.add_argument("--site", help="site of the rows, if the store has several")
    parser.add_argument("--of", choices=SIDES, default="pair",
                        help="what it sees of the rows: both models (a crosscoder, the default), "
                        "their difference, or one of them")  # fmt: skip
    parser.add_argument("--latents", type=int, metavar="N", help="default 8 times the width")
    parser.add_argument("--k", type=int, default=32, metavar="N", help="mean latents a token")
    parser.add_argument("--activation", default="batch_topk", help="default batch_topk")
    parser.add_argument("--steps", type=int, default=10_000, metavar="N", help="default 10000")
    parser.add_argument("--batch", type=int, default=2048, metavar="N",
                        help="rows a step, of all processes together (default 2048)")  # fmt: skip
    parser.add_argument("--lr", type=float, help="peak learning rate (default by size)")
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="N",
                        help="steps from one checkpoint to the next (default 500)")  # fmt: skip
    parser.add_argument("--by", choices=("rows", "latents"), default="rows",
                        help="what several processes share out; latents where one GPU cannot hold "
                        "the dictionary")  # fmt: skip
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    cluster_arguments(parser)


def harvest(spec: Mapping[str, Any], options: argparse.Namespace, cancel: Event) -> str:
    """Carry out ``harvest``; what to print.

    Raises:
        Cancelled: If the event is set; the same command goes on.
    """
    import torch

    from modeldiff import harvesting
    from modeldiff.cluster_harvest import PairSpec, harvest_on
    from modeldiff.store_places import is_address

    if options.texts is None:
        raise SetupError("harvest needs --texts FILE: texts, one a line, or chats as .jsonl.")
    _check_workers(options)
    if spec.get("remote"):
        raise SetupError("a harvest reads activations where the models are: load the pair here.")
    pair = PairSpec(**{name: value for name, value in spec.items() if value})
    sites = options.sites or [f"resid_post.{_n_layers(pair.base) // 2}"]
    settings: dict[str, Any] = {
        "on": options.on, "skip_first": options.skip_first, "max_tokens": options.max_tokens,
        "rows_per_shard": options.rows_per_shard, "progress": not options.quiet,
        "cancel": cancel, "dtype": torch.float32 if options.float32 else torch.bfloat16,
    }  # fmt: skip
    items = texts_in(options.texts)
    if options.cluster is None and not is_address(options.out):
        store = harvesting.harvest(pair.load(), items, sites, options.out, **settings)
        return f"store: {store}"
    manifest = harvest_on(pair, items, sites, options.out, cluster=options.cluster,
                          workers=options.workers, gpus=options.gpus_per_worker,
                          **settings)  # fmt: skip
    n_rows = sum(record["n_rows"] for record in manifest["shards"])
    return f"store: {options.out} ({n_rows:,} tokens, {', '.join(manifest['widths'])})"


def train(options: argparse.Namespace, cancel: Event) -> str:
    """Carry out ``train``; what to print (nothing but in the first of several processes).

    Raises:
        Cancelled: If the event is set; the same command goes on after the last checkpoint.
    """
    from modeldiff.cluster_train import TrainJob, run_here, train_on
    from modeldiff.dictionaries.configs import DictionaryConfig, TrainConfig

    _check_workers(options)
    if options.out.exists() and not options.out.is_dir():
        raise SetupError(f"--out {options.out} is a file: give a folder.")
    first = os.environ.get("RANK", "0") == "0"
    source, folder = _rows(options, cancel)
    site, width, n_models = source.site, source.d_model, 2 if options.of == "pair" else 1
    n_latents = 8 * width if options.latents is None else options.latents
    sizes = DictionaryConfig(
        width, n_latents, n_models, options.activation, options.k, options.of, str(site)
    )
    config = TrainConfig(
        options.steps, options.batch, options.lr, seed=options.seed, bf16=options.bf16,
        checkpoint_every=options.checkpoint_every,
    )  # fmt: skip
    job = TrainJob(folder, str(site), str(options.out), sizes, config, options.by,
                   options.follow, str(options.copy or ""))  # fmt: skip
    if options.cluster is not None:
        made = train_on(job, cluster=options.cluster, workers=options.workers)
        return f"dictionary: {options.out} ({made})"
    with _terminable(cancel):
        found = run_here(job, progress=first and not options.quiet, cancel=cancel)
    if not first:
        return ""
    last = found.logs[-1]
    shares = ", ".join(f"{share:.3f}" for share in last.fve)
    return (
        f"step {last.step}: loss {last.loss:.4f}, variance explained {shares}, L0 {last.l0:.1f}, "
        f"dead {last.dead:.1%}\ndictionary: {options.out} ({found.dictionary})"
    )


def _check_workers(options: argparse.Namespace) -> None:
    if options.workers is not None and options.cluster is None:
        raise SetupError(
            "--workers are those of a cluster: give --cluster auto too. (Without one, torchrun "
            "starts several processes of 'train'.)"
        )


def _rows(options: argparse.Namespace, cancel: Event) -> tuple[Any, str]:
    """The rows to train on, and where a job finds them."""
    from modeldiff.store_following import followed
    from modeldiff.store_places import fetched, is_address
    from modeldiff.stores import ActivationStore

    if not is_address(options.store):
        if options.follow:
            rows = followed(options.store, options.site, minutes=options.follow, cancel=cancel)
            return rows, options.store
        return ActivationStore.open(options.store).source(options.site), options.store
    if options.copy is None:
        raise SetupError(
            f"{options.store!r} is not on this machine, and training reads rows at random: give "
            "--copy DIR, a folder to copy it to (a copy that is there is used)."
        )
    if "RANK" in os.environ or (options.follow and options.cluster):
        raise SetupError(
            f"several processes would all copy {options.store!r}. Copy it once, with "
            "modeldiff.store_places.fetched, and give them the folder; or harvest into a folder."
        )
    if options.follow:
        asked = {"copy": options.copy, "minutes": options.follow, "cancel": cancel}
        return followed(options.store, options.site, **asked), options.store
    return fetched(options.store, options.copy).source(options.site), str(options.copy)


def texts_in(path: Path) -> Iterator[Any]:
    r"""Read texts one by one: lines, or the records of a ``.jsonl`` file.

    A record has ``text``, or ``messages`` (with ``role`` and ``content``), or ``prompt`` and
    ``response``. Empty lines are skipped.

    Raises:
        FileFormatError: If a record has none of these, or the file is not text in UTF-8.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "texts.jsonl"
        >>> _ = path.write_text('{"text": "a"}\n\n{"messages": [{"role": "user", "content": "b"}]}')
        >>> list(texts_in(path))
        ['a', Chat(messages=[{'role': 'user', 'content': 'b'}], response=None, prefill='')]
    """
    records = path.suffix == ".jsonl"
    with path.open(encoding="utf-8") as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _item(line, path, number) if records else line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path} is not text in UTF-8: {error}. Convert it.") from error


def _item(line: str, path: Path, number: int) -> Any:
    from modeldiff.tokens import Chat, Completion

    try:
        record = json.loads(line)
        if "text" in record:
            return str(record["text"])
        if "messages" in record:
            return Chat(list(record["messages"]))
        return Completion(record["prompt"], record["response"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path}, line {number}, is no record with 'text', 'messages', or 'prompt' and "
            f"'response' ({error!r})."
        ) from error


def _n_layers(base: str) -> int:
    from transformers import AutoConfig

    from modeldiff import embedded

    where: Any = base
    if base.startswith("organism:"):
        where = embedded.find(base.removeprefix("organism:")).base
    try:
        return AutoConfig.from_pretrained(where).get_text_config().num_hidden_layers
    except (OSError, ValueError) as error:
        said = str(error).strip().split("\n")[0]
        raise SetupError(
            f"the configuration of {base!r} cannot be read ({said}). Give a folder that exists, "
            "or a hub id; or name --sites, if its model has no ordinary configuration."
        ) from error


@contextmanager
def _terminable(cancel: Event) -> Iterator[None]:
    """Take SIGTERM, as torchrun and schedulers send it, for a wish to stop with a checkpoint."""

    def stop(number: int, frame: Any) -> None:
        cancel.set()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
