"""A copy in a bucket is whole or known to be unfinished, and comes back to the byte."""

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import text_run
from gcp_storage_emulator.server import create_server
from google.cloud import storage
from google.cloud.storage import Blob
from test_copying import files

from jaxlm import __main__ as cli
from jaxlm.checkpoints import bucket as buckets
from jaxlm.checkpoints.bucket import PARTIAL, WHOLE, download, upload
from jaxlm.checkpoints.folder import list_steps
from jaxlm.files.ours import MARKER
from jaxlm.launch import run_main

URL, ROOT = "gs://bucket/backup/tiny", "backup/tiny/"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logging.getLogger("gcp_storage_emulator").setLevel(logging.WARNING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        server.start()
        yield server
        server.stop()


@pytest.fixture
def store(server: Any) -> Any:
    """An emulated bucket, empty."""
    server.wipe(keep_buckets=True)
    return storage.Client().bucket("bucket")


@pytest.fixture
def run(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(own_home)
    return Path(text_run.RUN)


def names(store: Any) -> set[str]:
    return {found.name.removeprefix(ROOT) for found in store.list_blobs(prefix=ROOT)}


def objects(store: Any) -> dict[str, bytes]:
    return {name: store.blob(ROOT + name).download_as_bytes() for name in names(store)}


def is_like(copy: Path, run: Path) -> bool:
    """All but the config, which says where the checkpoints are."""
    wanted = {n: d for n, d in files(run).items() if n.endswith(".jsonl") or "/" in n}
    found = {n: d for n, d in files(copy).items() if n not in ("config.json", MARKER)}
    assert len(wanted) > 30
    return found == wanted


def test_there_and_back(store: Any, run: Path, capsys: pytest.CaptureFixture) -> None:
    before = files(Path())
    assert cli.command(["checkpoints", "copy", str(run), URL]) == 0
    assert f"copied to {URL}, and verified there: 4, 8, 12" in capsys.readouterr().out
    assert WHOLE in names(store) and PARTIAL not in names(store)
    assert files(Path()) == before  # no link is left
    assert cli.command(["checkpoints", "copy", URL, "back"]) == 0
    assert is_like(Path("back"), run)
    assert cli.command(["checkpoints", "diff", "back", str(run)]) == 0
    for args in ((str(run), URL), (URL, "back")):  # neither replaces what is there
        assert run_main(lambda args=args: cli.command(["checkpoints", "copy", *args])) == 1
    assert is_like(Path("back"), run)


@pytest.mark.slow
def test_one_step_without_one_that_is_damaged(store: Any, run: Path) -> None:
    text_run.damage(run / "checkpoints" / "4")
    assert upload(f"{run}@best", URL).steps == [8]
    assert download(URL, "back").steps == [8] == list_steps(Path("back/checkpoints"))
    other = upload(str(run), f"{URL}-2")
    assert other.steps == [8, 12] and list(other.damaged) == [4]


class Killed(BaseException):
    """Takes the place of a kill: nothing catches it."""


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Ends the process, so to speak, at the n-th change of the bucket, before or in the middle."""
    left = {"changes": -1, "made": 0}

    def limit(name: str) -> None:
        change = getattr(Blob, name)

        def limited(self: Any, *args: Any, **options: Any) -> Any:
            left["changes"] -= 1
            if left["changes"] == 0:
                raise Killed
            left["made"] += 1
            return change(self, *args, **options)

        monkeypatch.setattr(Blob, name, limited)

    for name in ("upload_from_filename", "upload_from_string", "delete"):
        limit(name)
    # A kill cleans nothing up.
    monkeypatch.setattr(buckets.shutil, "rmtree", _unless_killed(left, shutil.rmtree))
    yield left


def _unless_killed(left: dict[str, int], rmtree: Any) -> Any:
    return lambda *args, **options: None if left["changes"] == 0 else rmtree(*args, **options)


@pytest.mark.slow
def test_killed_at_any_instant_it_is_unfinished_and_then_whole(
    server: Any, store: Any, run: Path, dying: dict[str, int]
) -> None:
    shutil.rmtree(run / "checkpoints" / "4")
    upload(str(run), f"{URL}-first")
    num_changes = dying["made"]
    assert num_changes > 30
    for number in sorted({*range(1, 4), *range(4, num_changes, 20), num_changes - 1, num_changes}):
        server.wipe(keep_buckets=True)
        dying["changes"] = number
        with pytest.raises(Killed):
            upload(str(run), URL)
        dying["changes"] = -1
        assert (WHOLE in names(store)) == (number == num_changes)
        if number == num_changes:  # only copy.partial was still to go
            assert download(URL, f"back-{number}").steps == [8, 12]
            continue
        with pytest.raises(ValueError, match="found no copy.json, which is written last"):
            download(URL, f"back-{number}")
        dying["made"] = 0
        upload(str(run), URL)
        assert dying["made"] <= num_changes - max(number - 2, 0)  # what was sent is not sent again
        assert download(URL, f"back-{number}").steps == [8, 12]
        assert is_like(Path(f"back-{number}"), run)


@pytest.mark.slow
def test_what_a_trainer_deletes_meanwhile_is_in_the_copy(
    store: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, send = Path(shutil.copytree(run, "kept")), Blob.upload_from_filename

    def put(self: Any, *args: Any, **options: Any) -> Any:
        shutil.rmtree(run / "checkpoints" / "4", ignore_errors=True)
        return send(self, *args, **options)

    monkeypatch.setattr(Blob, "upload_from_filename", put)
    assert upload(str(run), URL).steps == [4, 8, 12]
    assert not (run / "checkpoints" / "4").exists()
    download(URL, "back")
    assert is_like(Path("back"), kept)


@pytest.mark.slow
def test_what_an_earlier_try_sent_and_is_gone_from_the_run_goes(
    store: Any, run: Path, dying: dict[str, int]
) -> None:
    dying["changes"] = 20
    with pytest.raises(Killed):
        upload(str(run), URL)
    dying["changes"] = -1
    step = next(name for name in names(store) if name.count("/") > 1).split("/")[1]
    shutil.rmtree(run / "checkpoints" / step)
    upload(str(run), URL)
    assert not any(name.startswith(f"checkpoints/{step}/") for name in names(store))
    download(URL, "back")
    assert is_like(Path("back"), run)


def test_bits_that_flip_on_the_way_are_found(
    store: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "checkpoints" / "4")
    send = Blob.upload_from_filename

    def put(self: Any, source: Path, **options: Any) -> Any:
        if self.name.endswith("12/manifest.json"):
            Path("other").write_bytes(source.read_bytes().replace(b"1", b"2", 1))
            source = Path("other")
        return send(self, source, **options)

    monkeypatch.setattr(Blob, "upload_from_filename", put)
    with pytest.raises(RuntimeError, match="12/manifest.json is not there as it was sent"):
        upload(str(run), URL)
    assert WHOLE not in names(store)
    monkeypatch.setattr(Blob, "upload_from_filename", send)
    upload(str(run), URL)
    download(URL, "back")
    assert is_like(Path("back"), run)


@pytest.mark.parametrize("kind", ["flipped", "missing"])
def test_damage_in_the_bucket_is_found_on_the_way_back(store: Any, run: Path, kind: str) -> None:
    upload(f"{run}@8", URL)
    name = next(name for name in names(store) if name.startswith("checkpoints/8/params/"))
    blob = store.blob(ROOT + name)
    if kind == "missing":
        blob.delete()
    else:
        content = bytearray(blob.download_as_bytes())
        content[len(content) // 2] ^= 1
        blob.upload_from_string(bytes(content))
    with pytest.raises(ValueError, match="missing, or not what was sent"):
        download(URL, "back")
    assert [name for name in os.listdir() if "back" in name] == []


def test_refusals(store: Any, run: Path) -> None:
    store.blob(f"{ROOT}of_others").upload_from_string("1")
    before = objects(store)
    with pytest.raises(ValueError, match="found objects, expected none"):
        upload(str(run), URL)
    with pytest.raises(ValueError, match="found no checkpoints"):
        upload("runs/none", f"{URL}-2")
    with pytest.raises(ValueError, match=r"found no copy\.json"):
        download(URL, "back")
    with pytest.raises(RuntimeError, match="gs://no-such/x: the copy was cut short"):
        upload(str(run), "gs://no-such/x")
    assert objects(store) == before and not list(Path("runs").glob(".*"))
    store.blob(ROOT + WHOLE).upload_from_string('{"files": {"../out": [1, 2]}}')
    with pytest.raises(ValueError, match="expected a name inside"):
        download(URL, "back")
