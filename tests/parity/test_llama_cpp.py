"""llama.cpp makes the same tokens of an export; it has to be there (see CONTRIBUTING.md)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import text_run
from test_interchange import MODELS

from jaxlm.inference.load import load_model
from jaxlm.interchange.export import export

FOLDER = os.environ.get("JAXLM_LLAMA_CPP", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="needs llama.cpp in the folder $JAXLM_LLAMA_CPP"),
]
PROMPT, NUM_NEW = [5, 17, 42, 7, 99], 16
GREEDY = """
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
const [modelPath, prompt, count] = process.argv.slice(2);
const options = {gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 1};
const model = await (await getLlama(options)).loadModel({modelPath});
const sequence = (await model.createContext({contextSize: 128})).getSequence();
const found = [];
for await (const token of sequence.evaluate(JSON.parse(prompt), {temperature: 0})) {
    found.push(token);
    if (found.length === Number(count)) break;
}
console.log(JSON.stringify(found));
process.exit(0);
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converter, which comes with the program."""
    folder = tmp_path_factory.mktemp("llama.cpp") / "source"
    bundle = Path(FOLDER) / "node_modules/node-llama-cpp/llama/gitRelease.bundle"
    subprocess.run(["git", "clone", "--quiet", bundle, folder], check=True)
    return folder


def convert(source: Path, exported: Path, gguf: Path) -> None:
    """As docs/interchange.md says."""
    page = (text_run.REPO / "docs/interchange.md").read_text()
    (command,) = re.findall(r'^python -c "import conversion[^`]+', page, re.M)
    command = command.replace("exported/tiny", str(exported)).replace("tiny.gguf", str(gguf))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PYTHONPATH": f"gguf-py:{os.environ.get('PYTHONPATH', '')}", "PATH": path}
    done = subprocess.run(command, shell=True, cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_greedy_tokens(source: Path, kind: str, tmp_path: Path):
    text_run.save_model(tmp_path / "run", MODELS[kind])
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    model, _ = load_model(str(tmp_path / "run"))
    tokens = list(PROMPT)
    for _ in range(NUM_NEW):
        logits_V = np.asarray(model(np.array([tokens], np.int32)))[0, -1]
        tokens.append(int(logits_V.argmax()))
    ours = tokens[len(PROMPT) :]
    assert len(set(ours)) >= 3

    convert(source, tmp_path / "out", tmp_path / "model.gguf")
    script = Path(FOLDER) / "greedy.mjs"  # beside the package that it imports
    script.write_text(GREEDY)
    command = ["node", str(script), str(tmp_path / "model.gguf"), json.dumps(PROMPT), str(NUM_NEW)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ours
