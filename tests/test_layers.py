"""The shape of the code itself: layers, forbidden imports and calls, sizes, no secrets."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modeldiff"
LAYERS = (
    "_version _shapes _files _progress errors seeds sites stats sampling graphs report_text",
    "masks moments split_halves directions direction_files direction_methods direction_components "
    "direction_controls interventions",
    "architectures tokens batching host_copies editing step_edits hooks prefill tracing loading "
    "placement pretrained embedded embedded_card",
    "forward activations static_decoding generation divergence outputs edit_effects survey "
    "logit_lens token_scores layer_maps batch_size remote_sides remote_http remote_kept "
    "remote_jobs remote_runs remote_generation remote_errors remote_lenses",
    "models",
    "dictionaries dictionaries.configs dictionaries.codes dictionaries.sources "
    "dictionaries.kernels dictionaries.triton_kernels dictionaries.models dictionaries.files "
    "dictionaries.metrics "
    "dictionaries.losses dictionaries.fast dictionaries.training dictionaries.checkpoints "
    "dictionaries.scaling dictionaries.classes dictionaries.examples dictionaries.firing "
    "dictionaries.latents dictionaries.causality dictionaries.matching dictionaries.text_diff "
    "dictionaries.itda dictionaries.readers dictionaries.readers_files "
    "dictionaries.readers_layouts dictionaries.pursuit "
    "stores store_files store_following store_places store_reading store_statistics store_texts "
    "live_rows harvesting "
    "lora lora_scalars lora_variants lora_effects lora_algebra amplification weights "
    "weight_spectra weight_extraction series series_nulls similarity difference_lens lens_queries "
    "patchscope steering_threshold causal_effect relevance "
    "attention_watch patch_runs remote_patching patching self_repair attribution attribution_bound "
    "layer_attribution illusion probe_fits probe_texts probe_scores probe_baselines probes "
    "orthogonalise "
    "caft caft_modes caft_monitor",
    "organisms organisms.world organisms.tokens organisms.judge organisms.training "
    "organisms.finetuning organisms.variants organisms.evaluation organisms.manifests "
    "organisms.spurious organisms.topic organisms.checkpoints organisms.steps organisms.backtrack "
    "organisms.planted organisms.nulls organisms.build",
    "behaviours organism_judges dose transfer judges judge_rates agreement questions score_prompts "
    "scorers local_judge api_judge ngram_judge sft sft_plans sft_rows sft_trl caft_candidates "
    "sft_files sft_state sft_metrics caft_arms "
    "caft_reading caft_contexts caft_controls caft_runs caft_results backtracking "
    "backtracking_scan thinking "
    "thinking_spans thinking_layers api_replies backtracking_text",
    "cache report report_files report_compare report_figures report_plots report_html "
    "audit answer_contrasts audit_answers audit_findings audit_proof audit_stages",
    "inspect_bridge inspect_compare distributed distributed_fast distributed_training "
    "cluster cluster_harvest cluster_train inspect_requests recipes recipe_files recipe_runs "
    "recipe_settings recipe_texts",
    "bench bench.scores bench.meter bench.cases bench.ablation bench.methods bench.methods.audit "
    "bench.methods.weight_change bench.methods.difference_sae "
    "bench.methods.base_contrast bench.methods.effects_scan bench.methods.layers_survey "
    "bench.methods.mean_difference bench.methods.model_directions bench.methods.output_diff "
    "bench.methods.pca_difference bench.methods.patching bench.methods.causal_effect "
    "bench.methods.probing "
    "bench.methods.module_effects bench.nulls bench.table bench.run",
    "doctor cli_help cli_cluster cli __main__",
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
REPORTS = {"report_figures", "report_plots", "report_html"}
"""The modules that draw, and may import bokeh."""


def name_of(path):
    inside = path.relative_to(PACKAGE).with_suffix("")
    return ".".join(part for part in inside.parts if part != "__init__")


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: path for name, path in SOURCES.items() if name}  # without the package's facade
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def for_checkers_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(tree, *, at_once=False):
    """Every imported module as (dotted name, line); names of packages are tried as modules.

    With ``at_once`` those alone that importing the module imports.
    """
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if at_once and (for_checkers_only(node) or isinstance(node, ast.FunctionDef)):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                known = inner.removeprefix("modeldiff.") in LAYER_OF and inner != node.module
                yield (inner if known else str(node.module)), node.lineno
        waiting.extend(ast.iter_child_nodes(node))


def own_imports(name, **options):
    for module, line in imports(TREES[name], **options):
        if module.split(".")[0] == "modeldiff":
            yield module.removeprefix("modeldiff").removeprefix("."), line


def test_the_table_names_every_module_once():
    names = " ".join(LAYERS).split()
    assert sorted(names) == sorted(set(names))
    assert set(MODULES) - set(names) == set(), "put new modules into LAYERS"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    wrong = [
        f"{name}:{line} (layer {LAYER_OF[name]}) imports {other or 'the facade'}"
        for other, line in own_imports(name)
        if LAYER_OF.get(other, 99) > LAYER_OF[name]
    ]
    assert wrong == []


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_imported_exists(name):
    missing = {other for other, _ in own_imports(name) if other not in SOURCES}
    assert missing == set()


def test_modules_of_one_layer_do_not_import_each_other_in_a_circle():
    edges = {
        name: {other for other, _ in own_imports(name, at_once=True)} & set(MODULES)
        for name in MODULES
    }
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in edges[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in edges:
        visit(name, [])


def roots(name):
    return {module.split(".")[0] for module, _ in imports(TREES[name])}


@pytest.mark.parametrize("name", SOURCES)
def test_imports_from_outside(name):
    """Notebooks and widgets use the package, never the other way round."""
    found = roots(name)
    interface = {"ipywidgets", "IPython", "traitlets", "anywidget", "jupyterlab", "ipykernel"}
    assert not found & (interface | {"modeldiff_widgets"})
    assert "bokeh" not in found or name in REPORTS
    assert "nnsight" not in found or name == "tracing"
    assert not found & {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def test_widgets_do_not_reach_around_the_package():
    """What nnsight, PEFT and bokeh are needed for is in modeldiff."""
    for path in (ROOT / "widgets").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {module.split(".")[0] for module, _ in imports(tree)}
        assert not found & {"nnsight", "peft", "pickle"}, path


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


FORBIDDEN = {
    "print", "eval", "exec", "torch.save", "torch.load", "torch.manual_seed", "pickle.load",
    "pickle.loads", "pd.read_pickle", "os.system", "input", "breakpoint",
}  # fmt: skip


def forbidden(tree):
    for called, node in calls(tree):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in FORBIDDEN:
            yield f"{node.lineno}: {called}"
        if options.get("trust_remote_code", "False") != "False":
            yield f"{node.lineno}: trust_remote_code"
        if options.get("shell", "False") != "False":
            yield f"{node.lineno}: shell"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            yield f"{node.lineno}: from __future__ import"
        if isinstance(node, ast.FunctionDef) and node.name == "save":
            yield f"{node.lineno}: a method `save`, which nnsight mounts on every object"
        if isinstance(node, ast.ExceptHandler) and ast.unparse(node.type or ast.Name("bare")) in (
            "bare",
            "Exception",
            "BaseException",
        ):
            yield f"{node.lineno}: except everything"


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_forbidden_is_called(name):
    allowed = {"print"} if name in ("cli", "__main__", "remote_generation") else set()
    if name in ("dictionaries.readers_files", "tracing"):  # foreign files, as tensors alone
        allowed = {"torch.load"}
        assert "weights_only=True" in ast.unparse(TREES[name])
    found = [each for each in forbidden(TREES[name]) if each.split(": ")[1] not in allowed]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "torch.save(x, y)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "try:\n    pass\nexcept Exception:\n    pass",
        "try:\n    pass\nexcept:\n    pass",
        "class A:\n    def save(self): ...",
    ],
)
def test_what_is_forbidden_is_found(code):
    assert list(forbidden(ast.parse(code)))


PYTHON = [*PACKAGE.rglob("*.py"), *(ROOT / "widgets").rglob("*.py")]


def test_files_are_short():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in PYTHON}
    assert {name: n for name, n in lengths.items() if n > 500} == {}


def length_of(function):
    """Lines of a function, its docstring not counted."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    return lines - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_functions_are_short():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} {length_of(node)}"
        for path in PYTHON
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and length_of(node) > 80
    ]
    assert long == []


SECRETS = re.compile(
    r"\bhf_[A-Za-z]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|\bxox[abp]-[0-9A-Za-z-]{20,}"
)
SKIPPED = {"__pycache__", "node_modules", "dist", "build"}


def tracked_looking():
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in (".ci", ".github") for part in parts)
        if path.is_file() and not hidden and not SKIPPED & set(parts):
            yield path


def test_no_secret_lies_in_a_file():
    seen = 0
    for path in tracked_looking():
        seen += 1
        match = SECRETS.search(path.read_bytes().decode("utf-8", "replace"))
        assert match is None, f"{path} holds what looks like a secret"
    assert seen > 50


@pytest.mark.parametrize(
    "secret", ["hf_" + "aB" * 17, "sk-" + "ant-" + "a1" * 12, "AKIA" + "A1" * 8, "ghp_" + "a1" * 18]
)
def test_secrets_would_be_found(secret):
    assert SECRETS.search(f"token = '{secret}'")
