"""From files to token batches: sources, formats, chat templates, the audit and TokenBatch."""
