"""Copies a run to a Google Cloud Storage bucket, and back.

A bucket has no rename. So the first object of a copy is `copy.partial`, and the last one is
`copy.json`, which lists the others with their checksums: without it, a copy is unfinished.
"""

import base64
import contextlib
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from jaxlm.checkpoints.copying import Copied, copy_run
from jaxlm.checkpoints.folder import list_steps
from jaxlm.checkpoints.manifest import find_damage
from jaxlm.checkpoints.names import split_step
from jaxlm.errors import FileError, InputError, RunError
from jaxlm.extras import MODULES, needs
from jaxlm.files.durable import crc32c, link
from jaxlm.files.ours import check_ours
from jaxlm.files.publish import published
from jaxlm.files.strict import parse_json
from jaxlm.terminal import prints_lines

PARTIAL, WHOLE = "copy.partial", "copy.json"


class _Copy(TypedDict):
    files: dict[str, list[int]]


@prints_lines
def upload(run: str, dest: str) -> Copied:
    """Copies a run or one step into a bucket, and compares the server's checksums.

    Intact objects of an earlier try are not sent again. A trainer may be training the run: hard
    links beside it keep files that the trainer deletes meanwhile. One process at a time.

    Args:
      run: as `copy_run` takes it.
      dest: such as gs://bucket/path; must be empty, or hold an earlier try of this copy.

    Raises:
      ValueError: as `copy_run` raises, or `dest` holds other objects.
      RuntimeError: the upload was interrupted; the same command resumes it.
    """
    base = Path(split_step(run)[0]).resolve()
    links = base.with_name(f".{base.name}.upload-{zlib.crc32(dest.encode()):08x}")
    with _bucket(dest) as (bucket, root):
        there = _list(bucket, root)
        if there and (WHOLE in there or PARTIAL not in there):
            raise InputError(f"{dest}: found objects, expected none; choose another name")
        check_ours(links)
        shutil.rmtree(links, ignore_errors=True)  # of one that was killed
        try:
            found = copy_run(run, str(links), copy_file=link)
            bucket.blob(root + PARTIAL).upload_from_string("{}")
            paths = [path for path in links.rglob("*") if not path.is_dir()]
            files = {path.relative_to(links).as_posix(): path for path in paths}
            wanted = {name: [path.stat().st_size, crc32c(path)] for name, path in files.items()}
            for name in (name for name, entry in wanted.items() if there.get(name) != entry):
                bucket.blob(root + name).upload_from_filename(files[name], checksum=None)
        finally:
            shutil.rmtree(links, ignore_errors=True)
        there = _list(bucket, root)
        for name in there.keys() - wanted.keys() - {PARTIAL}:  # of the earlier try
            bucket.blob(root + name).delete()
        if wrong := [name for name, entry in wanted.items() if there.get(name) != entry]:
            raise FileError(f"{wrong[0]} is not there as it was sent, and {len(wrong) - 1} more")
        bucket.blob(root + WHOLE).upload_from_string(json.dumps({"files": wanted}))
        bucket.blob(root + PARTIAL).delete()
    return found._replace(folder=dest)


@prints_lines
def download(url: str, dest: str) -> Copied:
    """Downloads a copy from a bucket, verified like any copy: complete, or absent.

    Raises:
      ValueError: there is no complete copy, the copy is damaged, or `dest` exists.
      RuntimeError: the bucket cannot be read, or the disk not written.
    """
    with _bucket(url) as (bucket, root):
        there = _list(bucket, root)
        if WHOLE not in there:
            raise InputError(
                f"{url}: found no {WHOLE}, which is written last: no copy is there, or an "
                "unfinished one, which the command that started it resumes"
            )
        files = parse_json(bucket.blob(root + WHOLE).download_as_bytes(), _Copy)["files"]
        with published(Path(dest)) as partial:
            for name, entry in files.items():
                path = partial / name
                if ".." in PurePosixPath(name).parts or not path.is_relative_to(partial):
                    raise InputError(f"{url}/{WHOLE}: found {name!r}, expected a name inside")
                path.parent.mkdir(parents=True, exist_ok=True)
                if name in there:
                    bucket.blob(root + name).download_to_filename(path, checksum=None)
                if name not in there or [path.stat().st_size, crc32c(path)] != entry:
                    raise InputError(f"{url}/{name}: missing, or not what was sent; none is kept")
            steps = list_steps(partial / "checkpoints")
            if not steps:
                raise InputError(f"{url}: found no checkpoint in the copy; nothing is kept")
            for step in steps:
                if damage := find_damage(partial / "checkpoints" / str(step), contents=False):
                    raise InputError(f"{url}: step {step}: {damage[0]}; nothing is kept")
    return Copied(dest, steps, [], {})


@contextlib.contextmanager
def _bucket(url: str) -> Iterator[tuple[Any, str]]:
    # The bucket, and the prefix of its object names.
    storage = needs(MODULES["gcs"], f"a copy in {url}")
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    name, _, path = url.removeprefix("gs://").partition("/")
    if not (name and path.strip("/")):
        raise InputError(f"{url}: expected gs://BUCKET/PATH, a path for the copy")
    try:
        yield storage.Client().bucket(name), path.rstrip("/") + "/"
    except (OSError, GoogleAPIError, GoogleAuthError) as error:
        raise RunError(
            f"{url}: the copy was cut short ({error}); look at the bucket, the disk and the "
            "sign-in (`gcloud auth application-default login`); the same command resumes"
        ) from error


def _list(bucket: Any, root: str) -> dict[str, list[int]]:
    # Name -> size and checksum of the stored object, computed by the server.
    return {
        found.name.removeprefix(root): [
            found.size,
            int.from_bytes(base64.b64decode(found.crc32c), "big"),
        ]
        for found in bucket.list_blobs(prefix=root)
    }
