"""Text and tokenizers from elsewhere: the Hugging Face Hub and TFDS.

Without a network, their libraries wait for minutes before they fail. So each use of it is
preceded by a probe, and none happens unless the source is remote and not yet prepared.
"""

import functools
import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from jaxlm.data.files import files_revision, text_of
from jaxlm.extras import needs

_PROBE_S = 5.0


class HuggingFace:
    """A dataset of the Hugging Face Hub, or a local folder laid out like one, streamed."""

    def __init__(self, spec: str, split: str, field: str) -> None:
        self.name = self.key = f"hf:{spec}"
        repo, _, self._config = spec.partition(":")
        self._repo, self._split, self._field = os.path.expanduser(repo), split, field
        self._local = os.path.isdir(self._repo)
        if self._local:
            self.key = _folder_revision(self._repo)

    @property
    def revision(self) -> str:
        """The commit of the dataset; for a folder, a hash of its listing."""
        return self.key if self._local else self._commit

    @functools.cached_property
    def _commit(self) -> str:
        _require_hub(f"data.source {self.name}", "give a local folder, as hf:FOLDER")
        try:
            return str(huggingface_hub.HfApi().dataset_info(self._repo, timeout=10).sha)
        except HfHubHTTPError as error:
            raise _not_on_hub(f"data.source {self.name}", error) from error

    def documents(self, start: int = 0) -> Iterator[str]:
        """The rows, as they arrive; a seek is as fast as the library's."""
        datasets = needs("datasets", f"data.source {self.name}")
        rows = datasets.load_dataset(
            self._repo,
            self._config or None,
            split=self._split,
            streaming=True,
            revision=None if self._local else self._commit,
        )
        for index, row in enumerate(rows.skip(start) if start else rows, start):
            yield text_of(row, self._field, f"{self.name} row {index}")


class Tfds:
    """A TensorFlow dataset by its name, or a folder that holds a prepared one; no TensorFlow."""

    def __init__(self, kind: str, spec: str, split: str, field: str) -> None:
        self.name = self.key = f"{kind}:{spec}"
        self._folder = os.path.expanduser(spec) if kind == "tfds_dir" else None
        self._spec, self._split, self._field = spec, split, field
        if self._folder is not None:
            if not os.path.isfile(os.path.join(self._folder, "dataset_info.json")):
                raise FileNotFoundError(
                    f"data.source {self.name}: no dataset_info.json there; expected the folder "
                    "of one version, such as DATA_DIR/NAME/1.0.0"
                )
            self.key = _folder_revision(self._folder)

    @functools.cached_property
    def _builder(self) -> Any:
        what = f"data.source {self.name}"
        tfds = needs("tensorflow_datasets", what)
        if self._folder is not None:
            return tfds.builder_from_directory(self._folder)
        needs("tensorflow_datasets.text", what)  # It registers c4 and wiki40b.
        elsewhere = "prepare it where that is to be had, and give the folder, as tfds_dir:FOLDER"
        builder = tfds.builder(self._spec, file_format="array_record")
        if not builder.data_path.exists():
            require_network("https://storage.googleapis.com", what, elsewhere)
            try:
                builder.download_and_prepare()
            except ImportError as error:
                raise ImportError(
                    f"{what}: TFDS prepares it with TensorFlow ({error}): `pip install "
                    f"tensorflow`, or {elsewhere}"
                ) from error
        return builder

    @property
    def revision(self) -> str:
        """Name and version of the dataset; for a folder, a hash of its listing too."""
        return f"{self._builder.info.full_name} {self.key}"

    def documents(self, start: int = 0) -> Iterator[str]:
        """The rows by their index, so that a seek costs nothing."""
        rows = self._builder.as_data_source(split=self._split)
        for index in range(start, len(rows)):
            yield text_of(rows[index], self._field, f"{self.name} row {index}")


def download_tokenizer(name: str) -> Path:
    """The tokenizer.json of a name on the Hub: as it was when first used, if it was.

    Raises:
      FileNotFoundError: the Hub has none that we may read.
      ConnectionError: the Hub cannot be reached.
    """
    cached = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json")
    if isinstance(cached, str):
        return Path(cached)
    what = f"data.tokenizer {name}"
    _require_hub(what, "give the path of a tokenizer.json, or train")
    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))
    except HfHubHTTPError as error:
        raise _not_on_hub(what, error) from error


def _folder_revision(folder: str) -> str:
    return files_revision(sorted(str(path) for path in Path(folder).rglob("*") if path.is_file()))


def _not_on_hub(what: str, error: HfHubHTTPError) -> FileNotFoundError:
    return FileNotFoundError(
        f"{what}: not found at {constants.ENDPOINT} ({error}); check the name, and "
        "log in if it is gated (`hf auth login`)"
    )


def _require_hub(what: str, instead: str) -> None:
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(
            f"{what}: HF_HUB_OFFLINE forbids to look it up; unset it, or {instead}"
        )
    require_network(constants.ENDPOINT, what, instead)


def require_network(url: str, what: str, instead: str) -> None:
    """Makes sure, within seconds, that a server answers, whatever it answers.

    Raises:
      ConnectionError: it does not.
    """
    problem = [f"no answer within {_PROBE_S:g} s"]

    def probe() -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, method="HEAD"), timeout=_PROBE_S
            ):
                problem.clear()
        except urllib.error.HTTPError as answer:
            answer.close()
            problem.clear()
        except (OSError, http.client.HTTPException) as error:
            problem[:] = [str(error)]

    # A thread, since the look-up of a host name knows no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_S)
    if problem:
        raise ConnectionError(f"{what}: cannot reach {url} ({problem[0]}); {instead}")
