"""The dashboard: what the page at `/` and `kvstore top` show, its history, and the page's own files (`static`)."""
