"""Peers that read and write tables: Parquet and Arrow files."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.peers import Work


def ray_data(work: Work) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    store = {} if work.memory is None else {"object_store_memory": work.memory}
    ray.init(num_cpus=work.workers, include_dashboard=False, log_to_driver=False, **store)
    ray.data.DataContext.get_current().enable_progress_bars = False
    data = ray.data.read_parquet(work.source).random_shuffle(seed=work.seed)
    data.write_parquet(work.target)
    ray.shutdown()


def hugging_face(work: Work) -> None:
    from datasets import Dataset

    Path(work.target).mkdir(parents=True)
    data = Dataset.from_file(str(Path(work.source, "rows.arrow")))
    data.shuffle(seed=work.seed, indices_cache_file_name=str(Path(work.target, "indices"))).flatten_indices(
        num_proc=work.workers if work.workers > 1 else None, cache_file_name=str(Path(work.target, "rows.arrow"))
    )


def duck_db(work: Work) -> None:
    import duckdb

    Path(work.target).mkdir(parents=True)
    base = duckdb.connect()
    base.execute(f"SET threads = {work.workers}")
    base.execute(f"SET temp_directory = '{work.target}.spill'")
    if work.memory is not None:
        base.execute(f"SET memory_limit = '{work.memory // (1 << 20)}MiB'")
    base.execute("SELECT setseed(?)", [1 / (2 + work.seed)])
    base.execute(
        f"COPY (SELECT * FROM read_parquet('{work.source}/*.parquet') ORDER BY random()) "
        f"TO '{work.target}/rows.parquet' (FORMAT parquet, COMPRESSION uncompressed)"
    )


def polars_sample(work: Work) -> None:
    os.environ["POLARS_MAX_THREADS"] = str(work.workers)
    import polars as pl

    Path(work.target).mkdir(parents=True)
    rows = pl.read_parquet(f"{work.source}/*.parquet").sample(fraction=1.0, shuffle=True, seed=work.seed)
    rows.write_parquet(Path(work.target, "rows.parquet"), compression="uncompressed")


def spark(work: Work) -> None:
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import rand

    builder = (
        SparkSession.builder.master(f"local[{work.workers}]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.local.dir", f"{work.target}.spill")
        .config("spark.log.level", "ERROR")
    )
    if work.memory is not None:
        builder = builder.config("spark.driver.memory", f"{work.memory // (1 << 20)}m")
    session = builder.getOrCreate()
    rows = session.read.parquet(work.source).orderBy(rand(work.seed))
    rows.write.option("compression", "none").parquet(work.target)
    session.stop()
