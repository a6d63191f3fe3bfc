"""Uploading a finished run to the Hugging Face Hub."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, exported when asked for

from svft_diffusion.errors import UserError
from svft_diffusion.files.training_folder import ADAPTER_FILE, METRICS_FILE
from svft_diffusion.training.card import CARD_FILE
from svft_diffusion.training.config import TrainingConfig
from svft_diffusion.training.metrics import FREEZING_FILE

# All else in the folder may be private: settings name folders of this machine, logs its name, and photos may lie there.
_SHARED_FILES = (ADAPTER_FILE, CARD_FILE, METRICS_FILE, FREEZING_FILE)
# OSError, and what the HTTP library raises that this version of huggingface_hub uses.
_FAILURES = cast(tuple[type[Exception], ...], (LocalTokenNotFoundError, *HfHubHTTPError.__bases__))
_LONGEST_REASON = 300  # letters of what the Hub says


def check_upload(config: TrainingConfig) -> None:
    """Refuse an upload that can't work, before anything is trained for it. The Hub is not asked.

    Raises:
        UserError: no repository can have the name, or nobody is logged in.
    """
    if not config.push_to_hub:
        return
    try:
        validate_repo_id(_repository_name(config))
    except HFValidationError as problem:
        raise UserError(f"--push_to_hub: {_one_line(problem)}; give another --hub_model_id") from problem
    if not config.hub_token and get_token() is None:
        raise UserError("--push_to_hub: not logged in to the Hugging Face Hub; run `hf auth login`")


def push_to_hub(config: TrainingConfig, samples: Sequence[Path]) -> str:
    """Upload adapter, card, the ``samples`` that it shows, and metrics; return the repository's name.

    Raises:
        UserError: not logged in, or the Hub refuses or can't be reached.
    """
    pictures = [sample.relative_to(config.output_dir).as_posix() for sample in samples]
    try:
        api = HfApi(token=config.hub_token or None)
        repository: str = api.create_repo(
            _repository_name(config), private=config.hub_private_repo, exist_ok=True
        ).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=config.output_dir,
            commit_message="Adapter",
            allow_patterns=[*_SHARED_FILES, *pictures],
        )
    except _FAILURES as problem:
        reason = _without_token(_reason(problem), config.hub_token or get_token())
        raise UserError(f"the adapter is saved in {config.output_dir}, but the upload failed: {reason}") from problem
    return repository


def _repository_name(config: TrainingConfig) -> str:
    return config.hub_model_id or config.output_dir.absolute().name


def _reason(problem: BaseException) -> str:
    """One line with the remedy."""
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, LocalTokenNotFoundError) or status == 401:
        return f"the Hub does not know you ({_one_line(problem)}); run `hf auth login`"
    if isinstance(problem, GatedRepoError) or status == 403:
        return f"your token may not write there ({_one_line(problem)}); use one with write access"
    if isinstance(problem, RepositoryNotFoundError) or status == 404:
        return f"no such repository or account ({_one_line(problem)}); check --hub_model_id"
    if isinstance(problem, OfflineModeIsEnabled) or status is None:
        return f"the Hub can't be reached ({_one_line(problem)})"
    return _one_line(problem)


def _one_line(problem: BaseException) -> str:
    return textwrap.shorten(str(problem), _LONGEST_REASON) or type(problem).__name__


def _without_token(text: str, token: str | None) -> str:
    return text.replace(token, "(token)") if token else text
