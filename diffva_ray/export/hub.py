"""Uploads an export to the Hugging Face Hub."""

from __future__ import annotations

from diffva_ray.data.dataset import UnusableData
from diffva_ray.progress import one_line
from diffva_ray.storage.store import StoreError


def push(folder: str, name: str) -> str:
    """Upload the local folder of a complete export to the data set ``name`` (ORG/NAME), which is created as a private
    one; returns its address.

    Raises UnusableData for a refused name or login, StoreError where the hub cannot be
    reached. The upload continues when the command is repeated: the hub keeps files that it has."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    # OSError, and the base of the errors of its HTTP client, which depends on the version
    unreachable: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    try:
        api = HfApi(library_name="diffva-ray")
        url = api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=url.repo_id, repo_type="dataset", commit_message="Export of diffva-ray"
        )
    except LocalTokenNotFoundError:
        raise UnusableData(f"--push-to {name}: no login; run hf auth login, or set HF_TOKEN") from None
    except HFValidationError as error:
        raise UnusableData(f"--push-to {name}: {one_line(error, 160)}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise UnusableData(
                f"--push-to {name}: the hub refuses this login ({status}); run hf auth login, or set HF_TOKEN"
            ) from None
        raise StoreError(f"--push-to {name}: {one_line(error, 160)}; repeat the command") from None
    except unreachable as error:
        raise StoreError(f"--push-to {name}: the hub cannot be reached ({one_line(error, 120)})") from None
    return str(url)
