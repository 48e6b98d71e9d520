"""Text and tokenizers from the Hugging Face Hub and TFDS.

Without a network, their libraries wait for minutes before they fail. So a probe precedes each use
of the network, which happens only for a remote source that is not prepared yet.
"""

import contextlib
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
import numpy as np
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from jaxlm.config import DataConfig
from jaxlm.corpus.files import Document, Source, document_of, files_revision
from jaxlm.corpus.formats import text_of
from jaxlm.corpus.stores import describe
from jaxlm.data.order import permute
from jaxlm.errors import MissingFileError, MissingPackageError, NoConnectionError
from jaxlm.extras import needs
from jaxlm.files.durable import expand

_PROBE_S = 5.0
_BATCH_ROWS = 256


def hugging_face(data: DataConfig) -> Source:
    """A dataset of the Hugging Face Hub, or a local folder laid out like one, streamed.

    Its revision is the commit; for a folder, a hash of its listing.
    """
    name = data.source
    repo, _, config = name.partition(":")[2].partition(":")
    repo = expand(repo, "data.source")
    local = os.path.isdir(repo)

    @functools.cache
    def commit() -> str:
        with _hub(f"data.source {name}", "give a local folder, as hf:FOLDER"):
            return str(huggingface_hub.HfApi().dataset_info(repo, timeout=10).sha)

    def documents(start: int) -> Iterator[Document]:
        datasets = needs("datasets", f"data.source {name}")
        revision = None if local else commit()
        rows = datasets.load_dataset(
            repo, config or None, split=data.split, streaming=True, revision=revision
        )
        # Files in a shuffled order and in turns: the first documents are a sample. The rows of a
        # file keep their order, since a buffer of several would have to be read ahead.
        rows = rows.shuffle(seed=0, buffer_size=1)
        for index, row in enumerate(rows.skip(start), start):
            yield document_of(text_of(row, data.text_field, f"{name} row {index}"), name)

    key = _folder_revision(repo) if local else name
    return Source(name, key, documents, look_up=None if local else commit)


def tfds(data: DataConfig) -> Source:
    """A TensorFlow dataset by its name, or a folder that holds a prepared one; no TensorFlow.

    Its revision is name and version of the dataset; for a folder, a hash of its listing too.

    Raises:
      FileNotFoundError: there is no prepared dataset in the folder.
    """
    name = key = data.source
    kind, _, spec = name.partition(":")
    folder = expand(spec, "data.source") if kind == "tfds_dir" else None
    if folder is not None:
        if not os.path.isfile(os.path.join(folder, "dataset_info.json")):
            raise MissingFileError(
                f"data.source {name}: no dataset_info.json there; expected the folder "
                "of one version, such as DATA_DIR/NAME/1.0.0"
            )
        key = _folder_revision(folder)

    @functools.cache
    def builder() -> Any:
        library = needs("tensorflow_datasets", f"data.source {name}")
        if folder is not None:
            return library.builder_from_directory(folder)
        return _prepared_builder(library, spec, f"data.source {name}")

    def documents(start: int) -> Iterator[Document]:
        rows = builder().as_data_source(split=data.split)
        for first in range(start, len(rows), _BATCH_ROWS):
            places = np.arange(first, min(first + _BATCH_ROWS, len(rows)))
            # Shuffled: the first documents are a sample of all.
            for index in map(int, permute(places, len(rows), seed=0, epoch=0)):
                text = text_of(rows[index], data.text_field, f"{name} row {index}")
                yield document_of(text, name)

    return Source(name, key, documents, look_up=lambda: f"{builder().info.full_name} {key}")


def _prepared_builder(library: Any, name: str, what: str) -> Any:
    needs("tensorflow_datasets.text", what)  # It registers c4 and wiki40b.
    elsewhere = "prepare it on a machine with network and TensorFlow, then give tfds_dir:FOLDER"
    builder = library.builder(name, file_format="array_record")
    if not builder.data_path.exists():
        require_network("https://storage.googleapis.com", what, elsewhere)
        try:
            builder.download_and_prepare()
        except ImportError as error:
            raise MissingPackageError(
                f"{what}: TFDS prepares it with TensorFlow ({error}): `pip install "
                f"tensorflow`, or {elsewhere}"
            ) from error
    return builder


def download_tokenizer(name: str) -> Path:
    """The tokenizer.json of a name on the Hub; a cached one is not updated.

    Raises:
      FileNotFoundError: the Hub has no such file that we may read.
      ConnectionError: the Hub cannot be reached.
    """
    cached = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json")
    if isinstance(cached, str):
        return Path(cached)
    with _hub(f"data.tokenizer {name}", "give the path of a tokenizer.json, or train"):
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json"))


def _folder_revision(folder: str) -> str:
    paths = sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())
    return files_revision(map(describe, paths))


@contextlib.contextmanager
def _hub(what: str, instead: str) -> Iterator[None]:
    if constants.HF_HUB_OFFLINE:
        raise NoConnectionError(
            f"{what}: HF_HUB_OFFLINE forbids to look it up; unset it, or {instead}"
        )
    require_network(constants.ENDPOINT, what, instead)
    try:
        yield
    except HfHubHTTPError as error:
        raise MissingFileError(
            f"{what}: not found at {constants.ENDPOINT} ({error}); check the name, and "
            "log in if it is gated (`hf auth login`)"
        ) from error


def require_network(url: str, what: str, instead: str) -> None:
    """Checks, within seconds, that a server responds, with any status.

    Raises:
      ConnectionError: no response.
    """
    request = urllib.request.Request(url, method="HEAD")
    problem = None

    def probe() -> None:
        nonlocal problem
        try:
            urllib.request.urlopen(request, timeout=_PROBE_S).close()
        except urllib.error.HTTPError as answer:
            answer.close()
        except (OSError, http.client.HTTPException) as error:
            problem = error

    # In a thread, since the look-up of a host name has no timeout.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_S)
    if problem or thread.is_alive():
        problem = problem or f"no answer within {_PROBE_S:g} s"
        raise NoConnectionError(f"{what}: cannot reach {url} ({problem}); {instead}")
