"""From what a recipe says to what it means: each entry becomes a checked modifier."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from keras_woodfisher.options.checks import number_mend, truth_mend
from keras_woodfisher.recipe.modifiers import pruning as modifiers
from keras_woodfisher.recipe.modifiers import reconstruction, training
from keras_woodfisher.recipe.modifiers.fields import LAST_POSITION
from keras_woodfisher.recipe.modifiers.others import OTHERS, THEIR_FIELDS
from keras_woodfisher.recipe.modifiers.pruning import Modifier
from keras_woodfisher.recipe.modifiers.reconstruction import ReconstructionModifier
from keras_woodfisher.recipe.modifiers.training import LastingModifier
from keras_woodfisher.recipe.syntax.errors import LONGEST, RecipeError, short_repr, short_text, shorten_quotations
from keras_woodfisher.recipe.syntax.outline import Entry, Outline

TAGS: dict[str, type[Modifier]] = {
    kind.tag: kind
    for module in (modifiers, reconstruction, training)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Modifier) and "tag" in vars(kind)
}
"""Every modifier by its tag."""

_SUBJECT = re.compile(r"^(Input|Tuple|List|Dictionary) ")


def modifiers_of(outline: Outline) -> tuple[Modifier, ...]:
    """The modifiers of all stages, in the project's own terms; a later stage begins where the one before ends.

    Raises:
        RecipeError: If a modifier or a field isn't known, or a value isn't allowed.
    """
    found: list[Modifier] = []
    offset = 0.0
    for number, stage in enumerate(outline.stages, 1):
        modifiers = [_modifier(entry, outline.source).shifted(offset) for entry in stage.entries]
        if offset:
            _refuse_late(stage.entries, modifiers, outline.source)
        ends = [max(m.last_epoch, m.first_epoch) for m in modifiers]
        offset = max([offset, *ends])
        if offset > LAST_POSITION:
            raise RecipeError(
                f"The stages end at epoch {offset:g}, one after the other; up to {LAST_POSITION:g} are allowed.",
                source=outline.source,
            )
        if number < len(outline.stages):
            _refuse_idle(stage.entries, modifiers, offset, outline.source)
            modifiers = [m.ended(offset) if isinstance(m, LastingModifier) else m for m in modifiers]
        found += modifiers
    return tuple(found)


def _refuse_late(entries: Sequence[Entry], modifiers: Sequence[Modifier], source: str) -> None:
    """Refuses what works before training in a stage that begins after some of it."""
    for entry, modifier in zip(entries, modifiers, strict=True):
        if isinstance(modifier, ReconstructionModifier):
            raise RecipeError(
                "it prunes before training, but its stage begins after some. Move it to the first stage.",
                line=entry.line,
                field=entry.tag,
                source=source,
            )


def _refuse_idle(entries: Sequence[Entry], modifiers: Sequence[Modifier], end: float, source: str) -> None:
    """Refuses what would begin where its stage ends."""
    for entry, modifier in zip(entries, modifiers, strict=True):
        if isinstance(modifier, LastingModifier) and modifier.end_epoch == -1 and modifier.start_epoch >= end:
            raise RecipeError(
                "it begins where its stage ends, so it would do nothing. Move it to the next stage.",
                line=entry.line,
                field=f"{entry.tag}.start_epoch",
                source=source,
            )


def _modifier(entry: Entry, source: str) -> Modifier:
    kind = TAGS.get(entry.tag)
    if kind is None:
        raise RecipeError(_unknown_tag(entry.tag), line=entry.line, field=entry.path, source=source)

    def error(message: str, field: str = "") -> RecipeError:
        line = entry.lines.get(field) or entry.lines.get(field.partition(".")[0]) or entry.line
        name = f"{entry.tag}.{field}" if field else entry.tag
        return RecipeError(shorten_quotations(message), line=line, field=name, source=source)

    for name, known in _unknown(kind, entry.fields):
        hint = _meant(name.rpartition(".")[2], known)
        raise error(f"there is no such field.{hint} There are: {', '.join(known)}.", name)
    try:
        return kind(**entry.fields).normal()
    except ValidationError as problem:
        raise error(*_first(problem, entry.fields)) from None
    except (TypeError, ValueError, OverflowError) as problem:
        raise error(str(problem), _named_in(str(problem), entry.fields)) from None


def _meant(name: str, known: Sequence[str]) -> str:
    """The field that was probably meant: that of LLM Compressor's under our name, or the nearest."""
    plain = re.sub(r"[^a-z0-9]", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    if (ours := THEIR_FIELDS.get(name)) in known:
        return f" It is LLM Compressor's name; here it is {ours}."
    near = difflib.get_close_matches(plain, known, n=1) if len(name) <= LONGEST else []
    return f" Do you mean {near[0]}?" if near else ""


def _unknown(kind: type[Modifier], fields: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for name, value in fields.items():
        if name not in kind.model_fields:
            yield name, list(kind.model_fields)
        elif name == "mfac_options" and isinstance(value, Mapping):
            known = list(modifiers.FisherOptions.model_fields)
            yield from ((f"{name}.{inner}", known) for inner in value if inner not in known)


def _first(problem: ValidationError, fields: Mapping[str, Any]) -> tuple[str, str]:
    """The message of the first error, which for a field of several forms says them all, and its field."""
    errors = problem.errors(include_url=False)
    place = errors[0]["loc"]
    if not place:
        message = errors[0]["msg"].removeprefix("Value error, ")
        return message, _named_in(message, fields)
    if errors[0]["type"] == "missing":
        return f"{'.'.join(map(str, place))} is required, and isn't there.", ""
    field = str(place[0])
    received = fields.get(field)
    if field == "mfac_options" and len(place) > 1 and isinstance(received, Mapping):
        field, received = f"{field}.{place[1]}", received.get(place[1])
    rules = list(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in errors if e["loc"][:1] == place[:1]))
    if whole := next((rule for rule in rules if rule.startswith("The ")), None):
        return whole, field
    wanted = "; or ".join(_SUBJECT.sub("", rule) for rule in rules)
    texts = (received, *received) if isinstance(received, Mapping) else (received,)
    menders = {"valid number": number_mend, "valid boolean": truth_mend, "": _variable_mend}
    found = (mender(text) for rule, mender in menders.items() if rule in wanted for text in texts)
    mend = next(filter(None, found), "")
    return f"got {short_repr(received)}, but it {wanted}. {mend}".rstrip(), field


def _variable_mend(text: Any) -> str:
    found = re.fullmatch(r"\s*\$\{?(\w+)\}?\s*", text) if isinstance(text, str) else None
    return f"Write eval({found[1]}) for the variable {found[1]} of the recipe." if found else ""


def _named_in(message: str, fields: Mapping[str, Any]) -> str:
    """The field that a message names first, which may be a nested one."""
    places = {name: name for name in fields}
    for outer in ("mfac_options", "lr_kwargs", "grad_sampler_kwargs"):
        nested = fields.get(outer)
        places |= {str(name): f"{outer}.{name}" for name in (nested if isinstance(nested, Mapping) else ())}
    named = [name for name in places if name in message]
    return places[min(named, key=lambda name: (message.index(name), -len(name)))] if named else ""


def _unknown_tag(tag: str) -> str:
    """What to do about a tag that none of ours has: the nearest name, or whose it is."""
    name = tag.rpartition(".")[2]  # as `!sparseml.pytorch.optim.MFACPruningModifier`
    if (foreign := {other.lower(): other for other in OTHERS}.get(name.lower())) is not None:
        problem = f"!{foreign} is outside this project, which prunes and schedules training. {OTHERS[foreign]}"
    elif near := _nearest(name):
        problem = f"there is no modifier !{short_text(tag)}. Do you mean !{near}? "
        problem += "Another kind is outside this project."
    else:
        problem = f"!{short_text(tag)} is outside this project, which prunes and schedules training. Remove it."
    return f"{problem} There are: {', '.join(TAGS)}."


def _nearest(name: str) -> str:
    """The tag that was probably meant, by its whole name or by what tells it from others; "" if none is near."""
    if len(name) > LONGEST:
        return ""
    for form, cutoff in ((str.lower, 0.87), (_stem, 0.8), (_words, 0.95)):
        forms = {form(known): known for known in TAGS}
        if near := difflib.get_close_matches(form(name), forms, n=1, cutoff=cutoff):
            return forms[near[0]]
    return ""


def _words(tag: str) -> str:
    """The words of a tag, whatever their order."""
    return " ".join(sorted(re.findall("[A-Z]+(?![a-z])|[A-Z][a-z]+", tag)))


def _stem(tag: str) -> str:
    """What tells one kind of modifier from another, in lower case."""
    short = tag.lower().replace("_", "").removesuffix("modifier")
    return short.removesuffix("pruning") or short
