"""Where text comes from: an iterator of documents in a fixed order."""

from jaxlm.config import DataConfig
from jaxlm.data import files
from jaxlm.data.files import Source


def open_source(config: DataConfig) -> Source:
    """The source that `config.source` names; a remote one is not contacted yet.

    Raises:
      FileNotFoundError: no such file or folder.
      ImportError: the package of the source is not installed.
    """
    kind, _, rest = config.source.partition(":")
    if kind == "embedded":
        return files.embedded()
    if kind == "text":
        return files.text_files(rest, config.text_field)
    from jaxlm.data import remote  # Most runs need no network, and never import this.

    if kind == "hf":
        return remote.hugging_face(rest, config.split, config.text_field)
    return remote.tfds(kind, rest, config.split, config.text_field)
