"""Everything durable: objects behind a resilient S3 store, and the job records.

`objects` holds the interface that callers program against, `actor` the Ray shell around it, `embedded` the
S3 server for a laptop, `testing` an in-memory store for tests.
"""
