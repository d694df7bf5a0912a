"""A delta as a repository of the Hugging Face hub: the file, its signature where there is one, and a model card.

The card follows from the manifest alone, and from an evaluation's JSON where one is passed; nothing in it is guessed.
Texts from the manifest are quoted, so that they can bring neither YAML keys nor markup into the card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import peraxis_format as pxd
from peraxis_tools.delta_parts import refuse_part
from peraxis_tools.errors import ToolError
from peraxis_tools.folders import atomic_folder
from peraxis_tools.inspect import InspectResult, inspect
from peraxis_tools.outputs import check_folder, claim_folder
from peraxis_tools.progress import ProgressOf, silent
from peraxis_tools.sign import signature_path

__all__ = ["PublishResult", "Relation", "model_card", "publish", "read_evaluation"]

Relation = Literal["finetune", "adapter", "quantized", "merge"]

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CHUNK: Final = 1 << 22
_EVALUATION: Final = "peraxis.eval/1"
_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishResult:
    """url: of the commit, None where nothing was uploaded. files: names in the repository."""

    repository: str
    content_id: str
    files: tuple[str, ...]
    folder: Path | None
    url: str | None


def publish(
    repository: str,
    path: str | Path,
    *,
    evaluation: Path | None = None,
    licence: str | None = None,
    relation: Relation = "finetune",
    dry_run: Path | None = None,
    overwrite: bool = False,
    private: bool = False,
    revision: str | None = None,
    progress: ProgressOf = silent,
) -> PublishResult:
    """Verify the file, write the card, and upload both; with dry_run, write the repository to that folder instead.

    evaluation: JSON of `peraxis-tools eval`. Raises ToolError, PxdError, OSError.
    """
    path = Path(path)
    if not _HUB_ID.fullmatch(repository):
        raise ToolError(f"{repository}: not a repository's name; pass org/name")
    if not path.name.isprintable():
        raise ToolError(f"{path}: the hub takes no such file name; rename it")
    if dry_run is not None:
        check_folder(dry_run, overwrite=overwrite, inputs=(path, signature_path(path), evaluation))
    with pxd.open(path) as delta:
        refuse_part(delta.manifest, path)
        with progress("verify", delta.size - delta.header_size) as step:
            delta.verify(progress=step)
    found = inspect(path)
    card = model_card(repository, path.name, found, read_evaluation(evaluation), licence=licence, relation=relation)
    bundle = signature_path(path)
    files = {path.name: path, **({bundle.name: bundle} if bundle.is_file() else {})}
    url = None
    if dry_run is None:
        url = _upload(repository, files, card, private=private, revision=revision, content_id=found.content_id)
    else:
        claim = claim_folder(dry_run, overwrite=overwrite, inputs=(*files.values(), evaluation))
        # No list of files in it: all of it is for the hub, and its card tells whose it is.
        with claim, atomic_folder(dry_run, overwrite=overwrite, marker=False) as folder:
            (folder / "README.md").write_text(card, "utf-8")
            (folder / ".gitattributes").write_text(_ATTRIBUTES)
            with progress("copy", sum(source.stat().st_size for source in files.values())) as step:
                for name, source in files.items():
                    _copy(source, folder / name, step)
    return PublishResult(
        repository=repository,
        content_id=found.content_id,
        files=("README.md", ".gitattributes", *files),
        folder=dry_run,
        url=url,
    )


def _copy(source: Path, target: Path, step: Callable[[int], None]) -> None:
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            step(len(chunk))


# A .pxd is large and binary; its suffix is Cython's too, whose text filters must not touch it.
_ATTRIBUTES: Final = "*.pxd filter=lfs diff=lfs merge=lfs -text\n"


def _upload(
    repository: str, files: Mapping[str, Path], card: str, *, private: bool, revision: str | None, content_id: str
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    operations = [CommitOperationAdd(name, source) for name, source in files.items()]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    operations.append(CommitOperationAdd(".gitattributes", _ATTRIBUTES.encode()))
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message=f"Add {content_id}", revision=revision)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ToolError(f"{repository}: cannot be uploaded: {reason}; log in with `hf auth login`") from None
    return str(done.commit_url)


def read_evaluation(path: Path | None) -> Mapping[str, Any] | None:
    """An evaluation's JSON. Raises ToolError for anything else."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("schema") != _EVALUATION:
        raise ToolError(f"{path}: not the JSON of an evaluation ({_EVALUATION}); write it with `eval --json`")
    if not _is_evaluation(found):
        raise ToolError(f"{path}: lacks figures of an evaluation, or they are no numbers; write it with `eval --json`")
    return found


def _is_evaluation(found: Mapping[str, Any]) -> bool:
    """Whether what the card shows is there: for each domain numbers of each candidate."""
    domains = found.get("domains")
    return isinstance(domains, list) and all(isinstance(domain, dict) and _is_domain(domain) for domain in domains)


def _is_domain(domain: Mapping[str, Any]) -> bool:
    candidates, perplexity = domain.get("candidates"), domain.get("perplexity")
    if not isinstance(candidates, dict) or not isinstance(perplexity, dict) or "domain" not in domain:
        return False
    numbers = [domain.get("perplexity_fine_tuned")]
    for name, fidelity in candidates.items():
        if not isinstance(fidelity, dict):
            return False
        numbers += [fidelity.get("kl"), fidelity.get("top1"), perplexity.get(name)]
    return all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)


def model_card(
    repository: str,
    file: str,
    found: InspectResult,
    evaluation: Mapping[str, Any] | None = None,
    *,
    licence: str | None = None,
    relation: Relation = "finetune",
) -> str:
    """The README.md of a repository: front matter for the hub, sizes, fidelity, how to load."""
    if evaluation is not None and evaluation.get("content_id") != found.content_id:
        raise ToolError(f"the evaluation is of {evaluation.get('content_id')}, not of this file; evaluate it again")
    return "\n".join(
        [
            *_front_matter(found, licence, relation),
            f"# {_md(found.manifest.fine_tuned.id)}",
            "",
            f"A full fine-tune of {_md(found.manifest.base.id)} as a 1-bit difference in the PXD format: "
            f"{found.file_bytes:,} bytes for a checkpoint of {found.full_bytes:,}, "
            f"**{found.ratio:.1f} times smaller**.",
            "",
            *_facts(found),
            *_loading(repository, file, found),
            *_sizes(found),
            *(_fidelity(evaluation) if evaluation is not None else []),
        ]
    )


def _yaml(value: str) -> str:
    return json.dumps(value)  # a JSON string is a YAML one


def _md(value: str) -> str:
    plain = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in value)
    return _SPECIAL.sub(r"\\\1", plain)


def _front_matter(found: InspectResult, licence: str | None, relation: Relation) -> Iterator[str]:
    yield "---"
    base = found.manifest.base.id
    if _HUB_ID.fullmatch(base):
        yield f"base_model: {_yaml(base)}"
        yield f"base_model_relation: {relation}"
    if licence is not None:
        yield f"license: {_yaml(licence)}"
    yield "library_name: peraxis"
    yield "tags:\n- pxd\n- delta\n- 1-bit"
    yield "---"
    yield ""


def _facts(found: InspectResult) -> Iterator[str]:
    base = found.manifest.base
    revision = f" at `{_md(base.revision)}`" if base.revision else ""
    yield f"- content ID `{found.content_id}`"
    yield f"- base {_md(base.id)}{revision}, `{base.digest}`"
    calibration = found.manifest.calibration
    if calibration is not None:
        yield (
            f"- scales fitted on {_md(calibration.source)}, {calibration.samples} samples of "
            f"{calibration.sequence_length} tokens"
        )
    yield f"- written by {_md(found.manifest.producer.name)} {_md(found.manifest.producer.version)}"
    yield ""


def _loading(repository: str, file: str, found: InspectResult) -> Iterator[str]:
    base = found.manifest.base.id if _HUB_ID.fullmatch(found.manifest.base.id) else "BASE"
    yield "## Load"
    yield ""
    yield "```sh"
    yield "pip install 'peraxis[tools]'"
    yield f"hf download {repository} {file} --local-dir ."
    yield f"peraxis-tools verify {file} --base {base} --expect-content-id {found.content_id}"
    yield f"peraxis-tools apply {base} {file} -o model"
    yield "```"
    yield ""
    yield "```python"
    yield "import peraxis_tools"
    yield ""
    yield f'model = peraxis_tools.load_model("{base}", "{file}")'
    yield "```"
    yield ""


def _sizes(found: InspectResult) -> Iterator[str]:
    yield "## Sizes"
    yield ""
    yield "| tensors | modules | stored bytes | full bytes | ratio |"
    yield "|---|---:|---:|---:|---:|"
    for share in found.by_kind:
        ratio = f"{share.full_bytes / share.bytes:.1f}" if share.bytes else "-"
        yield f"| {share.label} | {share.modules} | {share.bytes:,} | {share.full_bytes:,} | {ratio} |"
    yield ""


def _fidelity(evaluation: Mapping[str, Any]) -> Iterator[str]:
    yield "## Fidelity"
    yield ""
    yield "Beside the fine-tuned model, per token: KL in nats, share of equal most likely tokens, perplexity."
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
