"""The audit trail: records, the hash chain, its one writer, and its readers."""
