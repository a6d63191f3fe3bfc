"""Uploading a finished run to the Hugging Face Hub."""

from __future__ import annotations

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from svft_diffusion.errors import UserError
from svft_diffusion.training.card import CONFIG_FILE
from svft_diffusion.training.config import TrainingConfig


def push_to_hub(config: TrainingConfig) -> str:
    """Upload adapter, card, samples and metrics, and return the repository's name.

    Raises:
        UserError: not logged in, or the Hub refuses.
    """
    api = HfApi(token=config.hub_token)
    name = config.hub_model_id or config.output_dir.absolute().name
    try:
        repository: str = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=config.output_dir,
            commit_message="Adapter",
            # config.yaml names folders of this machine; the card has the settings that matter to others.
            ignore_patterns=["checkpoint-*", ".*", CONFIG_FILE, f"{config.logging_dir.as_posix()}/*"],
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as problem:
        reason = str(problem).strip().splitlines()[0]
        raise UserError(
            f"the adapter is saved in {config.output_dir}, but the upload failed: {reason} (run `hf auth login`)"
        ) from problem
    return repository
