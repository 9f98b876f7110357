"""Models of the Hugging Face Hub: resolved to a commit and fetched into the hub's own cache, only what is loaded."""

import errno
import glob
import logging
import os
import re
import shlex
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import httpx2
from huggingface_hub import DryRunFileInfo, HfApi, constants, get_cached_repo_tree, get_token, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from tqdm import tqdm

from distill.errors import TeacherError
from distill.models.sd3_files import (
    INDEX,
    MODELS,
    RECORD,
    present_components,
    read_json,
    setting_names,
    shard_names,
    weights_name,
)

CARD = "README.md"  # for the license
_REFERENCE = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w.-]*(/\w[\w.-]*)*))?", re.ASCII)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubModel:
    """A model of the hub, and one of its branches, tags or commits; None is the default branch."""

    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, reference: str) -> Self | None:
        """Read `owner/name[@revision]`; None for text that can only be a path."""
        match = _REFERENCE.fullmatch(reference)
        if match is None or reference.endswith(".safetensors"):
            return None
        return cls(match["id"], match["revision"])

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"

    def resolve(self, command: str = "") -> "HubModel":
        """The same model at the commit that its revision names now, or named last if the hub cannot be reached.

        Raises TeacherError if there is no such model, revision or permission; `command` is named as what fetches it.
        """
        with _explained(self, command):
            offline = constants.is_offline_mode()
            found = HfApi().resolve_revision(self.id, revision=self.revision, local_files_only=offline)
            return HubModel(self.id, found.resolved)


def fetch(model: HubModel, weights: Collection[str] = tuple(MODELS)) -> Path:
    """Fetch a commit of a Stable Diffusion 3, with weights of some components; return its folder in the hub's cache.

    Complete files are not fetched again, and nothing is requested for a model whose files are all there. Raises
    TeacherError if the model is not a Stable Diffusion 3, and for whatever keeps it from being fetched.
    """
    with _explained(model):
        folder = Path(_download(model, [INDEX]))
        files = _file_names(model, folder)
        if INDEX not in files:
            raise TeacherError(_not_a_pipeline(model, files))
        settings = [name for name in (CARD, RECORD) if name in files]
        indices: list[str] = []
        whole: list[str] = []
        for part in present_components(read_json(folder / INDEX), str(model)):
            names = [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
            settings += [f"{part}/{name}" for name in setting_names(part, names)]
            if part in weights:
                try:
                    name = f"{part}/{weights_name(part, names)[0]}"
                except LookupError as error:
                    raise TeacherError(
                        f"{model} has no {part}/{error.args[0]}; only models with weights in safetensors can be used"
                    ) from None
                (indices if name.endswith(".json") else whole).append(name)
        _download(model, settings + indices)
        for name in indices:
            whole += [f"{name.partition('/')[0]}/{shard}" for shard in shard_names(folder / name)]
        if not all((folder / name).exists() for name in whole) and not constants.is_offline_mode():
            _check_space(model, _download(model, whole, dry_run=True))
        if whole:  # no pattern at all would fetch every file
            _download(model, whole)
        return folder


def fetch_single(model: HubModel) -> Path:
    """Fetch a single model in transformers' format, such as CLIP; return its folder in the hub's cache.

    Settings, vocabulary and one variant of the weights are fetched. Raises TeacherError for a model without weights in
    safetensors, and for whatever keeps it from being fetched.
    """
    revision = [] if model.revision is None else ["--revision", model.revision]
    command = shlex.join(["hf", "download", model.id, *revision])
    model = model.resolve(command)
    with _explained(model, command):
        folder = Path(_download(model, ["config.json"]))
        files = [name for name in _file_names(model, folder) if "/" not in name]
        try:
            weights = [weights_name("", files)[0]]
        except LookupError as error:
            raise TeacherError(
                f"{model} has no {error.args[0]}; only models with weights in safetensors can be used"
            ) from None
        _download(model, [name for name in files if name.endswith((".json", ".txt"))])
        if weights[0].endswith(".json"):
            weights = shard_names(folder / weights[0])
        _download(model, weights)
        return folder


class _NoBar(tqdm):  # type: ignore[misc]
    """A progress bar that is not shown."""

    hidden: ClassVar[bool | None] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": self.hidden})


class _TerminalBar(_NoBar):
    """A progress bar on a terminal only."""

    hidden = None


def _download(model: HubModel, names: Collection[str], dry_run: bool = False) -> Any:
    """Fetch files of a commit, or say with `dry_run` what that would fetch; return the folder of the commit."""
    shown = any(name.endswith(".safetensors") for name in names) and os.environ.get("LOCAL_RANK", "0") == "0"
    return snapshot_download(
        model.id,
        revision=model.revision,
        allow_patterns=[glob.escape(name) for name in names],
        endpoint=constants.ENDPOINT,
        tqdm_class=_TerminalBar if shown and not dry_run else _NoBar,
        dry_run=dry_run,
    )


def _file_names(model: HubModel, folder: Path) -> list[str]:
    """The names of a commit's files: all on the hub, or those in the cache if other programs put them there."""
    try:
        return [file.path for file in get_cached_repo_tree(model.id, revision=model.revision)]
    except CachedRepoTreeNotFoundError:
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


def _check_space(model: HubModel, files: Collection[DryRunFileInfo]) -> None:
    """Log how much is going to be fetched. Raises TeacherError if the disk of the cache has less space."""
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise TeacherError(
            f"{model} needs {needed / 1e9:.1f} GB in {cache}, which has {free / 1e9:.1f} GB free; free space, or set "
            "HF_HOME to a folder on another disk"
        )
    _log.warning("fetching %.3g GB of %s into %s", needed / 1e9, model, cache)


def _not_a_pipeline(model: HubModel, files: Collection[str]) -> str:
    """What a model without `model_index.json` is, and the fix."""
    single = next((name for name in sorted(files) if "/" not in name and name.endswith(".safetensors")), None)
    fix = "give a model in the format of diffusers"
    if single is not None:
        fix += f", or the path of its single file after `hf download {model.id} {single}`"
    return f"{model} has no {INDEX}, so it is not a pipeline in the format of diffusers; {fix}"


@contextmanager
def _explained(model: HubModel, command: str = "") -> Iterator[None]:
    """Turn the hub's errors into sentences with the fix. `command` fetches the model; empty is `distill fetch`."""
    try:
        yield
    except (HfHubHTTPError, httpx2.TransportError, LocalEntryNotFoundError, RevisionResolutionError) as error:
        raise TeacherError(_explain(model, error, command)) from error
    except HFValidationError as error:
        raise TeacherError(f"{model.id!r} is neither a folder here nor a name of a model on the hub") from error
    except OSError as error:
        cache = constants.HF_HUB_CACHE
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = f"free space in {cache}, or set HF_HOME to a folder on another disk"
        elif error.errno is None:  # a file is shorter than the hub says
            fix = "run the same command again; complete files are kept"
        else:
            fix = f"set HF_HOME to a folder that can be written, in place of {cache}"
        raise TeacherError(f"{model} could not be fetched ({error}); {fix}") from error


def _explain(model: HubModel, error: Exception, command: str) -> str:
    """The sentence for an error of the hub, of the network, or of a cache that lacks the model."""
    login = "`hf auth login` or HF_TOKEN"
    page = f"{constants.ENDPOINT}/{model.id}"
    if isinstance(error, GatedRepoError):
        who = f"with the account of {login}" if get_token() else f"and log in with {login}"
        return f"{model.id} is gated: accept its license at {page} {who}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{model.id!r} is neither a folder here nor a model of {constants.ENDPOINT} that this account sees; "
            f"correct it, or log in with {login} for a private model"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{model.id} has no revision {model.revision!r}; give a branch, tag or commit of {page}/commits/main"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        fix = f"log in again with {login}" if status in (401, 403) else "try again later"
        return f"{constants.ENDPOINT} answers {status} for {model}; {fix}"
    missing = f"{str(model)!r} is not a folder here, and as a model of the hub it is not wholly in the cache"
    if constants.is_offline_mode():
        command = command or f"distill fetch {model}"
        return f"{missing} while HF_HUB_OFFLINE is set; fetch it with `HF_HUB_OFFLINE=0 {command}`"
    reason = str(error.__cause__ or error).partition("\n")[0]
    return (
        f"{missing} while {constants.ENDPOINT} cannot be reached ({reason}); check the network, HTTPS_PROXY and "
        "HF_ENDPOINT"
    )
