"""`AuditState`: everything the panels share, as one traitlets object that knows no widget."""

from collections.abc import Mapping
from typing import Any

from traitlets import Any as AnyTrait
from traitlets import Bool, Dict, Float, HasTraits, Int, List, TraitError, Unicode, validate

from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.sources import Source
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction, load_directions, save_directions
from modeldiff.errors import FileFormatError
from modeldiff.interventions import Plan
from modeldiff.stores import ActivationStore, StoreRows
from modeldiff.tokens import Chat
from modeldiff_widgets import _stack


class AuditState(HasTraits):
    """What is asked, where one looks, and what is done to the models.

    Lists and dicts are replaced, never changed in place, so that whoever observes them hears of
    it. `results` and `directions` are not part of `to_dict`; directions are written with
    `save_directions`.

    Example:
        >>> state = AuditState(prompt="How are you?", temperature=0.7)
        >>> AuditState.from_dict(state.to_dict()).temperature
        0.7
    """

    prompt = Unicode(help="A plain text; used where there are no messages.").tag(kept=True)
    messages = List(Dict(), help="A chat, as mappings with role and content.").tag(kept=True)
    prefill = Unicode(help="How the answer begins, as part of the prompt.").tag(kept=True)
    layer = Int(0, min=0, help="The layer that is looked at.").tag(kept=True)
    token = Int(-1, min=-1, help="Index of the selected token; -1 for none.").tag(kept=True)
    direction = Unicode(help="Name of the selected direction.").tag(kept=True)
    edits = List(Dict(), help="The stack of edits, see `new_edit`.").tag(kept=True)
    temperature = Float(0.7, min=0.0, help="0 is greedy.").tag(kept=True)
    n_samples = Int(1, min=1, help="Answers a prompt.").tag(kept=True)
    seed = Int(0, help="Of the shared noise and of random controls.").tag(kept=True)
    max_new_tokens = Int(64, min=1, help="Where answers are cut.").tag(kept=True)
    metric = Unicode("kl_ft_base", help="What colours tokens.").tag(kept=True)
    scale = Float(1.0, min=0.0, help="Value at which a token has its full colour.").tag(kept=True)
    random_control = Bool(False, help="Whether a random control stands beside.").tag(kept=True)
    directions_file = Unicode(help="File that holds the directions; '' if none does.").tag(
        kept=True
    )
    latent = Int(0, min=0, help="The latent that is looked at.").tag(kept=True)
    caft = List(Unicode(), help="Names of the directions to train against.").tag(kept=True)

    dictionary = AnyTrait(None, help="The dictionary whose latents are read, or None.")
    rows = AnyTrait(None, help="A source of paired activations for it, or None.")
    dictionary_folder = Unicode(help="Where the dictionary lies; '' if nowhere yet.")
    rows_code = Unicode(help="Python that makes the source; '' if only this object has it.")
    directions = Dict(key_trait=Unicode(), help="Directions by name.")
    direction_code = Dict(key_trait=Unicode(), help="Python that makes a direction, by its name.")
    results = Dict(key_trait=Unicode(), help="What panels computed, for other panels.")

    @validate("edits")
    def _valid_edits(self, proposal: Any) -> list[dict[str, Any]]:
        return [_stack.checked(edit) for edit in proposal["value"]]

    # -- what is asked

    def item(self) -> Any:
        """What `ModelPair.generate` and the like take: the chat, or the plain text."""
        if not self.messages:
            return self.prompt
        if self.prefill:
            return Chat(tuple(self.messages), prefill=self.prefill)
        return list(self.messages)

    def item_code(self) -> str:
        """Python for `item`; ``md`` must be in scope."""
        if not self.messages:
            return repr(self.prompt)
        messages = repr(list(self.messages))
        return f"md.Chat({messages}, prefill={self.prefill!r})" if self.prefill else messages

    # -- what is done

    def plan(self, *, random: bool = False) -> Plan | None:
        """The stack as a plan; None if no edit is on.

        Args:
            random: Put a random direction of the same length and site in each direction's place.

        Raises:
            InterventionError: If a direction is missing or an edit cannot be made.
        """
        return _stack.plan_of(self.edits, self.controls() if random else self.directions)

    def controls(self) -> dict[str, Direction]:
        """A random direction in place of each that the stack uses, drawn with the state's seed."""
        return {
            name: random_like(self.directions[name], i + 1, seed=self.seed)[i]
            for i, name in enumerate(_stack.used(self.edits))
            if name in self.directions
        }

    def grid(self) -> dict[str, Plan]:
        """Named plans for ``do=``: "edited", and "random" where the control is wanted."""
        plan = self.plan()
        if plan is None:
            return {}
        control = self.plan(random=True) if self.random_control and self._directed() else None
        return {"edited": plan} | ({"random": control} if control else {})

    def code(self) -> str:
        """Python lines that define ``do`` for the stack; ``pair`` is in scope."""
        return "\n".join([*self._header(), _stack.code_of(self.edits)])

    def grid_code(self) -> str:
        """Python lines that define ``do`` as `grid` gives it."""
        if not any(edit["on"] for edit in self.edits):
            return "do = {}"
        lines = [*self._header(), _stack.code_of(self.edits, name="edited")]
        if not (self.random_control and self._directed()):
            return "\n".join([*lines, "do = {'edited': edited}"])
        swap = (
            f"{{n: md.random_like(directions[n], i + 1, seed={self.seed})[i] "
            f"for i, n in enumerate({_stack.used(self.edits)!r})}}"
        )
        control = _stack.code_of(self.edits, name="random")
        return "\n".join(
            [*lines, f"directions = {swap}", control, "do = {'edited': edited, 'random': random}"]
        )

    def directions_code(self, names: list[str]) -> str:
        """Python lines that define ``directions`` with these names.

        Directions with code of their own are made by it, others are read from
        `directions_file`; without either they are taken from ``state``, this object.
        """
        if not names:
            return ""
        if all(name in self.direction_code for name in names):
            made = [self.direction_code[name].strip() for name in names]
            pairs = [f"directions = {{{names[0]!r}: {made[0]}}}"] if len(made) == 1 else [
                "directions = {",
                *(f"    {name!r}: {code}," for name, code in zip(names, made, strict=True)),
                "}",
            ]  # fmt: skip
            return "\n".join(pairs)
        if self.directions_file:
            return (
                "from modeldiff.directions import load_directions\n"
                f"directions = {{d.name: d for d in load_directions({self.directions_file!r})}}"
            )
        return "directions = state.directions"

    def _header(self) -> list[str]:
        lines = ["import modeldiff as md", *_stack.imports_of(self.edits)]
        directions = self.directions_code(_stack.used(self.edits))
        return [*lines, directions] if directions else lines

    def _directed(self) -> bool:
        return bool(_stack.used(self.edits))

    # -- dictionaries

    def use_dictionary(self, dictionary: Dictionary | None, folder: str = "") -> None:
        """Read the latents of another dictionary.

        Args:
            dictionary: The dictionary; None for none.
            folder: Where it lies, for code and labels.
        """
        with self.hold_trait_notifications():
            self.dictionary_folder, self.dictionary = folder, dictionary

    def use_rows(self, store: ActivationStore | Source | None, site: str = "") -> None:
        """Measure latents, and train dictionaries, on other activations.

        Args:
            store: A store, or a source of rows; None for none.
            site: Which site of a store; default that of the dictionary.

        Raises:
            SiteError: If the store lacks the site, or has several and none is named.
        """
        if isinstance(store, StoreRows):
            store, site = store.store, str(store.site)
        if not isinstance(store, ActivationStore):
            self.rows_code, self.rows = "", store
            return
        named = site or (self.dictionary.config.site if self.dictionary is not None else "")
        rows = store.source(named or None)
        where = repr(named) if named else ""
        self.rows_code = f"ActivationStore.open({str(store.folder)!r}).source({where})"
        self.rows = rows

    def dictionary_code(self) -> str:
        """Python lines that define ``dictionary``; from its folder, or from ``state``."""
        if not self.dictionary_folder:
            return "dictionary = state.dictionary"
        return (
            "from modeldiff.dictionaries.readers import read\n"
            f"dictionary = read({self.dictionary_folder!r})"
        )

    def source_code(self) -> str:
        """Python lines that define ``rows``; from the store's folder, or from ``state``."""
        if not self.rows_code:
            return "rows = state.rows"
        return f"from modeldiff.stores import ActivationStore\nrows = {self.rows_code}"

    # -- directions

    def add_direction(self, direction: Direction, code: str = "", *, select: bool = True) -> str:
        """Keep a direction; another one of the same name gets a number.

        Args:
            direction: What to keep.
            code: A Python expression that makes it, with ``pair`` and ``md`` in scope.
            select: Whether it becomes the selected one.

        Returns:
            The name under which it is kept.
        """
        name, number = direction.name, 1
        while name in self.directions and self.directions[name].content_key != (
            direction.content_key
        ):
            number += 1
            name = f"{direction.name} {number}"
        self.directions = {**self.directions, name: direction.renamed(name)}
        if code:
            self.direction_code = {**self.direction_code, name: code}
        if name not in self.direction_code:
            self.directions_file = ""  # what it holds is not complete any more
        if select:
            self.direction = name
        return name

    def save_directions(self, path: str) -> None:
        """Write all directions to one file, which snippets then read.

        Raises:
            DirectionError: If there are none.
        """
        save_directions(path, self.directions.values())
        self.directions_file = str(path)

    def load_directions(self, path: str) -> list[str]:
        """Add the directions of a file; returns their names here.

        Raises:
            FileFormatError: If it is no such file.
        """
        known = self.directions_file if self.directions else str(path)
        found = load_directions(path)
        names = [self.add_direction(each, select=False) for each in found]
        same = names == [each.name for each in found] and len(self.directions) == len(names)
        self.directions_file = known if same else ""
        return names

    # -- files

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON-able values; directions and results are not among them."""
        return {name: getattr(self, name) for name in sorted(self.traits(kept=True))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "AuditState":
        """Read what `to_dict` wrote.

        Raises:
            FileFormatError: If a setting is unknown or has a value that it cannot have.
        """
        state = cls()
        state.update(data)
        return state

    def update(self, data: Mapping[str, Any]) -> None:
        """Change settings, all of them or none.

        Raises:
            FileFormatError: If a setting is unknown or has a value that it cannot have.
        """
        unknown = sorted(set(data) - set(self.traits(kept=True)))
        if unknown:
            raise FileFormatError(f"settings that are not known: {unknown}; nothing was changed.")
        before = self.to_dict()
        try:
            with self.hold_trait_notifications():
                for name, value in data.items():
                    setattr(self, name, value)
        except (TraitError, ValueError) as error:
            for name, value in before.items():
                setattr(self, name, value)
            raise FileFormatError(f"{error} Nothing was changed.") from error
