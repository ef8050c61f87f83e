"""From parquet rows to micro-batches."""
