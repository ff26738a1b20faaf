"""The laboratory: `kvstore bench`, named workloads that are each measured against a ceiling in the same run."""
