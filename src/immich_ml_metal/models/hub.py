"""Immich's repositories on a model hub: the files of each half, their sizes and digests.

`huggingface_hub` supplies the address (`HF_ENDPOINT`), the token (`HF_TOKEN`, `hf auth login`) and
the metadata; `transfer` brings the bytes.
"""

import json
from typing import TYPE_CHECKING

import httpx2
from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from immich_ml_metal.catalog import ModelSpec
from immich_ml_metal.errors import ModelUnavailable
from immich_ml_metal.models.remote import Listing, RemoteFile
from immich_ml_metal.models.shelf import is_for_us
from immich_ml_metal.models.transfer import Transient, describe_transport, raise_for_status
from immich_ml_metal.types import Part

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling


class Hub:
    """Reads repositories of one organisation at one revision."""

    def __init__(
        self, organization: str, revision: str, endpoint: str | None, timeout_s: float
    ) -> None:
        self._organization = organization
        self._revision = revision
        address = endpoint.rstrip("/") if endpoint else None
        self._api = HfApi(endpoint=address, library_name="immich-ml-metal")
        self._timeout_s = timeout_s

    def list_files(self, spec: ModelSpec, part: Part) -> Listing:
        """The files of one half, pinned to the commit the revision names now.

        Raises:
            Transient: worth another try.
            ModelUnavailable: no such repository or revision, or no access.
        """
        repository = f"{self._organization}/{spec.name}"
        found = self._model_info(repository)
        commit = found.sha or self._revision
        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        files = tuple(
            self._remote_file(sibling, repository, commit, headers)
            for sibling in found.siblings or ()
            if is_for_us(sibling.rfilename, part)
        )
        if not any(file.path == f"{part}/model.onnx" for file in files):
            raise ModelUnavailable(
                f"{self._api.endpoint}/{repository} ({self._revision}) has no {part}/model.onnx"
            )
        return Listing(f"{self._api.endpoint}/{repository}", commit, files)

    def _model_info(self, repository: str) -> "ModelInfo":
        where = f"{self._api.endpoint}/{repository}"
        try:
            return self._api.model_info(
                repository,
                revision=self._revision,
                files_metadata=True,
                timeout=self._timeout_s,
            )
        except OfflineModeIsEnabled as exc:
            raise ModelUnavailable("downloads are switched off (HF_HUB_OFFLINE)") from exc
        except RevisionNotFoundError as exc:
            raise ModelUnavailable(f"{where} has no revision {self._revision!r}") from exc
        except GatedRepoError as exc:
            raise ModelUnavailable(f"{where} is gated; set HF_TOKEN") from exc
        except RepositoryNotFoundError as exc:
            raise ModelUnavailable(
                f"{where} does not exist, or is private and HF_TOKEN is missing or wrong"
            ) from exc
        except HfHubHTTPError as exc:
            raise_for_status(exc.response.status_code, exc.response.headers, where)
            raise Transient(str(exc)) from exc
        except httpx2.RequestError as exc:
            raise Transient(describe_transport(exc)) from exc
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as exc:
            raise Transient(
                f"{self._api.endpoint} does not answer like a model hub (a login page or a proxy?)"
            ) from exc

    def _remote_file(
        self, sibling: "RepoSibling", repository: str, commit: str, headers: dict[str, str]
    ) -> RemoteFile:
        if not (sibling.lfs or sibling.blob_id):
            raise ModelUnavailable(
                f"{self._api.endpoint} lists no digests, so its files cannot be trusted"
            )
        url = hf_hub_url(
            repository, sibling.rfilename, revision=commit, endpoint=self._api.endpoint
        )
        return RemoteFile(
            path=sibling.rfilename,
            url=url,
            size_bytes=sibling.lfs.size if sibling.lfs else sibling.size,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
            git_sha1=None if sibling.lfs else sibling.blob_id,
            headers=headers,
        )
