"""Predicts languages for a table of names with Ray Data. The table may be larger than memory.

    python examples/score_table.py [--rows 20000]

`map_batches` streams a folder of Parquet files through workers, which each load the pretrained
network once. The results go to another folder. On a cluster, Ray distributes the workers over the
machines. The script writes a table of made-up names, scores it with two workers on this machine,
and checks the languages against a single call. It prints the number of workers, the most frequent
languages, and the rate. It takes less than a minute, mostly to start Ray and the workers. Install
Ray with `pip install "namernn_fast[examples]"`.
"""

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray must not send usage reports

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    from ray.data import ActorPoolStrategy
except ModuleNotFoundError as error:
    advice = "run: pip install 'namernn_fast[examples]'"
    raise SystemExit(f"{error.name} is not installed; {advice}") from error

import torch

from namernn_fast import names

FILES, WORKERS = 8, 2
BEGINNINGS = ("Ack", "Bern", "Dubo", "Ferr", "Kowal", "Naka", "Ngu", "Petr", "Sak", "Silv")
ENDS = ("er", "ada", "ini", "is", "moto", "ois", "ov", "ska", "son", "yen")


class Scorer:
    """Adds the columns language and worker to a batch of rows. Each worker has one scorer."""

    def __init__(self):
        torch.set_num_threads(1)  # a worker has one core
        self.predictor = names.load(names.pretrained_checkpoint())

    def __call__(self, batch):
        batch["worker"] = [os.getpid()] * len(batch["name"])
        batch["language"] = self.predictor.languages_of(batch["name"].tolist())
        return batch


def write_table(folder, rows):
    """Writes Parquet files with the columns id and name."""
    drawn = random.Random(0)
    for number, ids in enumerate(range(start, rows, FILES) for start in range(FILES)):
        made_up = [drawn.choice(BEGINNINGS) + drawn.choice(ENDS) for _ in ids]
        table = pa.table({"id": list(ids), "name": made_up})
        pq.write_table(table, folder / f"names-{number}.parquet")


def main():
    """Writes a table, scores it, and checks the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the table")
    rows = parser.parse_args().rows

    # Reserve one more core than the workers need, for the tasks that read and write files.
    ray.init(num_cpus=WORKERS + 1, include_dashboard=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "names"), Path(folder, "languages")
        source.mkdir()
        write_table(source, rows)
        started = time.perf_counter()
        table = ray.data.read_parquet(str(source))
        blocks = table.repartition(target_num_rows_per_block=4096)  # workers take turns
        scored = blocks.map_batches(Scorer, compute=ActorPoolStrategy(size=WORKERS))
        scored.write_parquet(str(target))
        seconds = time.perf_counter() - started
        result = pq.read_table(target).sort_by("id").to_pydict()
    ray.shutdown()

    assert result["id"] == list(range(rows))
    expected = names.load(names.pretrained_checkpoint()).languages_of(result["name"])
    assert result["language"] == expected
    print(f"{rows:,} rows of {FILES} files: the languages match a single call")
    print(f"{len(set(result['worker']))} workers took part")
    told = Counter(result["language"]).most_common(4)
    print("most frequent:", ", ".join(f"{language} {count:,}" for language, count in told))
    print(f"{rows / seconds:,.0f} rows a second on this machine, including start-up of workers")


if __name__ == "__main__":
    main()
