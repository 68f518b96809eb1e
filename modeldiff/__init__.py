"""Find, test and remove what a fine-tune changed in a language model.

Names are imported when first used, so that ``import modeldiff`` is instant and pulls in neither
torch nor nnsight.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from modeldiff._version import __version__ as __version__

if TYPE_CHECKING:
    from modeldiff.activations import Activations as Activations
    from modeldiff.answer_contrasts import answer_directions as answer_directions
    from modeldiff.api_judge import ApiScorer as ApiScorer
    from modeldiff.architectures import SiteMap as SiteMap
    from modeldiff.audit import Audit as Audit
    from modeldiff.audit_stages import Settings as Settings
    from modeldiff.backtracking import window_directions as window_directions
    from modeldiff.backtracking_scan import probe_grid as probe_grid
    from modeldiff.backtracking_scan import window_scan as window_scan
    from modeldiff.backtracking_text import held_out_grid as held_out_grid
    from modeldiff.backtracking_text import steering_grid as steering_grid
    from modeldiff.behaviours import Behaviour as Behaviour
    from modeldiff.behaviours import Prompt as Prompt
    from modeldiff.behaviours import Verdict as Verdict
    from modeldiff.behaviours import organism_behaviours as organism_behaviours
    from modeldiff.cache import Cache as Cache
    from modeldiff.caft_arms import Arm as Arm
    from modeldiff.caft_arms import standard_arms as standard_arms
    from modeldiff.caft_candidates import candidates as candidates
    from modeldiff.caft_reading import Choice as Choice
    from modeldiff.caft_reading import choose_by_judge as choose_by_judge
    from modeldiff.caft_reading import choose_by_keywords as choose_by_keywords
    from modeldiff.caft_reading import interpretation as interpretation
    from modeldiff.caft_results import CaftResult as CaftResult
    from modeldiff.caft_runs import run_arms as run_arms
    from modeldiff.direction_components import pca_difference as pca_difference
    from modeldiff.direction_controls import random_like as random_like
    from modeldiff.direction_methods import mean_difference as mean_difference
    from modeldiff.directions import Direction as Direction
    from modeldiff.directions import cosine_table as cosine_table
    from modeldiff.dose import dose_response as dose_response
    from modeldiff.dose import residual_norms as residual_norms
    from modeldiff.dose import with_prompts as with_prompts
    from modeldiff.edit_effects import effects as effects
    from modeldiff.generation import Generations as Generations
    from modeldiff.harvesting import harvest as harvest
    from modeldiff.interventions import Ablate as Ablate
    from modeldiff.interventions import Cell as Cell
    from modeldiff.interventions import Clamp as Clamp
    from modeldiff.interventions import Plan as Plan
    from modeldiff.interventions import Replace as Replace
    from modeldiff.interventions import ScaleAdapter as ScaleAdapter
    from modeldiff.interventions import ScaleAlong as ScaleAlong
    from modeldiff.interventions import Steer as Steer
    from modeldiff.judge_rates import em_rate as em_rate
    from modeldiff.judge_rates import rate_difference as rate_difference
    from modeldiff.judge_rates import rates_by_question as rates_by_question
    from modeldiff.judges import RegexJudge as RegexJudge
    from modeldiff.judges import RuleJudge as RuleJudge
    from modeldiff.local_judge import LocalScorer as LocalScorer
    from modeldiff.masks import Last as Last
    from modeldiff.masks import New as New
    from modeldiff.masks import Positions as Positions
    from modeldiff.masks import Regex as Regex
    from modeldiff.masks import Role as Role
    from modeldiff.masks import Span as Span
    from modeldiff.models import ModelPair as ModelPair
    from modeldiff.ngram_judge import NgramJudge as NgramJudge
    from modeldiff.outputs import OutputDiff as OutputDiff
    from modeldiff.prefill import Prefill as Prefill
    from modeldiff.questions import load_behaviour as load_behaviour
    from modeldiff.questions import question_sets as question_sets
    from modeldiff.report import Report as Report
    from modeldiff.scorers import ScoreJudge as ScoreJudge
    from modeldiff.sft import finetune as finetune
    from modeldiff.sft_plans import SFTPlan as SFTPlan
    from modeldiff.sft_rows import response_rows as response_rows
    from modeldiff.sft_rows import split_rows as split_rows
    from modeldiff.sites import Site as Site
    from modeldiff.static_decoding import StaticDecoder as StaticDecoder
    from modeldiff.store_following import followed as followed
    from modeldiff.stores import ActivationStore as ActivationStore
    from modeldiff.thinking import label_directions as label_directions
    from modeldiff.tokens import Chat as Chat
    from modeldiff.tokens import Completion as Completion

_HOMES = {
    "activations": "Activations",
    "answer_contrasts": "answer_directions",
    "api_judge": "ApiScorer",
    "architectures": "SiteMap",
    "audit": "Audit",
    "audit_stages": "Settings",
    "backtracking": "window_directions",
    "backtracking_scan": "probe_grid window_scan",
    "backtracking_text": "held_out_grid steering_grid",
    "behaviours": "Behaviour Prompt Verdict organism_behaviours",
    "cache": "Cache",
    "caft_arms": "Arm standard_arms",
    "caft_candidates": "candidates",
    "caft_reading": "Choice choose_by_judge choose_by_keywords interpretation",
    "caft_results": "CaftResult",
    "caft_runs": "run_arms",
    "direction_components": "pca_difference",
    "direction_controls": "random_like",
    "direction_methods": "mean_difference",
    "directions": "Direction cosine_table",
    "dose": "dose_response residual_norms with_prompts",
    "edit_effects": "effects",
    "generation": "Generations",
    "harvesting": "harvest",
    "interventions": "Ablate Cell Clamp Plan Replace ScaleAdapter ScaleAlong Steer",
    "judge_rates": "em_rate rate_difference rates_by_question",
    "judges": "RegexJudge RuleJudge",
    "local_judge": "LocalScorer",
    "masks": "Last New Positions Regex Role Span",
    "models": "ModelPair",
    "ngram_judge": "NgramJudge",
    "outputs": "OutputDiff",
    "prefill": "Prefill",
    "questions": "load_behaviour question_sets",
    "report": "Report",
    "scorers": "ScoreJudge",
    "sft": "finetune",
    "sft_plans": "SFTPlan",
    "sft_rows": "response_rows split_rows",
    "sites": "Site",
    "static_decoding": "StaticDecoder",
    "store_following": "followed",
    "stores": "ActivationStore",
    "thinking": "label_directions",
    "tokens": "Chat Completion",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'modeldiff' has no attribute {name!r}")
    return getattr(import_module(f"modeldiff.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*_HOME_OF, *(name for name in globals() if name.startswith("__"))})
