"""How fast text becomes tokens: ours, and Hugging Face's datasets and datatrove on the same text.

uv run --with datatrove,orjson python benchmarks/prepare_rate.py [--megabytes 100] [--turns 3]

The text is the Python of the installed packages, as .jsonl of one file a document. Each way runs in
processes of its own and ends with token ids on disk; the tokenizer is the same and is trained
before. Prints for each turn wall time (s), its rate, and of all processes of that way together
processor time (s) and peak memory (MiB, shared pages counted once).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import jax

WAYS = {
    "tokenizers alone": "tokenizers",
    "jaxlm": "jaxlm",
    "jaxlm, 2 processes": "jaxlm",
    "datasets, 2 processes": "datasets",
    "datatrove, 2 processes": "datatrove",
}


def main() -> None:
    """Writes the text, and prepares it each way in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--way")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.way:
        globals()[f"by_{args.way}"](args.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = write_text(folder, args.megabytes * 10**6)
        print(f"{num_bytes / 1e6:.1f} MB of text")
        for turn in range(args.turns):
            for label, way in WAYS.items():
                measure(folder, label, way, turn, num_bytes)


def write_text(folder: Path, limit: int) -> int:
    """Writes two files of documents and a tokenizer; returns the bytes of text."""
    from jaxlm.corpus.tokenizer import train_tokenizer

    texts, size = list[str](), 0
    for path in sorted(Path(jax.__file__).parents[1].rglob("*.py")):
        if size < limit and (text := path.read_text("utf-8", "ignore").replace("\0", "")):
            texts.append(text)
            size += len(text.encode())
    for number in range(2):
        rows = (json.dumps({"text": text}) for text in texts[number::2])
        (folder / f"{number}.jsonl").write_text("\n".join(rows))
    train_tokenizer(texts[::20], 8192).save(str(folder / "tokenizer.json"))
    return size


def measure(folder: Path, label: str, way: str, turn: int, num_bytes: int) -> None:
    """Runs one way, by two processes of ours if the label says so."""
    count = 2 if way == "jaxlm" and "2" in label else 1
    out = folder / f"{way}-{count}-{turn}"
    out.mkdir()
    command = [sys.executable, __file__, "--way", way, "--folder", str(out)]
    started_s = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = (folder / "log").open("a")
        running = [subprocess.Popen(command, stdout=log, stderr=log) for _ in range(count)]
        os._exit(any([process.wait() for process in running]))
    busy_s, most, status = dict[str, float](), 0, None
    while status is None:
        most = max(most, look(pid, busy_s))
        time.sleep(0.05)
        done, code = os.waitpid(pid, os.WNOHANG)
        status = code if done else None
    wall_s = time.perf_counter() - started_s
    print(
        f"{label}: {wall_s:.1f} s, {num_bytes / wall_s / 1e6:.2f} MB/s, processor "
        f"{sum(busy_s.values()):.1f} s, peak {most / 2**20:.0f} MiB{' FAILED' if status else ''}",
        flush=True,
    )


def look(session: int, busy_s: dict[str, float]) -> int:
    """Notes the processor time of each process of a session; returns their memory (bytes)."""
    num_bytes = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # one that has just ended
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks = int(fields[11]) + int(fields[12])
                busy_s[entry.name] = ticks / os.sysconf("SC_CLK_TCK")
                shares = (entry / "smaps_rollup").read_text()
                num_bytes += int(shares.partition("Pss:")[2].split()[0]) * 1024
    return num_bytes


def by_tokenizers(out: Path) -> None:
    """The library that the others call, on text in memory; nothing is written."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out.parent / "tokenizer.json"))
    for path in sorted(out.parent.glob("*.jsonl")):
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for start in range(0, len(texts), 500):
            tokenizer.encode_batch_fast(texts[start : start + 500], add_special_tokens=False)


def by_jaxlm(out: Path) -> None:
    """Ours."""
    from jaxlm.config import DataConfig
    from jaxlm.corpus.prepared import find_or_make

    config = DataConfig(
        source=f"text:{out.parent}/*.jsonl",
        tokenizer=str(out.parent / "tokenizer.json"),
        cache_dir=str(out),
    )
    find_or_make(config, vocab_size=8192, limits=[10**10])


def by_datasets(out: Path) -> None:
    """As in the scripts of transformers: `map` of batches, then arrow on disk."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from datasets import load_dataset
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out.parent / "tokenizer.json"))
    files = [str(path) for path in sorted(out.parent.glob("*.jsonl"))]
    texts = load_dataset("json", data_files=files, split="train", cache_dir=str(out / "cache"))

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"input_ids": [[*of.ids, 0] for of in found]}

    tokens = texts.map(encode, batched=True, num_proc=2, remove_columns=["text"])
    tokens.save_to_disk(str(out / "tokens"))


def by_datatrove(out: Path) -> None:
    """Its tokenizer step, a task a file."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # By name, for a type checker without the package.
    executor: Any = resolve_name("datatrove.executor:LocalPipelineExecutor")
    reader: Any = resolve_name("datatrove.pipeline.readers:JsonlReader")
    writer: Any = resolve_name("datatrove.pipeline.tokens:DocumentTokenizer")
    texts = out / "texts"
    texts.mkdir()
    for path in out.parent.glob("*.jsonl"):
        (texts / path.name).symlink_to(path)
    executor(
        pipeline=[
            reader(str(texts)),
            writer(
                str(out / "tokens"),
                tokenizer_name_or_path=str(out.parent / "tokenizer.json"),
                eos_token="<|endoftext|>",
                shuffle_documents=False,
            ),
        ],
        tasks=2,
        workers=2,
        logging_dir=str(out / "logs"),
    ).run()


if __name__ == "__main__":
    main()
