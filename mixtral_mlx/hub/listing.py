"""What the Hugging Face hub has: a repository's files at one commit, those that are needed, and who may have them.

huggingface_hub asks; here its answers are checked, and its refusals said with what a person can do about them. Bringing
the files is left to `fetch`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name, try_to_load_from_cache

from ..config import shown
from .patience import GO_ON, HubError, PassingError, Patience, Setbacks, is_passing, pause_asked, reason

_T = TypeVar("_T")

_FORMS = {
    "safetensors": [
        r"model-\d+-of-(\d+)\.safetensors",
        r"model\.safetensors",
        r"model[\w.-]*\.safetensors",
        r"weights[\w.-]*\.safetensors",
        r"consolidated[\w.-]*\.safetensors",
    ],
    "torch": [
        r"pytorch_model-\d+-of-(\d+)\.bin",
        r"pytorch_model\.bin",
        r"pytorch_model[\w.-]*\.bin",
        r"consolidated[\w.-]*\.pth",
        r"consolidated[\w.-]*\.pt",
    ],
}
_BESIDE = re.compile(
    r"(config|params|generation_config|quantize_config|quant_config|special_tokens_map|added_tokens)\.json"
    r"|[\w-]*tokenizer[\w.-]*|chat_template\.jinja"
)
_INDEXES = {"safetensors": "model.safetensors.index.json", "torch": "pytorch_model.bin.index.json"}
_GGUF_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_SAFE_PATH = re.compile(r"(?:[\w-][\w.-]{0,250}/)*[\w-][\w.-]{0,250}", re.ASCII)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: `path` in it, bytes, and the hub's hash of it (`sha256` or git's `blob_id`)."""

    path: str
    size: int
    sha256: str | None = None
    blob_id: str | None = None

    @property
    def name(self) -> str:
        """What it is called on this machine."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Listing:
    """A repository at one commit: all its files, and those that are needed, small ones first, then `weights`."""

    repo: str
    revision: str
    commit: str
    form: str
    files: tuple[HubFile, ...]
    beside: tuple[HubFile, ...]
    weights: tuple[HubFile, ...]
    offline: bool = False

    @property
    def needed(self) -> tuple[HubFile, ...]:
        return self.beside + self.weights

    @property
    def nbytes(self) -> int:
        """Bytes of all needed files."""
        return sum(file.size for file in self.needed)


def list_files(
    source: str, revision: str | None = None, *, offline: bool = False, patience: Patience = Patience()
) -> Listing:
    """List what `source`, a repository or `repository:file.gguf`, has and what of it is needed; raises `HubError`.

    Also finds out whether this person may fetch it. `offline` looks into the Hugging Face cache only."""
    repo, _, choice = source.partition(":")
    asked = revision or constants.DEFAULT_REVISION
    if offline or constants.is_offline_mode():
        commit, files = _in_cache(repo, asked)
        return _listing(repo, asked, commit, files, choice, offline=True)
    # An answer to so small a question either comes soon or not at all.
    patience = replace(patience, tries=min(patience.tries, 4))
    commit, files = _persist(lambda: _on_hub(repo, asked), repo, patience)
    listing = _listing(repo, asked, commit, files, choice, offline=False)
    if first := next((file for file in listing.needed if cached(listing, file) is None), None):
        # The list is public even where the files are not.
        _persist(lambda: get_hf_file_metadata(url_of(listing, first)), repo, patience)
    return listing


def cached(listing: Listing, file: HubFile) -> Path | None:
    """Where `file` lies in the Hugging Face cache, if it does."""
    paths = []
    found = try_to_load_from_cache(listing.repo, file.path, revision=listing.commit)
    if isinstance(found, str):
        paths.append(Path(found))
    if hashed := file.sha256 or file.blob_id:
        # Another commit of the same repository, as after an edit of its README, shares the file.
        paths.append(cache_folder(listing.repo) / "blobs" / hashed)
    return next((path for path in paths if path.is_file() and path.stat().st_size == file.size), None)


def cache_folder(repo: str) -> Path:
    """Where the Hugging Face cache keeps what it has of `repo`."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def url_of(listing: Listing, file: HubFile) -> str:
    """Where the hub gives out `file`."""
    return hf_hub_url(listing.repo, file.path, revision=listing.commit, endpoint=constants.ENDPOINT)


def explained(error: HfHubHTTPError, repo: str) -> HubError:
    """What the hub refuses and what a person can do about it."""
    page = f"{constants.ENDPOINT}/{repo}"
    status = error.response.status_code
    login = "run: hf auth login"
    if isinstance(error, GatedRepoError):
        code, found, hint = "hub_gated", "asks for its licence to be accepted", f"Accept it on {page}, then {login}"
    elif isinstance(error, RevisionNotFoundError):
        code, found, hint = "hub_no_revision", "has no such revision", f"Its revisions are on {page}/tree/main"
    elif isinstance(error, EntryNotFoundError):
        code, found, hint = "hub_no_file", "no longer has a file that it listed", "Run the same command again."
    elif isinstance(error, DisabledRepoError):
        code, found, hint = "hub_disabled", "was disabled by the hub", "Choose another repository."
    elif status == 401 and "Invalid" in (error.response.headers.get("X-Error-Message") or ""):
        code, found, hint = "hub_token", "cannot be had with this token", f"Renew it: {login}, or set HF_TOKEN anew."
    elif isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        code, found = "hub_not_found", "does not exist, or is private"
        hint = f"Check the name; for a private one {login}"
    elif status == 403:
        code, found = "hub_forbidden", "is closed to this token"
        hint = f"Give the token the right to read it on {constants.ENDPOINT}/settings/tokens"
    else:
        code, found, hint = "hub_failing", f"could not be fetched ({reason(error)})", GO_ON
    return HubError(f"On the hub, {repo} {found}.", code=code, hint=hint)


def not_here(repo: str, path: str) -> HubError:
    """The error that says that offline there is no `path`, or nothing, of `repo`."""
    return HubError(
        f"{f'{path} of ' if path else ''}{repo} is not in the Hugging Face cache, and offline nothing is fetched.",
        code="offline",
        hint="Run it once without --offline and HF_HUB_OFFLINE.",
    )


def in_words(nbytes: float) -> str:
    """A size as people read it."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _on_hub(repo: str, revision: str) -> tuple[str, list[HubFile]]:
    info = HfApi(endpoint=constants.ENDPOINT).model_info(
        repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    if not isinstance(info.sha, str) or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise ValueError(f"names commit {str(info.sha)[:60]!r}")
    files = [
        HubFile(
            sibling.rfilename,
            sibling.lfs.size if sibling.lfs else sibling.size,
            _hex(sibling.lfs.sha256 if sibling.lfs else None, 64),
            _hex(sibling.blob_id, 40),
        )
        for sibling in info.siblings or []
        if type(sibling.size) is int and sibling.size >= 0
    ]
    return info.sha, files


def _hex(text: str | None, digits: int) -> str | None:
    return text if isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", text) else None


def _in_cache(repo: str, revision: str) -> tuple[str, list[HubFile]]:
    try:
        # The pattern matches nothing: where the snapshot lies is all that is asked.
        snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns="*/-"))
    except (LocalEntryNotFoundError, HFValidationError):
        raise HubError(
            f"{shown(repo)} at {shown(revision)} is not in the Hugging Face cache, and offline nothing is fetched.",
            code="offline",
            hint="Run it once with a network, or give a folder.",
        ) from None
    paths = sorted(path for path in snapshot.rglob("*") if path.is_file())
    return snapshot.name, [_cached_file(path, path.relative_to(snapshot).as_posix()) for path in paths]


def _cached_file(path: Path, name: str) -> HubFile:
    """A file of the cache, which calls it by the hub's hash of it."""
    hashed = path.readlink().name if path.is_symlink() else None
    return HubFile(name, path.stat().st_size, _hex(hashed, 64), _hex(hashed, 40))


def _listing(repo: str, revision: str, commit: str, files: Sequence[HubFile], choice: str, *, offline: bool) -> Listing:
    # Whatever the hub says, nothing outside the folder is written.
    files = sorted((file for file in files if _SAFE_PATH.fullmatch(file.path)), key=lambda file: file.path)
    form, weights = _gguf(repo, files, choice) if choice else _weights(repo, files)
    index = _INDEXES.get(form) if not choice else None
    beside = [file for file in files if _BESIDE.fullmatch(file.path) or file.path == index]
    return Listing(repo, revision, commit, form, tuple(files), tuple(beside), tuple(weights), offline)


def _weights(repo: str, files: Sequence[HubFile]) -> tuple[str, list[HubFile]]:
    """The one form to convert from: a repository often holds the same weights several times."""
    for form, patterns in _FORMS.items():
        for pattern in patterns:
            matches = [(file, match) for file in files if (match := re.fullmatch(pattern, file.path, re.ASCII))]
            if matches and matches[0][1].groups():
                return form, _whole_set(repo, [(file, int(match[1])) for file, match in matches])
            if matches:
                return form, [file for file, _ in matches]
    return _gguf(repo, files, "")


def _whole_set(repo: str, parts: Sequence[tuple[HubFile, int]]) -> list[HubFile]:
    """The parts of the first set that has as many as its names say."""
    counts = sorted({count for _, count in parts})
    for count in counts:
        found = [file for file, of in parts if of == count]
        if len(found) == count:
            return found
    found = [file for file, of in parts if of == counts[0]]
    raise HubError(
        f"{repo} has {len(found)} of the {counts[0]} parts that {found[0].path} is one of.",
        code="hub_incomplete",
        hint="Fetch the missing ones with a network, or choose another repository or revision.",
    )


def _gguf(repo: str, files: Sequence[HubFile], choice: str) -> tuple[str, list[HubFile]]:
    """The GGUF file, or the parts of one, that `choice` names by its path or an unmistakable part of it."""
    models: dict[str, list[tuple[HubFile, int]]] = {}
    for file in files:
        if file.path.endswith(".gguf"):
            part = _GGUF_PART.fullmatch(file.path)
            models.setdefault(part[1] + ".gguf" if part else file.path, []).append((file, int(part[2]) if part else 1))
    exact = [name for name, parts in models.items() if choice in (name, *(file.path for file, _ in parts))]
    fitting = exact or [name for name in models if choice.lower() in name.lower()]
    if len(fitting) == 1:
        return "gguf", _whole_set(repo, models[fitting[0]])
    if models:
        sizes = {name: sum(file.size for file, _ in models[name]) for name in fitting or models}
        found = "".join(f"\n  {repo}:{name}  {size / 1e9:.1f} GB" for name, size in sizes.items())
        asked = f"none is {shown(choice)}" if not fitting else "say which"
        raise HubError(f"{repo} has {len(sizes)} GGUF models; {asked}:{found}", code="hub_choose", hint="Add its name.")
    names = ", ".join(shown(file.path) for file in files[:8]) or "nothing"
    raise HubError(
        f"{repo} holds no {f'GGUF file {shown(choice)}' if choice else 'weights in a known form'} (found: {names}).",
        code="no_weights",
        hint="Known are model*.safetensors, pytorch_model*.bin, consolidated.* and *.gguf.",
    )


def _persist(ask: Callable[[], _T], repo: str, patience: Patience) -> _T:
    """The hub's answer to `ask`, asking again while there is hope; raises `HubError`."""
    setbacks = Setbacks(repo, patience)
    while True:
        try:
            return ask()
        except HfHubHTTPError as error:
            if not is_passing(error.response.status_code):
                raise explained(error, repo) from None
            setbacks.bear(PassingError(reason(error), pause_s=pause_asked(error.response)))
        except httpx2.TransportError as error:
            setbacks.bear(error)
        except OfflineModeIsEnabled:
            raise not_here(repo, "") from None
        except HFValidationError:
            raise HubError(
                f"{shown(repo)} is no name of a repository.",
                code="bad_repository",
                hint="Repositories are named like mistralai/Mixtral-8x7B-Instruct-v0.1.",
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # Its answer is not of the hub's form.
            raise HubError(
                f"{constants.ENDPOINT} does not answer like a hub about {repo} ({reason(error)}).",
                code="hub_failing",
                hint="Check the network, and HF_ENDPOINT if it is set.",
            ) from None
