"""A prepared dataset in a few lines, to be looked at before a long run."""

from collections.abc import Sequence
from typing import TypedDict

from jaxlm.corpus.overlap import count_leaks
from jaxlm.corpus.tokenizer import load_tokenizer
from jaxlm.data.dataset import MANIFEST, Dataset
from jaxlm.data.shards import TokenShards
from jaxlm.files.strict import read_json
from jaxlm.terminal import progress

_WINDOW_TOKENS = 48
_MAX_CHARS = 300


class _Counts(TypedDict):
    documents: dict[str, int]


def overview(name: str, dataset: Dataset, training: Sequence[TokenShards]) -> list[str]:
    """Tokens, documents, leaks into `training`, and the first and last text of a dataset."""
    documents = read_json(dataset.directory / MANIFEST, _Counts)["documents"]
    bytes_per_token = dataset.eval_bytes / max(dataset.eval.num_tokens - 1, 1)
    lines = [
        f"{name}: {dataset.train.num_tokens:,} training tokens in {documents['train']:,} "
        f"documents, {dataset.eval.num_tokens:,} held out in {documents['eval']:,}, in "
        f"{dataset.directory}",
        f"  {bytes_per_token:.2f} bytes per token (held-out text)",
    ]
    dropped = {kind: documents.get(kind, 0) for kind in ("empty", "duplicate")}
    if total := sum(dropped.values()):
        which = " and ".join(f"{count:,} {kind}" for kind, count in dropped.items() if count)
        lines.append(
            f"  dropped: {which} documents ({total / sum(documents.values()):.1%} of those read)"
        )
    with progress("Looking for held-out text in the training tokens", 1) as advance:
        leaks = count_leaks(dataset.eval, training, dataset.eos_id, advance)
    if leaks.num_documents:
        lines.append(
            f"  ⚠ {leaks.num_documents:,} of {leaks.of_documents:,} held-out documents have half "
            "or more of their text in the training tokens of the run: their loss says little. In a "
            "new run, --data.drop_duplicates removes exact copies within a source"
        )
    tokenizer = load_tokenizer(dataset.tokenizer_path)

    def text(tokens: TokenShards, start: int) -> str:
        stop = min(start + _WINDOW_TOKENS, tokens.num_tokens)
        ids = tokens.read(max(start, 0), stop).tolist()
        return repr(tokenizer.decode(ids, skip_special_tokens=False)[:_MAX_CHARS])

    for split, tokens in {"training": dataset.train, "held out": dataset.eval}.items():
        if tokens.num_tokens:
            lines.append(f"  {split}, first: {text(tokens, 0)}")
            lines.append(f"  {split}, last: {text(tokens, tokens.num_tokens - _WINDOW_TOKENS)}")
    return lines
