"""Where text comes from: an iterator of documents in a fixed order."""

from collections.abc import Iterator
from typing import Protocol

from jaxlm.config import DataConfig
from jaxlm.data.files import Embedded, TextFiles


class Source(Protocol):
    """A corpus."""

    name: str
    """What the user asked for."""
    key: str
    """Tells corpora apart without a network; for what is on this machine, it is the revision."""

    @property
    def revision(self) -> str:
        """Identity of the content; a remote source looks it up."""
        ...

    def documents(self, start: int = 0) -> Iterator[str]:
        """The documents from number `start` on, in an order that is always the same."""
        ...


def open_source(config: DataConfig) -> Source:
    """The source that `config.source` names; a remote one is not contacted yet.

    Raises:
      FileNotFoundError: no such file or folder.
      ImportError: the package of the source is not installed.
    """
    kind, _, rest = config.source.partition(":")
    if kind == "embedded":
        return Embedded()
    if kind == "text":
        return TextFiles(rest, config.text_field)
    from jaxlm.data import remote  # Most runs need no network, and never import this.

    if kind == "hf":
        return remote.HuggingFace(rest, config.split, config.text_field)
    return remote.Tfds(kind, rest, config.split, config.text_field)
