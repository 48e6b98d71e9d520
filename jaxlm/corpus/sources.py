"""Opens the source that `data.source` names, of those in files.py and remote.py."""

import pkgutil

from jaxlm.config import DataConfig
from jaxlm.corpus.files import Source

# Kind of source -> module:function. Imported on demand: most runs need no package of a remote one.
_SOURCES = {
    "embedded": "jaxlm.corpus.files:embedded",
    "text": "jaxlm.corpus.files:text_files",
    "tokens": "jaxlm.corpus.tokens:refuse_text",
    "hf": "jaxlm.corpus.remote:hugging_face",
    "tfds": "jaxlm.corpus.remote:tfds",
    "tfds_dir": "jaxlm.corpus.remote:tfds",
}


def open_source(config: DataConfig) -> Source:
    """The source named by `config.source`; a remote one is not contacted yet.

    Raises:
      FileNotFoundError: no such file or folder.
      ImportError: the package of the source is not installed.
    """
    kind = config.source.partition(":")[0]
    return pkgutil.resolve_name(_SOURCES[kind])(config)
