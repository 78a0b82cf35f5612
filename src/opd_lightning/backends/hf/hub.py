"""Put a written model folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


def check_hub(name: str) -> None:
    """See that the hub can be written to, before anything is made for it.

    Args:
        name: Repository such as "me/my-student".

    Raises:
        ValueError: It cannot be a repository's name, or nobody is logged in.
        OSError: The hub cannot be reached, or does not accept the token.
    """
    try:
        validate_repo_id(name)
        HfApi().whoami()
    except HFValidationError as error:
        raise ValueError(f"push_to_hub: {error} Expected a repository such as me/my-student.") from error
    except LocalTokenNotFoundError as error:
        raise ValueError("push_to_hub: nobody is logged in here. Run `hf auth login`, or set HF_TOKEN.") from error
    except HTTPError as error:
        raise OSError(f"push_to_hub: the hub cannot be asked who is logged in: {error}") from error


def push_folder(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder as one commit; the repository is made if there is none.

    Args:
        folder: What to upload.
        name: Repository such as "me/my-student".
        private: Whether a new repository is private; an existing one stays as it is.

    Returns:
        The address of the repository.

    Raises:
        OSError: The hub refuses, or the connection breaks.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Student trained with opd_lightning")
    except HTTPError as error:
        raise OSError(
            f"push_to_hub: {name} could not be written: {error} The model is whole in {str(folder)!r}; to try again:"
            f" hf upload {name} {folder}"
        ) from error
    return str(address)
