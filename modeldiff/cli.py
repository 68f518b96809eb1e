"""The command line: ``modeldiff diff | audit | run | harvest | train | organisms | ...``."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from modeldiff import cli_cluster, cli_help
from modeldiff._version import __version__
from modeldiff.errors import Cancelled, FileFormatError, ModelDiffError, SetupError

OK, DIFFERS, WRONG, STOPPED, CLOSED = 0, 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return OK
    try:
        code = options.command(options)
        sys.stdout.flush()
        return code
    except (Cancelled, KeyboardInterrupt):
        _say("modeldiff: stopped", sys.stderr)
        return STOPPED
    except BrokenPipeError:  # whoever read the output has gone, as in `modeldiff ls | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except (ModelDiffError, OSError) as error:
        _say(f"modeldiff: {cli_help.in_shell_words(str(error))}", sys.stderr)
        return WRONG


def _say(text: str, stream: Any = None) -> None:
    (stream or sys.stdout).write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = cli_help.Parser(
        prog="modeldiff",
        description="Find, test and remove what a fine-tune changed in a language model.",
        epilog=cli_help.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"modeldiff {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add(commands, "diff", _diff, "differences of the predictions of two models", _diff_arguments)
    _add(commands, "audit", _audit, "the whole audit, written to a folder", _audit_arguments)
    _add(commands, "rerun", _rerun, "repeat an audit and compare its numbers", _rerun_arguments)
    _add(commands, "harvest", _harvest, "activations of many texts, to a store", _harvest_arguments)
    _add(commands, "train", _train, "a dictionary of a store's rows", cli_cluster.train_arguments)
    _add(commands, "ls", _ls, "the recipes", _nothing)
    _add(commands, "cp", _cp, "a recipe's files, to change them", _cp_arguments)
    _add(commands, "run", _run, "a recipe, and whether its outcome is as expected", _run_arguments)
    _add(
        commands,
        "organisms",
        _organisms,
        "the embedded pairs whose truth is known",
        _organisms_arguments,
    )
    _add(commands, "bench", _bench, "score every method on pairs of known truth", _bench_arguments)
    _add(commands, "doctor", _doctor, "what this installation can do, and what it lacks", _nothing)
    _add(commands, "lab", _lab, "open JupyterLab on a copy of the notebooks", _lab_arguments)
    return parser


def _add(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    arguments: Callable[[argparse.ArgumentParser], None],
) -> None:
    parser = commands.add_parser(
        name, help=text, description=text.capitalize() + ".",
        epilog=cli_help.OF_COMMANDS.get(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    arguments(parser)
    parser.set_defaults(command=run)


def _organisms_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("build", nargs=argparse.REMAINDER,
                        help="'build --out DIR' makes all of them again (an hour); "
                        "'build --help' tells more")  # fmt: skip


def _pair_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", help="base model: a folder, a hub id, or organism:NAME")
    parser.add_argument("finetuned", nargs="?", help="whole fine-tune: a folder or a hub id")
    parser.add_argument("--adapter", help="LoRA adapter, folder or hub id, instead of FINETUNED")
    parser.add_argument("--subfolder", default="", help="folder inside the fine-tune's repository")
    parser.add_argument("--revision", help="revision of the fine-tune")
    parser.add_argument("--device", help="cpu, cuda, auto, ... (default: CUDA where there is one)")
    parser.add_argument("--remote", nargs="?", const=True, metavar="ADDRESS",
                        help="run on NDIF, or on the server at this address")  # fmt: skip
    parser.add_argument("--texts", type=Path, metavar="FILE",
                        help="texts, one a line (default: an organism's questions)")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    _pair_arguments(parser)
    parser.add_argument("--csv", type=Path, help="write the table of all tokens there")
    parser.add_argument("--seed", type=int, default=0, help="seed of the intervals (default 0)")


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    _pair_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--prompts", type=int, default=20, metavar="N",
                        help="organisms: prompts of each domain (default 20)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    parser.add_argument("--random", type=int, default=20, metavar="N",
                        help="random directions to compare with (default 20)")  # fmt: skip
    parser.add_argument("--samples", type=int, default=1, metavar="N",
                        help="answers to each prompt (default 1)")  # fmt: skip


def _harvest_arguments(parser: argparse.ArgumentParser) -> None:
    _pair_arguments(parser)
    cli_cluster.harvest_arguments(parser)


def _rerun_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", type=Path, help="manifest.json of an audit, or its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new report")
    parser.add_argument("--tolerance", type=float, default=1e-4,
                        help="largest absolute difference of a number (default 1e-4)")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a small run: some minutes")
    parser.add_argument("--out", type=Path, default=Path("bench"),
                        help="folder of the results; a run that was stopped goes on (default "
                        "./bench)")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="these methods")
    parser.add_argument("--organisms", nargs="+", default=[], metavar="NAME", help="these pairs")
    parser.add_argument("--nulls", type=int, metavar="N",
                        help="null pairs of each kind; the default is up to 50")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _cp_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="a recipe (modeldiff ls)")
    parser.add_argument("folder", type=Path, help="where the copies go; nothing is overwritten")


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe (modeldiff ls), or the path of a TOML file")
    parser.add_argument("--smoke", action="store_true", help="seconds; the outcome is not judged")
    parser.add_argument("--out", type=Path, help="folder of the results (default ./runs/NAME)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="values instead of the file's, e.g. data.n_train=100")  # fmt: skip


def _nothing(parser: argparse.ArgumentParser) -> None:
    """Take no arguments."""


def _lab_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, default=Path("modeldiff-notebooks"),
                        help="where the copy goes (default ./modeldiff-notebooks)")  # fmt: skip
    parser.add_argument("--no-start", action="store_true", help="copy only, do not open JupyterLab")


def _load(spec: dict[str, Any]) -> Any:
    from transformers.utils import logging

    from modeldiff.models import ModelPair

    logging.disable_progress_bar()
    cli_help.check_pair(spec["base"], spec.get("finetuned"), spec.get("adapter"))
    names = ("finetuned", "adapter", "subfolder", "revision", "device", "remote")
    try:
        return ModelPair.load(spec["base"], **{n: spec[n] for n in names if spec.get(n)})
    except ModelDiffError:
        raise
    except ValueError as error:  # what other libraries raise for files that are not there
        raise SetupError(f"the pair could not be loaded: {error}. Check the paths.") from error


def _spec(options: argparse.Namespace) -> dict[str, Any]:
    names = ("base", "finetuned", "adapter", "subfolder", "revision", "device", "remote")
    return {name: getattr(options, name) for name in names}


def _lines(path: Path | None) -> list[str]:
    cli_help.check_texts(path)
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not text in UTF-8: {error}. Convert it.") from error
    if not any(line.strip() for line in lines):
        raise FileFormatError(f"{path} holds no text; it should have one a line.")
    return [line for line in lines if line.strip()]


def _questions(spec: dict[str, Any], n: int, seed: int) -> tuple[Any, ...]:
    from modeldiff.behaviours import organism_behaviours

    base = str(spec["base"])
    if not base.startswith("organism:"):
        return ()
    return organism_behaviours(base.removeprefix("organism:"), n, seed)


def _diff(options: argparse.Namespace) -> int:
    texts: list[Any] = _lines(options.texts)
    pair = _load(_spec(options))
    if not texts:
        asked = _questions(_spec(options), 4, options.seed)
        texts = [prompt.render() for behaviour in asked for prompt in behaviour.prompts]
    if not texts:
        raise ModelDiffError("diff needs --texts FILE, one text a line, to compare predictions on.")
    with _stoppable() as cancel:
        found = pair.output_diff(texts, progress=not options.quiet, cancel=cancel)
    _say(f"{pair}\n{len(texts)} texts, {len(found.tokens)} predicted tokens; means a token, with "
         "95 % intervals\n")  # fmt: skip
    _say(_of_metrics(found.summary(seed=options.seed)))
    columns = ["token", "mean_probability_change", "mean_log_ratio"]
    for title, frame in (("gained", found.promoted(8)), ("lost", found.demoted(8))):
        shown = frame[columns].assign(token=frame["token"].map(repr))  # blanks can be seen
        _say(f"\ntokens that {title} probability\n{shown.to_string(index=False)}")
    if options.csv:
        from modeldiff._files import atomic_write

        with atomic_write(options.csv) as temporary:
            found.tokens.to_csv(temporary, index=False)
        _say(f"\nall tokens: {options.csv}")
    return OK


def _of_metrics(summary: Any) -> str:
    """The means of the metrics, each with what it is."""
    lines = [f"{'':15}{'mean':>9}{'low':>9}{'high':>9}"]
    for each in summary.itertuples():
        figures = "".join(f"{value:9.4g}" for value in (each.estimate, each.low, each.high))
        lines.append(f"{each.metric:15}{figures}   {cli_help.UNITS.get(each.metric, '')}")
    return "\n".join(lines)


def _audit(options: argparse.Namespace) -> int:
    spec = _spec(options) | {"texts": _lines(options.texts), "prompts": options.prompts}
    settings = {"seed": options.seed, "n_random": options.random, "n_samples": options.samples}
    report = _carried_out(spec, settings, options.out, not options.quiet)
    return OK if report.complete else STOPPED


def _carried_out(spec: dict[str, Any], settings: dict[str, Any], out: Path, progress: bool) -> Any:
    """Load, audit, save and print; what was finished is saved also when stopped."""
    from modeldiff.audit import Audit
    from modeldiff.audit_stages import Settings
    from modeldiff.cache import Cache

    out.mkdir(parents=True, exist_ok=True)  # else it would fail when all is done
    pair = _load(spec)
    texts = spec.get("texts", ())
    asked = () if texts else _questions(spec, spec.get("prompts", 20), settings["seed"])
    audit = Audit(pair, asked, texts, Settings(**settings), Cache(out / "cache"), spec)
    with _stoppable() as cancel:
        report = audit.run(progress=progress, cancel=cancel)
    report.save_to(out)
    _say(_summary(report))
    _say(f"\n{'report' if report.complete else 'INCOMPLETE report'}: {out / 'report.html'}")
    return report


def _summary(report: Any) -> str:
    """The findings and the main table, for a terminal."""
    marks = {True: "yes", False: "no ", None: " ? "}
    lines = [f"[{marks[f.holds]}] {f.claim}\n      {f.evidence}" for f in report.findings]
    columns = [
        "cell", "n", "rate", "rate_low", "rate_high", "coherent", "kl_to_base", "kl_low", "kl_high"
    ]  # fmt: skip
    for name in ("behaviour", "effects"):
        if name in report.tables:
            frame = report.table(name)
            shown = frame[[column for column in columns if column in frame]]
            lines.append("\n" + shown.to_string(index=False, float_format=lambda x: f"{x:.3f}"))
    return "\n".join([*lines, *(f"note: {caveat}" for caveat in report.caveats)])


def _rerun(options: argparse.Namespace) -> int:
    from modeldiff.audit_stages import Settings
    from modeldiff.report import Report

    folder = options.manifest if options.manifest.is_dir() else options.manifest.parent
    if not options.manifest.is_dir() and options.manifest.name != "manifest.json":
        raise FileFormatError(f"rerun takes the manifest.json of an audit, got {options.manifest}.")
    before = Report.load_from(folder)
    recorded = dict(before.settings)
    spec, asked = dict(recorded.get("load", {})), recorded.get("asked")
    known = Settings.__dataclass_fields__
    settings = {name: value for name, value in recorded.items() if name in known}
    if "base" not in spec:
        raise ModelDiffError(
            f"{options.manifest} does not say how its pair was loaded: the audit ran on models in "
            "memory. Run it again from Python, with load={'base': ..., 'adapter': ...}."
        )
    if not before.complete:
        raise ModelDiffError(
            f"{options.manifest} is of an audit that was stopped: there is nothing to compare "
            "with. Run it again with the same --out; finished answers are in its cache."
        )
    if options.out.resolve() == folder.resolve():
        raise ModelDiffError(
            f"--out {options.out} is where the audit lies: it would be overwritten, and its cache "
            "read instead of the models run. Choose another folder."
        )
    after = _carried_out(spec, settings, options.out, not options.quiet)
    if not after.complete:
        return STOPPED
    if asked != after.settings["asked"]:
        _say("what was asked is not the same as then: prompts, judge or texts differ")
    if before.pair["digests"] != after.pair["digests"]:
        _say("the models are not the same as then: " + str(after.pair["digests"]))
    compared = before.compare(after, options.tolerance)
    _say("\n" + compared.to_string(index=False))
    same = bool(compared["within"].all())
    _say(f"\n{'reproduced' if same else 'DIFFERS'} (tolerance {options.tolerance:g})")
    return OK if same else DIFFERS


def _harvest(options: argparse.Namespace) -> int:
    from transformers.utils import logging

    logging.disable_progress_bar()
    cli_help.check_texts(options.texts)
    cli_help.check_pair(options.base, options.finetuned, options.adapter)
    with _stoppable() as cancel:
        _say(cli_cluster.harvest(_spec(options), options, cancel))
    return OK


def _train(options: argparse.Namespace) -> int:
    with _stoppable() as cancel:
        if found := cli_cluster.train(options, cancel):
            _say(found)
    return OK


def _ls(options: argparse.Namespace) -> int:
    from modeldiff.recipe_files import names, read

    for name in names():
        recipe = read(name)
        _say(f"{name}  ({recipe.minutes:g} min, arXiv {recipe.paper.arxiv})\n    {recipe.purpose}")
    return OK


def _cp(options: argparse.Namespace) -> int:
    from modeldiff.recipe_files import copy

    toml, script = copy(options.name, options.folder)
    _say(f"{toml}\n{script}\nrun it with: modeldiff run {toml}")
    return OK


def _run(options: argparse.Namespace) -> int:
    from modeldiff.recipe_runs import carry_out, summary

    unread = [each for each in options.set if "=" not in each]
    if unread:
        raise ModelDiffError(f"--set takes KEY=VALUE, got {' '.join(unread)}.")
    changes = dict(each.split("=", 1) for each in options.set)
    with _stoppable() as cancel:
        run = carry_out(options.recipe, smoke=options.smoke, out=options.out, changes=changes,
                        say=_say, cancel=cancel)  # fmt: skip
    _say(summary(run))
    return DIFFERS if run.within is False else OK


def _organisms(options: argparse.Namespace) -> int:
    from modeldiff import embedded

    if options.build[:1] == ["build"]:
        from modeldiff.organisms import build

        build.main(options.build[1:])
        return OK
    if options.build:
        raise ModelDiffError(f"organisms takes nothing or 'build ...', got {options.build}.")
    for name in embedded.names():
        found = embedded.find(name)
        _say(f"organism:{name}\n    {found.summary}")
    return OK


def _bench(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from transformers.utils import logging

    from modeldiff.bench.run import QUICK, Plan, bench

    logging.disable_progress_bar()
    plan = replace(QUICK if options.quick else Plan(), seed=options.seed)
    if options.nulls is not None:
        if options.nulls < 0:
            raise ModelDiffError(f"--nulls takes 0 or more pairs, got {options.nulls}.")
        plan = replace(plan, n_same=options.nulls, n_other=options.nulls)
    with _stoppable() as cancel:
        found = bench(plan, only=options.only, organisms=options.organisms, out=options.out,
                      progress=not options.quiet, cancel=cancel)  # fmt: skip
    path = found.save_to(options.out)
    _say(found.markdown() if options.markdown else found.text())
    _say(f"{'results' if found.complete else 'INCOMPLETE results'}: {path}")
    return OK if found.complete else STOPPED


def _doctor(options: argparse.Namespace) -> int:
    from modeldiff import doctor

    found = doctor.examine()
    _say(doctor.as_text(found))
    return OK if doctor.healthy(found) else DIFFERS


def _lab(options: argparse.Namespace) -> int:
    import importlib.util
    import shutil
    import subprocess

    packed = Path(__file__).parent / "_notebooks"
    source = packed if packed.is_dir() else Path(__file__).parent.parent / "notebooks"
    options.folder.mkdir(parents=True, exist_ok=True)
    for notebook in sorted(source.glob("*.ipynb")):
        if not (options.folder / notebook.name).exists():  # a user's changes are never overwritten
            shutil.copy(notebook, options.folder)
    _say(f"notebooks: {options.folder.resolve()}")
    if options.no_start:
        return OK
    if importlib.util.find_spec("jupyterlab") is None:
        raise SetupError("JupyterLab is not installed: pip install 'modeldiff-lab[lab]'")
    command = [sys.executable, "-m", "jupyterlab", str(options.folder)]
    return subprocess.run(command, check=False).returncode


@contextmanager
def _stoppable() -> Iterator[Event]:
    """Turn the first Ctrl-C into a clean stop; the second one interrupts as usual."""
    cancel = Event()

    def stop(number: int, frame: Any) -> None:
        _say("\nstopping: what is finished will be kept (Ctrl-C again to quit at once)", sys.stderr)
        cancel.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)
