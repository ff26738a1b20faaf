"""The workloads of `kvstore bench`, one module each, with `run(argument, quick) -> list[Table]`."""
