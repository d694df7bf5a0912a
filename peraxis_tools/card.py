"""A repository's model card: front matter for the hub, and one section for each delta, which later runs replace.

The sections are made from the manifest, and from an evaluation's JSON if it is given. Texts from the manifest are
escaped, so that they cannot add YAML keys or markup to the card. Text outside our sections is not changed.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import peraxis_format as pxd
from peraxis_tools.card_updates import ChainPlace, places
from peraxis_tools.deltas.calibration_text import calibration_text
from peraxis_tools.deltas.inspection import InspectResult
from peraxis_tools.display.shown import counted, times_smaller
from peraxis_tools.errors import ToolError
from peraxis_tools.remote.names import HUB_ID
from peraxis_tools.yaml_file import check_yaml, what_is_wrong

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

__all__ = ["CardDelta", "card_text", "missing_fields"]

_FRONT_MATTER: Final = 1 << 20  # bytes: those of a model may list hundreds of results
_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&:]|(?<=www)\.)")
_REVISION: Final = re.compile(r"[\w.-]+(/[\w.-]+)*")
_FRONT: Final = re.compile(
    r"(\s*---(?:\r\n|\r|\n))([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)"
)  # as in huggingface_hub
_TAGS: Final = ("pxd", "delta")
_INHERITED: Final = ("language", "license", "license_name", "license_link", "pipeline_tag", "datasets")
_PIPELINES: Final = (
    ("ForCausalLM", "text-generation"),
    ("LMHeadModel", "text-generation"),
    ("ForSeq2SeqLM", "text2text-generation"),
    ("ForConditionalGeneration", "image-text-to-text"),
    ("ForSequenceClassification", "text-classification"),
    ("ForMaskedLM", "fill-mask"),
)
_METRICS: Final = (
    ("kl", "kl_divergence", "KL(fine-tuned || this), nats per token"),
    ("top1", "accuracy", "share of equal most likely tokens"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CardDelta:
    """One delta of the card. base_id: replaces the manifest's; architecture: from the configuration."""

    file: str
    found: InspectResult
    base_id: str | None = None
    base_revision: str | None = None
    evaluation: Mapping[str, Any] | None = None
    architecture: str = ""

    @property
    def base(self) -> pxd.Identity:
        """The base's id and revision for the card. The file can name any revision; only a plain one is shown."""
        manifest = self.found.manifest.base
        if self.base_id is None:
            plain = manifest.revision if _REVISION.fullmatch(manifest.revision or "") else None
            return pxd.Identity(id=manifest.id, revision=plain)
        return pxd.Identity(id=self.base_id, revision=self.base_revision)


def card_text(
    repository: str,
    deltas: Sequence[CardDelta],
    *,
    existing: str | None = None,
    fine_tuned_card: str | None = None,
    license: str | None = None,
    relation: str = "finetune",
) -> str:
    """The README.md. existing: the repository's card; its text and metadata are extended.

    fine_tuned_card: the fine-tune's own card, for language, license, pipeline and data sets. Raises ToolError.
    """
    card = _parse_card(existing)
    # A ModelCard's data are ModelCardData; the library types them as the base class.
    data = cast("ModelCardData", card.data) if card is not None else None
    text = card.text.strip("\n") if card is not None else f"# {_md(deltas[0].found.manifest.fine_tuned.id)}"
    chain = places({delta.file: delta.found.manifest for delta in deltas})
    by_file = {delta.file: delta for delta in deltas}
    for delta in deltas:
        place = chain.get(delta.file)
        base = _base_to_pass(delta, place, by_file)
        text = _with_section(text, delta.file, "\n".join(_section(repository, delta, place, base)))
    merged = _data(repository, deltas, data, _inherited(fine_tuned_card), license, relation)
    return f"---\n{merged.to_yaml()}\n---\n\n{text}\n"


def _parse_card(content: str | None) -> ModelCard | None:
    """Parse a card; None without one. Raises ToolError if its front matter is not YAML."""
    from huggingface_hub import ModelCard

    if content is None:
        return None
    front = _FRONT.match(content)
    try:
        if front:
            check_yaml(front[2], "README.md: its front matter", limit=_FRONT_MATTER)
        return ModelCard(content, ignore_metadata_errors=True)
    except ToolError:
        raise
    except Exception as error:  # yaml has its own hierarchy, and the card is untrusted
        reason = what_is_wrong(error, above=content[: front.start(2)].count("\n") if front else 0)
        raise ToolError(f"README.md: its front matter cannot be read ({reason}); correct it first") from None


def _inherited(content: str | None) -> dict[str, Any]:
    """Language, license, pipeline and data sets of the fine-tune's card."""
    card = _parse_card(content)
    values = {} if card is None else {key: getattr(card.data, key, None) for key in _INHERITED}
    return {key: value for key, value in values.items() if value}


def missing_fields(content: str) -> list[str]:
    """The usual fields that this card lacks."""
    card = _parse_card(content)
    usual = ("base_model", "license", "language", "pipeline_tag")
    return [key for key in usual if card is None or not getattr(card.data, key, None)]


def _data(
    repository: str,
    deltas: Sequence[CardDelta],
    before: ModelCardData | None,
    theirs: Mapping[str, Any],
    license: str | None,
    relation: str,
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    values: dict[str, Any] = {} if before is None else dict(before.to_dict())  # type: ignore[no-untyped-call]
    values.pop("model-index", None)
    bases = [delta.base.id for delta in deltas if HUB_ID.fullmatch(delta.base.id)]
    bases = _union(values.get("base_model"), bases)
    if bases:
        values["base_model"] = bases[0] if len(bases) == 1 else bases
        values.setdefault("base_model_relation", relation)
    if license is not None:
        values["license"] = license
    pipeline = next((tag for end, tag in _PIPELINES if deltas[0].architecture.endswith(end)), None)
    for key, value in {**({"pipeline_tag": pipeline} if pipeline else {}), **theirs}.items():
        values.setdefault(key, value)
    values.setdefault("library_name", "peraxis")
    signs = any(_has_signs(delta.found) for delta in deltas)
    values["tags"] = _union(values.get("tags"), (*_TAGS, "1-bit") if signs else _TAGS)
    results = _results(deltas, [] if before is None else list(before.eval_results or []))
    if results:
        values["model_name"] = (before.model_name if before is not None else None) or repository.rpartition("/")[2]
        values["eval_results"] = results
    return ModelCardData(**values)


def _union(before: Any, more: Iterable[str]) -> list[str]:
    held = [before] if isinstance(before, str) else list(before or [])
    return [*held, *(item for item in dict.fromkeys(more) if item not in held)]


def _results(deltas: Sequence[CardDelta], before: list[EvalResult]) -> list[EvalResult]:
    """All figures of the evaluations; those of a file that is published again are replaced."""
    from huggingface_hub import EvalResult

    names = {delta.file for delta in deltas}
    # The hub's metadata has no field for one file of several; the configuration of a metric is the closest.
    kept = [result for result in before if result.metric_config not in names]
    for delta in deltas:
        for domain in (delta.evaluation or {}).get("domains", ()):
            fidelity: Mapping[str, Any] = domain["candidates"].get("merged") or next(
                iter(domain["candidates"].values()), {}
            )
            kept += [
                EvalResult(
                    task_type="text-generation",
                    dataset_type=re.sub(r"[^\w.-]+", "-", str(domain["domain"])),
                    dataset_name=str(domain["domain"]),
                    metric_type=metric,
                    metric_name=name,
                    metric_value=fidelity[key],
                    metric_config=delta.file,
                )
                for key, metric, name in _METRICS
                if key in fidelity
            ]
    return kept


def _with_section(text: str, file: str, section: str) -> str:
    """The text with this file's section replaced, or appended."""
    key = json.dumps(file).replace("--", "-\\u002d").replace(">", "\\u003e")
    begin, end = f"<!-- peraxis delta {key} -->", f"<!-- peraxis end {key} -->"
    block = f"{begin}\n{section}\n{end}"
    start, stop = text.find(begin), text.find(end)
    if 0 <= start < stop:
        return text[:start] + block + text[stop + len(end) :]
    return f"{text}\n\n{block}"


def _has_signs(found: InspectResult) -> bool:
    return any(module.components for module in found.manifest.modules)


def _section(repository: str, delta: CardDelta, place: ChainPlace | None, base: str) -> Iterator[str]:
    found = delta.found
    yield f"## {_md(delta.file)}"
    yield ""
    yield (
        f"{_what(delta, place)} in the PXD format: {found.bytes:,} bytes "
        f"for a checkpoint of {found.full_bytes:,}, **{times_smaller(found.full_bytes, found.bytes)}**."
    )
    yield ""
    yield from _facts(delta, place)
    yield from _loading(repository, delta, place, base)
    yield from _sizes(found)
    if delta.evaluation is not None:
        yield from _fidelity(delta.evaluation)


def _what(delta: CardDelta, place: ChainPlace | None) -> str:
    """The kind of file, in words. place: that of an update."""
    if place is None:
        kind = "a 1-bit difference" if _has_signs(delta.found) else "an exact difference"
        return f"A full fine-tune of {_md(delta.base.id)} as {kind}"
    if place.is_anchor:
        return "A whole state of a chain of exact updates"
    if place.previous is not None:
        return f"An exact update that follows {_md(place.file) if place.file else 'another one'},"
    return f"An exact update of {_md(delta.base.id)}"


def _md(value: str) -> str:
    plain = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in value)
    return _SPECIAL.sub(r"\\\1", plain)


def _facts(delta: CardDelta, place: ChainPlace | None) -> Iterator[str]:
    base, found = delta.base, delta.found
    revision = f" at `{_md(base.revision)}`" if base.revision else ""
    yield f"- content ID `{found.content_id}`"
    if place is None or (place.previous is None and not place.is_anchor):
        yield f"- base {_md(base.id)}{revision}, `{found.manifest.base.digest}`"
    elif place.previous is not None:
        yield f"- follows {f'{_md(place.file)}, ' if place.file else ''}content ID `{place.previous}`"
    if place is not None:
        yield f"- the state after it is `{found.manifest.result}`"
    calibration = found.manifest.calibration
    if calibration is not None:
        yield (
            f"- scales fitted on {counted(calibration.samples, 'sample')} of {calibration.sequence_length} tokens: "
            f"{_md(calibration_text(found.manifest))}"
        )
    yield f"- written by {_md(found.manifest.producer.name)} {_md(found.manifest.producer.version)}"
    yield ""


def _base_to_pass(delta: CardDelta, place: ChainPlace | None, deltas: Mapping[str, CardDelta]) -> str:
    """The hub id to pass as the base, that of the chain's first update for one of its others; else BASE."""
    identity: pxd.Identity | None = delta.base
    if place is not None and (place.is_anchor or place.previous is not None) and delta.base_id is None:
        first = deltas.get(place.first or "")
        identity = None if first is None or place.is_anchor else first.base
    if identity is None or not HUB_ID.fullmatch(identity.id):
        return "BASE"
    return f"{identity.id}@{identity.revision}" if identity.revision else identity.id


def _loading(repository: str, delta: CardDelta, place: ChainPlace | None, base: str) -> Iterator[str]:
    file, quoted = shlex.quote(delta.file), shlex.quote(base)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", delta.file)), default=0))
    follows = place is not None and place.previous is not None
    yield f"### Load {_md(delta.file)}"
    yield ""
    if follows:
        yield (
            f"An update is applied after those before it: these commands take all updates of this repository, and "
            f"write the state after the last one. {base} is the checkpoint that the chain begins with; if it begins "
            "with a whole state, any checkpoint of this model, for its configuration and tokenizer."
        )
        yield ""
    elif place is not None and place.is_anchor:
        yield (
            "This file has every weight, so it needs no base. apply and load take the configuration and the tokenizer "
            f"from {base}, which is any checkpoint of this model."
        )
        yield ""
    yield f"{fence}sh"
    yield "pip install 'peraxis[hub]'"
    if follows:
        yield f"hf download {repository} --include '*.pxd' --local-dir updates"
        yield f"peraxis-tools verify updates --base {quoted}"
        yield f"peraxis-tools apply {quoted} updates -o model"
    else:
        on = "" if place is not None and place.is_anchor else f" --base {quoted}"
        yield f"hf download {repository} {file} --local-dir ."
        yield f"peraxis-tools verify {file}{on} --expect-content-id {delta.found.content_id}"
        yield f"peraxis-tools apply {quoted} {file} -o model"
    yield fence
    yield ""
    yield f"{fence}python"
    yield "import peraxis  # pip install 'peraxis[compress,hub]'"
    yield ""
    named = "updates" if follows else delta.file
    yield f"model, tokenizer = peraxis.load({json.dumps(named)}, base={json.dumps(base)})"
    yield fence
    yield ""


def _sizes(found: InspectResult) -> Iterator[str]:
    yield "### Sizes"
    yield ""
    yield "| tensors | modules | stored bytes | full bytes | ratio |"
    yield "|---|---:|---:|---:|---:|"
    for share in found.by_kind:
        ratio = f"{share.full_bytes / share.bytes:.1f}" if share.bytes else "-"
        yield f"| {share.label} | {share.module_count} | {share.bytes:,} | {share.full_bytes:,} | {ratio} |"
    yield ""


def _fidelity(evaluation: Mapping[str, Any]) -> Iterator[str]:
    yield "### Fidelity"
    yield ""
    yield "Compared with the fine-tuned model, per token: KL in nats, share of equal most likely tokens, perplexity."
    yield ""
    yield "| text | model | KL | top-1 | perplexity | fine-tuned |"
    yield "|---|---|---:|---:|---:|---:|"
    for domain in evaluation["domains"]:
        for name, fidelity in domain["candidates"].items():
            yield (
                f"| {_md(str(domain['domain']))} | {_md(name)} | {fidelity['kl']:.4g} | {fidelity['top1']:.1%} | "
                f"{domain['perplexity'][name]:.4g} | {domain['perplexity_fine_tuned']:.4g} |"
            )
    yield ""
