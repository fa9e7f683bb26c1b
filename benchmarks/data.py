"""A million rows: time and memory until a run has its records, the first time, from the cache of tokenised data, and
where it chooses its lengths by them.

Each start is a process of its own, which reads a file of JSON Lines with short prompts and answers, makes the splits of
a usual run, and then looks at what SFT would train on, row by row. Its time is CPU time, user and system, as a shared
machine changes the time on the clock. Its memory is the peak of the process; that of a start with 100 rows is the
libraries alone. Reading alone is the same file row by row without any meaning.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import main
from benchmarks.results import ROOT, Fact, Result

ROWS, FEW = 1_000_000, 100
WORDS = ("tea", "pot", "cold", "why", "water", "seven", "people", "and", "of", "the", "house", "is", "was", "never")
PROMPT_WORDS, ANSWER_WORDS = (6, 20), (4, 16)

_READ = """
import sys
from rayrlhf.config_data import DatasetConfig
from rayrlhf.data.loading import load_source
print(sum(1 for row in load_source(DatasetConfig(path=sys.argv[1])).train))
"""
_START = """
import sys
from rayrlhf.config_file import parse_config
from rayrlhf.data.lengths import choose_lengths
from rayrlhf.data.run_data import RunData
from rayrlhf.models.loading import load_tokenizer, resolve_model
data = {"demonstrations": {"path": sys.argv[1], "format": "prompts"}}
if sys.argv[2] == "given":
    data |= {"max_prompt_tokens": 160, "max_response_tokens": 48}
tokenizer = load_tokenizer(resolve_model("embedded:opt-tiny"))
config, _ = choose_lengths(parse_config({"name": "a", "data": data}, "benchmark"), tokenizer, 1024)
run = RunData(config, tokenizer)
run.read()
sft = run.train.sft
tokens = sum(len(record.ids) + len(record.response_ids[0]) for record in sft)
print(len(sft), len(run.train.rl), tokens)
"""


def run(quick: bool) -> Result:
    """Measure a start with few rows, with many, and with many again."""
    rows = ROWS // 100 if quick else ROWS
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as another:
        few, many = (written(Path(directory, f"{count}.jsonl"), count) for count in (FEW, rows))
        _, libraries, _ = measured(_START, few, "given", cache=directory)
        reading, _, _ = measured(_READ, many, cache=directory)
        first, first_mib, found = measured(_START, many, "given", cache=directory)
        again, again_mib, cached = measured(_START, many, "given", cache=directory)
        chosen, chosen_mib, _ = measured(_START, many, "chosen", cache=another)
        assert found == cached, "the cache has other records"
        entries = [file for file in Path(directory, "records").rglob("*") if file.is_file()]
        facts = [
            Fact("reading alone", "rows/s of CPU", [rows / reading]),
            Fact("first start", "s of CPU", [first]),
            Fact("first start", "rows/s of CPU", [rows / first]),
            Fact("start from the cache", "s of CPU", [again]),
            Fact("first start that chooses lengths", "s of CPU", [chosen]),
            Fact("start with few rows, peak", "MiB", [libraries]),
            Fact("first start, peak", "MiB", [first_mib]),
            Fact("start from the cache, peak", "MiB", [again_mib]),
            Fact("first start that chooses lengths, peak", "MiB", [chosen_mib]),
            Fact("first start, beyond the libraries", "bytes a row", [(first_mib - libraries) * 2**20 / rows]),
            Fact("the file", "bytes a row", [many.stat().st_size / rows]),
            Fact("the cache", "bytes a row", [sum(file.stat().st_size for file in entries) / rows]),
        ]
    settings = {
        "rows": str(rows),
        "few rows": str(FEW),
        "tokenizer": "opt-tiny",
        "SFT rows, RL rows, SFT tokens": found,
    }
    return Result(settings, facts=facts)


def written(path: Path, count: int) -> Path:
    """A file of `count` different rows."""
    draw = random.Random(0)

    def text(words: tuple[int, int]) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(*words)))

    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {"prompt": f"{text(PROMPT_WORDS)} {i}?", "response": f"{text(ANSWER_WORDS)}."}
            file.write(json.dumps(row) + "\n")
    return path


def measured(code: str, path: Path, *words: str, cache: str) -> tuple[float, float, str]:
    """CPU seconds, peak memory in MiB, and the last line of a process that runs `code` on a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path), *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAYRLHF_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the process ended with {os.waitstatus_to_exitcode(status)}: {said}")
    print(said.rstrip(), flush=True)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, said.strip().splitlines()[-1]


if __name__ == "__main__":
    main("data")
